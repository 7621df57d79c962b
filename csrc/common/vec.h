// CPU vector maths on 32-byte lanes: the same code for every instruction set, cloned per set at load time.
//
// Lanes are explicit (GCC vector extension) so that a reduction's order is written down, not chosen by the compiler:
// results do not depend on the alignment of a row. 32 bytes, not 64: without AVX-512, g++ 12 takes a comparison of
// 64-byte vectors apart lane by lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define SDFAST_INLINE inline __attribute__((always_inline))
#define SDFAST_INLINE_LAMBDA __attribute__((always_inline))
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SDFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SDFAST_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define SDFAST_CLONES
#endif

namespace sdfast::vec {

template <class T>
struct Types;
template <>
struct Types<float> {
  typedef float Lanes __attribute__((vector_size(32)));
  typedef int32_t Mask __attribute__((vector_size(32)));
};
template <>
struct Types<double> {
  typedef double Lanes __attribute__((vector_size(32)));
  typedef int64_t Mask __attribute__((vector_size(32)));
};
template <class T>
using Lanes = typename Types<T>::Lanes;
template <class T>
using Mask = typename Types<T>::Mask;
template <class T>
inline constexpr int kLanes = 32 / sizeof(T);

template <class T>
SDFAST_INLINE Lanes<T> load(const T* from) {
  Lanes<T> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <class T>
SDFAST_INLINE Lanes<T> load_tail(const T* from, int count, T fill) {
  T padded[kLanes<T>];
  for (int j = 0; j < kLanes<T>; ++j) padded[j] = fill;
  for (int j = 0; j < count; ++j) padded[j] = from[j];
  return load(padded);
}

template <class T>
SDFAST_INLINE void store(T* to, const Lanes<T>& lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}

template <class T>
SDFAST_INLINE void store_tail(T* to, const Lanes<T>& lanes, int count) {
  T padded[kLanes<T>];
  store(padded, lanes);
  for (int j = 0; j < count; ++j) to[j] = padded[j];
}

template <class T>
SDFAST_INLINE Lanes<T> broadcast(T value) {
  return value - Lanes<T>{};
}

// The lanes with those `kDistance` apart (a power of two) exchanged.
template <int kDistance, class Vector>
SDFAST_INLINE Vector swapped(const Vector& lanes) {
  using Index = std::conditional_t<sizeof(lanes[0]) == 4, Mask<float>, Mask<double>>;
  Index from;
  for (int j = 0; j < static_cast<int>(sizeof(Vector) / sizeof(lanes[0])); ++j) from[j] = j ^ kDistance;
  return __builtin_shuffle(lanes, from);
}

// Folds all lanes into one by a commutative `join`.
template <class Vector, class Join>
SDFAST_INLINE auto across(Vector lanes, const Join& join) {
  if constexpr (sizeof(lanes[0]) == 4) lanes = join(lanes, swapped<4>(lanes));
  lanes = join(lanes, swapped<2>(lanes));
  lanes = join(lanes, swapped<1>(lanes));
  return lanes[0];
}

template <class T>
SDFAST_INLINE T sum(const Lanes<T>& lanes) {
  return across(lanes, [](const Lanes<T>& a, const Lanes<T>& b) SDFAST_INLINE_LAMBDA { return a + b; });
}

// For lanes without NaN.
template <class T>
SDFAST_INLINE T max(const Lanes<T>& lanes) {
  return across(lanes, [](const Lanes<T>& a, const Lanes<T>& b) SDFAST_INLINE_LAMBDA { return a > b ? a : b; });
}

template <class T>
SDFAST_INLINE int64_t min_index(const Mask<T>& lanes) {
  return across(lanes, [](const Mask<T>& a, const Mask<T>& b) SDFAST_INLINE_LAMBDA { return a < b ? a : b; });
}

template <class T>
SDFAST_INLINE bool any(const Mask<T>& lanes) {
  return across(lanes, [](const Mask<T>& a, const Mask<T>& b) SDFAST_INLINE_LAMBDA { return a | b; }) != 0;
}

// 0, 1, 2, ...
template <class T>
SDFAST_INLINE Mask<T> counting() {
  Mask<T> lanes;
  for (int j = 0; j < kLanes<T>; ++j) lanes[j] = j;
  return lanes;
}

// exp(x) for x <= 0, NaN kept; relative error below 1.1 ulp (tests/native). Below 2^-126 the result is 0, not denormal.
// Cody-Waite reduction x = n ln2 + r, then 1 + r + r^2 q(r), q fitted on |r| <= ln2/2 with relative error 3.6e-9.
SDFAST_INLINE Lanes<float> exp_nonpositive(const Lanes<float>& x) {
  const float kShifter = 12582912.f;  // 1.5 * 2^23: adding it leaves round(y) in the low bits
  const Lanes<float> shifted = x * 1.44269504088896341f + kShifter;
  const Lanes<float> n = shifted - kShifter;
  const Lanes<float> r = (x - n * 0.693359375f) - n * -2.12194440054690583e-4f;
  Lanes<float> q = r * 0.00137512791098f + 0.00836895177748f;
  q = q * r + 0.041669538691f;
  q = q * r + 0.166665181653f;
  q = q * r + 0.499999885615f;
  const Lanes<float> y = (q * r) * r + r + 1.f;
  Mask<float> bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);  // the shifter's own bits fall off the left end
  Lanes<float> power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.33654f ? Lanes<float>{} : y * power;
}

// log(x) for normal x > 0; 0 for x = 0 and denormals, where t log t vanishes; NaN for NaN and negative x.
// x = 2^n m, m in [sqrt(1/2), sqrt(2)); log m = 2 s P(s^2), s = (m - 1) / (m + 1), P fitted with relative error 7e-10.
SDFAST_INLINE Lanes<float> log_or_zero(const Lanes<float>& x) {
  Mask<float> bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Mask<float> exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent << 23;
  Lanes<float> m;
  std::memcpy(&m, &bits, sizeof m);
  const Lanes<float> s = (m - 1.f) / (m + 1.f);
  const Lanes<float> s2 = s * s;
  Lanes<float> p = s2 * 0.149629477787f + 0.199873936835f;
  p = p * s2 + 0.333334079992f;
  p = p * s2 + 0.999999999311f;
  const Lanes<float> n = __builtin_convertvector(exponent, Lanes<float>);
  const Lanes<float> y = n * 0.693147180559945f + (s + s) * p;
  const Lanes<float> nan = broadcast(std::numeric_limits<float>::quiet_NaN());
  const Lanes<float> tiny = broadcast(std::numeric_limits<float>::min());
  return x >= tiny ? y : (x >= 0.f ? Lanes<float>{} : nan);
}

// float64 is the type of checks and small problems: the C library, lane by lane.
SDFAST_INLINE Lanes<double> exp_nonpositive(const Lanes<double>& x) {
  Lanes<double> y;
  for (int j = 0; j < kLanes<double>; ++j) y[j] = std::exp(x[j]);
  return y;
}

SDFAST_INLINE Lanes<double> log_or_zero(const Lanes<double>& x) {
  Lanes<double> y;
  for (int j = 0; j < kLanes<double>; ++j) y[j] = x[j] == 0 ? 0 : std::log(x[j]);
  return y;
}

// Calls step(offset, lanes in use, slot) over [0, count): full vectors, then one partial vector. The slot, 0 to 3,
// names the accumulator to add to: four sums run side by side, a quarter as long, so faster and rounded less.
template <class T, class Step>
SDFAST_INLINE void sweep(int64_t count, const Step& step) {
  constexpr int kWidth = kLanes<T>;
  constexpr std::integral_constant<int, kWidth> full{};
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    step(i, full, std::integral_constant<int, 0>{});
    step(i + kWidth, full, std::integral_constant<int, 1>{});
    step(i + 2 * kWidth, full, std::integral_constant<int, 2>{});
    step(i + 3 * kWidth, full, std::integral_constant<int, 3>{});
  }
  for (; i + kWidth <= count; i += kWidth) step(i, full, std::integral_constant<int, 0>{});
  if (i < count) step(i, static_cast<int>(count - i), std::integral_constant<int, 1>{});
}

// The accumulators of a sweep.
template <class T>
struct Total {
  Lanes<T> slots[4] = {};
  SDFAST_INLINE Lanes<T>& operator[](int slot) { return slots[slot]; }
  SDFAST_INLINE T sum() const { return vec::sum<T>((slots[0] + slots[1]) + (slots[2] + slots[3])); }
};

template <class T, class Count>
SDFAST_INLINE Lanes<T> load_some(const T* from, Count count, T fill) {
  if constexpr (std::is_same_v<Count, int>) {
    return load_tail(from, count, fill);
  } else {
    return load(from);
  }
}

template <class T, class Count>
SDFAST_INLINE void store_some(T* to, const Lanes<T>& lanes, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    store_tail(to, lanes, count);
  } else {
    store(to, lanes);
  }
}

}  // namespace sdfast::vec
