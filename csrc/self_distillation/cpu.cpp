// Computed: the self-distillation loss, its gradient with respect to the logits, and batch statistics, on the CPU.
// Fused: label function, target, loss and gradient, row by row while the row is in cache.
// Never materialised: a (rows, classes) target or probability; a thread keeps at most four rows of scratch.
#include "cpu_row.h"

namespace sdfast::self_distillation {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The batch's accuracy must be known before the first gradient: finds every row's peak, kept for the second pass.
template <class T>
T adaptive_batch_alpha(const Problem<T>& problem, T ratio, int64_t kept, std::vector<Peak<T>>& peaks) {
  peaks.resize(problem.rows);
  std::vector<uint8_t> correct(problem.rows);
  over_rows(problem.rows, problem.classes, [&](int64_t begin, int64_t end, bool split_columns) {
    Scratch<T> scratch(problem.classes);
    const Columns columns = {problem.classes, split_columns};
    for (int64_t i = begin; i < end; ++i) {
      if (!problem.kept(i)) continue;
      const T* x = scratch.fetch(problem.logits, i, Scratch<T>::kLogits);
      const T* soft_labels =
          problem.soft_labels ? scratch.fetch(problem.soft_labels, i, Scratch<T>::kSoftLabels) : nullptr;
      peaks[i] = peak_of(x, columns);
      correct[i] = is_correct(problem, peaks[i], x, soft_labels, problem.label(i), columns);
    }
  });
  int64_t count = 0;
  for (const uint8_t c : correct) count += c;
  return adaptive_alpha(ratio, static_cast<T>(count), static_cast<T>(kept));
}

template <class T>
struct BatchCounts {
  int64_t kept;
  T denominator;
};

// Also the check of everything that is read per row, so that no error is found inside a parallel region.
template <class T>
BatchCounts<T> check_and_count(const Problem<T>& problem) {
  const int64_t alphas = problem.alpha ? (problem.alpha_stride ? problem.rows : 1) : 0;
  for (int64_t i = 0; i < alphas; ++i) {
    const T alpha = problem.alpha[i * problem.alpha_stride];
    if (alpha != alpha) fail<std::invalid_argument>("alpha: row ", i, " is NaN, wanted a number");
    if (problem.loss != kMse && !(alpha >= 0 && alpha <= 1))
      fail<std::invalid_argument>("alpha: row ", i, " is ", alpha, ", wanted within [0, 1] for a probability target");
  }
  if (!problem.labels) return {problem.rows, static_cast<T>(problem.rows)};
  int64_t kept = 0;
  double weight = 0;
  for (int64_t i = 0; i < problem.rows; ++i) {
    const int64_t label = problem.labels[i * problem.label_stride];
    if (label == problem.ignore_index) continue;
    if (label < 0 || label >= problem.classes)
      fail<std::out_of_range>("labels: row ", i, " is ", label, ", wanted 0 <= label < ", problem.classes,
                              " or ignore_index=", problem.ignore_index,
                              problem.classes == 1 ? " (targets of a one-column regression are floats)" : "");
    ++kept;
    if (problem.class_weight) weight += problem.class_weight[label];
  }
  return {kept, problem.class_weight ? static_cast<T>(weight) : static_cast<T>(kept)};
}

template <class T>
Problem<T> make_problem(const Tensor& logits, const Tensor& labels, const OptionalTensor& alpha,
                        const OptionalTensor& source, const OptionalTensor& class_weight,
                        const OptionalTensor& row_weight, double alpha_value, int64_t label_fn, double label_parameter,
                        int64_t loss, int64_t ignore_index, double label_smoothing) {
  Problem<T> problem;
  problem.logits = Rows(logits);
  problem.rows = logits.size(0);
  problem.classes = logits.size(1);
  if (source) problem.source = Rows(*source);
  if (is_floating(labels.scalar_type())) {
    problem.soft_labels = Rows(labels);
  } else {
    problem.labels = labels.const_data_ptr<int64_t>();
    problem.label_stride = labels.stride(0);
  }
  if (alpha) {
    problem.alpha = alpha->const_data_ptr<T>();
    problem.alpha_stride = alpha->dim();  // the caller passes () or a contiguous (N,)
  }
  problem.shared_alpha = static_cast<T>(alpha_value);
  if (class_weight) {
    problem.class_weight = class_weight->const_data_ptr<T>();
    double sum = 0;
    for (int64_t c = 0; c < problem.classes; ++c) sum += problem.class_weight[c];
    problem.class_weight_sum = static_cast<T>(sum);
  }
  if (row_weight) problem.row_weight = row_weight->const_data_ptr<T>();
  problem.label_fn = label_fn;
  problem.loss = loss;
  problem.ignore_index = ignore_index;
  problem.label_parameter = static_cast<T>(label_parameter);
  problem.label_smoothing = static_cast<T>(label_smoothing);
  return problem;
}

template <class T>
constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(Problem<T> problem, const Tensor& logits, double alpha_value,
                                              bool adaptive, int64_t reduction, bool want_gradient, bool want_stats) {
  const BatchCounts<T> counts = check_and_count(problem);
  std::vector<Peak<T>> peaks;
  if (adaptive) problem.shared_alpha = adaptive_batch_alpha(problem, static_cast<T>(alpha_value), counts.kept, peaks);
  problem.want_stats = want_stats;

  Tensor loss = reduction == kNone ? new_tensor(logits, {problem.rows}, kType<T>) : new_tensor(logits, {}, kType<T>);
  Tensor gradient = want_gradient ? new_gradient(logits) : new_tensor(logits, {0}, logits.scalar_type());
  const OutputRows out = want_gradient ? OutputRows(gradient) : OutputRows();
  std::vector<RowResult<T>> results(problem.rows);
  // An all-ignored batch has loss 0, not 0/0.
  const T divisor = reduction != kMean || counts.kept == 0 ? T(1) : counts.denominator, share = T(1) / divisor;
  over_rows(problem.rows, problem.classes, [&](int64_t begin, int64_t end, bool split_columns) {
    run_rows(
        problem, begin, end, split_columns, adaptive ? peaks.data() : nullptr,
        [&](int64_t i) { return problem.weight_of(i) * share; }, out, results.data());
    for (int64_t i = begin; i < end; ++i)
      if (problem.kept(i)) results[i].loss *= problem.weight_of(i);
  });

  T* losses = loss.mutable_data_ptr<T>();
  if (reduction == kNone) {
    for (int64_t i = 0; i < problem.rows; ++i) losses[i] = results[i].loss;
  } else {
    double sum = 0;
    for (const RowResult<T>& result : results) sum += result.loss;
    losses[0] = static_cast<T>(sum / divisor);
  }
  const bool want_state = want_stats || !want_gradient;
  Tensor state = new_tensor(logits, {want_state ? int64_t{kStateSize} : 0}, kType<T>);
  if (want_state) {
    double alpha = 0, correct = 0, entropy = 0, agrees = 0;
    for (int64_t i = 0; i < problem.rows; ++i) {
      if (!problem.kept(i)) continue;
      alpha += problem.alpha_of(i);
      correct += results[i].correct;
      entropy += results[i].entropy;
      agrees += results[i].agrees;
    }
    const double kept = counts.kept > 0 ? counts.kept : 1;
    T* values = state.mutable_data_ptr<T>();
    values[kAlpha] = problem.alpha_stride ? static_cast<T>(alpha / kept) : problem.alpha_of(0);
    values[kDenominator] = divisor;
    values[kAccuracy] = static_cast<T>(correct / kept);
    values[kTargetEntropy] = static_cast<T>(entropy / kept);
    values[kAgreement] = static_cast<T>(agrees / kept);
  }
  return {loss, gradient, state};
}

template <class T>
Tensor backward_as(const Problem<T>& problem, const Tensor& upstream, const Tensor& state, const Tensor& logits) {
  Tensor gradient = new_gradient(logits);
  const OutputRows out(gradient);
  const T* given = upstream.const_data_ptr<T>();
  const int64_t given_stride = upstream.dim() == 1 ? upstream.stride(0) : 0;
  const T divisor = state.const_data_ptr<T>()[kDenominator];
  over_rows(problem.rows, problem.classes, [&](int64_t begin, int64_t end, bool split_columns) {
    run_rows<T>(
        problem, begin, end, split_columns, nullptr,
        [&](int64_t i) { return given[i * given_stride] * problem.weight_of(i) / divisor; }, out, nullptr);
  });
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logits, Tensor labels, OptionalTensor alpha, OptionalTensor source,
                                           OptionalTensor class_weight, OptionalTensor row_weight, double alpha_value,
                                           bool adaptive, int64_t label_fn, double label_parameter, int64_t loss,
                                           int64_t reduction, int64_t ignore_index, double label_smoothing,
                                           bool want_gradient, bool want_stats) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return forward_as<T>(make_problem<T>(logits, labels, alpha, source, class_weight, row_weight, alpha_value, label_fn,
                                         label_parameter, loss, ignore_index, label_smoothing),
                         logits, alpha_value, adaptive, reduction, want_gradient, want_stats);
  };
  return logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.f);
}

Tensor backward(Tensor upstream, Tensor state, Tensor logits, Tensor labels, OptionalTensor alpha,
                OptionalTensor source, OptionalTensor class_weight, OptionalTensor row_weight, double alpha_value,
                int64_t label_fn, double label_parameter, int64_t loss, int64_t ignore_index, double label_smoothing) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward_as<T>(make_problem<T>(logits, labels, alpha, source, class_weight, row_weight, alpha_value,
                                          label_fn, label_parameter, loss, ignore_index, label_smoothing),
                          upstream, state, logits);
  };
  return logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.f);
}

}  // namespace
}  // namespace sdfast::self_distillation

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("_self_distillation", TORCH_BOX(&sdfast::self_distillation::forward));
  m.impl("_self_distillation_backward", TORCH_BOX(&sdfast::self_distillation::backward));
}
