// Computed: the self-distillation loss, its gradient with respect to the logits, and batch statistics, on the CPU.
// Fused: label function, target, loss and gradient, row by row while the row is in cache.
// Never materialised: a (rows, classes) target or probability; a thread keeps at most four rows of scratch.
#include "cpu_batch.h"

namespace sdfast::self_distillation {
namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_as(Problem<T> problem, const Tensor& logits, const Description& d) {
  const BatchCounts<T> counts = check_and_count(problem);
  std::vector<Peak<T>> peaks;
  if (d.adaptive)
    problem.shared_alpha = adaptive_batch_alpha(problem, static_cast<T>(d.alpha_value), counts.kept, peaks);

  Tensor loss = d.reduction == kNone ? new_tensor(logits, {problem.rows}, kType<T>) : new_tensor(logits, {}, kType<T>);
  Tensor gradient =
      d.want_gradient ? new_gradient(logits, logits.scalar_type()) : new_tensor(logits, {0}, logits.scalar_type());
  const OutputRows out = d.want_gradient ? OutputRows(gradient) : OutputRows();
  std::vector<RowResult<T>> results(problem.rows);
  // An all-ignored batch has loss 0, not 0/0.
  const T divisor = d.reduction != kMean || counts.kept == 0 ? T(1) : counts.denominator, share = T(1) / divisor;
  over_rows(problem.rows, problem.classes, [&](int64_t begin, int64_t end, bool split_columns) {
    run_rows(
        problem, begin, end, split_columns, d.adaptive ? peaks.data() : nullptr,
        [&](int64_t i) { return problem.weight_of(i) * share; }, out, results.data());
    for (int64_t i = begin; i < end; ++i)
      if (problem.kept(i)) results[i].loss *= problem.weight_of(i);
  });

  write_losses(results, d.reduction, divisor, loss.mutable_data_ptr<T>());
  const bool want_state = d.want_stats || !d.want_gradient;
  Tensor state = new_tensor(logits, {want_state ? int64_t{kStateSize} : 0}, kType<T>);
  if (want_state) write_state(problem, results, counts.kept, divisor, state.mutable_data_ptr<T>());
  return {loss, gradient, state};
}

template <class T>
Tensor backward_as(const Problem<T>& problem, const Tensor& upstream, const Tensor& state, const Tensor& logits) {
  Tensor gradient = new_gradient(logits, logits.scalar_type());
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
                                           int64_t codes, int64_t ignore_index, OptionalNumbers numbers) {
  const Description d = unpacked(alpha_value, codes, ignore_index, numbers);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return forward_as<T>(make_problem<T>(logits, labels, alpha, source, class_weight, row_weight, d), logits, d);
  };
  return logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.f);
}

Tensor backward(Tensor upstream, Tensor state, Tensor logits, Tensor labels, OptionalTensor alpha,
                OptionalTensor source, OptionalTensor class_weight, OptionalTensor row_weight, double alpha_value,
                int64_t codes, int64_t ignore_index, OptionalNumbers numbers) {
  const Description d = unpacked(alpha_value, codes, ignore_index, numbers);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward_as<T>(make_problem<T>(logits, labels, alpha, source, class_weight, row_weight, d), upstream, state,
                          logits);
  };
  return logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.f);
}

}  // namespace
}  // namespace sdfast::self_distillation

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("_self_distillation", TORCH_BOX(&sdfast::self_distillation::forward));
  m.impl("_self_distillation_backward", TORCH_BOX(&sdfast::self_distillation::backward));
}
