// The loops over one row's columns, one per formula, cloned for each instruction set. n columns; T float or double.
#pragma once

#include "../common/vec.h"
#include "kernel.h"

namespace sdfast::self_distillation {

using vec::broadcast;
using vec::Lanes;
using vec::load_some;
using vec::Mask;
using vec::store_some;
using vec::sweep;

template <class T>
struct Peak {
  T value;        // largest entry, NaN entries passed over
  int64_t index;  // its first index
  bool nan;       // whether any entry is NaN
};

// Two levels: blocks are compared by one max each, and only the best block is searched for the index.
template <class T>
SDFAST_CLONES Peak<T> peak(const T* x, int64_t n) {
  constexpr int kWidth = vec::kLanes<T>;
  constexpr int64_t kBlock = 32 * kWidth;
  const T lowest = -std::numeric_limits<T>::infinity();
  Peak<T> best = {lowest, 0, false};
  Mask<T> unordered = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    Lanes<T> high[4] = {broadcast(lowest), broadcast(lowest), broadcast(lowest), broadcast(lowest)};
    const T* from = x + begin;
    int64_t i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const Lanes<T> lanes = vec::load(from + i + u * kWidth);
        high[u] = lanes > high[u] ? lanes : high[u];
        unordered |= lanes != lanes;
      }
    }
    sweep<T>(count - i, [&](int64_t at, auto used, auto) SDFAST_INLINE_LAMBDA {
      const Lanes<T> lanes = load_some(from + i + at, used, lowest);
      high[0] = lanes > high[0] ? lanes : high[0];
      unordered |= lanes != lanes;
    });
    high[0] = high[0] > high[1] ? high[0] : high[1];
    high[2] = high[2] > high[3] ? high[2] : high[3];
    high[0] = high[0] > high[2] ? high[0] : high[2];
    const T top = vec::max<T>(high[0]);
    if (top > best.value) best.value = top, best.index = begin;
  }
  best.nan = vec::any<T>(unordered);
  while (best.index < n && !(x[best.index] == best.value)) ++best.index;
  if (best.index == n) best.index = 0;  // every entry is NaN
  return best;
}

// sum_c exp((x_c - shift) scale), the terms kept in `terms` unless that is null
template <class T>
SDFAST_CLONES T exp_sum(const T* x, int64_t n, T shift, T scale, T* terms) {
  const T lowest = -std::numeric_limits<T>::infinity();
  vec::Total<T> total;
  if (terms) {
    sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
      const Lanes<T> term = vec::exp_nonpositive((load_some(x + i, used, lowest) - shift) * scale);
      store_some(terms + i, term, used);
      total[slot] += term;
    });
  } else {
    sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
      total[slot] += vec::exp_nonpositive((load_some(x + i, used, lowest) - shift) * scale);
    });
  }
  return total.sum();
}

template <class T>
struct Softmax {
  Peak<T> top;
  T total;  // sum_c exp(x_c - top.value)
  T log_total;
};

template <class T>
inline constexpr int64_t kSmallRow = 16 * vec::kLanes<T>;

// The whole softmax of n <= kSmallRow columns, loaded once: scale p_c goes to `out` unless that is null. A last partial
// vector overlaps the one before it: its first lanes are repeats, counted once and written twice with the same value.
template <class T>
SDFAST_CLONES Softmax<T> small_softmax(const T* x, int64_t n, T scale, T* out, T rate = 1) {
  constexpr int kWidth = vec::kLanes<T>;
  const T lowest = -std::numeric_limits<T>::infinity();
  const int columns = static_cast<int>(n), full = columns / kWidth, rest = columns % kWidth;
  const int used = full + (rest > 0), last = columns - kWidth;  // last < 0: the row is shorter than a vector
  const auto first = [&](int j) { return j < full || last < 0 ? j * kWidth : last; };
  Lanes<T> lanes[16];
  for (int j = 0; j < full; ++j) lanes[j] = vec::load(x + j * kWidth);
  if (rest) lanes[full] = last >= 0 ? vec::load(x + last) : vec::load_tail(x, rest, lowest);

  Lanes<T> high = broadcast(lowest);
  Mask<T> unordered = {};
  for (int j = 0; j < used; ++j) {
    high = lanes[j] > high ? lanes[j] : high;
    unordered |= lanes[j] != lanes[j];
  }
  const T top = vec::max<T>(high);
  Mask<T> at = Mask<T>{} + columns;
  for (int j = used - 1; j >= 0; --j) at = lanes[j] == top ? vec::counting<T>() + first(j) : at;
  const int64_t index = vec::min_index<T>(at);

  Lanes<T> total = {};
  for (int j = 0; j < used; ++j) {
    lanes[j] = vec::exp_nonpositive((lanes[j] - top) * rate);
    if (j == full && last >= 0)
      total += vec::counting<T>() >= kWidth - rest ? lanes[j] : Lanes<T>{};
    else
      total += lanes[j];
  }
  const T sum = vec::sum<T>(total);
  if (out) {
    const T factor = scale / sum;
    for (int j = 0; j < full; ++j) vec::store(out + j * kWidth, Lanes<T>(lanes[j] * factor));
    if (rest && last >= 0) vec::store(out + last, Lanes<T>(lanes[full] * factor));
    if (last < 0) vec::store_tail(out, Lanes<T>(lanes[full] * factor), rest);
  }
  return {{top, index < n ? index : 0, vec::any<T>(unordered)}, sum, std::log(sum)};
}

template <class T>
inline constexpr int64_t kTinyRow = 4 * vec::kLanes<T>;

// The softmax of up to kLanes rows of n <= kTinyRow columns, a row a lane, so that no reduction crosses lanes: scale[r]
// p_rc goes to `out` unless that is null. A row's bits do not depend on its lane, nor on the other lanes.
template <class T>
SDFAST_CLONES void tiny_softmax(const T* x, int64_t row_stride, int rows, int n, const T* scale, T* out,
                                Softmax<T>* softmax, T rate = 1) {
  constexpr int kWidth = vec::kLanes<T>;
  const T* from[kWidth];
  for (int r = 0; r < kWidth; ++r) from[r] = x + (r < rows ? r : rows - 1) * row_stride;
  Lanes<T> lanes[kTinyRow<T>];
  Lanes<T> high = broadcast(-std::numeric_limits<T>::infinity());
  Mask<T> at = {}, unordered = {};
  for (int c = 0; c < n; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < kWidth; ++r) lanes[c][r] = from[r][c];
    at = lanes[c] > high ? Mask<T>{} + c : at;
    high = lanes[c] > high ? lanes[c] : high;
    unordered |= lanes[c] != lanes[c];
  }
  Lanes<T> total = {};
  for (int c = 0; c < n; ++c) {
    lanes[c] = vec::exp_nonpositive((lanes[c] - high) * rate);
    total += lanes[c];
  }
  const Lanes<T> log_total = vec::log_or_zero(total);
  for (int r = 0; r < rows; ++r)
    softmax[r] = {{high[r], static_cast<int64_t>(at[r]), unordered[r] != 0}, total[r], log_total[r]};
  if (!out) return;
  const Lanes<T> factor = vec::load(scale) / total;
  T scaled[kTinyRow<T>][kWidth];
  for (int c = 0; c < n; ++c) vec::store(scaled[c], Lanes<T>(lanes[c] * factor));
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < n; ++c) out[r * n + c] = scaled[c][r];
}

// The softmax of up to kLanes rows of n <= kSmallRow columns.
template <class T>
void small_rows(const T* x, int64_t row_stride, int rows, int64_t n, const T* scale, T* out, Softmax<T>* softmax,
                T rate = 1) {
  if (n <= kTinyRow<T>) return tiny_softmax(x, row_stride, rows, static_cast<int>(n), scale, out, softmax, rate);
  for (int r = 0; r < rows; ++r)
    softmax[r] = small_softmax(x + r * row_stride, n, scale[r], out ? out + r * n : nullptr, rate);
}

// out_c = (out_c scale - uniform w_c) factor (w = 1 where null)
template <class T>
SDFAST_CLONES void scale_minus(T* out, int64_t n, T scale, T uniform, const T* w, T factor) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    Lanes<T> lanes = load_some(out + i, used, T(0)) * scale;
    if (w)
      lanes -= load_some(w + i, used, T(0)) * uniform;
    else
      lanes -= uniform;
    store_some(out + i, Lanes<T>(lanes * factor), used);
  });
}

// out_c = (out_c first) second, each product rounded
template <class T>
SDFAST_CLONES void scale(T* out, int64_t n, T first, T second = 1) {
  sweep<T>(n, [&](int64_t i, auto used, auto)
                  SDFAST_INLINE_LAMBDA { store_some(out + i, load_some(out + i, used, T(0)) * first * second, used); });
}

// What `small_rows` has left at mass p_c, made the gradient of a target at two classes: less these, times the row's own
// weight, times factor.
template <class T>
void finish_small_gradient(T* gradient, int64_t n, int64_t label, T at_label, int64_t source, T at_source, T own,
                           T factor) {
  gradient[label] -= at_label;
  gradient[source] -= at_source;
  scale(gradient, n, own, factor);
}

// sum_c w_c (-log p_c), with -log p_c = log_total - (x_c - shift); a class of weight 0 adds nothing
template <class T>
SDFAST_CLONES T negative_log_sum(const T* x, int64_t n, T shift, T log_total, const T* w) {
  vec::Total<T> total;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    // The fill makes the unused lanes exactly zero.
    Lanes<T> term = log_total - (load_some(x + i, used, shift + log_total) - shift);
    if constexpr (std::is_same_v<decltype(used), int>) {
      for (int j = used; j < vec::kLanes<T>; ++j) term[j] = 0;
    }
    if (w) {
      const Lanes<T> weight = load_some(w + i, used, T(0));
      term = weight == T(0) ? Lanes<T>{} : term * weight;
    }
    total[slot] += term;
  });
  return total.sum();
}

// target_c = uniform + label y_c + source h_c; y and h absent where null. A slope > 0 makes it h_c = clamp(slope h_c).
template <class T>
SDFAST_CLONES void mix_target(T* target, int64_t n, Mixture<T> mix, const T* y, const T* h, T slope) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    Lanes<T> lanes = broadcast(mix.uniform);
    if (y) lanes += load_some(y + i, used, T(0)) * mix.label;
    if (h) {
      Lanes<T> term = load_some(h + i, used, T(0));
      if (slope > 0) {
        term *= slope;
        term = term < T(-1) ? broadcast(T(-1)) : term;
        term = term > T(1) ? broadcast(T(1)) : term;
      }
      lanes += term * mix.source;
    }
    store_some(target + i, lanes, used);
  });
}

// log t for t >= 0, denormals and zero included
template <class T>
SDFAST_INLINE Lanes<T> log_probability(const Lanes<T>& t) {
  const T kRaise = 18446744073709551616., kLogRaise = 44.3614195558364998;  // 2^64
  const Lanes<T> lowest = broadcast(-std::numeric_limits<T>::infinity());
  const Mask<T> low = t < std::numeric_limits<T>::min();
  const Lanes<T> y = vec::log_or_zero(Lanes<T>(low ? t * kRaise : t)) - (low ? broadcast(kLogRaise) : Lanes<T>{});
  return t == T(0) ? lowest : y;
}

template <class T>
SDFAST_CLONES void take_logarithms(T* target, int64_t n) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    store_some(target + i, log_probability<T>(load_some(target + i, used, T(1))), used);
  });
}

// target_c = (s_c - shift) rate + alpha log(uniform + label y_c); where y is null the second term is `floor`
template <class T>
SDFAST_CLONES void mix_logarithms(T* target, int64_t n, const T* s, T shift, T rate, const T* y, Mixture<T> label,
                                  T alpha, T floor) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    Lanes<T> lanes = (load_some(s + i, used, shift) - shift) * rate + floor;
    if (y) lanes += log_probability<T>(load_some(y + i, used, T(1)) * label.label + label.uniform) * alpha;
    store_some(target + i, lanes, used);
  });
}

template <class T>
struct Sums {
  T mass, loss;
};

// mass = sum_c w_c t_c; loss = sum_c w_c t_c (log_total - (x_c - shift)) [+ w_c t_c log t_c for kl]. A class with no
// weighted target mass adds nothing, though its logit be -inf.
template <class T>
SDFAST_CLONES Sums<T> cross_entropy_sums(const T* x, const T* target, int64_t n, T shift, T log_total, const T* w,
                                         bool kl) {
  vec::Total<T> mass, loss;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    const Lanes<T> t = load_some(target + i, used, T(0));
    Lanes<T> term = log_total - (load_some(x + i, used, shift) - shift);
    if (kl) term += vec::log_or_zero(t);
    const Lanes<T> weighted = w ? t * load_some(w + i, used, T(0)) : t;
    loss[slot] += weighted == T(0) ? Lanes<T>{} : term * weighted;
    mass[slot] += weighted;
  });
  return {mass.sum(), loss.sum()};
}

// out_c = factor (p_c mass - w_c t_c), p_c = out_c normalizer
template <class T>
SDFAST_CLONES void write_cross_entropy_gradient(T* out, const T* target, int64_t n, T normalizer, T mass, T factor,
                                                const T* w) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    Lanes<T> t = load_some(target + i, used, T(0));
    if (w) t *= load_some(w + i, used, T(0));
    const Lanes<T> p = load_some(out + i, used, T(0)) * normalizer;
    store_some(out + i, cross_entropy_gradient(p, t, mass) * factor, used);
  });
}

// sum_c (x_c - t_c)^2; the gradient times factor goes to `out` unless that is null
template <class T>
SDFAST_CLONES T squared_error(const T* x, const T* target, int64_t n, T classes, T factor, T* out) {
  vec::Total<T> total;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    const Lanes<T> difference = load_some(x + i, used, T(0)) - load_some(target + i, used, T(0));
    total[slot] += difference * difference;
    if (out) store_some(out + i, mse_gradient(difference, classes) * factor, used);
  });
  return total.sum();
}

template <class T>
struct BrierSums {
  T loss, inner;
};

// loss = sum_c (p_c - t_c)^2, inner = sum_c p_c (p_c - t_c), p_c = terms_c normalizer
template <class T>
SDFAST_CLONES BrierSums<T> brier_sums(const T* terms, const T* target, int64_t n, T normalizer) {
  vec::Total<T> loss, inner;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    const Lanes<T> p = load_some(terms + i, used, T(0)) * normalizer;
    const Lanes<T> difference = p - load_some(target + i, used, T(0));
    loss[slot] += difference * difference;
    inner[slot] += p * difference;
  });
  return {loss.sum(), inner.sum()};
}

// out_c = factor times the Brier gradient, p_c = out_c normalizer
template <class T>
SDFAST_CLONES void write_brier_gradient(T* out, const T* target, int64_t n, T normalizer, T inner, T factor) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    const Lanes<T> p = load_some(out + i, used, T(0)) * normalizer;
    const Lanes<T> difference = p - load_some(target + i, used, T(0));
    store_some(out + i, brier_gradient(p, difference, inner) * factor, used);
  });
}

// -sum_c t_c log t_c; NaN where an entry is negative
template <class T>
SDFAST_CLONES T entropy(const T* target, int64_t n) {
  vec::Total<T> total;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    const Lanes<T> t = load_some(target + i, used, T(0));
    total[slot] -= t == T(0) ? Lanes<T>{} : t * vec::log_or_zero(t);
  });
  return total.sum();
}

}  // namespace sdfast::self_distillation
