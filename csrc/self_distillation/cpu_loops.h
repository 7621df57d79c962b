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
    sweep<T>(count - i, [&](int64_t at, auto used) {
      const Lanes<T> lanes = load_some(from + i + at, used, lowest);
      high[0] = lanes > high[0] ? lanes : high[0];
      unordered |= lanes != lanes;
    });
    high[0] = high[0] > high[1] ? high[0] : high[1];
    high[2] = high[2] > high[3] ? high[2] : high[3];
    high[0] = high[0] > high[2] ? high[0] : high[2];
    T top = high[0][0];
    for (int j = 1; j < kWidth; ++j) top = high[0][j] > top ? high[0][j] : top;
    if (top > best.value) best.value = top, best.index = begin;
  }
  for (int j = 0; j < kWidth; ++j) best.nan |= unordered[j] != 0;
  while (best.index < n && !(x[best.index] == best.value)) ++best.index;
  if (best.index == n) best.index = 0;  // every entry is NaN
  return best;
}

// sum_c exp((x_c - shift) scale), the terms kept in `terms` unless that is null
template <class T>
SDFAST_CLONES T exp_sum(const T* x, int64_t n, T shift, T scale, T* terms) {
  const T lowest = -std::numeric_limits<T>::infinity();
  Lanes<T> total = {};
  if (terms) {
    sweep<T>(n, [&](int64_t i, auto used) {
      const Lanes<T> term = vec::exp_nonpositive((load_some(x + i, used, lowest) - shift) * scale);
      store_some(terms + i, term, used);
      total += term;
    });
  } else {
    sweep<T>(n, [&](int64_t i, auto used) {
      total += vec::exp_nonpositive((load_some(x + i, used, lowest) - shift) * scale);
    });
  }
  return vec::sum<T>(total);
}

// out_c = out_c scale - uniform w_c (w = 1 where null)
template <class T>
SDFAST_CLONES void scale_minus(T* out, int64_t n, T scale, T uniform, const T* w) {
  sweep<T>(n, [&](int64_t i, auto used) {
    Lanes<T> lanes = load_some(out + i, used, T(0)) * scale;
    if (w)
      lanes -= load_some(w + i, used, T(0)) * uniform;
    else
      lanes -= uniform;
    store_some(out + i, lanes, used);
  });
}

template <class T>
SDFAST_CLONES void scale(T* out, int64_t n, T factor) {
  sweep<T>(n, [&](int64_t i, auto used) { store_some(out + i, load_some(out + i, used, T(0)) * factor, used); });
}

// sum_c w_c (-log p_c), with -log p_c = log_total - (x_c - shift)
template <class T>
SDFAST_CLONES T negative_log_sum(const T* x, int64_t n, T shift, T log_total, const T* w) {
  Lanes<T> total = {};
  sweep<T>(n, [&](int64_t i, auto used) {
    // The fill makes the unused lanes exactly zero.
    Lanes<T> term = log_total - (load_some(x + i, used, shift + log_total) - shift);
    if constexpr (std::is_same_v<decltype(used), int>) {
      for (int j = used; j < vec::kLanes<T>; ++j) term[j] = 0;
    }
    if (w) term *= load_some(w + i, used, T(0));
    total += term;
  });
  return vec::sum<T>(total);
}

// target_c = uniform + label y_c + source h_c; y and h absent where null, h_c = slope h_c clamped to [-1, 1] if slope > 0
template <class T>
SDFAST_CLONES void mix_target(T* target, int64_t n, Mixture<T> mix, const T* y, const T* h, T slope) {
  sweep<T>(n, [&](int64_t i, auto used) {
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

template <class T>
struct Sums {
  T mass, loss;
};

// mass = sum_c w_c t_c; loss = sum_c w_c t_c (log_total - (x_c - shift)) [+ w_c t_c log t_c for kl]. A class with no
// target mass adds nothing, though its logit be -inf.
template <class T>
SDFAST_CLONES Sums<T> cross_entropy_sums(const T* x, const T* target, int64_t n, T shift, T log_total, const T* w,
                                         bool kl) {
  Lanes<T> mass = {}, loss = {};
  sweep<T>(n, [&](int64_t i, auto used) {
    const Lanes<T> t = load_some(target + i, used, T(0));
    Lanes<T> term = log_total - (load_some(x + i, used, shift) - shift);
    if (kl) term += vec::log_or_zero(t);
    term = t == T(0) ? Lanes<T>{} : term * t;
    const Lanes<T> weight = w ? load_some(w + i, used, T(0)) : broadcast(T(1));
    loss += term * weight;
    mass += t * weight;
  });
  return {vec::sum<T>(mass), vec::sum<T>(loss)};
}

// out_c = factor (p_c mass - w_c t_c), p_c = out_c normalizer
template <class T>
SDFAST_CLONES void write_cross_entropy_gradient(T* out, const T* target, int64_t n, T normalizer, T mass, T factor,
                                                const T* w) {
  sweep<T>(n, [&](int64_t i, auto used) {
    Lanes<T> t = load_some(target + i, used, T(0));
    if (w) t *= load_some(w + i, used, T(0));
    const Lanes<T> p = load_some(out + i, used, T(0)) * normalizer;
    store_some(out + i, cross_entropy_gradient(p, t, mass) * factor, used);
  });
}

// sum_c (x_c - t_c)^2; the gradient times factor goes to `out` unless that is null
template <class T>
SDFAST_CLONES T squared_error(const T* x, const T* target, int64_t n, T classes, T factor, T* out) {
  Lanes<T> total = {};
  sweep<T>(n, [&](int64_t i, auto used) {
    const Lanes<T> difference = load_some(x + i, used, T(0)) - load_some(target + i, used, T(0));
    total += difference * difference;
    if (out) store_some(out + i, mse_gradient(difference, classes) * factor, used);
  });
  return vec::sum<T>(total);
}

template <class T>
struct BrierSums {
  T loss, inner;
};

// loss = sum_c (p_c - t_c)^2, inner = sum_c p_c (p_c - t_c), p_c = terms_c normalizer
template <class T>
SDFAST_CLONES BrierSums<T> brier_sums(const T* terms, const T* target, int64_t n, T normalizer) {
  Lanes<T> loss = {}, inner = {};
  sweep<T>(n, [&](int64_t i, auto used) {
    const Lanes<T> p = load_some(terms + i, used, T(0)) * normalizer;
    const Lanes<T> difference = p - load_some(target + i, used, T(0));
    loss += difference * difference;
    inner += p * difference;
  });
  return {vec::sum<T>(loss), vec::sum<T>(inner)};
}

// out_c = factor times the Brier gradient, p_c = out_c normalizer
template <class T>
SDFAST_CLONES void write_brier_gradient(T* out, const T* target, int64_t n, T normalizer, T inner, T factor) {
  sweep<T>(n, [&](int64_t i, auto used) {
    const Lanes<T> p = load_some(out + i, used, T(0)) * normalizer;
    const Lanes<T> difference = p - load_some(target + i, used, T(0));
    store_some(out + i, brier_gradient(p, difference, inner) * factor, used);
  });
}

// -sum_c t_c log t_c; NaN where an entry is negative
template <class T>
SDFAST_CLONES T entropy(const T* target, int64_t n) {
  Lanes<T> total = {};
  sweep<T>(n, [&](int64_t i, auto used) {
    const Lanes<T> t = load_some(target + i, used, T(0));
    total -= t == T(0) ? Lanes<T>{} : t * vec::log_or_zero(t);
  });
  return vec::sum<T>(total);
}

}  // namespace sdfast::self_distillation
