// Computed: a loss on the rows of a prediction bank, its gradient with respect to the logits, and the rows' update.
// Fused: gathering the rows, target or regulariser, loss, gradient, batch sums and the write; one launch for a small
// batch, two for a large one. Never materialised: a (rows, classes) target, probability or gathered row.
#include "../common/launch.cuh"

#include <tuple>

#include "../self_distillation/cuda_batch.cuh"
#include "cuda_rows.cuh"
#include "description.h"

namespace sdfast::prediction_bank {
namespace {

using namespace self_distillation;

// Over every blocks-th row from this block's: for each index of the batch its last row and how many rows have it.
template <class In>
__device__ void claim_rows(const Problem<In>& problem, const Storage& storage, int block, int blocks) {
  if (!storage.claims) return;
  for (int64_t i = int64_t{block} * blockDim.x + threadIdx.x; i < problem.rows; i += int64_t{blocks} * blockDim.x) {
    const int64_t index = storage.indices[i];
    if (!problem.kept(i) || !storage.holds(index)) continue;
    atomicMax(storage.claims + 2 * index, static_cast<int>(i) + 1);
    atomicAdd(storage.claims + 2 * index + 1, 1);
  }
}

template <class In, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    count_and_claim_kernel(const Problem<In> problem, const Storage storage, const bool correct, double* const partial,
                           int* const blocks_done) {
  claim_rows(problem, storage, blockIdx.x, gridDim.x);
  write_counts<In, kAligned>(problem, correct, partial, blocks_done);
}

template <class In, bool kAligned, Targets kTargets>
__global__ void __launch_bounds__(kMaxThreads, 1)
    bank_kernel(const Problem<In> problem, const Storage storage, const Settings<Accumulated<In>> bank,
                const Batch<Accumulated<In>> batch, const bool late) {
  using T = Accumulated<In>;
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  if (!batch.counts) {
    claim_rows(problem, storage, 0, 1);
    __threadfence();
    __syncthreads();
  }
  const BatchFacts<T> facts = begin_batch<In, kAligned>(problem, batch);
  const Layout<In, kAligned> layout = {team_of(problem.team_size), problem.classes};
  const int64_t teams = blockDim.x / layout.team.size;
  double sums[kTallies] = {0, 0, 0, 0, 0};
  for (int64_t i = blockIdx.x * teams + threadIdx.x / layout.team.size; i < problem.rows; i += gridDim.x * teams) {
    if (!problem.kept(i)) {
      skip_row(problem, batch, i, layout);
      continue;
    }
    const int64_t given = storage.indices[i], index = storage.holds(given) ? given : 0;  // no address is made of it
    int writer = storage.claims && index == given ? __ldcg(storage.claims + 2 * index) - 1 : -1;
    const bool wrong = index != given || (bank.unique && writer != i);
    const int64_t seen = storage.seen[index];
    const bool teaches = bank.usable(seen, true);
    const T alpha = wrong ? kNaN : teaches ? problem.alpha_of(i, facts.shared_alpha) : T(1);
    const T weight = problem.row_weight ? problem.row_weight[i] : T(1);
    const BankSource<In, kAligned> source = {storage,
                                             bank,
                                             index * problem.classes,
                                             bank.weight(seen),
                                             teaches,
                                             problem.label_fn == kSoftmax,
                                             bank.strength != 0 && teaches,
                                             {problem.logits, i, bank.clamp},
                                             layout};
    const RowResult<T> row = Row<In, kAligned, kTargets, BankSource<In, kAligned>>(
                                 problem, layout, i, alpha, late ? T(1) : weight / facts.divisor, source)
                                 .run();
    if (storage.claims && index == given && closes(storage, index, layout.team)) {
      if (bank.update) write_row<In, kAligned>(storage, problem.logits, bank, index, writer, layout);
      if (layout.team.rank == 0) storage.claims[2 * index] = 0;
    }
    if (layout.team.rank == 0) tally(batch, i, row, alpha, weight, sums);
  }
  Problem<In> described = problem;
  described.alpha_stride = 1;  // whatever was given: rows that the bank does not teach have 1
  end_batch(described, batch, facts, sums);
}

template <class In, bool kAligned, Targets kTargets>
void launch(const CudaStream& stream, Problem<In> problem, const Storage& storage,
            const Settings<Accumulated<In>>& bank, Batch<Accumulated<In>> batch, bool late, const Tensor& logits) {
  const Shape shape = shape_for(stream, problem.rows, problem.classes, Piece<In>::kSize);
  problem.team_size = shape.team_size;
  problem.cache_slots = shape.cache_slots;
  const auto kernel = bank_kernel<In, kAligned, kTargets>;
  if (shape.one_block)
    return stream.launch(kernel, 1, shape.threads, shape.shared_bytes, problem, storage, bank, batch, late);

  const int blocks = blocks_for(problem.rows, shape.threads / shape.team_size,
                                stream.resident_blocks(kernel, shape.threads, shape.shared_bytes));
  const Tensor workspace = new_workspace(logits, problem, batch, blocks);
  stream.launch(count_and_claim_kernel<In, kAligned>, batch.count_blocks, count_threads(problem.team_size), 0, problem,
                storage, batch.adaptive, batch.counts, batch.blocks_done);
  stream.launch(kernel, blocks, shape.threads, shape.shared_bytes, problem, storage, bank, batch, late);
}

template <class In, class... Arguments>
void launch_for(const CudaStream& stream, const Problem<In>& problem, const Tensor& logits,
                const Arguments&... arguments) {
  const auto with = [&](auto aligned, auto targets) {
    launch<In, aligned, targets>(stream, problem, arguments..., logits);
  };
  constexpr std::integral_constant<Targets, kDenseTargets> dense;
  constexpr std::integral_constant<Targets, kReshapedTargets> reshaped;
  const bool aligned = problem.logits.template in_pieces<In>(problem.classes, logits.scalar_type());
  if (aligned && problem.reshapes_target())
    with(std::true_type(), reshaped);
  else if (aligned)
    with(std::true_type(), dense);
  else if (problem.reshapes_target())
    with(std::false_type(), reshaped);
  else
    with(std::false_type(), dense);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logits, Tensor labels, OptionalTensor alpha, Tensor indices,
                                           Tensor predictions, Tensor, Tensor seen, Tensor claims,
                                           OptionalTensor class_weight, OptionalTensor row_weight, double alpha_value,
                                           int64_t codes, int64_t ignore_index, OptionalNumbers numbers,
                                           double momentum, OptionalNumbers regularisation) {
  const Description d = unpacked(alpha_value, codes, ignore_index, numbers);
  return with_dtype(logits, [&](auto zero) {
    using In = decltype(zero);
    using T = Accumulated<In>;
    const CudaStream stream(logits);
    Problem<In> problem = make_problem<In>(logits, labels, alpha, {}, class_weight, row_weight, d);
    const Settings<T> bank = unpacked_settings<T>(codes, momentum, regularisation);
    const bool late = comes_late(codes);
    Storage storage;
    storage.predictions = predictions.mutable_data_ptr();
    storage.type = predictions.scalar_type();
    storage.seen = seen.mutable_data_ptr<int32_t>();
    if (bank.update || bank.unique) storage.claims = claims.mutable_data_ptr<int32_t>();
    storage.samples = seen.numel();
    storage.indices = indices.const_data_ptr<int64_t>();
    Batch<T> batch;
    batch.reduction = d.reduction;
    batch.adaptive = d.adaptive;
    batch.alpha_value = static_cast<T>(alpha_value);

    Tensor value =
        d.reduction == kNone ? new_tensor(logits, {problem.rows}, kType<T>) : new_tensor(logits, {}, kType<T>);
    (d.reduction == kNone ? batch.losses : batch.loss) = value.mutable_data_ptr<T>();
    Tensor state = new_tensor(logits, {int64_t{kStateSize}}, kType<T>);
    batch.state = state.mutable_data_ptr<T>();
    const ScalarType type = late ? kType<T> : logits.scalar_type();
    Tensor gradient =
        d.want_gradient ? new_tensor(logits, {logits.size(0), logits.size(1)}, type) : new_tensor(logits, {0}, type);
    if (d.want_gradient && late)
      problem.wide_gradient = static_cast<T*>(gradient.mutable_data_ptr());
    else if (d.want_gradient)
      problem.gradient = static_cast<In*>(gradient.mutable_data_ptr());
    launch_for<In>(stream, problem, logits, storage, bank, batch, late);
    return std::tuple<Tensor, Tensor, Tensor>(value, gradient, state);
  });
}

}  // namespace
}  // namespace sdfast::prediction_bank

STABLE_TORCH_LIBRARY_IMPL(sdfast, CUDA, m) { m.impl("_prediction_bank", TORCH_BOX(&sdfast::prediction_bank::forward)); }
