// One column on the CPU: the passes over its points, vectorised.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "secular.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SDFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SDFAST_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define SDFAST_CLONES
#endif

namespace sdfast::secular {
namespace {

// Explicit lanes fix the order of every sum, whatever the instruction set; two of them hide the latency of the adds.
typedef double Lanes __attribute__((vector_size(32)));
typedef long long Mask __attribute__((vector_size(32)));
constexpr long long kWidth = 4;
constexpr long long kStride = 2 * kWidth;  // columns are padded to whole strides with d = w = 0

inline __attribute__((always_inline)) Lanes load(const double* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline __attribute__((always_inline)) double add_up(const Lanes& a, const Lanes& b) {
  const Lanes sum = a + b;
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

inline long long padded_to_strides(long long points) { return (points + kStride - 1) / kStride * kStride; }

// The sums of one pass. Folded columns (fold.h) have weights w o signs, |signs| <= 1; `size` is the value without them.
template <bool kFolded>
struct Pass {
  Lanes value[2] = {}, slope[2] = {}, curve[2] = {}, energy[2] = {}, size[2] = {};

  __attribute__((always_inline)) void add(int j, Lanes weight, const double* signs, Lanes t, Lanes pull) {
    Lanes term = weight * t * t;
    if (kFolded) {
      const Lanes sign = load(signs);
      size[j] += term;
      term *= sign;
      weight *= sign;
    }
    const Lanes pulled = term * pull;
    value[j] += term;
    slope[j] += pulled;
    curve[j] += pulled * pull;
    energy[j] += weight;
  }

  __attribute__((always_inline)) void finish(Sums& sums, double& total_size) {
    sums = {add_up(value[0], value[1]), add_up(slope[0], slope[1]), add_up(curve[0], curve[1]),
            add_up(energy[0], energy[1])};
    if (kFolded) total_size = add_up(size[0], size[1]);
  }
};

// What a pass reads and writes; `signs` of a folded column alone.
struct Points {
  const double* d;
  double* w;
  const double* signs;
  long long padded;
};

template <bool kFolded>
inline __attribute__((always_inline)) void sums_at(const Points& points, double s, Sums& sums, double& size) {
  Pass<kFolded> pass;
  for (long long k = 0; k < points.padded; k += kStride) {
    for (int j = 0; j < 2; ++j) {
      const long long at = k + j * kWidth;
      const Lanes eigenvalue = load(points.d + at);
      const Lanes t = 1 / (1 + s * eigenvalue);
      pass.add(j, load(points.w + at), points.signs + at, t, t * eigenvalue);
    }
  }
  pass.finish(sums, size);
}

template <bool kFolded>
inline __attribute__((always_inline)) void advance_all(const Points& points, double s, double next, Sums& sums,
                                                       double& size) {
  Pass<kFolded> pass;
  for (long long k = 0; k < points.padded; k += kStride) {
    for (int j = 0; j < 2; ++j) {
      const long long at = k + j * kWidth;
      const Lanes eigenvalue = load(points.d + at);
      const Lanes here = s * eigenvalue, below = 1 + here, below_next = 1 + next * eigenvalue;
      const Lanes both = 1 / (below * below_next), t = both * below;
      const Lanes filter = here * (both * below_next);  // s d / (1 + s d)
      Lanes kept = load(points.w + at) * filter * filter;
      const Mask counts = kept >= kNothing;
      kept = counts ? kept : Lanes{};
      std::memcpy(points.w + at, &kept, sizeof kept);
      pass.add(j, kept, points.signs + at, t, t * eigenvalue);
    }
  }
  pass.finish(sums, size);
}

SDFAST_CLONES void plain_sums_at(const Points& points, double s, Sums& sums, double& size) {
  sums_at<false>(points, s, sums, size);
}
SDFAST_CLONES void folded_sums_at(const Points& points, double s, Sums& sums, double& size) {
  sums_at<true>(points, s, sums, size);
}
SDFAST_CLONES void plain_advance(const Points& points, double s, double next, Sums& sums, double& size) {
  advance_all<false>(points, s, next, sums, size);
}
SDFAST_CLONES void folded_advance(const Points& points, double s, double next, Sums& sums, double& size) {
  advance_all<true>(points, s, next, sums, size);
}

// Weights only shrink, those of small eigenvalues fastest: what together is below this beside a value of 1 never counts
// again.
constexpr double kNeverAgain = 1e-19;

// What solve_column walks.
template <bool kFolded>
struct CpuColumn {
  Points points;
  std::vector<double>& multipliers;
  double dropped = 0;  // of the weights left behind
  double loudest = 0;  // folded: the most that rounding of a sum was magnified by, size over value

  Sums at(double s) {
    Sums sums;
    double size = 0;
    (kFolded ? folded_sums_at : plain_sums_at)(points, s, sums, size);
    hear(sums, size);
    return sums;
  }
  Sums advance(double s, double next) {
    Sums sums;
    double size = 0;
    (kFolded ? folded_advance : plain_advance)(points, s, next, sums, size);
    hear(sums, size);
    leave_behind();
    return sums;
  }
  void found(long long, double c) { multipliers.push_back(c); }

  void hear(const Sums& sums, double size) {
    if (kFolded && !(size <= loudest * sums.value)) loudest = sums.value > 0 ? size / sums.value : HUGE_VAL;
  }

  // Eigenvalues come in ascending order from eigh: in any other this is right too, but finds less.
  void leave_behind() {
    while (points.padded > kStride) {
      double block = 0;
      for (int j = 0; j < kStride; ++j) block += points.w[j];
      if (!(dropped + block < kNeverAgain)) return;
      dropped += block;
      points.d += kStride, points.w += kStride, points.padded -= kStride;
      if (kFolded) points.signs += kStride;
    }
  }
};

}  // namespace
}  // namespace sdfast::secular
