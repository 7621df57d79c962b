// Computed: the distillation loss and its gradient with respect to the student's logits, on the CPU.
// Fused: both softmaxes, the divergence, the label's cross entropy, and the gradient, row by row while the row is in
// cache. Never materialised: a (rows, classes) probability, teacher or difference; a thread keeps at most a few rows of
// scratch.
#include "cpu_row.h"

namespace sdfast::distillation {
namespace {

using self_distillation::kMean;
using self_distillation::kNone;

template <class T>
void check_top_k(const Problem<T>& problem) {
  const int64_t k = problem.teacher.columns, classes = problem.hard.classes;
  std::vector<int64_t> listed_by(classes, -1);
  for (int64_t i = 0; i < problem.hard.rows; ++i) {
    if (!problem.hard.kept(i)) continue;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t index = problem.indices[i * k + j];
      if (index < 0 || index >= classes)
        fail<std::out_of_range>("indices: row ", i, " lists ", index, ", wanted 0 <= index < ", classes);
      if (listed_by[index] == i) fail<std::invalid_argument>("indices: row ", i, " lists ", index, " twice");
      listed_by[index] = i;
    }
    if (!(problem.tail[i] >= 0 && problem.tail[i] <= 1))
      fail<std::invalid_argument>("tail_mass: row ", i, " is ", problem.tail[i], ", wanted within [0, 1]");
  }
}

// Everything that is read per row, checked before any of it is used: no error is found inside a parallel region.
// Returns the number of rows kept.
template <class T>
int64_t check_and_count(const Problem<T>& problem) {
  const auto& hard = problem.hard;
  const int64_t alphas = problem.alpha ? (problem.alpha_stride ? hard.rows : 1) : 0;
  for (int64_t i = 0; i < alphas; ++i)
    if (!(problem.alpha[i] >= 0 && problem.alpha[i] <= 1))
      fail<std::invalid_argument>("alpha: row ", i, " is ", problem.alpha[i], ", wanted within [0, 1]");
  if (problem.indices) check_top_k(problem);
  if (!hard.labels) return hard.rows;
  int64_t kept = 0;
  for (int64_t i = 0; i < hard.rows; ++i) {
    const int64_t label = hard.label(i);
    if (label == hard.ignore_index) continue;
    if (label < 0 || label >= hard.classes)
      fail<std::out_of_range>("labels: row ", i, " is ", label, ", wanted 0 <= label < ", hard.classes,
                              " or ignore_index=", hard.ignore_index);
    ++kept;
  }
  return kept;
}

struct Options {
  double alpha_value, temperature, teacher_temperature;
  int64_t divergence, form, ignore_index;
  double label_smoothing;
};

template <class T>
Problem<T> make_problem(const Tensor& logits, const Tensor& teacher, const OptionalTensor& indices,
                        const OptionalTensor& tail, const OptionalTensor& labels, const OptionalTensor& alpha,
                        const OptionalTensor& row_weight, const Options& options) {
  Problem<T> problem;
  auto& hard = problem.hard;
  hard.logits = Rows(logits);
  hard.rows = logits.size(0);
  hard.classes = logits.size(1);
  hard.label_fn = self_distillation::kHardmax;
  hard.loss = self_distillation::kCrossEntropy;
  hard.ignore_index = options.ignore_index;
  hard.label_smoothing = static_cast<T>(options.label_smoothing);
  problem.labelled = labels.has_value();
  if (labels && is_floating(labels->scalar_type())) {
    hard.soft_labels = Rows(*labels);
  } else if (labels) {
    hard.labels = labels->const_data_ptr<int64_t>();
    hard.label_stride = labels->stride(0);
  }
  if (row_weight) hard.row_weight = row_weight->const_data_ptr<T>();
  problem.teacher = Rows(teacher);
  if (indices) problem.indices = indices->const_data_ptr<int64_t>();
  if (tail) problem.tail = tail->const_data_ptr<T>();
  if (alpha) {
    problem.alpha = alpha->const_data_ptr<T>();
    problem.alpha_stride = alpha->dim();  // the caller passes () or a contiguous (N,)
  }
  problem.shared_alpha = static_cast<T>(options.alpha_value);
  problem.temperature = static_cast<T>(options.temperature);
  problem.teacher_temperature = static_cast<T>(options.teacher_temperature);
  problem.divergence = options.divergence;
  problem.form = options.form;
  return problem;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(const Problem<T>& problem, const Tensor& logits, int64_t reduction,
                                              bool want_gradient) {
  const int64_t kept = check_and_count(problem), rows = problem.hard.rows, classes = problem.hard.classes;
  Tensor loss = reduction == kNone ? new_tensor(logits, {rows}, kType<T>) : new_tensor(logits, {}, kType<T>);
  Tensor gradient =
      want_gradient ? new_gradient(logits, logits.scalar_type()) : new_tensor(logits, {0}, logits.scalar_type());
  const OutputRows out = want_gradient ? OutputRows(gradient) : OutputRows();
  // An all-ignored batch has loss 0, not 0/0.
  const T divisor = reduction != kMean || kept == 0 ? T(1) : static_cast<T>(kept), share = T(1) / divisor;
  std::vector<T> summed(reduction == kNone ? 0 : rows);
  T* const losses = reduction == kNone ? loss.mutable_data_ptr<T>() : summed.data();
  over_rows(rows, classes, [&](int64_t begin, int64_t end, bool split_columns) {
    run_rows(
        problem, begin, end, split_columns, [&](int64_t i) { return problem.hard.weight_of(i) * share; }, out, losses);
    for (int64_t i = begin; i < end; ++i)
      if (problem.hard.kept(i)) losses[i] *= problem.hard.weight_of(i);
  });
  if (reduction != kNone) {
    double sum = 0;
    for (const T row : summed) sum += row;
    loss.mutable_data_ptr<T>()[0] = static_cast<T>(sum / divisor);
  }
  Tensor state = new_tensor(logits, {want_gradient ? int64_t{0} : int64_t{kStateSize}}, kType<T>);
  if (!want_gradient) state.mutable_data_ptr<T>()[kDenominator] = divisor;
  return {loss, gradient, state};
}

template <class T>
Tensor backward_as(const Problem<T>& problem, const Tensor& upstream, const Tensor& state, const Tensor& logits) {
  Tensor gradient = new_gradient(logits, logits.scalar_type());
  const OutputRows out(gradient);
  const T* given = upstream.const_data_ptr<T>();
  const int64_t given_stride = upstream.dim() == 1 ? upstream.stride(0) : 0;
  const T divisor = state.const_data_ptr<T>()[kDenominator];
  over_rows(problem.hard.rows, problem.hard.classes, [&](int64_t begin, int64_t end, bool split_columns) {
    run_rows(
        problem, begin, end, split_columns,
        [&](int64_t i) { return given[i * given_stride] * problem.hard.weight_of(i) / divisor; }, out,
        static_cast<T*>(nullptr));
  });
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logits, Tensor teacher, OptionalTensor indices, OptionalTensor tail,
                                           OptionalTensor labels, OptionalTensor alpha, OptionalTensor row_weight,
                                           double alpha_value, double temperature, double teacher_temperature,
                                           int64_t divergence, int64_t teacher_form, int64_t reduction,
                                           int64_t ignore_index, double label_smoothing, bool want_gradient) {
  const Options options = {alpha_value,  temperature,  teacher_temperature, divergence,
                           teacher_form, ignore_index, label_smoothing};
  const auto run = [&](auto zero) {
    return forward_as(make_problem<decltype(zero)>(logits, teacher, indices, tail, labels, alpha, row_weight, options),
                      logits, reduction, want_gradient);
  };
  return logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.f);
}

Tensor backward(Tensor upstream, Tensor state, Tensor logits, Tensor teacher, OptionalTensor indices,
                OptionalTensor tail, OptionalTensor labels, OptionalTensor alpha, OptionalTensor row_weight,
                double alpha_value, double temperature, double teacher_temperature, int64_t divergence,
                int64_t teacher_form, int64_t ignore_index, double label_smoothing) {
  const Options options = {alpha_value,  temperature,  teacher_temperature, divergence,
                           teacher_form, ignore_index, label_smoothing};
  const auto run = [&](auto zero) {
    return backward_as(make_problem<decltype(zero)>(logits, teacher, indices, tail, labels, alpha, row_weight, options),
                       upstream, state, logits);
  };
  return logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.f);
}

}  // namespace
}  // namespace sdfast::distillation

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("_distillation", TORCH_BOX(&sdfast::distillation::forward));
  m.impl("_distillation_backward", TORCH_BOX(&sdfast::distillation::backward));
}
