// Computed: the self-distillation loss, its gradient with respect to the logits, and batch statistics, on the CPU.
// Fused: label function, target, loss and gradient, row by row while the row is in cache.
// Never materialised: a (rows, classes) target or probability; a thread keeps at most four rows of scratch.
#include "../common/rows.h"
#include "cpu_loops.h"

namespace sdfast::self_distillation {
namespace {

using OptionalTensor = std::optional<Tensor>;

// What a call fixes for all rows.
template <class T>
struct Problem {
  Rows logits, source, soft_labels;   // (N, C); source and soft_labels may be absent
  const int64_t* labels = nullptr;    // (N,), absent with soft_labels
  int64_t label_stride = 0;
  const T* alpha = nullptr;           // (N,) or, with stride 0, one value
  int64_t alpha_stride = 0;
  const T* class_weight = nullptr;    // (C,)
  const T* row_weight = nullptr;      // (N,)
  T class_weight_sum = 0;
  int64_t rows = 0, classes = 0;
  int64_t label_fn = 0, loss = 0, ignore_index = 0;
  T label_parameter = 1, label_smoothing = 0;
  T shared_alpha = 1;
  bool want_stats = false;

  bool kept(int64_t i) const { return !labels || labels[i * label_stride] != ignore_index; }
  T alpha_of(int64_t i) const { return alpha ? alpha[i * alpha_stride] : shared_alpha; }
  bool one_column_signs() const { return classes == 1 && soft_labels; }  // +-1 labels of a one-column regression
};

template <class T>
struct RowResult {
  T loss = 0, entropy = 0;
  bool correct = false, agrees = false;
};

// Scratch of one thread: four rows, made only when a row needs them.
template <class T>
struct Scratch {
  enum Slot { kLogits, kSource, kTerms, kTarget, kSoftLabels, kSlots };
  std::vector<T> slots[kSlots];
  int64_t columns;
  explicit Scratch(int64_t columns) : columns(columns) {}
  T* row(Slot slot) {
    if (slots[slot].empty()) slots[slot].resize(columns);
    return slots[slot].data();
  }
  T* row_unless(bool direct, Slot slot) { return direct ? nullptr : row(slot); }
};

template <class T>
Peak<T> peak_of(const T* x, const Columns& columns) {
  return columns.fold<Peak<T>>(
      [&](int64_t begin, int64_t end) {
        Peak<T> part = peak(x + begin, end - begin);
        part.index += begin;
        return part;
      },
      [](const Peak<T>& left, const Peak<T>& right) {
        const bool later = right.value > left.value;
        return Peak<T>{later ? right.value : left.value, later ? right.index : left.index, left.nan || right.nan};
      });
}

template <class T>
T exp_sum_of(const T* x, const Columns& columns, T shift, T scale, T* terms) {
  return columns.fold<T>(
      [&](int64_t b, int64_t e) { return exp_sum(x + b, e - b, shift, scale, terms ? terms + b : nullptr); },
      [](T left, T right) { return left + right; });
}

// One row: its loss, and factor times its gradient into `gradient` unless that is null.
template <class T>
struct Row {
  const Problem<T>& problem;
  Scratch<T>& scratch;
  Columns columns;
  int64_t i;
  const T* x;
  Peak<T> top;          // of the logits
  Mixture<T> mix;
  T factor;
  T* gradient;
  const T* w;           // class weights or null
  RowResult<T> result;

  const T* weights(int64_t begin) const { return w ? w + begin : nullptr; }
  T weight(int64_t c) const { return w ? w[c] : T(1); }

  // Cross entropy or KL against a target with at most two classes above its uniform floor: O(1) beside the softmax.
  void sparse(int64_t label, int64_t source) {
    const T total = exp_sum_of(x, columns, top.value, T(1), gradient);
    const T log_total = std::log(total);
    const auto negative_log = [&](int64_t c) { return log_total - (x[c] - top.value); };
    const T at_label = mix.label * weight(label), at_source = mix.source * weight(source);
    T mass = at_label + at_source;
    if (at_label != 0) result.loss += at_label * negative_log(label);
    if (at_source != 0) result.loss += at_source * negative_log(source);
    if (mix.uniform != 0) {
      mass += mix.uniform * (w ? problem.class_weight_sum : T(columns.count));
      result.loss += mix.uniform * columns.fold<T>(
                                       [&](int64_t b, int64_t e) {
                                         return negative_log_sum(x + b, e - b, top.value, log_total, weights(b));
                                       },
                                       [](T left, T right) { return left + right; });
    }
    if (problem.loss == kKl) result.loss += sparse_log_target(label, source, w != nullptr);
    if (problem.want_stats) {
      result.entropy = -sparse_log_target(label, source, false);
      result.agrees = !top.nan && keeps_label(mix, label, source);
    }
    if (result.loss != result.loss || top.nan) result.loss = std::numeric_limits<T>::quiet_NaN();
    if (!gradient) return;
    columns.apply([&](int64_t b, int64_t e) {
      if (mix.uniform != 0)
        scale_minus(gradient + b, e - b, factor * (mass / total), factor * mix.uniform, weights(b));
      else
        scale(gradient + b, e - b, factor * (mass / total));
    });
    gradient[label] -= factor * at_label;
    gradient[source] -= factor * at_source;
  }

  // sum_c w_c t_c log t_c of a sparse target
  T sparse_log_target(int64_t label, int64_t source, bool weighted) const {
    const auto term = [](T t) { return t == 0 ? T(0) : t * std::log(t); };
    const auto of = [&](int64_t c) { return weighted ? w[c] : T(1); };
    T floor_weight = (weighted ? problem.class_weight_sum : T(columns.count)) - of(label);
    T sum = 0;
    if (label == source) {
      sum = of(label) * term(mix.uniform + mix.label + mix.source);
    } else {
      sum = of(label) * term(mix.uniform + mix.label) + of(source) * term(mix.uniform + mix.source);
      floor_weight -= of(source);
    }
    return mix.uniform == 0 ? sum : sum + floor_weight * term(mix.uniform);
  }

  // Any target: written out for this one row.
  void dense(const T* soft_labels, int64_t label, const T* source, bool own_source) {
    const bool softmax_of_logits = problem.loss != kMse;
    T* terms = gradient && softmax_of_logits ? gradient : nullptr;
    T total = 1;
    if (softmax_of_logits) {
      if (!terms && (problem.loss == kBrier || own_source)) terms = scratch.row(Scratch<T>::kTerms);
      total = exp_sum_of(x, columns, top.value, T(1), terms);
    }
    const T* target = mixed_target(soft_labels, label, source, own_source, softmax_of_logits ? terms : nullptr, total);
    if (problem.loss == kMse) {
      squared(target);
    } else if (problem.loss == kBrier) {
      brier(target, terms, T(1) / total);
    } else {
      cross_entropy(target, total);
    }
    if (problem.want_stats) target_stats(target, soft_labels, label);
  }

  const T* mixed_target(const T* soft_labels, int64_t label, const T* source, bool own_source, const T* own_terms,
                        T own_total) {
    T* target = scratch.row(Scratch<T>::kTarget);
    Mixture<T> scaled = mix;
    const T* h = mix.source != 0 ? source : nullptr;
    const T slope = problem.label_fn == kClip ? clip_slope(problem.label_parameter) : T(0);
    int64_t hard = -1;
    if (h && problem.label_fn == kHardmax) {
      const Peak<T> peak = own_source ? top : peak_of(h, columns);
      hard = peak.index;
      h = nullptr;
      if (peak.nan) scaled.uniform = std::numeric_limits<T>::quiet_NaN();
    } else if (h && problem.label_fn == kSoftmax) {
      if (own_source && own_terms && problem.label_parameter == 1) {
        scaled.source /= own_total;
        h = own_terms;
      } else {
        const T shift = own_source ? top.value : peak_of(h, columns).value;
        scaled.source /= exp_sum_of(h, columns, shift, T(1) / problem.label_parameter, target);
        h = target;
      }
    }
    columns.apply([&](int64_t b, int64_t e) {
      mix_target(target + b, e - b, scaled, soft_labels ? soft_labels + b : nullptr, h ? h + b : nullptr, slope);
    });
    if (!soft_labels) target[label] += mix.label;
    if (hard >= 0) target[hard] += mix.source;
    return target;
  }

  void cross_entropy(const T* target, T total) {
    const T log_total = std::log(total);
    const Sums<T> sums = columns.fold<Sums<T>>(
        [&](int64_t b, int64_t e) {
          return cross_entropy_sums(x + b, target + b, e - b, top.value, log_total, weights(b), problem.loss == kKl);
        },
        [](const Sums<T>& left, const Sums<T>& right) {
          return Sums<T>{left.mass + right.mass, left.loss + right.loss};
        });
    result.loss = top.nan ? std::numeric_limits<T>::quiet_NaN() : sums.loss;
    if (!gradient) return;
    columns.apply([&](int64_t b, int64_t e) {
      write_cross_entropy_gradient(gradient + b, target + b, e - b, T(1) / total, sums.mass, factor, weights(b));
    });
  }

  void squared(const T* target) {
    const T classes = static_cast<T>(columns.count);
    result.loss = columns.fold<T>(
                      [&](int64_t b, int64_t e) {
                        return squared_error(x + b, target + b, e - b, classes, factor, gradient ? gradient + b : nullptr);
                      },
                      [](T left, T right) { return left + right; }) /
                  classes;
  }

  void brier(const T* target, const T* terms, T normalizer) {
    const BrierSums<T> sums = columns.fold<BrierSums<T>>(
        [&](int64_t b, int64_t e) { return brier_sums(terms + b, target + b, e - b, normalizer); },
        [](const BrierSums<T>& left, const BrierSums<T>& right) {
          return BrierSums<T>{left.loss + right.loss, left.inner + right.inner};
        });
    result.loss = sums.loss;
    if (!gradient) return;
    columns.apply([&](int64_t b, int64_t e) {
      write_brier_gradient(gradient + b, target + b, e - b, normalizer, sums.inner, factor);
    });
  }

  void target_stats(const T* target, const T* soft_labels, int64_t label) {
    const auto add = [](T left, T right) { return left + right; };
    result.entropy = columns.fold<T>([&](int64_t b, int64_t e) { return entropy(target + b, e - b); }, add);
    if (problem.one_column_signs()) {
      result.agrees = (target[0] > 0) == (soft_labels[0] > 0);
      return;
    }
    const Peak<T> best = peak_of(target, columns);
    result.agrees = !best.nan && best.index == (soft_labels ? peak_of(soft_labels, columns).index : label);
  }
};

template <class T>
bool is_correct(const Problem<T>& problem, const Peak<T>& top, const T* x, const T* soft_labels, int64_t label,
                const Columns& columns) {
  if (top.nan) return false;
  if (problem.one_column_signs()) return (x[0] > 0) == (soft_labels[0] > 0);
  return top.index == (soft_labels ? peak_of(soft_labels, columns).index : label);
}

// `known` is the row's peak where an earlier pass found it, else null.
template <class T>
RowResult<T> run_row(const Problem<T>& problem, Scratch<T>& scratch, bool split_columns, int64_t i, const Peak<T>* known,
                     T factor, const OutputRows& out) {
  using S = Scratch<T>;
  const Columns columns = {problem.classes, split_columns};
  T* const direct = out ? out.template direct<T>(i) : nullptr;
  T* const gradient = out && !direct ? scratch.row(S::kTerms) : direct;
  if (!problem.kept(i)) {
    if (gradient) std::fill_n(gradient, problem.classes, T(0));
    if (gradient && !direct) out.write(i, gradient);
    return {};
  }
  const T* x = problem.logits.row(i, scratch.row_unless(problem.logits.template direct<T>(), S::kLogits));
  const T alpha = problem.alpha_of(i);
  Row<T> row = {problem,  scratch, columns, i, x, known ? *known : peak_of(x, columns),
                mixture(alpha, problem.label_smoothing, problem.classes),
                factor,   gradient, problem.class_weight, {}};
  const bool own_source = !problem.source;
  const T* source = x;
  if (!own_source && row.mix.source != 0)
    source = problem.source.row(i, scratch.row_unless(problem.source.template direct<T>(), S::kSource));
  const int64_t label = problem.labels ? problem.labels[i * problem.label_stride] : -1;
  const T* soft_labels = nullptr;
  if (problem.soft_labels)
    soft_labels = problem.soft_labels.row(
        i, scratch.row_unless(problem.soft_labels.template direct<T>(), S::kSoftLabels));
  const bool one_hot = problem.label_fn == kHardmax || row.mix.source == 0;
  if (problem.labels && one_hot && (problem.loss == kCrossEntropy || problem.loss == kKl)) {
    const Peak<T> chosen = row.mix.source == 0 ? Peak<T>{0, label, false} : own_source ? row.top : peak_of(source, columns);
    if (chosen.nan) row.mix.source = std::numeric_limits<T>::quiet_NaN();
    row.sparse(label, chosen.index);
  } else {
    row.dense(soft_labels, label, source, own_source);
  }
  if (problem.want_stats) row.result.correct = is_correct(problem, row.top, x, soft_labels, label, columns);
  if (gradient && !direct) out.write(i, gradient);
  return row.result;
}

// Rows go to threads; rows fewer than the threads and long are split by columns instead. body(begin, end, split_columns)
template <class Body>
void over_rows(int64_t rows, int64_t classes, const Body& body) {
  constexpr int64_t kGrain = 32768;  // entries worth waking a thread for
  if (rows < static_cast<int64_t>(torch::stable::get_num_threads()) && classes >= 2 * Columns::kChunk) {
    body(0, rows, true);
  } else if (rows * classes <= kGrain) {
    body(0, rows, false);
  } else {
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / classes),
                                [&](int64_t begin, int64_t end) { body(begin, end, false); });
  }
}

// The batch's accuracy must be known before the first gradient: finds every row's peak, kept for the second pass.
template <class T>
T adaptive_batch_alpha(const Problem<T>& problem, T ratio, int64_t kept, std::vector<Peak<T>>& peaks) {
  peaks.resize(problem.rows);
  std::vector<uint8_t> correct(problem.rows);
  over_rows(problem.rows, problem.classes, [&](int64_t begin, int64_t end, bool split_columns) {
    using S = Scratch<T>;
    Scratch<T> scratch(problem.classes);
    const Columns columns = {problem.classes, split_columns};
    for (int64_t i = begin; i < end; ++i) {
      if (!problem.kept(i)) continue;
      const T* x = problem.logits.row(i, scratch.row_unless(problem.logits.template direct<T>(), S::kLogits));
      const T* soft_labels = nullptr;
      if (problem.soft_labels)
        soft_labels = problem.soft_labels.row(
            i, scratch.row_unless(problem.soft_labels.template direct<T>(), S::kSoftLabels));
      peaks[i] = peak_of(x, columns);
      correct[i] = is_correct(problem, peaks[i], x, soft_labels,
                              problem.labels ? problem.labels[i * problem.label_stride] : -1, columns);
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
                              " or ignore_index=", problem.ignore_index);
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

Tensor new_tensor(const Tensor& like, std::vector<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, size, type);
}

template <class T>
constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

Tensor new_gradient(const Tensor& logits) {
  Tensor gradient = new_tensor(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  use_huge_pages(gradient.mutable_data_ptr(), gradient.numel() * gradient.element_size());
  return gradient;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(Problem<T> problem, const Tensor& logits, double alpha_value,
                                              bool adaptive, int64_t reduction, bool want_gradient, bool want_stats) {
  const BatchCounts<T> counts = check_and_count(problem);
  std::vector<Peak<T>> peaks;
  if (adaptive)
    problem.shared_alpha = adaptive_batch_alpha(problem, static_cast<T>(alpha_value), counts.kept, peaks);
  problem.want_stats = want_stats;

  Tensor loss = reduction == kNone ? new_tensor(logits, {problem.rows}, kType<T>) : new_tensor(logits, {}, kType<T>);
  Tensor gradient = want_gradient ? new_gradient(logits) : new_tensor(logits, {0}, logits.scalar_type());
  const OutputRows out = want_gradient ? OutputRows(gradient) : OutputRows();
  std::vector<RowResult<T>> results(problem.rows);
  // An all-ignored batch has loss 0, not 0/0.
  const T divisor = reduction != kMean || counts.kept == 0 ? T(1) : counts.denominator;
  over_rows(problem.rows, problem.classes, [&](int64_t begin, int64_t end, bool split_columns) {
    Scratch<T> scratch(problem.classes);
    for (int64_t i = begin; i < end; ++i) {
      const T weight = problem.row_weight ? problem.row_weight[i] : T(1);
      results[i] = run_row(problem, scratch, split_columns, i, adaptive ? &peaks[i] : nullptr, weight / divisor, out);
      if (problem.kept(i)) results[i].loss *= weight;
    }
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
    Scratch<T> scratch(problem.classes);
    for (int64_t i = begin; i < end; ++i) {
      const T weight = problem.row_weight ? problem.row_weight[i] : T(1);
      run_row<T>(problem, scratch, split_columns, i, nullptr, given[i * given_stride] * weight / divisor, out);
    }
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
