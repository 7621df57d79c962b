// Launching kernels: the current stream, the device's limits, the launch itself. tests/native stands in for this file
// to run the kernels on a CPU.
#ifndef SDFAST_LAUNCH_CUH
#define SDFAST_LAUNCH_CUH

#include "stable.h"

#include <cuda_runtime.h>

namespace sdfast {

// The device of a tensor made current, and its current stream: those of the caller, graph capture included.
class CudaStream {
 public:
  explicit CudaStream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cudaGetDevice(&device_));
  }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int max_shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // How many blocks the whole device runs at once.
  template <class Kernel>
  int resident_blocks(const Kernel& kernel, int threads, int shared_bytes) const {
    allow_shared(kernel, shared_bytes);
    int blocks;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
    return blocks * multiprocessors();
  }

  template <class Kernel, class... Arguments>
  void launch(const Kernel& kernel, int blocks, int threads, int shared_bytes, const Arguments&... arguments) const {
    allow_shared(kernel, shared_bytes);
    kernel<<<blocks, threads, shared_bytes, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  int device_;

  int attribute(cudaDeviceAttr name) const {
    int value;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device_));
    return value;
  }

  template <class Kernel>
  void allow_shared(const Kernel& kernel, int bytes) const {
    constexpr int kWithoutAsking = 48 << 10;
    if (bytes > kWithoutAsking)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
};

__device__ inline char* dynamic_shared() {
  extern __shared__ int4 bytes[];  // int4: aligned to 16
  return reinterpret_cast<char*>(bytes);
}

}  // namespace sdfast

#endif
