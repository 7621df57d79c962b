// Computed: the self-distillation loss, its gradient with respect to the logits, and batch statistics, on a GPU.
// Fused: label function, target, loss, gradient and batch sums; one launch for a small batch, two for a large one.
// Never materialised: a (rows, classes) target or probability; a row stays in shared memory between its passes.
#include "../common/launch.cuh"

#include <algorithm>
#include <tuple>

#include "cuda_rows.cuh"
#include "cuda_shape.cuh"

namespace sdfast::self_distillation {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int kCountBlocks = 256;  // at most, of the launch that counts a large batch

enum Count { kKept, kWeight, kCorrect, kCounts };
enum Tally { kLossSum, kAlphaSum, kCorrectSum, kEntropySum, kAgreeSum, kTallies };

// What the batch is for beside its rows: which of these is set says what a launch reads and writes.
template <class T>
struct Batch {
  Reduction reduction = kNone;
  bool adaptive = false;
  T alpha_value = 1;            // of every row, or the ratio of an adaptive alpha
  T* losses = nullptr;          // (N,)
  T* loss = nullptr;            // ()
  T* state = nullptr;           // (kStateSize,)
  const T* upstream = nullptr;  // () or (N,), of a backward launch, which takes its divisor from `given_state`
  int64_t upstream_stride = 0;
  const T* given_state = nullptr;
  double* counts = nullptr;  // (count_blocks, kCounts), of the launch before; null: this one block counts
  int count_blocks = 0;
  double* tallies = nullptr;   // (blocks, kTallies)
  int* blocks_done = nullptr;  // zeroed by the launch before

  __device__ bool forward_needs_batch() const { return !upstream && (loss || state); }
};

// ---- The batch: counts before the rows, sums after them. All sums are in a fixed order, with no atomics on floats.
// ----

// Over every rows_step-th row from `first`: kept rows, their class weights and, for an adaptive alpha, correct ones.
template <class In, bool kAligned>
__device__ void count_rows(const Problem<In>& problem, bool correct, int block, int blocks, double (&counts)[kCounts]) {
  const Layout<In, kAligned> layout = {team_of(correct ? problem.team_size : 1), problem.classes};
  const int64_t teams = blockDim.x / layout.team.size;
  for (int v = 0; v < kCounts; ++v) counts[v] = 0;
  for (int64_t i = block * teams + threadIdx.x / layout.team.size; i < problem.rows; i += blocks * teams) {
    if (!problem.kept(i)) continue;
    bool right = false;
    if (correct)
      right = is_correct(problem, i, layout, scan(problem.logits, i, layout, false, true, Accumulated<In>(1)));
    if (layout.team.rank != 0) continue;
    counts[kKept] += 1;
    counts[kCorrect] += right;
    if (!problem.class_weight || !problem.labels) continue;
    const int64_t given = problem.labels[i * problem.label_stride], last = problem.classes - 1;
    counts[kWeight] += problem.class_weight[given < 0 ? 0 : given > last ? last : given];
  }
  team_sum(block_team(), counts);
}

template <class In, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    count_kernel(const Problem<In> problem, const bool correct, double* const partial, int* const blocks_done) {
  double counts[kCounts];
  count_rows<In, kAligned>(problem, correct, blockIdx.x, gridDim.x, counts);
  if (threadIdx.x != 0) return;
  for (int v = 0; v < kCounts; ++v) partial[int64_t{blockIdx.x} * kCounts + v] = counts[v];
  if (blockIdx.x == 0) *blocks_done = 0;
}

// Sums of `count` rows of kValues partial sums, by the whole block.
template <int kValues>
__device__ void sum_partials(const double* partial, int count, double (&sums)[kValues]) {
  for (int v = 0; v < kValues; ++v) sums[v] = 0;
  for (int b = threadIdx.x; b < count; b += blockDim.x)
    for (int v = 0; v < kValues; ++v) sums[v] += __ldcg(partial + b * kValues + v);
  team_sum(block_team(), sums);
}

// Whether this block is the last to arrive; what the others wrote before is then visible to it.
__device__ inline bool arrives_last(int* blocks_done) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(blocks_done, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

template <class In, class T>
__device__ void write_batch(const Problem<In>& problem, const Batch<T>& batch, const double (&sums)[kTallies],
                            double kept, T divisor, T shared_alpha) {
  if (batch.loss) *batch.loss = static_cast<T>(sums[kLossSum] / divisor);
  if (!batch.state) return;
  kept = kept > 0 ? kept : 1;
  batch.state[kAlpha] =
      problem.alpha_stride ? static_cast<T>(sums[kAlphaSum] / kept) : problem.alpha_of(0, shared_alpha);
  batch.state[kDenominator] = divisor;
  batch.state[kAccuracy] = static_cast<T>(sums[kCorrectSum] / kept);
  batch.state[kTargetEntropy] = static_cast<T>(sums[kEntropySum] / kept);
  batch.state[kAgreement] = static_cast<T>(sums[kAgreeSum] / kept);
}

// ---- The rows. ----

template <class In, bool kAligned, Targets kTargets>
__global__ void __launch_bounds__(kMaxThreads, kTargets == kSparseTargets ? 2 : 1)
    rows_kernel(const Problem<In> problem, const Batch<Accumulated<In>> batch) {
  using T = Accumulated<In>;
  double counts[kCounts] = {0, 0, 0};
  T divisor = 1, shared_alpha = batch.alpha_value;
  if (batch.upstream) {
    divisor = batch.given_state[kDenominator];
  } else if (batch.forward_needs_batch()) {
    if (batch.counts)
      sum_partials(batch.counts, batch.count_blocks, counts);
    else
      count_rows<In, kAligned>(problem, batch.adaptive, 0, 1, counts);
    // An all-ignored batch has loss 0, not 0/0.
    if (batch.reduction == kMean && counts[kKept] > 0)
      divisor = static_cast<T>(problem.class_weight && problem.labels ? counts[kWeight] : counts[kKept]);
    if (batch.adaptive)
      shared_alpha = adaptive_alpha(batch.alpha_value, static_cast<T>(counts[kCorrect]), static_cast<T>(counts[kKept]));
  }

  const Layout<In, kAligned> layout = {team_of(problem.team_size), problem.classes};
  const int64_t teams = blockDim.x / layout.team.size;
  double sums[kTallies] = {0, 0, 0, 0, 0};
  for (int64_t i = blockIdx.x * teams + threadIdx.x / layout.team.size; i < problem.rows; i += gridDim.x * teams) {
    if (!problem.kept(i)) {
      if (problem.gradient) zero_row(problem, i, layout);
      if (batch.losses && layout.team.rank == 0) batch.losses[i] = 0;
      continue;
    }
    const T alpha = problem.alpha_of(i, shared_alpha), weight = problem.row_weight ? problem.row_weight[i] : T(1);
    const T above = batch.upstream ? batch.upstream[i * batch.upstream_stride] : T(1);
    const RowResult<T> row = Row<In, kAligned, kTargets>(problem, layout, i, alpha, above * weight / divisor).run();
    if (layout.team.rank != 0) continue;
    if (batch.losses) batch.losses[i] = row.loss * weight;
    sums[kLossSum] += row.loss * weight;
    sums[kAlphaSum] += alpha;
    sums[kCorrectSum] += row.correct;
    sums[kEntropySum] += row.entropy;
    sums[kAgreeSum] += row.agrees;
  }
  if (!batch.forward_needs_batch()) return;

  team_sum(block_team(), sums);
  if (batch.counts) {
    if (threadIdx.x == 0)
      for (int v = 0; v < kTallies; ++v) batch.tallies[int64_t{blockIdx.x} * kTallies + v] = sums[v];
    if (!arrives_last(batch.blocks_done)) return;
    sum_partials(batch.tallies, gridDim.x, sums);
  }
  if (threadIdx.x == 0) write_batch(problem, batch, sums, counts[kKept], divisor, shared_alpha);
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

template <class T>
constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

template <class In>
Problem<In> make_problem(const Tensor& logits, const Tensor& labels, const OptionalTensor& alpha,
                         const OptionalTensor& source, const OptionalTensor& class_weight,
                         const OptionalTensor& row_weight, int64_t label_fn, double label_parameter, int64_t loss,
                         int64_t ignore_index, double label_smoothing, int64_t mixing, double target_power,
                         double row_power) {
  using T = Accumulated<In>;
  constexpr int64_t kMostClasses = 1 << 30;  // columns are counted in int
  if (logits.size(1) > kMostClasses)
    fail<std::invalid_argument>("logits: got ", logits.size(1), " classes, wanted at most ", kMostClasses);
  Problem<In> problem;
  problem.logits = Operand(logits);
  problem.rows = logits.size(0);
  problem.classes = static_cast<int>(logits.size(1));
  if (source) problem.source = Operand(*source);
  if (labels.scalar_type() == ScalarType::Long) {
    problem.labels = labels.const_data_ptr<int64_t>();
    problem.label_stride = labels.stride(0);
  } else {
    problem.soft_labels = Operand(labels);
  }
  if (alpha) {
    problem.alpha = alpha->const_data_ptr<T>();
    problem.alpha_stride = alpha->dim();  // the caller passes () or a contiguous (N,)
  }
  if (class_weight) problem.class_weight = class_weight->const_data_ptr<T>();
  if (row_weight) problem.row_weight = row_weight->const_data_ptr<T>();
  problem.label_fn = static_cast<LabelFunction>(label_fn);
  problem.loss = static_cast<Loss>(loss);
  problem.ignore_index = ignore_index;
  problem.label_parameter = static_cast<T>(label_parameter);
  problem.label_smoothing = static_cast<T>(label_smoothing);
  problem.mixing = static_cast<Mixing>(mixing);
  problem.target_power = static_cast<T>(target_power);
  problem.row_power = static_cast<T>(row_power);
  return problem;
}

template <class In, bool kAligned, Targets kTargets>
void launch(const CudaStream& stream, Problem<In> problem, Batch<Accumulated<In>> batch, const Tensor& logits) {
  if (problem.rows == 0 && !batch.loss && !batch.state) return;
  const Shape shape = shape_for(stream, problem.rows, problem.classes, Piece<In>::kSize);
  problem.team_size = shape.team_size;
  problem.cache_slots = shape.cache_slots;
  const auto blocks_for = [&](int teams, int64_t most) {
    return static_cast<int>(std::min((problem.rows + teams - 1) / teams, most));
  };
  const auto kernel = rows_kernel<In, kAligned, kTargets>;
  const bool needs_batch = !batch.upstream && (batch.loss || batch.state);
  if (needs_batch && shape.one_block)
    return stream.launch(kernel, 1, shape.threads, shape.shared_bytes, problem, batch);

  const int blocks =
      blocks_for(shape.threads / shape.team_size, stream.resident_blocks(kernel, shape.threads, shape.shared_bytes));
  Tensor workspace;
  if (needs_batch) {
    const int count_threads = problem.team_size > kWarp ? problem.team_size : kRowThreads;
    batch.count_blocks = blocks_for(batch.adaptive ? count_threads / problem.team_size : count_threads, kCountBlocks);
    const int64_t counts = int64_t{batch.count_blocks} * kCounts, tallies = int64_t{blocks} * kTallies;
    workspace = new_tensor(logits, {counts + tallies + 1}, ScalarType::Double);  // of the stream's own allocator
    batch.counts = workspace.mutable_data_ptr<double>();
    batch.tallies = batch.counts + counts;
    batch.blocks_done = reinterpret_cast<int*>(batch.tallies + tallies);
    stream.launch(count_kernel<In, kAligned>, batch.count_blocks, count_threads, 0, problem, batch.adaptive,
                  batch.counts, batch.blocks_done);
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

template <class Run>
auto with_dtype(const Tensor& logits, const Run& run) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Half{});
    default:
      fail<std::invalid_argument>("logits: wanted float32, float64, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logits, Tensor labels, OptionalTensor alpha, OptionalTensor source,
                                           OptionalTensor class_weight, OptionalTensor row_weight, double alpha_value,
                                           bool adaptive, int64_t label_fn, double label_parameter, int64_t loss,
                                           int64_t reduction, int64_t ignore_index, double label_smoothing,
                                           int64_t mixing, double target_power, double row_power, bool want_gradient,
                                           bool want_stats) {
  return with_dtype(logits, [&](auto zero) {
    using In = decltype(zero);
    using T = Accumulated<In>;
    const CudaStream stream(logits);
    Problem<In> problem =
        make_problem<In>(logits, labels, alpha, source, class_weight, row_weight, label_fn, label_parameter, loss,
                         ignore_index, label_smoothing, mixing, target_power, row_power);
    problem.want_stats = want_stats;
    Batch<T> batch;
    batch.reduction = static_cast<Reduction>(reduction);
    batch.adaptive = adaptive;
    batch.alpha_value = static_cast<T>(alpha_value);

    Tensor value = reduction == kNone ? new_tensor(logits, {problem.rows}, kType<T>) : new_tensor(logits, {}, kType<T>);
    (reduction == kNone ? batch.losses : batch.loss) = value.mutable_data_ptr<T>();
    const int64_t state_size = want_stats || !want_gradient ? int64_t{kStateSize} : 0;
    Tensor state = new_tensor(logits, {state_size}, kType<T>);
    if (state_size) batch.state = state.mutable_data_ptr<T>();
    Tensor gradient = want_gradient ? new_gradient(problem, logits) : new_tensor(logits, {0}, logits.scalar_type());
    launch_for(stream, problem, batch, logits);
    return std::tuple<Tensor, Tensor, Tensor>(value, gradient, state);
  });
}

Tensor backward(Tensor upstream, Tensor state, Tensor logits, Tensor labels, OptionalTensor alpha,
                OptionalTensor source, OptionalTensor class_weight, OptionalTensor row_weight, double alpha_value,
                int64_t label_fn, double label_parameter, int64_t loss, int64_t ignore_index, double label_smoothing,
                int64_t mixing, double target_power, double row_power) {
  return with_dtype(logits, [&](auto zero) {
    using In = decltype(zero);
    using T = Accumulated<In>;
    const CudaStream stream(logits);
    Problem<In> problem =
        make_problem<In>(logits, labels, alpha, source, class_weight, row_weight, label_fn, label_parameter, loss,
                         ignore_index, label_smoothing, mixing, target_power, row_power);
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
