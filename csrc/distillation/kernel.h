// Scalar formulas of the distillation loss. The maths is derived in sdfast/ops/distillation/README.md; the enumerations
// repeat the tables in sdfast/ops/distillation/description.py.
#pragma once

#include "../self_distillation/kernel.h"

namespace sdfast::distillation {

enum Divergence : int64_t { kKl = 0, kReverseKl = 1, kJs = 2 };
enum TeacherForm : int64_t { kLogits = 0, kLogProbabilities = 1, kTopKBucket = 2, kTopKUniform = 3 };
enum State : int64_t { kDenominator = 0, kStateSize = 1 };

// log of one side's probabilities, for a row: log p_c = (x_c - shift) rate - log_total; p_c = exp((x_c - shift) rate)
// normalizer. A teacher given by log-probabilities is taken as it is: rate 1, log_total = -shift.
template <class T>
struct Side {
  T shift, rate, log_total, normalizer;
};

// V below is a scalar or a vector of lanes; T the scalar type. Each is dD/d(x_c rate) of its divergence D.

// D = sum_c q_c (log q_c - log p_c), with mass = sum_c q_c
template <class V, class T>
SDFAST_HOST_DEVICE V kl_gradient(const V& p, const V& q, T mass) {
  return p * mass - q;
}

// D = sum_c p_c s_c, with s_c = log p_c - log q_c; or Jensen-Shannon's, with s_c = log(p_c / m_c) / 2 and
// inner = sum_c p_c s_c
template <class V, class T>
SDFAST_HOST_DEVICE V score_gradient(const V& p, const V& score, T inner) {
  return p * (score - inner);
}

}  // namespace sdfast::distillation
