// Reductions over a team: the threads that share a row, a power of two of them within a warp, or a whole block.
// Every thread of the team gets the same bits, and the order of a sum depends on the team's size alone.
#pragma once

#include <cstdint>
#include <limits>

namespace sdfast {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;  // of a block
constexpr int kMaxWarps = kMaxThreads / kWarp;

struct Team {
  int size;       // more than a warp: then it is the block
  int rank;       // of this thread in it
  unsigned mask;  // its lanes within the warp
};

__device__ inline Team team_of(int size) {
  const int lane = threadIdx.x % kWarp;
  if (size >= kWarp) return {size, static_cast<int>(threadIdx.x) % size, 0xffffffffu};
  return {size, lane % size, ((1u << size) - 1) << (lane / size * size)};
}

__device__ inline Team block_team() {
  return {static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x), 0xffffffffu};
}

// join(left, right) must be commutative, so that a butterfly leaves the same bits in every lane.
template <int kValues, class T, class Join>
__device__ inline void reduce(const Team& team, T (&values)[kValues], const Join& join) {
  const int lanes = team.size < kWarp ? team.size : kWarp;
  for (int step = lanes / 2; step > 0; step /= 2)
    for (int v = 0; v < kValues; ++v) values[v] = join(values[v], __shfl_xor_sync(team.mask, values[v], step));
  if (team.size <= kWarp) return;

  __shared__ T of_warp[kValues][kMaxWarps];
  const int warp = threadIdx.x / kWarp, warps = team.size / kWarp;
  __syncthreads();  // the last reduction's values have been read
  if (threadIdx.x % kWarp == 0)
    for (int v = 0; v < kValues; ++v) of_warp[v][warp] = values[v];
  __syncthreads();
  for (int v = 0; v < kValues; ++v) {
    values[v] = of_warp[v][0];
#pragma unroll 1
    for (int other = 1; other < warps; ++other) values[v] = join(values[v], of_warp[v][other]);
  }
}

template <int kValues, class T>
__device__ inline void team_sum(const Team& team, T (&values)[kValues]) {
  reduce(team, values, [](T left, T right) { return left + right; });
}

// The larger one, and NaN where either is NaN.
__device__ inline float max_or_nan(float left, float right) {
#ifdef __CUDA_ARCH__
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(left), "f"(right));
  return larger;
#else
  return left > right || left != left ? left : right;
#endif
}
__device__ inline double max_or_nan(double left, double right) { return left > right || left != left ? left : right; }

template <class T>
__device__ inline T team_max_or_nan(const Team& team, T value) {
  T values[1] = {value};
  reduce(team, values, [](T left, T right) { return max_or_nan(left, right); });
  return values[0];
}

__device__ inline int team_min(const Team& team, int value) {
  int values[1] = {value};
  reduce(team, values, [](int left, int right) { return left < right ? left : right; });
  return values[0];
}

}  // namespace sdfast
