// Computed: a loss on the rows of a prediction bank, its gradient with respect to the logits, and the rows' update.
// Fused: gathering the rows, target or regulariser, loss, gradient and writing back, row by row while it is in cache.
// Never materialised: a (rows, classes) target, probability or gathered row; a thread keeps nine rows of scratch.
#include "cpu_problem.h"
#include "cpu_small_row.h"

namespace sdfast::prediction_bank {
namespace {

// Scratch of one thread beside the loss's own.
template <class T>
struct BankScratch {
  Scratch<T> loss;
  std::vector<T> old, fresh, logs, regulariser;
  std::vector<int32_t> order;

  explicit BankScratch(const BankProblem<T>& problem)
      : loss(problem.loss.classes), old(2 * problem.loss.classes + 1), fresh(problem.loss.classes) {}

  T* row(std::vector<T>& slot) {
    if (slot.empty()) slot.resize(loss.columns);
    return slot.data();
  }
};

template <class T, class Fold>
T fold_sum(const Columns& columns, const Fold& fold) {
  return columns.fold<T>(fold, [](T left, T right) { return left + right; });
}

// One row against its bank row: the softmax first, from which the update and the regulariser are made, then the loss,
// which overwrites it.
template <class T>
class BankRow {
 public:
  BankRow(const BankProblem<T>& problem, BankScratch<T>& scratch, bool split_columns, int64_t i, const Peak<T>* known,
          T factor, T* gradient)
      : problem_(problem),
        scratch_(scratch),
        row_(problem.loss, scratch.loss, split_columns, i, known, factor, gradient),
        index_(problem.indices[i]),
        terms_(gradient && problem.loss.loss != kMse ? gradient : scratch.loss.row(Scratch<T>::kTerms)) {}

  RowResult<T> run() {
    const Settings<T>& bank = problem_.bank;
    const Columns& columns = row_.columns;
    const Peak<T>& top = row_.find_top();
    const T total = exp_sum_of(row_.x, columns, top.value, T(1), terms_);
    scale_ = T(1) / total;
    const bool finite = is_finite(top), writes = finite && problem_.writes(row_.i);
    const int64_t seen = problem_.storage.seen[index_];

    const T* source = problem_.storage.read(index_, scratch_.old.data());
    if (finite && (writes || bank.write_first)) blend_into_fresh(source, bank.weight(seen));
    if (finite && bank.write_first) source = scratch_.fresh.data();

    const bool usable = bank.usable(seen, finite), regularised = bank.strength != 0 && usable;
    if (regularised) regularise_by(source);
    Prepared<T> prepared = {total, source, T(0)};
    if (row_.mix.source != 0 && problem_.loss.label_fn == kSoftmax) {
      if (problem_.loss.label_parameter == 1 && problem_.loss.mixing == kArithmetic) {
        prepared.source_sum = fold_sum<T>(columns, [&](int64_t b, int64_t e) { return sum(source + b, e - b); });
      } else {
        T* logs = scratch_.row(scratch_.logs);
        columns.apply([&](int64_t b, int64_t e) { logarithms(source + b, e - b, logs + b); });
        prepared.source = logs;
      }
    }
    // A small row that only learns its label is left to the plain loss's own way, which has other bits.
    const bool plain = row_.mix.source == 0 && !regularised;
    if (!plain || problem_.loss.classes > kSmallRow<T>) row_.prepared = &prepared;
    RowResult<T> result = row_.run();
    if (regularised) {
      result.loss += bank.strength * std::log(T(1) - agreement_.inner);
      T* const out = row_.gradient;
      if (out) columns.apply([&](int64_t b, int64_t e) { add(out + b, scratch_.regulariser.data() + b, e - b); });
    }
    if (writes) problem_.storage.write(index_, scratch_.fresh.data(), scratch_.order);
    return result;
  }

 private:
  const BankProblem<T>& problem_;
  BankScratch<T>& scratch_;
  Row<T> row_;
  const int64_t index_;
  T* const terms_;
  T scale_ = 0;
  Agreement<T> agreement_ = {0, 0};

  void blend_into_fresh(const T* old, T weight) {
    const T low = problem_.bank.clamp;
    T* fresh = scratch_.fresh.data();
    T normalizer = 1;
    if (low > 0)
      normalizer /=
          fold_sum<T>(row_.columns, [&](int64_t b, int64_t e) { return cut_sum(terms_ + b, e - b, scale_, low); });
    row_.columns.apply(
        [&](int64_t b, int64_t e) { blend(old + b, terms_ + b, e - b, scale_, low, normalizer, weight, fresh + b); });
  }

  void regularise_by(const T* t) {
    const T low = problem_.bank.clamp;
    agreement_ = row_.columns.template fold<Agreement<T>>(
        [&](int64_t b, int64_t e) { return agreement(t + b, terms_ + b, e - b, scale_, low); },
        [](const Agreement<T>& left, const Agreement<T>& right) {
          return Agreement<T>{left.inner + right.inner, left.pull + right.pull};
        });
    if (!row_.gradient) return;
    const T slope = row_.factor * problem_.bank.strength / (T(1) - agreement_.inner);
    T* out = scratch_.row(scratch_.regulariser);
    row_.columns.apply([&](int64_t b, int64_t e) {
      regularise(t + b, terms_ + b, e - b, scale_, low, slope, agreement_.pull, out + b);
    });
  }
};

template <class T>
RowResult<T> run_bank_row(const BankProblem<T>& problem, BankScratch<T>& scratch, bool split_columns, int64_t i,
                          const Peak<T>* known, const OutputRows& out) {
  T* const direct = out ? out.template direct<T>(i) : nullptr;
  T* const gradient = out && !direct ? scratch.loss.row(Scratch<T>::kGradient) : direct;
  RowResult<T> result;
  if (problem.loss.kept(i)) {
    result = BankRow<T>(problem, scratch, split_columns, i, known, problem.factor_of(i), gradient).run();
    result.loss *= problem.loss.weight_of(i);
  } else if (gradient) {
    std::fill_n(gradient, problem.loss.classes, T(0));
  }
  if (gradient && !direct) out.write(i, gradient);
  return result;
}

// All that is read a row is checked before any row runs.
template <class T>
void check_indices(const BankProblem<T>& problem) {
  for (int64_t i = 0; i < problem.loss.rows; ++i) {
    const int64_t index = problem.indices[i];
    if (problem.loss.kept(i) && (index < 0 || index >= problem.storage.samples))
      fail<std::out_of_range>("indices: row ", i, " is ", index, ", wanted 0 <= index < ", problem.storage.samples);
  }
}

// A row's alpha is 1 where its bank row does not teach yet. Whether a prediction is finite is not known here, and makes
// no difference: a row of other logits has no finite loss.
template <class T>
std::vector<T> effective_alphas(const BankProblem<T>& problem) {
  std::vector<T> alphas(problem.loss.rows, T(1));
  for (int64_t i = 0; i < problem.loss.rows; ++i)
    if (problem.loss.kept(i) && problem.bank.usable(problem.storage.seen[problem.indices[i]], true))
      alphas[i] = problem.loss.alpha_of(i);
  return alphas;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(BankProblem<T> problem, const Tensor& logits, const Description& d,
                                              bool late) {
  Problem<T>& loss = problem.loss;
  const BatchCounts<T> counts = check_and_count(loss);
  check_indices(problem);
  problem.roles = roles_of(problem.indices, loss.rows, [&](int64_t i) { return loss.kept(i); }, problem.bank.unique);
  std::vector<Peak<T>> peaks;
  if (d.adaptive) loss.shared_alpha = adaptive_batch_alpha(loss, static_cast<T>(d.alpha_value), counts.kept, peaks);
  const std::vector<T> alphas = effective_alphas(problem);
  loss.alpha = alphas.data();
  loss.alpha_stride = 1;

  Tensor value = d.reduction == kNone ? new_tensor(logits, {loss.rows}, kType<T>) : new_tensor(logits, {}, kType<T>);
  const ScalarType gradient_type = late ? kType<T> : logits.scalar_type();
  Tensor gradient = d.want_gradient ? new_gradient(logits, gradient_type) : new_tensor(logits, {0}, gradient_type);
  const OutputRows out = d.want_gradient ? OutputRows(gradient) : OutputRows();
  std::vector<RowResult<T>> results(loss.rows);
  // An all-ignored batch has loss 0, not 0/0.
  const T divisor = d.reduction != kMean || counts.kept == 0 ? T(1) : counts.denominator;
  problem.late = late;
  problem.share = T(1) / divisor;
  const bool small = SmallBankRows<T>::serves(problem);
  const auto run = [&](int64_t begin, int64_t end, bool split_columns, bool last) {
    const auto taken = [&](int64_t i) { return (problem.roles[i] == kWritesLast) == last; };
    if (small) return run_small_rows(problem, begin, end, out, taken, results.data());
    BankScratch<T> scratch(problem);
    for (int64_t i = begin; i < end; ++i) {
      if (taken(i))
        results[i] = run_bank_row(problem, scratch, split_columns, i, d.adaptive ? &peaks[i] : nullptr, out);
    }
  };
  over_rows(loss.rows, loss.classes,
            [&](int64_t begin, int64_t end, bool split_columns) { run(begin, end, split_columns, false); });
  // A row that others share is written once they all have read it.
  const std::vector<uint8_t>& roles = problem.roles;
  if (std::find(roles.begin(), roles.end(), kWritesLast) != roles.end()) run(0, loss.rows, false, true);

  write_losses(results, d.reduction, divisor, value.mutable_data_ptr<T>());
  Tensor state = new_tensor(logits, {int64_t{kStateSize}}, kType<T>);
  write_state(loss, results, counts.kept, divisor, state.mutable_data_ptr<T>());
  return {value, gradient, state};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logits, Tensor labels, OptionalTensor alpha, Tensor indices,
                                           Tensor predictions, Tensor classes, Tensor seen, Tensor,
                                           OptionalTensor class_weight, OptionalTensor row_weight, double alpha_value,
                                           int64_t codes, int64_t ignore_index, OptionalNumbers numbers,
                                           double momentum, OptionalNumbers regularisation) {
  const Description d = unpacked(alpha_value, codes, ignore_index, numbers);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return forward_as<T>({make_problem<T>(logits, labels, alpha, {}, class_weight, row_weight, d),
                          unpacked_settings<T>(codes, momentum, regularisation),
                          Storage(predictions, classes, seen, logits.size(1)),
                          indices.const_data_ptr<int64_t>(),
                          {}},
                         logits, d, comes_late(codes));
  };
  return logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.f);
}

}  // namespace
}  // namespace sdfast::prediction_bank

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) { m.impl("_prediction_bank", TORCH_BOX(&sdfast::prediction_bank::forward)); }
