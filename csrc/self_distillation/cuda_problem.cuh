// What a call of the self-distillation loss fixes for its rows on the GPU, and scans over one row.
#pragma once

#include "../common/pieces.cuh"
#include "kernel.h"

namespace sdfast::self_distillation {

// What a call fixes for all rows.
template <class In>
struct Problem {
  using T = Accumulated<In>;
  Operand logits, source, soft_labels;  // (N, C); source and soft_labels may be absent
  const int64_t* labels = nullptr;      // (N,), absent with soft_labels
  int64_t label_stride = 0;
  const T* alpha = nullptr;  // (N,) or, with stride 0, one value
  int64_t alpha_stride = 0;
  const T* class_weight = nullptr;  // (C,)
  const T* row_weight = nullptr;    // (N,)
  int64_t rows = 0, ignore_index = 0;
  int classes = 0;
  LabelFunction label_fn = kHardmax;
  Loss loss = kCrossEntropy;
  T label_parameter = 1, label_smoothing = 0;
  Mixing mixing = kArithmetic;
  T target_power = 1, row_power = 0;
  bool want_stats = false;
  In* gradient = nullptr;              // (N, C) or absent
  T* wide_gradient = nullptr;          // (N, C), instead, where it is not to be rounded yet
  int team_size = 0, cache_slots = 0;  // threads that share a row; pieces of it that a thread keeps in shared memory

  bool reshapes_target() const { return mixing != kArithmetic || target_power != T(1); }
  __device__ bool kept(int64_t i) const { return !labels || labels[i * label_stride] != ignore_index; }
  __device__ T alpha_of(int64_t i, T shared) const { return alpha ? alpha[i * alpha_stride] : shared; }
  __device__ bool wants_gradient() const { return gradient || wide_gradient; }
  template <bool kAligned>
  __device__ OutputRow<In, kAligned> gradient_row(int64_t i, const Layout<In, kAligned>& layout) const {
    return {gradient ? gradient + i * classes : nullptr, layout, wide_gradient ? wide_gradient + i * classes : nullptr};
  }
  __device__ bool one_column_signs() const { return classes == 1 && soft_labels.data; }
};

template <class In>
__device__ inline Accumulated<In> exponential(Accumulated<In> x) {
  if constexpr (sizeof(In) == 2) {
    return __expf(x);  // its error is far below a half's rounding
  } else {
    return exp(x);
  }
}

// Largest entry and sums of exponentials in one pass: the sums are rescaled whenever a larger entry turns up.
template <class In>
struct Online {
  using T = Accumulated<In>;
  static constexpr int kSize = Piece<In>::kSize;
  static constexpr int kNowhere = 0x7fffffff;

  T top = -std::numeric_limits<T>::infinity();  // NaN once any entry is
  T total = 0;                                  // sum_c exp(x_c - top)
  T tempered = 0;                               // sum_c exp((x_c - top) / temperature), at temperature 1 left alone
  int step = -1;                                // of the first piece that holds `top`
  int index = kNowhere;                         // its first column, once found

  __device__ void add(int at, const T (&x)[kSize], bool sums, T inverse_temperature) {
    T high = x[0];
#pragma unroll
    for (int j = 1; j < kSize; ++j) high = max_or_nan(high, x[j]);
    if (!(high <= top)) {
      rescale(max_or_nan(top, high), inverse_temperature);
      step = at;
    }
    // Nothing but -inf so far: its terms are 0, though -inf - -inf is not.
    if (!sums || top == -std::numeric_limits<T>::infinity()) return;
#pragma unroll
    for (int j = 0; j < kSize; ++j) total += exponential<In>(x[j] - top);
    if (inverse_temperature == T(1)) return;
#pragma unroll
    for (int j = 0; j < kSize; ++j) tempered += exponential<In>((x[j] - top) * inverse_temperature);
  }

  // load(step, x) reads a piece again, to find the column of the largest entry in it.
  template <bool kAligned, class Load>
  __device__ void finish(const Layout<In, kAligned>& layout, bool sums, bool want_index, T inverse_temperature,
                         const Load& load) {
    const T own = top;
    const T team_top = team_max_or_nan(layout.team, own);
    if (sums) {
      rescale(team_top, inverse_temperature);
      T both[2] = {total, tempered};
      team_sum(layout.team, both);
      total = both[0], tempered = inverse_temperature == T(1) ? both[0] : both[1];
    }
    top = team_top;
    if (!want_index) return;
    if (own == team_top && step >= 0) {
      T x[kSize];
      load(step, x);
#pragma unroll
      for (int j = kSize - 1; j >= 0; --j)
        if (x[j] == team_top && layout.holds(step, j)) index = layout.column(step, j);
    }
    index = team_min(layout.team, index);
    if (index == kNowhere) index = 0;  // an entry is NaN, or all are -inf
  }

 private:
  __device__ void rescale(T raised, T inverse_temperature) {
    total *= exponential<In>(top - raised);
    if (inverse_temperature != T(1)) tempered *= exponential<In>((top - raised) * inverse_temperature);
    top = raised;
  }
};

// The peak of one row of any operand and, where wanted, the sum of exp((x_c - top) / temperature), in `tempered`.
template <class In, bool kAligned, class Rows>
__device__ Online<In> scan(const Rows& operand, int64_t i, const Layout<In, kAligned>& layout, bool sums,
                           bool want_index, Accumulated<In> inverse_temperature) {
  using T = Accumulated<In>;
  const auto load = [&](int step, T(&x)[Piece<In>::kSize]) {
    operand.load(i, layout, step, -std::numeric_limits<T>::infinity(), x);
  };
  Online<In> online;
  const int steps = layout.steps();
  for (int step = 0; step < steps; ++step) {
    T x[Piece<In>::kSize];
    load(step, x);
    online.add(step, x, sums, inverse_temperature);
  }
  online.finish(layout, sums, want_index, inverse_temperature, load);
  return online;
}

// Whether the largest logit is the label's; a row with a NaN logit is never correct.
template <class In, bool kAligned>
__device__ bool is_correct(const Problem<In>& problem, int64_t i, const Layout<In, kAligned>& layout,
                           const Online<In>& peak) {
  using T = Accumulated<In>;
  if (peak.top != peak.top) return false;
  if (problem.one_column_signs())
    return (problem.logits.template element<T>(i, 0) > 0) == (problem.soft_labels.template element<T>(i, 0) > 0);
  if (problem.labels) return peak.index == problem.labels[i * problem.label_stride];
  return peak.index == scan(problem.soft_labels, i, layout, false, true, T(1)).index;
}

template <class T>
struct RowResult {
  T loss = 0, entropy = 0;
  bool correct = false, agrees = false;
};

}  // namespace sdfast::self_distillation
