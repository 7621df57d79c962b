// The loops over one row's columns, one per divergence, cloned for each instruction set. n columns; T float or double.
#pragma once

#include "../self_distillation/cpu_loops.h"
#include "kernel.h"

namespace sdfast::distillation {

using vec::broadcast;
using vec::Lanes;
using vec::load_some;
using vec::store_some;
using vec::sweep;

template <class T>
SDFAST_INLINE Lanes<T> log_probability(const Lanes<T>& x, const Side<T>& side) {
  return (x - side.shift) * side.rate - side.log_total;
}

// sum_c q_c (log q_c - log p_c) over columns whose exponentials lie in p and q; scale times the gradient is added to,
// or (`fresh`) written to `out`, unless that is null. `out` may be p itself.
template <class T>
SDFAST_CLONES T kl(const T* x, const T* t, const T* p, const T* q, int64_t n, Side<T> student, Side<T> teacher, T mass,
                   T scale, bool fresh, T* out) {
  vec::Total<T> total;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    const Lanes<T> log_p = log_probability<T>(load_some(x + i, used, student.shift), student);
    const Lanes<T> log_q = log_probability<T>(load_some(t + i, used, teacher.shift), teacher);
    const Lanes<T> q_c = load_some(q + i, used, T(0)) * teacher.normalizer;
    total[slot] += q_c == T(0) ? Lanes<T>{} : q_c * (log_q - log_p);
    if (!out) return;
    const Lanes<T> p_c = load_some(p + i, used, T(0)) * student.normalizer;
    Lanes<T> gradient = kl_gradient(p_c, q_c, mass) * scale;
    if (!fresh) gradient += load_some(out + i, used, T(0));
    store_some(out + i, gradient, used);
  });
  return total.sum();
}

// sum_c p_c (log p_c - log q_c); the scores go to `scores`, which may be t itself.
template <class T>
SDFAST_CLONES T reverse_kl(const T* x, const T* t, const T* p, int64_t n, Side<T> student, Side<T> teacher, T* scores) {
  vec::Total<T> total;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    const Lanes<T> log_p = log_probability<T>(load_some(x + i, used, student.shift), student);
    const Lanes<T> log_q = log_probability<T>(load_some(t + i, used, teacher.shift), teacher);
    const Lanes<T> p_c = load_some(p + i, used, T(0)) * student.normalizer;
    const Lanes<T> score = p_c == T(0) ? Lanes<T>{} : log_p - log_q;
    total[slot] += p_c * score;
    if (scores) store_some(scores + i, score, used);
  });
  return total.sum();
}

template <class T>
struct JsSums {
  T loss, inner;
};

// loss = sum_c (q_c log(q_c/m_c) + p_c log(p_c/m_c)) / 2, inner = sum_c p_c log(p_c/m_c) / 2, m = (p + q) / 2. `q`
// holds exponentials, and receives the scores.
template <class T>
SDFAST_CLONES JsSums<T> js(const T* p, T* q, int64_t n, T p_normalizer, T q_normalizer) {
  vec::Total<T> loss, inner;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    const Lanes<T> p_c = load_some(p + i, used, T(0)) * p_normalizer, q_c = load_some(q + i, used, T(0)) * q_normalizer;
    const Lanes<T> m = (p_c + q_c) * T(0.5);
    const Lanes<T> score = p_c == T(0) ? Lanes<T>{} : vec::log_or_zero(Lanes<T>(p_c / m)) * T(0.5);
    const Lanes<T> of_teacher = q_c == T(0) ? Lanes<T>{} : vec::log_or_zero(Lanes<T>(q_c / m)) * T(0.5);
    const Lanes<T> own = p_c * score;
    inner[slot] += own;
    loss[slot] += own + q_c * of_teacher;
    store_some(q + i, score, used);
  });
  return {loss.sum(), inner.sum()};
}

// scale times p_c (s_c - inner), added to or (`fresh`) written to `out`, which may be p itself
template <class T>
SDFAST_CLONES void write_score_gradient(const T* p, const T* scores, int64_t n, T normalizer, T inner, T scale,
                                        bool fresh, T* out) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    const Lanes<T> p_c = load_some(p + i, used, T(0)) * normalizer;
    Lanes<T> gradient = score_gradient(p_c, load_some(scores + i, used, T(0)), inner) * scale;
    if (!fresh) gradient += load_some(out + i, used, T(0));
    store_some(out + i, gradient, used);
  });
}

// out_c = log p_c + more
template <class T>
SDFAST_CLONES void log_probabilities(const T* x, int64_t n, Side<T> side, T more, T* out) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    store_some(out + i, log_probability<T>(load_some(x + i, used, side.shift), side) + more, used);
  });
}

}  // namespace sdfast::distillation
