// The multipliers of self-distillation: roots s = 1/c of sum_k w_k / (1 + s d_k)^2 = 1, round after round.
// Fused: each Newton step is one pass over d and w; a round's update of w shares its pass with the next round's first
// step. Never materialised: anything of size points x columns beside w itself.
//
// One source for g++ (behind pybind11, bindings.cpp) and for CUDA (nvcc, and NVRTC through CuPy's RawModule): no
// headers. The definition and the mathematics stand in sdfast/hilbert/secular.py.
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

const int kMaxSteps = 200;       // Newton takes 5 to 20; this ends a loop that NaN would keep alive
const double kLastStep = 1e-9;   // a step this small (relative) leaves an error of its square
const double kNothing = 1e-290;  // weights below this are 0: they never count, and denormals are slow

// Sums over a column at one s, with t = 1 / (1 + s d).
struct Sums {
  double energy;  // sum w
  double pull;    // sum w d
  double value;   // sum w t^2
  double slope;   // sum w t^3 d
};

// Newton's step on value^(-1/2) = 1, an increasing concave function of s.
SDFAST_SECULAR double newton_step(double value, double slope) {
  return slope > 0 ? value * ((value - 1) / (SDFAST_SECULAR_SQRT(value) + 1)) / slope : 0;
}

// One entry after a round with multiplier 1/s: w (s d t)^2.
template <class Number>
SDFAST_SECULAR Number filtered(const Number& w, const Number& d, const Number& t, double s) {
  const Number kept = d * t * s;
  return w * kept * kept;
}

// All rounds of one column. `column` offers
//   Sums start()          energy and pull of w; value = energy and slope = pull, as s = 0 has them
//   Sums at(double s)     value and slope at s
//   Sums advance(double s)  w becomes w (s d t)^2, then all four sums of the new w at the same s
// and c holds `rounds` entries, of which those before the collapse are written. Returns how many.
template <class Column>
SDFAST_SECULAR long long solve_column(Column& column, long long rounds, double* c) {
  Sums sums = column.start();
  double s = 0;
  for (long long round = 0; round < rounds; ++round) {
    if (!(sums.energy > 1)) return round;
    // From s = 0 the step is never right of the root. From the last root, which is right of this one, it lands left of
    // it too, but perhaps below 0: the larger of the two is the better start.
    const double first = newton_step(sums.energy, sums.pull);
    const double next = s + newton_step(sums.value, sums.slope);
    s = round && next > first ? next : first;
    for (int step = 0; step < kMaxSteps; ++step) {
      sums = column.at(s);
      const double change = newton_step(sums.value, sums.slope);
      s += change;
      if (!(change > kLastStep * s)) break;
    }
    c[round] = 1 / s;
    sums = column.advance(s);
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
  double* scratch;  // (4, blockDim.x) of shared memory

  __device__ void add_up(Sums& sums) {
    double* const mine = scratch + threadIdx.x;
    const int threads = blockDim.x;
    mine[0] = sums.energy;
    mine[threads] = sums.pull;
    mine[2 * threads] = sums.value;
    mine[3 * threads] = sums.slope;
    __syncthreads();
    for (int half = threads / 2; half > 0; half /= 2) {
      if ((int)threadIdx.x < half) {
        for (int j = 0; j < 4; ++j) mine[j * threads] += mine[j * threads + half];
      }
      __syncthreads();
    }
    sums.energy = scratch[0];
    sums.pull = scratch[threads];
    sums.value = scratch[2 * threads];
    sums.slope = scratch[3 * threads];
    __syncthreads();  // nobody writes again before everybody has read
  }

  __device__ Sums start() {
    Sums sums = {0, 0, 0, 0};
    for (long long k = threadIdx.x; k < points; k += blockDim.x) {
      sums.energy += w[k];
      sums.pull += w[k] * d[k];
    }
    add_up(sums);
    sums.value = sums.energy;
    sums.slope = sums.pull;
    return sums;
  }

  __device__ Sums at(double s) {
    Sums sums = {0, 0, 0, 0};
    for (long long k = threadIdx.x; k < points; k += blockDim.x) {
      const double t = 1 / (1 + s * d[k]);
      const double term = w[k] * t * t;
      sums.value += term;
      sums.slope += term * t * d[k];
    }
    add_up(sums);
    return sums;
  }

  __device__ Sums advance(double s) {
    Sums sums = {0, 0, 0, 0};
    for (long long k = threadIdx.x; k < points; k += blockDim.x) {
      const double t = 1 / (1 + s * d[k]);
      double kept = filtered(w[k], d[k], t, s);
      if (!(kept >= kNothing)) kept = 0;
      w[k] = kept;
      const double term = kept * t * t;
      sums.energy += kept;
      sums.pull += kept * d[k];
      sums.value += term;
      sums.slope += term * t * d[k];
    }
    add_up(sums);
    return sums;
  }
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
  sdfast::secular::BlockColumn column = {d, w + row * points, points, scratch};
  // Every thread runs the same loop on the same sums, and writes the same c.
  const long long fits = sdfast::secular::solve_column(column, rounds, c + row * rounds);
  if (threadIdx.x == 0) counts[row] = fits;
}

#endif

#endif  // SDFAST_SECULAR_H
