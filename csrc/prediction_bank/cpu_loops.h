// The loops of a prediction bank over one row's columns, cloned for each instruction set. Terms are exp(x_c - max), so
// that p_c = terms_c scale.
#pragma once

#include "../common/vec.h"
#include "kernel.h"

namespace sdfast::prediction_bank {

using vec::broadcast;
using vec::Lanes;
using vec::load_some;
using vec::Mask;
using vec::store_some;
using vec::sweep;

// p cut off to [low, high]; low = 0 cuts nothing off.
template <class T>
SDFAST_INLINE Lanes<T> cut(const Lanes<T>& p, T low, T high) {
  const Lanes<T> raised = p < low ? broadcast(low) : p;
  return low > 0 ? (raised > high ? broadcast(high) : raised) : p;
}

template <class T>
SDFAST_CLONES T cut_sum(const T* terms, int64_t n, T scale, T low) {
  vec::Total<T> total;
  const T high = T(1) - low, inside = scale > 0 ? low / scale : low;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    Lanes<T> p = cut<T>(load_some(terms + i, used, inside) * scale, low, high);
    if constexpr (std::is_same_v<decltype(used), int>) {
      for (int j = used; j < vec::kLanes<T>; ++j) p[j] = 0;
    }
    total[slot] += p;
  });
  return total.sum();
}

// fresh_c = old_c + weight (o_c - old_c) with o_c = cut(p_c) normalizer, and o_c itself where the weight is 1
template <class T>
SDFAST_CLONES void blend(const T* old, const T* terms, int64_t n, T scale, T low, T normalizer, T weight, T* fresh) {
  const T high = T(1) - low;
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    const Lanes<T> p = cut<T>(load_some(terms + i, used, T(0)) * scale, low, high) * normalizer;
    const Lanes<T> before = load_some(old + i, used, T(0));
    store_some(fresh + i, weight == T(1) ? p : before + (p - before) * weight, used);
  });
}

template <class T>
SDFAST_CLONES T sum(const T* x, int64_t n) {
  vec::Total<T> total;
  sweep<T>(n,
           [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA { total[slot] += load_some(x + i, used, T(0)); });
  return total.sum();
}

// logs_c = log t_c, denormals included; -inf where t_c is 0
template <class T>
SDFAST_CLONES void logarithms(const T* t, int64_t n, T* logs) {
  const T raise = sizeof(T) == 4 ? T(16777216) : T(4503599627370496.);  // 2^24, 2^52
  const T log_raise = sizeof(T) == 4 ? T(16.635532333438686) : T(36.04365338911715);
  const T least = std::numeric_limits<T>::min();
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    const Lanes<T> lanes = load_some(t + i, used, T(1));
    const Lanes<T> raised = lanes < least ? lanes * raise : lanes;
    Lanes<T> y = vec::log_or_zero(raised) - (lanes < least ? broadcast(log_raise) : Lanes<T>{});
    y = lanes == T(0) ? broadcast(-std::numeric_limits<T>::infinity()) : y;
    store_some(logs + i, y, used);
  });
}

// inner = <t, cut(p)>, pull = sum of t_c p_c where p_c is not cut off
template <class T>
struct Agreement {
  T inner, pull;
};

template <class T>
SDFAST_CLONES Agreement<T> agreement(const T* t, const T* terms, int64_t n, T scale, T low) {
  vec::Total<T> inner, pull;
  const T high = T(1) - low;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    const Lanes<T> p = load_some(terms + i, used, T(0)) * scale, weight = load_some(t + i, used, T(0));
    inner[slot] += weight * cut<T>(p, low, high);
    const Lanes<T> part = weight * p;
    pull[slot] += (p >= low) & (p <= high) ? part : Lanes<T>{};
  });
  return {inner.sum(), pull.sum()};
}

// out_c = slope p_c (pull - t_c), without t_c where p_c is cut off
template <class T>
SDFAST_CLONES void regularise(const T* t, const T* terms, int64_t n, T scale, T low, T slope, T pull, T* out) {
  const T high = T(1) - low;
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    const Lanes<T> p = load_some(terms + i, used, T(0)) * scale, weight = load_some(t + i, used, T(0));
    const Lanes<T> held = (p >= low) & (p <= high) ? weight : Lanes<T>{};
    store_some(out + i, p * (pull - held) * slope, used);
  });
}

template <class T>
SDFAST_CLONES void add(T* to, const T* from, int64_t n) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    store_some(to + i, load_some(to + i, used, T(0)) + load_some(from + i, used, T(0)), used);
  });
}

}  // namespace sdfast::prediction_bank
