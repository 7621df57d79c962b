// The multipliers of self-distillation: roots s = 1/c of sum_k w_k / (1 + s d_k)^2 = 1, round after round.
// Fused: each step is one pass over d and w; a round's update of w shares its pass, and its one division an entry, with
// the next round's first step, taken where the last rounds point to: in a long path a round costs one pass. Never
// materialised: anything of size points x columns beside w itself.
//
// One source for g++ (behind pybind11: cpu_column.h, fold.h, bindings.cpp) and for CUDA (nvcc, and NVRTC through CuPy's
// RawModule): no headers. The definition and the mathematics stand in sdfast/hilbert/secular.py.
#ifndef SDFAST_SECULAR_H
#define SDFAST_SECULAR_H

#ifdef __CUDACC__
#define SDFAST_SECULAR __host__ __device__ __forceinline__
#define SDFAST_SECULAR_SQRT sqrt
#else
#define SDFAST_SECULAR inline __attribute__((always_inline))
#define SDFAST_SECULAR_SQRT __builtin_sqrt
#endif

namespace sdfast {
namespace secular {

const int kMaxSteps = 200;       // 1 to 20 are taken; this ends a loop that NaN would keep alive
const double kNear = 0.1;        // steps this small (relative) take the curvature along: errors are cubed, not squared
const double kLastStep = 3e-6;   // such a step this small leaves an error of its cube
const double kNothing = 1e-290;  // weights below this are 0: they never count, and denormals are slow
const double kFarthest = 1e140;  // two s up to here can be multiplied

// Energies up to here are 1 but for the rounding of all rounds so far: the zero function fits. Why so, in secular.py.
SDFAST_SECULAR double collapsed_below(long long rounds) {
  const double passes = 1 + (double)rounds;
  return 1 + 0x1p-50 * passes * passes;
}

// Sums over a column at one s, with t = 1 / (1 + s d).
struct Sums {
  double value;   // sum w t^2
  double slope;   // sum w t^3 d
  double curve;   // sum w t^4 d^2
  double energy;  // sum w, after a round only
};

// The step from s towards value^(-1/2) = 1, an increasing concave function of s: Newton's, which from the left never
// overshoots, or near the root Halley's.
SDFAST_SECULAR double step_from(const Sums& sums, double s, bool& near) {
  near = false;
  if (!(sums.slope > 0)) return 0;
  const double newton = sums.value * ((sums.value - 1) / (SDFAST_SECULAR_SQRT(sums.value) + 1)) / sums.slope;
  near = newton < kNear * s && -newton < kNear * s;
  return near ? newton / (1 + 1.5 * newton * (sums.slope / sums.value - sums.curve / sums.slope)) : newton;
}

// The root, from the sums at some s.
template <class Column>
SDFAST_SECULAR double root_from(Column& column, Sums sums, double s) {
  double before = 0;
  bool from_left = false, cubed = false;  // how this s was reached
  for (int step = 0; step < kMaxSteps; ++step) {
    bool near;
    const double change = step_from(sums, s, near);
    const double size = change < 0 ? -change : change;
    // Newton's steps from the left stay there, and Halley's shrink fast: any other step is made of rounding.
    if (change == 0 || (from_left && change < 0) || (cubed && size > 0.5 * before)) break;
    const bool inside = s + change > 0;  // else the start was too far right of the root
    s = inside ? s + change : 0;
    if (near && size <= kLastStep * s) break;
    from_left = inside && !near && change > 0;
    cubed = near;
    before = size;
    sums = column.at(s);
  }
  return s;
}

// All rounds of one column. `column` offers
//   Sums at(double s)                    value, slope and curve at s
//   Sums advance(double s, double next)  w becomes w (s d t)^2, then the sums of the new w at `next`
//   void found(long long round, double c)
// and hears of the rounds before the collapse. Returns how many.
template <class Column>
SDFAST_SECULAR long long solve_column(Column& column, long long rounds) {
  Sums sums = column.at(0);
  sums.energy = sums.value;
  double s = 0, start = 0;
  double growth[2] = {1, 1};  // s / last s, and that over its own last
  double guess = 0;
  for (long long round = 0; round < rounds; ++round) {
    if (!(sums.energy > collapsed_below(round))) return round;
    const double last = s;
    s = root_from(column, sums, start);
    column.found(round, 1 / s);
    // The next root by extrapolating log s: cubically, or not at all where that missed this root by more.
    const double missed = guess > s ? guess - s : s - guess, moved = last > s ? last - s : s - last;
    const double first = round > 0 ? s / last : 1, second = round > 1 ? first / growth[0] : 1;
    const double third = round > 2 ? second / growth[1] : 1;
    growth[0] = first, growth[1] = second;
    guess = s * first * second * third;
    start = round > 3 && missed < moved && guess > 0 ? guess : s;
    if (!(s < kFarthest && start < kFarthest)) start = 0;
    sums = column.advance(s, start);
  }
  return rounds;
}

}  // namespace secular
}  // namespace sdfast

#ifdef __CUDACC__

namespace sdfast {
namespace secular {

// A column in global memory, walked by one block; every thread holds the same sums after each pass.
struct BlockColumn {
  const double* d;  // (points)
  double* w;        // (points), consumed
  long long points;
  double* c;        // (rounds)
  double* scratch;  // (4, blockDim.x) of shared memory

  __device__ void add_up(Sums& sums) {
    double* const mine = scratch + threadIdx.x;
    const int threads = blockDim.x;
    mine[0] = sums.value;
    mine[threads] = sums.slope;
    mine[2 * threads] = sums.curve;
    mine[3 * threads] = sums.energy;
    __syncthreads();
    for (int half = threads / 2; half > 0; half /= 2) {
      if ((int)threadIdx.x < half) {
        for (int j = 0; j < 4; ++j) mine[j * threads] += mine[j * threads + half];
      }
      __syncthreads();
    }
    sums.value = scratch[0];
    sums.slope = scratch[threads];
    sums.curve = scratch[2 * threads];
    sums.energy = scratch[3 * threads];
    __syncthreads();  // nobody writes again before everybody has read
  }

  __device__ Sums at(double s) {
    Sums sums = {0, 0, 0, 0};
    for (long long k = threadIdx.x; k < points; k += blockDim.x) {
      const double t = 1 / (1 + s * d[k]), pull = t * d[k], term = w[k] * t * t;
      sums.value += term;
      sums.slope += term * pull;
      sums.curve += term * pull * pull;
    }
    add_up(sums);
    return sums;
  }

  __device__ Sums advance(double s, double next) {
    Sums sums = {0, 0, 0, 0};
    for (long long k = threadIdx.x; k < points; k += blockDim.x) {
      const double here = s * d[k], below = 1 + here, below_next = 1 + next * d[k];
      const double both = 1 / (below * below_next), t = both * below, pull = t * d[k];
      const double filter = here * (both * below_next);  // s d / (1 + s d)
      double kept = w[k] * filter * filter;
      if (!(kept >= kNothing)) kept = 0;
      w[k] = kept;
      const double term = kept * t * t;
      sums.value += term;
      sums.slope += term * pull;
      sums.curve += term * pull * pull;
      sums.energy += kept;
    }
    add_up(sums);
    return sums;
  }

  __device__ void found(long long round, double multiplier) { c[round] = multiplier; }  // all threads, the same
};

}  // namespace secular
}  // namespace sdfast

// One block of 256 threads a column.
extern "C" __global__ void sdfast_secular_path(const double* d,  // (points)
                                               double* w,        // (columns, points), consumed
                                               long long points, long long rounds,
                                               double* c,          // (columns, rounds), holds inf beforehand
                                               long long* counts)  // (columns)
{
  __shared__ double scratch[4 * 256];
  const long long row = blockIdx.x;
  sdfast::secular::BlockColumn column = {d, w + row * points, points, c + row * rounds, scratch};
  // Every thread runs the same loop on the same sums, and writes the same c.
  const long long fits = sdfast::secular::solve_column(column, rounds);
  if (threadIdx.x == 0) counts[row] = fits;
}

#endif

#endif  // SDFAST_SECULAR_H
