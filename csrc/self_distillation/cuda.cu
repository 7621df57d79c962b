// Computed: the self-distillation loss, its gradient with respect to the logits, and batch statistics, on a GPU.
// Fused: label function, target, loss, gradient and batch sums; one launch for a small batch, two for a large one.
// Never materialised: a (rows, classes) target or probability; a row stays in shared memory between its passes.
#include "../common/launch.cuh"

#include <tuple>

#include "cuda_batch.cuh"

namespace sdfast::self_distillation {
namespace {

template <class In, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    count_kernel(const Problem<In> problem, const bool correct, double* const partial, int* const blocks_done) {
  write_counts<In, kAligned>(problem, correct, partial, blocks_done);
}

template <class In, bool kAligned, Targets kTargets>
__global__ void __launch_bounds__(kMaxThreads, kTargets == kSparseTargets ? 2 : 1)
    rows_kernel(const Problem<In> problem, const Batch<Accumulated<In>> batch) {
  using T = Accumulated<In>;
  const BatchFacts<T> facts = begin_batch<In, kAligned>(problem, batch);
  const Layout<In, kAligned> layout = {team_of(problem.team_size), problem.classes};
  const int64_t teams = blockDim.x / layout.team.size;
  double sums[kTallies] = {0, 0, 0, 0, 0};
  for (int64_t i = blockIdx.x * teams + threadIdx.x / layout.team.size; i < problem.rows; i += gridDim.x * teams) {
    if (!problem.kept(i)) {
      skip_row(problem, batch, i, layout);
      continue;
    }
    const T alpha = problem.alpha_of(i, facts.shared_alpha), weight = problem.row_weight ? problem.row_weight[i] : T(1);
    const T above = batch.upstream ? batch.upstream[i * batch.upstream_stride] : T(1);
    const RowResult<T> row = Row<In, kAligned, kTargets>(problem, layout, i, alpha, above * weight / facts.divisor,
                                                         TensorSource(problem.source))
                                 .run();
    if (layout.team.rank == 0) tally(batch, i, row, alpha, weight, sums);
  }
  end_batch(problem, batch, facts, sums);
}

// gradient *= upstream, which is read on the device: a plain loss.backward() passes 1, and every block leaves at once.
template <class In>
__global__ void __launch_bounds__(kRowThreads)
    scale_kernel(In* const gradient, const int64_t count, const Accumulated<In>* const upstream) {
  using T = Accumulated<In>;
  constexpr int kSize = Piece<In>::kSize;
  const T factor = *upstream;
  if (factor == T(1)) return;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t p = first; p < count / kSize; p += stride) {
    Piece<In> piece;
    copy(&piece, reinterpret_cast<Piece<In>*>(gradient) + p);
    for (int j = 0; j < kSize; ++j) piece.at[j] = static_cast<In>(static_cast<T>(piece.at[j]) * factor);
    copy(reinterpret_cast<Piece<In>*>(gradient) + p, &piece);
  }
  for (int64_t at = count / kSize * kSize + first; at < count; at += stride)
    gradient[at] = static_cast<In>(static_cast<T>(gradient[at]) * factor);
}

// ---- Launchers. ----

template <class In, bool kAligned, Targets kTargets>
void launch(const CudaStream& stream, Problem<In> problem, Batch<Accumulated<In>> batch, const Tensor& logits) {
  if (problem.rows == 0 && !batch.loss && !batch.state) return;
  const Shape shape = shape_for(stream, problem.rows, problem.classes, Piece<In>::kSize);
  problem.team_size = shape.team_size;
  problem.cache_slots = shape.cache_slots;
  const auto kernel = rows_kernel<In, kAligned, kTargets>;
  const bool needs_batch = !batch.upstream && (batch.loss || batch.state);
  if (needs_batch && shape.one_block)
    return stream.launch(kernel, 1, shape.threads, shape.shared_bytes, problem, batch);

  const int blocks = blocks_for(problem.rows, shape.threads / shape.team_size,
                                stream.resident_blocks(kernel, shape.threads, shape.shared_bytes));
  Tensor workspace;
  if (needs_batch) {
    workspace = new_workspace(logits, problem, batch, blocks);
    stream.launch(count_kernel<In, kAligned>, batch.count_blocks, count_threads(problem.team_size), 0, problem,
                  batch.adaptive, batch.counts, batch.blocks_done);
  }
  stream.launch(kernel, blocks, shape.threads, shape.shared_bytes, problem, batch);
}

template <class In, bool kAligned>
void launch_for_targets(const CudaStream& stream, const Problem<In>& problem, const Batch<Accumulated<In>>& batch,
                        const Tensor& logits) {
  const bool log_loss = problem.loss == kCrossEntropy || problem.loss == kKl;
  const bool plain = !problem.alpha && !batch.adaptive && batch.alpha_value == 1;
  const bool one_hot = problem.labels && problem.label_smoothing == 0 && (plain || problem.label_fn == kHardmax);
  if (problem.reshapes_target())
    launch<In, kAligned, kReshapedTargets>(stream, problem, batch, logits);
  else if (log_loss && one_hot && problem.row_power == 0)
    launch<In, kAligned, kSparseTargets>(stream, problem, batch, logits);
  else
    launch<In, kAligned, kDenseTargets>(stream, problem, batch, logits);
}

template <class In>
void launch_for(const CudaStream& stream, const Problem<In>& problem, const Batch<Accumulated<In>>& batch,
                const Tensor& logits) {
  if (problem.logits.template in_pieces<In>(problem.classes, logits.scalar_type()))
    launch_for_targets<In, true>(stream, problem, batch, logits);
  else
    launch_for_targets<In, false>(stream, problem, batch, logits);
}

template <class In>
Tensor new_gradient(Problem<In>& problem, const Tensor& logits) {
  Tensor gradient = new_tensor(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  problem.gradient = static_cast<In*>(gradient.mutable_data_ptr());
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logits, Tensor labels, OptionalTensor alpha, OptionalTensor source,
                                           OptionalTensor class_weight, OptionalTensor row_weight, double alpha_value,
                                           int64_t codes, int64_t ignore_index, OptionalNumbers numbers) {
  const Description d = unpacked(alpha_value, codes, ignore_index, numbers);
  return with_dtype(logits, [&](auto zero) {
    using In = decltype(zero);
    using T = Accumulated<In>;
    const CudaStream stream(logits);
    Problem<In> problem = make_problem<In>(logits, labels, alpha, source, class_weight, row_weight, d);
    Batch<T> batch;
    batch.reduction = d.reduction;
    batch.adaptive = d.adaptive;
    batch.alpha_value = static_cast<T>(alpha_value);

    const bool of_rows = d.reduction == kNone;
    Tensor value = of_rows ? new_tensor(logits, {problem.rows}, kType<T>) : new_tensor(logits, {}, kType<T>);
    (of_rows ? batch.losses : batch.loss) = value.mutable_data_ptr<T>();
    const int64_t state_size = d.want_stats || !d.want_gradient ? int64_t{kStateSize} : 0;
    Tensor state = new_tensor(logits, {state_size}, kType<T>);
    if (state_size) batch.state = state.mutable_data_ptr<T>();
    Tensor gradient = d.want_gradient ? new_gradient(problem, logits) : new_tensor(logits, {0}, logits.scalar_type());
    launch_for(stream, problem, batch, logits);
    return std::tuple<Tensor, Tensor, Tensor>(value, gradient, state);
  });
}

Tensor backward(Tensor upstream, Tensor state, Tensor logits, Tensor labels, OptionalTensor alpha,
                OptionalTensor source, OptionalTensor class_weight, OptionalTensor row_weight, double alpha_value,
                int64_t codes, int64_t ignore_index, OptionalNumbers numbers) {
  Description d = unpacked(alpha_value, codes, ignore_index, numbers);
  d.want_stats = false;
  return with_dtype(logits, [&](auto zero) {
    using In = decltype(zero);
    using T = Accumulated<In>;
    const CudaStream stream(logits);
    Problem<In> problem = make_problem<In>(logits, labels, alpha, source, class_weight, row_weight, d);
    Tensor gradient = new_gradient(problem, logits);
    Batch<T> batch;
    batch.alpha_value = static_cast<T>(alpha_value);
    batch.upstream = upstream.const_data_ptr<T>();
    batch.upstream_stride = upstream.dim() == 1 ? upstream.stride(0) : 0;
    batch.given_state = state.const_data_ptr<T>();
    launch_for(stream, problem, batch, logits);
    return gradient;
  });
}

// gradient: contiguous, as `forward` made it; upstream: 0-d, in the loss's dtype.
void scale_in_place(Tensor gradient, Tensor upstream) {
  with_dtype(gradient, [&](auto zero) {
    using In = decltype(zero);
    const int64_t count = gradient.numel();
    if (count == 0) return;
    const CudaStream stream(gradient);
    const auto kernel = scale_kernel<In>;
    constexpr int64_t kEntriesOfBlock = kRowThreads * Piece<In>::kSize;
    const int64_t blocks = std::min<int64_t>((count + kEntriesOfBlock - 1) / kEntriesOfBlock,
                                             stream.resident_blocks(kernel, kRowThreads, 0));
    stream.launch(kernel, static_cast<int>(blocks), kRowThreads, 0, static_cast<In*>(gradient.mutable_data_ptr()),
                  count, upstream.const_data_ptr<Accumulated<In>>());
  });
}

}  // namespace
}  // namespace sdfast::self_distillation

STABLE_TORCH_LIBRARY_IMPL(sdfast, CUDA, m) {
  m.impl("_self_distillation", TORCH_BOX(&sdfast::self_distillation::forward));
  m.impl("_self_distillation_backward", TORCH_BOX(&sdfast::self_distillation::backward));
  m.impl("_scale_in_place", TORCH_BOX(&sdfast::self_distillation::scale_in_place));
}
