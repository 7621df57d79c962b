// Runs CUDA kernels on a CPU, one block after another: each CUDA thread is a fibre that gives way at every shuffle and
// barrier. It stands in for csrc/common/launch.cuh, so that the kernels' own source is what is tested. A shuffle or
// barrier that some of its threads never reach ends the process with a message.
#pragma once

#include "../../csrc/common/stable.h"

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

struct Barrier {
  int arrived = 0;
  long generation = 0;
};

struct Block {
  struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };
  std::vector<Fibre> fibres;
  std::vector<uint64_t> lanes;  // what each thread offers to a shuffle
  std::map<uint64_t, Barrier> barriers;
  ucontext_t scheduler;
  unsigned running = 0;
  bool progress = false;
  std::function<void()> body;
};

inline Block* block = nullptr;
inline std::vector<char> shared;
inline int launches = 0;

inline int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

inline void run_fibre() {
  block->body();
  block->fibres[block->running].done = true;
  block->progress = true;
  swapcontext(&block->fibres[block->running].context, &block->scheduler);
}

inline void wait(uint64_t key, int count) {
  Barrier& barrier = block->barriers[key];
  block->progress = true;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  const long generation = barrier.generation;
  while (barrier.generation == generation) swapcontext(&block->fibres[block->running].context, &block->scheduler);
}

inline void run_block(unsigned threads, const std::function<void()>& body) {
  Block here;
  block = &here;
  here.body = body;
  here.fibres.resize(threads);
  here.lanes.resize(threads);
  constexpr size_t kStack = 128 << 10;
  for (auto& fibre : here.fibres) {
    fibre.stack.reset(new char[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, run_fibre, 0);
  }
  for (bool left = true; left;) {
    left = false;
    here.progress = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (here.fibres[t].done) continue;
      left = true;
      here.running = threadIdx.x = t;
      swapcontext(&here.scheduler, &here.fibres[t].context);
    }
    if (left && !here.progress) {
      std::fprintf(stderr, "cuda_on_cpu: threads of block %u wait at a shuffle or barrier for ever\n", blockIdx.x);
      std::abort();
    }
  }
  block = nullptr;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(~uint64_t{0}, static_cast<int>(blockDim.x)); }
inline void __threadfence() {}
inline float __expf(float x) { return std::exp(x); }
inline double __ldcg(const double* from) { return *from; }
inline int __ldcg(const int* from) { return *from; }
inline int atomicAdd(int* to, int value) { return (*to += value) - value; }
inline int atomicMax(int* to, int value) {
  const int before = *to;
  if (value > before) *to = value;
  return before;
}
inline void __syncwarp(unsigned mask) {
  cuda_on_cpu::wait(uint64_t{1} << 40 | uint64_t{threadIdx.x / 32} << 32 | mask, __builtin_popcount(mask));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  const unsigned thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (!(mask >> lane & 1) || !(mask >> (lane ^ step) & 1)) {
    std::fprintf(stderr, "cuda_on_cpu: lane %u shuffles by %d outside its mask %08x\n", lane, step, mask);
    std::abort();
  }
  const uint64_t key = uint64_t{warp} << 32 | mask;
  std::memcpy(&cuda_on_cpu::block->lanes[thread], &value, sizeof value);
  cuda_on_cpu::wait(key, __builtin_popcount(mask));
  std::memcpy(&value, &cuda_on_cpu::block->lanes[thread ^ step], sizeof value);
  cuda_on_cpu::wait(key, __builtin_popcount(mask));
  return value;
}

namespace sdfast {

using std::exp;
using std::log;

// A device of two multiprocessors that hold one block each, so that every loop over a grid takes several turns.
class CudaStream {
 public:
  explicit CudaStream(const Tensor&) {}
  int multiprocessors() const { return 2; }
  int max_shared_bytes() const { return cuda_on_cpu::setting("SDFAST_EMULATED_SHARED", 227 << 10); }
  template <class Kernel>
  int resident_blocks(const Kernel&, int, int) const {
    return multiprocessors();
  }
  template <class Kernel, class... Arguments>
  void launch(const Kernel& kernel, int blocks, int threads, int shared_bytes, const Arguments&... arguments) const {
    if (blocks < 1 || threads < 32 || threads > 1024 || threads % 32 || shared_bytes > max_shared_bytes()) {
      std::fprintf(stderr, "cuda_on_cpu: cannot launch %d blocks of %d threads, %d bytes\n", blocks, threads,
                   shared_bytes);
      std::abort();
    }
    ++cuda_on_cpu::launches;
    blockDim.x = threads, gridDim.x = blocks;
    for (int b = 0; b < blocks; ++b) {
      blockIdx.x = b;
      cuda_on_cpu::shared.assign(shared_bytes + 16, char(0xff));  // NaN in every dtype
      cuda_on_cpu::run_block(threads, [&] { kernel(arguments...); });
    }
  }
};

inline char* dynamic_shared() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(cuda_on_cpu::shared.data()) + 15) & ~uintptr_t{15});
}

}  // namespace sdfast

extern "C" int sdfast_emulated_launches() { return cuda_on_cpu::launches; }
