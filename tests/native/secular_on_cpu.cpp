// Runs the CUDA kernel of csrc/secular/secular.h on a CPU: a block's threads are real threads that meet at a barrier.
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>

struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx, blockDim;
static std::barrier<>* block_barrier = nullptr;
static void __syncthreads() { block_barrier->arrive_and_wait(); }

#define __CUDACC__
#define __host__
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#include "../../csrc/secular/secular.h"

extern "C" void run(const double* d, double* w, long long points, long long columns, long long rounds, double* c,
                    long long* counts, int threads) {
  for (long long column = 0; column < columns; ++column) {
    std::barrier<> barrier(threads);
    block_barrier = &barrier;
    std::vector<std::thread> block;
    for (int t = 0; t < threads; ++t) {
      block.emplace_back([=] {
        threadIdx.x = t;
        blockIdx.x = static_cast<unsigned>(column);
        blockDim.x = threads;
        sdfast_secular_path(d, w, points, rounds, c, counts);
      });
    }
    for (auto& thread : block) thread.join();
  }
}
