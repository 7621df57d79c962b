// Scalar formulas of the self-distillation loss, shared by the CPU and the CUDA kernels. The maths is derived in
// sdfast/ops/self_distillation/README.md; the enumerations repeat the tables in
// sdfast/ops/self_distillation/description.py.
#pragma once

#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define SDFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SDFAST_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace sdfast::self_distillation {

enum LabelFunction : int64_t { kSoftmax = 0, kHardmax = 1, kIdentity = 2, kClip = 3 };
enum Loss : int64_t { kCrossEntropy = 0, kKl = 1, kMse = 2, kBrier = 3 };
enum Mixing : int64_t { kArithmetic = 0, kGeometric = 1 };
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// The `state` output: what the backward and the statistics need of the whole batch.
enum State : int64_t {
  kAlpha = 0,
  kDenominator = 1,
  kAccuracy = 2,
  kTargetEntropy = 3,
  kAgreement = 4,
  kStateSize = 5
};

// target_c = uniform + label * y_c + source * h_c
template <class T>
struct Mixture {
  T label, uniform, source;
};

template <class T>
SDFAST_HOST_DEVICE Mixture<T> mixture(T alpha, T label_smoothing, int64_t classes) {
  // Without a division where there is no smoothing, but NaN where alpha is.
  const T uniform = alpha * (label_smoothing == T(0) ? T(0) : label_smoothing / T(classes));
  return {alpha * (T(1) - label_smoothing), uniform, T(1) - alpha};
}

// y's share and the floor under every class of the smoothed label alone, for a geometric mean with alpha and 1 - alpha.
template <class T>
SDFAST_HOST_DEVICE Mixture<T> label_alone(T label_smoothing, int64_t classes) {
  return mixture(T(1), label_smoothing, classes);
}

// w loss, where a weight of zero beats an infinite loss: the limit of p^q (-log p)
template <class T>
SDFAST_HOST_DEVICE T weighted_loss(T weight, T loss) {
  return weight == T(0) && loss > std::numeric_limits<T>::max() ? T(0) : weight * loss;
}

// 1 - alpha = clip(ratio * accuracy, 0, 1); an empty batch has accuracy 0 and learns from its labels alone.
template <class T>
SDFAST_HOST_DEVICE T adaptive_alpha(T ratio, T correct, T kept) {
  const T trust = kept > T(0) ? ratio * correct / kept : T(0);
  return T(1) - (trust < T(0) ? T(0) : trust > T(1) ? T(1) : trust);
}

template <class T>
SDFAST_HOST_DEVICE T clip_slope(T rho) {
  return T(4) / (T(1) - T(2) * rho);
}

// V below is a scalar or a vector of lanes; T the scalar type.

// d(-sum_c w_c t_c log p_c)/dx_c, with mass = sum_c w_c t_c
template <class V, class T>
SDFAST_HOST_DEVICE V cross_entropy_gradient(const V& p, const V& weighted_target, T mass) {
  return p * mass - weighted_target;
}

// d(1/C sum_c (x_c - t_c)^2)/dx_c, with difference = x_c - t_c
template <class V, class T>
SDFAST_HOST_DEVICE V mse_gradient(const V& difference, T classes) {
  return difference * (T(2) / classes);
}

// d(sum_c (p_c - t_c)^2)/dx_c, with difference = p_c - t_c and inner = sum_c p_c difference_c
template <class V, class T>
SDFAST_HOST_DEVICE V brier_gradient(const V& p, const V& difference, T inner) {
  return p * (difference - inner) * T(2);
}

// Whether the target's largest entry is the given label's, for an index label and a one-hot h at `source`: equal
// entries go to the first index, as in argmax.
template <class T>
SDFAST_HOST_DEVICE bool keeps_label(const Mixture<T>& mix, int64_t label, int64_t source) {
  if (mix.label + mix.source == T(0)) return label == 0;  // a uniform target
  return label == source || mix.label > mix.source || (mix.label == mix.source && label < source);
}

}  // namespace sdfast::self_distillation
