// The rows of a prediction bank on the GPU: read as a source by the team of threads that shares a row, and written.
#pragma once

#include "../self_distillation/cuda_rows.cuh"
#include "kernel.h"

namespace sdfast::prediction_bank {

using self_distillation::exponential;
using self_distillation::Online;

// A bank's tensors.
struct Storage {
  void* predictions = nullptr;  // (samples, C), contiguous
  ScalarType type = ScalarType::Float;
  int32_t* seen = nullptr;    // (samples,)
  int32_t* claims = nullptr;  // (samples, 2): the last row of the batch that has an index, how many are still to come
  int64_t samples = 0;
  const int64_t* indices = nullptr;  // (N,)

  // The columns of one piece of the row that starts at `first`, 0 past its end.
  template <class In, bool kAligned, class T>
  __device__ void read(int64_t first, const Layout<In, kAligned>& layout, int step, T (&x)[Piece<In>::kSize]) const {
    const auto from = [&](const auto* typed) {
#pragma unroll
      for (int j = 0; j < Piece<In>::kSize; ++j)
        x[j] = layout.holds(step, j) ? static_cast<T>(typed[first + layout.column(step, j)]) : T(0);
    };
    as_stored(from);
  }
  template <class In, bool kAligned, class T>
  __device__ void write(int64_t first, const Layout<In, kAligned>& layout, int step,
                        const T (&x)[Piece<In>::kSize]) const {
    const auto to = [&](auto* typed) {
#pragma unroll
      for (int j = 0; j < Piece<In>::kSize; ++j)
        if (layout.holds(step, j))
          typed[first + layout.column(step, j)] = static_cast<std::remove_pointer_t<decltype(typed)>>(x[j]);
    };
    as_stored(to);
  }
  __device__ bool holds(int64_t index) const { return index >= 0 && index < samples; }

 private:
  template <class Use>
  __device__ void as_stored(const Use& use) const {
    if (type == ScalarType::Float) return use(static_cast<float*>(predictions));
    if (type == ScalarType::Double) return use(static_cast<double*>(predictions));
    use(static_cast<BFloat16*>(predictions));
  }
};

// What one row of logits puts into the bank: its softmax, cut off where that is wanted, and the blend with what is
// there.
template <class In, bool kAligned>
struct Observation {
  using T = Accumulated<In>;
  static constexpr int kSize = Piece<In>::kSize;
  const Operand& logits;
  const int64_t row;
  const T clamp;
  T top = 0, scale = 0, normalizer = 1;
  bool finite = false;

  __device__ void begin(const Online<In>& peak, const Layout<In, kAligned>& layout) {
    constexpr T kMost = std::numeric_limits<T>::max();
    top = peak.top;
    scale = T(1) / peak.total;
    finite = top <= kMost && top >= -kMost && peak.total > 0;
    if (!(clamp > 0)) return;
    T sums[1] = {0};
    for (int step = 0; step < layout.steps(); ++step) {
      T p[kSize];
      probabilities(layout, step, p);
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        if (layout.holds(step, j)) sums[0] += cut(p[j]);
    }
    team_sum(layout.team, sums);
    normalizer = T(1) / sums[0];
  }

  __device__ void probabilities(const Layout<In, kAligned>& layout, int step, T (&p)[kSize]) const {
    logits.load_own(row, layout, step, -std::numeric_limits<T>::infinity(), p);
#pragma unroll
    for (int j = 0; j < kSize; ++j) p[j] = exponential<In>(p[j] - top) * scale;
  }

  __device__ T cut(T p) const {
    if (!(clamp > 0)) return p;
    return p < clamp ? clamp : p > T(1) - clamp ? T(1) - clamp : p;
  }

  __device__ T blend(T old, T p, T weight) const {
    const T observed = cut(p) * normalizer;
    return weight == T(1) ? observed : old + weight * (observed - old);
  }
};

// A bank's row as the source of a row of logits: the logarithms of its probabilities, or these for a hardmax.
template <class In, bool kAligned>
struct BankSource {
  using T = Accumulated<In>;
  static constexpr int kSize = Piece<In>::kSize;
  static constexpr bool kNeedsSoftmax = true;

  const Storage& storage;
  const Settings<T>& bank;
  const int64_t first;  // of the bank's row
  const T weight;       // of this row's prediction in it
  const bool teaches, logarithms, dense;
  Observation<In, kAligned> observation;
  Layout<In, kAligned> layout;
  T pull = 0, slope = 0, extra = 0;

  __device__ bool present() const { return true; }
  __device__ bool wants_dense() const { return dense; }
  __device__ T loss() const { return extra; }

  __device__ void begin(const Online<In>& peak, const Layout<In, kAligned>&) {
    observation.begin(peak, layout);
    if (bank.strength == 0 || !teaches) return;
    T sums[2] = {0, 0};  // <t, cut(p)>, and t_c p_c where p_c is not cut off
    for (int step = 0; step < layout.steps(); ++step) {
      T p[kSize], t[kSize];
      both(step, p, t);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (!layout.holds(step, j)) continue;
        sums[0] += t[j] * observation.cut(p[j]);
        sums[1] += uncut(p[j]) ? t[j] * p[j] : T(0);
      }
    }
    team_sum(layout.team, sums);
    pull = sums[1];
    slope = bank.strength / (T(1) - sums[0]);
    extra = bank.strength * log(T(1) - sums[0]);
  }

  // As Operand::load does it, of this bank's row: `row` is the logits'.
  __device__ void load(int64_t, const Layout<In, kAligned>&, int step, T fill, T (&x)[kSize]) const {
    T p[kSize], t[kSize];
    both(step, p, t);
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] = !layout.holds(step, j) ? fill : logarithms ? log(t[j]) : t[j];
  }

  // The regulariser's part of the gradient, on top of the loss's.
  __device__ void add_gradient(int step, T factor, T (&gradient)[kSize]) const {
    if (slope == 0) return;
    T p[kSize], t[kSize];
    both(step, p, t);
#pragma unroll
    for (int j = 0; j < kSize; ++j) gradient[j] += factor * slope * p[j] * (pull - (uncut(p[j]) ? t[j] : T(0)));
  }

 private:
  __device__ bool uncut(T p) const { return p >= bank.clamp && p <= T(1) - bank.clamp; }

  // p of the logits and t of the bank, as they are read: with this row's prediction in it or without.
  __device__ void both(int step, T (&p)[kSize], T (&t)[kSize]) const {
    const bool mixes = bank.write_first && observation.finite;
    if (mixes || bank.strength != 0) observation.probabilities(layout, step, p);
    storage.read(first, layout, step, t);
    if (!mixes) return;
#pragma unroll
    for (int j = 0; j < kSize; ++j) t[j] = observation.blend(t[j], p[j], weight);
  }
};

// Every lane of a team waits for the others, and sees what they have read and written.
__device__ inline void team_barrier(const Team& team) {
  if (team.size > kWarp)
    __syncthreads();
  else
    __syncwarp(team.mask);
}

// Whether this team is the last of those whose rows have this index: then all have read the bank's row.
__device__ inline bool closes(const Storage& storage, int64_t index, const Team& team) {
  team_barrier(team);
  int left = 1 << 30;
  if (team.rank == 0) {
    __threadfence();
    left = atomicAdd(storage.claims + 2 * index + 1, -1);
    __threadfence();
  }
  return team_min(team, left) == 1;
}

// The bank's row with the prediction of row `writer` in it; by the team that closes the index.
template <class In, bool kAligned>
__device__ void write_row(const Storage& storage, const Operand& logits, const Settings<Accumulated<In>>& bank,
                          int64_t index, int64_t writer, const Layout<In, kAligned>& layout) {
  using T = Accumulated<In>;
  constexpr int kSize = Piece<In>::kSize;
  Observation<In, kAligned> observation = {logits, writer, bank.clamp};
  observation.begin(self_distillation::scan(logits, writer, layout, true, false, T(1)), layout);
  if (!observation.finite) return;
  const T weight = bank.weight(storage.seen[index]);
  const int64_t first = index * layout.columns;
  for (int step = 0; step < layout.steps(); ++step) {
    T p[kSize], t[kSize];
    observation.probabilities(layout, step, p);
    storage.read(first, layout, step, t);
#pragma unroll
    for (int j = 0; j < kSize; ++j) t[j] = observation.blend(t[j], p[j], weight);
    storage.write(first, layout, step, t);
  }
  team_barrier(layout.team);  // all have read `seen`
  if (layout.team.rank == 0) ++storage.seen[index];
}

}  // namespace sdfast::prediction_bank
