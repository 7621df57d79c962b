// The CUDA backend as operations of their own on CPU tensors, its kernels run by cuda_on_cpu.h.
#include "cuda_on_cpu.h"

#define SDFAST_LAUNCH_CUH  // cuda_on_cpu.h stands in for it
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(sdfast_emulated, CPU, m, C10_UID)

#include "../../csrc/self_distillation/cuda.cu"
