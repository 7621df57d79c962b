// The bank's CUDA backend as an operation of its own on CPU tensors, its kernels run by cuda_on_cpu.h.
#include "cuda_on_cpu.h"

#define SDFAST_LAUNCH_CUH  // cuda_on_cpu.h stands in for it
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(sdfast_emulated_bank, CPU, m, C10_UID)

#include "../../csrc/prediction_bank/cuda.cu"
