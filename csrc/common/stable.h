// The one place that includes torch: LibTorch's stable ABI, never ATen.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;
using OptionalTensor = std::optional<Tensor>;

// The dtype that sums, losses and weights have.
template <class T>
constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// pybind11, which carries torch.ops calls, turns std::invalid_argument into ValueError and std::out_of_range into
// IndexError; STD_TORCH_CHECK would give a RuntimeError that starts with a source path.
template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

// An uninitialised contiguous tensor beside `like`. The C shim directly: the dispatcher's boxed `new_empty` takes three
// times as long, which shows in a loss of 128 x 10.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[8], step = 1;
  const int64_t dims = static_cast<int64_t>(sizes.size());
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes.begin()[d];
  }
  int32_t device_type, dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.begin(), strides, dtype, device_type, like.get_device_index(), &made));
  return Tensor(made);
}

}  // namespace sdfast
