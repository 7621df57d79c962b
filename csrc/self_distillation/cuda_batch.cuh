// What a batch on the GPU fixes before its rows and sums after them, shared by the losses that run such rows.
#pragma once

#include <algorithm>

#include "cuda_rows.cuh"
#include "description.h"

namespace sdfast::self_distillation {

constexpr int kRowThreads = 256;             // of a block that takes several rows
constexpr int kCountBlocks = 256;            // at most, of the launch that counts a large batch
constexpr int64_t kOneBlockEntries = 16384;  // a batch no larger is one block's work, and then one launch's
constexpr int kStaticSharedBytes = 8192;     // room left to the reductions

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

// The launch before the rows of a large batch: this block's part of the counts.
template <class In, bool kAligned>
__device__ void write_counts(const Problem<In>& problem, bool correct, double* partial, int* blocks_done) {
  double counts[kCounts];
  count_rows<In, kAligned>(problem, correct, blockIdx.x, gridDim.x, counts);
  if (threadIdx.x != 0) return;
  for (int v = 0; v < kCounts; ++v) partial[int64_t{blockIdx.x} * kCounts + v] = counts[v];
  if (blockIdx.x == 0) *blocks_done = 0;
}

// An ignored row: loss and gradient 0.
template <class In, bool kAligned, class T>
__device__ void skip_row(const Problem<In>& problem, const Batch<T>& batch, int64_t i,
                         const Layout<In, kAligned>& layout) {
  if (problem.wants_gradient()) zero_row(problem, i, layout);
  if (batch.losses && layout.team.rank == 0) batch.losses[i] = 0;
}

// Writes a row's loss and adds the row to this thread's sums; one thread of a team does.
template <class T>
__device__ void tally(const Batch<T>& batch, int64_t i, const RowResult<T>& row, T alpha, T weight,
                      double (&sums)[kTallies]) {
  if (batch.losses) batch.losses[i] = row.loss * weight;
  sums[kLossSum] += row.loss * weight;
  sums[kAlphaSum] += alpha;
  sums[kCorrectSum] += row.correct;
  sums[kEntropySum] += row.entropy;
  sums[kAgreeSum] += row.agrees;
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

// What the batch fixes for its rows.
template <class T>
struct BatchFacts {
  double kept = 0;
  T divisor = 1, shared_alpha = 1;
};

template <class In, bool kAligned>
__device__ BatchFacts<Accumulated<In>> begin_batch(const Problem<In>& problem, const Batch<Accumulated<In>>& batch) {
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

  return {counts[kKept], divisor, shared_alpha};
}

// Sums over all rows, from what this block's threads have summed; by the last block to come here.
template <class In, class T>
__device__ void end_batch(const Problem<In>& problem, const Batch<T>& batch, const BatchFacts<T>& facts,
                          double (&sums)[kTallies]) {
  if (!batch.forward_needs_batch()) return;

  team_sum(block_team(), sums);
  if (batch.counts) {
    if (threadIdx.x == 0)
      for (int v = 0; v < kTallies; ++v) batch.tallies[int64_t{blockIdx.x} * kTallies + v] = sums[v];
    if (!arrives_last(batch.blocks_done)) return;
    sum_partials(batch.tallies, gridDim.x, sums);
  }
  if (threadIdx.x == 0) write_batch(problem, batch, sums, facts.kept, facts.divisor, facts.shared_alpha);
}

// ---- For the launchers. ----

// Threads for a row of `pieces`: some four pieces each within a warp, then up to eight, then more warps.
inline int team_size_for(int64_t pieces) {
  const int64_t wanted = pieces <= 4           ? pieces
                         : pieces <= 8 * kWarp ? std::clamp<int64_t>((pieces + 3) / 4, 4, kWarp)
                                               : std::clamp<int64_t>((pieces + 7) / 8, 128, kMaxThreads);
  int size = 1;
  while (size < wanted) size *= 2;
  return size;
}

struct Shape {
  int team_size, threads, cache_slots, shared_bytes;
  bool one_block;
};

inline Shape shape_for(const CudaStream& stream, int64_t rows, int64_t classes, int piece_size) {
  constexpr int kWithoutAsking = 48 << 10;
  const int64_t pieces = (classes + piece_size - 1) / piece_size;
  Shape shape;
  shape.team_size = team_size_for(pieces);
  shape.one_block = rows <= 1 || rows * classes <= kOneBlockEntries;
  shape.threads = std::max(shape.team_size, kRowThreads);
  if (shape.team_size > kWarp)
    shape.threads = shape.team_size;
  else if (shape.one_block && rows * shape.team_size > kRowThreads)
    shape.threads = kMaxThreads;
  const int64_t slot_bytes = int64_t{16} * shape.threads;
  const int64_t slots = (pieces + shape.team_size - 1) / shape.team_size;
  int64_t room = kWithoutAsking - kStaticSharedBytes;
  if (slots * slot_bytes > room) room = stream.max_shared_bytes() - kStaticSharedBytes;
  shape.cache_slots = static_cast<int>(std::min(slots, room / slot_bytes));
  shape.shared_bytes = static_cast<int>(shape.cache_slots * slot_bytes);
  return shape;
}

// Blocks for all rows, `teams` rows a block, at most `most`.
inline int blocks_for(int64_t rows, int teams, int64_t most) {
  return static_cast<int>(std::min((rows + teams - 1) / teams, most));
}

template <class In>
Problem<In> make_problem(const Tensor& logits, const Tensor& labels, const OptionalTensor& alpha,
                         const OptionalTensor& source, const OptionalTensor& class_weight,
                         const OptionalTensor& row_weight, const Description& d) {
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

// Threads of a block of the launch that counts.
inline int count_threads(int team_size) { return team_size > kWarp ? team_size : kRowThreads; }

// The scratch of a batch's sums, of the stream's own allocator, and where each part of it lies: `blocks` for the rows.
template <class In>
Tensor new_workspace(const Tensor& logits, const Problem<In>& problem, Batch<Accumulated<In>>& batch, int blocks) {
  const int threads = count_threads(problem.team_size);
  batch.count_blocks = blocks_for(problem.rows, batch.adaptive ? threads / problem.team_size : threads, kCountBlocks);
  const int64_t counts = int64_t{batch.count_blocks} * kCounts, tallies = int64_t{blocks} * kTallies;
  Tensor workspace = new_tensor(logits, {counts + tallies + 1}, ScalarType::Double);
  batch.counts = workspace.mutable_data_ptr<double>();
  batch.tallies = batch.counts + counts;
  batch.blocks_done = reinterpret_cast<int*>(batch.tallies + tallies);
  return workspace;
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

}  // namespace sdfast::self_distillation
