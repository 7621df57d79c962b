// What a batch on the CPU fixes before its rows and sums after them, shared by the losses that run such rows.
#pragma once

#include "cpu_row.h"
#include "description.h"

namespace sdfast::self_distillation {

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
                        const OptionalTensor& row_weight, const Description& d) {
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
  problem.shared_alpha = static_cast<T>(d.alpha_value);
  if (class_weight) {
    problem.class_weight = class_weight->const_data_ptr<T>();
    double sum = 0;
    for (int64_t c = 0; c < problem.classes; ++c) sum += problem.class_weight[c];
    problem.class_weight_sum = static_cast<T>(sum);
  }
  if (row_weight) problem.row_weight = row_weight->const_data_ptr<T>();
  problem.label_fn = d.label_fn;
  problem.loss = d.loss;
  problem.ignore_index = d.ignore_index;
  problem.label_parameter = static_cast<T>(d.label_parameter);
  problem.label_smoothing = static_cast<T>(d.label_smoothing);
  problem.mixing = d.mixing;
  problem.target_power = static_cast<T>(d.target_power);
  problem.row_power = static_cast<T>(d.row_power);
  problem.want_stats = d.want_stats;
  return problem;
}

// The rows' losses, or their sum over the divisor.
template <class T>
void write_losses(const std::vector<RowResult<T>>& results, int64_t reduction, T divisor, T* losses) {
  if (reduction == kNone) {
    for (const RowResult<T>& result : results) *losses++ = result.loss;
    return;
  }
  double sum = 0;
  for (const RowResult<T>& result : results) sum += result.loss;
  *losses = static_cast<T>(sum / divisor);
}

// What the backward and the statistics need, from the rows' own results.
template <class T>
void write_state(const Problem<T>& problem, const std::vector<RowResult<T>>& results, int64_t kept, T divisor,
                 T* values) {
  double alpha = 0, correct = 0, entropy = 0, agrees = 0;
  for (int64_t i = 0; i < problem.rows; ++i) {
    if (!problem.kept(i)) continue;
    alpha += problem.alpha_of(i);
    correct += results[i].correct;
    entropy += results[i].entropy;
    agrees += results[i].agrees;
  }
  const double count = kept > 0 ? kept : 1;
  values[kAlpha] = problem.alpha_stride ? static_cast<T>(alpha / count) : problem.alpha_of(0);
  values[kDenominator] = divisor;
  values[kAccuracy] = static_cast<T>(correct / count);
  values[kTargetEntropy] = static_cast<T>(entropy / count);
  values[kAgreement] = static_cast<T>(agrees / count);
}

}  // namespace sdfast::self_distillation
