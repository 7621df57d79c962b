// Computed: for every sample its own gradients of a convolution's weight and of a normalisation's scale and shift.
// Fused: padding, the order of the channels, the sum over positions and the order of the weight, a sample at a time.
// Never materialised: an unfolded or normalised input; a thread keeps one packed sample and a tile of results.
#include "cpu_convolution.h"
#include "cpu_normalization.h"

namespace sdfast::sample_gradients {
namespace {

Layout layout_of(const Tensor& tensor) {  // (samples, rows, channels, depth, height, width)
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), {tensor.stride(3), tensor.stride(4), tensor.stride(5)}};
}

template <class T>
void convolution_as(const Geometry& geometry, const Tensor& input, const Tensor& gradient, Tensor& out, bool add) {
  const T *inputs = input.const_data_ptr<T>(), *gradients = gradient.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const Layout input_layout = layout_of(input), gradient_layout = layout_of(gradient);
  const DenseGroups<T> dense(geometry, input_layout, gradient_layout);
  const GroupLanes<T> lanes(geometry, input_layout, gradient_layout);
  if (geometry.groups > 1 && lanes.cost() < dense.cost())
    lanes.run(inputs, gradients, to, out.stride(0), add);
  else
    dense.run(inputs, gradients, to, out.stride(0), add);
}

void convolution(Tensor input, Tensor gradient, Tensor out, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool accumulate) {
  Geometry geometry{input.size(0), input.size(1), groups, input.size(2) / groups, gradient.size(2) / groups};
  for (int axis = 0; axis < kSpace; ++axis) {
    geometry.in[axis] = input.size(3 + axis);
    geometry.out[axis] = gradient.size(3 + axis);
    geometry.kernel[axis] = kernel[axis];
    geometry.stride[axis] = stride[axis];
    geometry.padding[axis] = padding[axis];
    geometry.dilation[axis] = dilation[axis];
  }
  if (geometry.samples == 0 || geometry.width() == 0) return;
  if (geometry.positions() == 0) {
    if (!accumulate)
      for (int64_t i = 0; i < geometry.samples; ++i)
        std::memset(static_cast<char*>(out.mutable_data_ptr()) + i * out.stride(0) * out.element_size(), 0,
                    geometry.width() * out.element_size());
    return;
  }
  if (input.scalar_type() == ScalarType::Double)
    convolution_as<double>(geometry, input, gradient, out, accumulate);
  else
    convolution_as<float>(geometry, input, gradient, out, accumulate);
}

void channels(std::optional<Tensor> input, Tensor gradient, std::optional<Tensor> mean, std::optional<Tensor> rstd,
              std::optional<Tensor> weight, std::optional<Tensor> bias, bool accumulate) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto view = [](const std::optional<Tensor>& tensor) { return tensor ? View<T>(*tensor) : View<T>(); };
    channel_sums<T>(gradient.size(0), gradient.size(1), gradient.size(2), gradient.size(3), view(input),
                    View<T>(gradient), view(mean), view(rstd), Sums<T>(weight, accumulate), Sums<T>(bias, accumulate));
  };
  gradient.scalar_type() == ScalarType::Double ? run(0.0) : run(0.f);
}

void positions(Tensor input, Tensor gradient, bool centered, double eps, std::optional<Tensor> weight,
               std::optional<Tensor> bias, bool accumulate) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    position_sums<T>(gradient.size(0), gradient.size(1), gradient.size(2), View<T>(input), View<T>(gradient), centered,
                     static_cast<T>(eps), Sums<T>(weight, accumulate), Sums<T>(bias, accumulate));
  };
  gradient.scalar_type() == ScalarType::Double ? run(0.0) : run(0.f);
}

}  // namespace
}  // namespace sdfast::sample_gradients

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("_sample_convolution", TORCH_BOX(&sdfast::sample_gradients::convolution));
  m.impl("_sample_channels", TORCH_BOX(&sdfast::sample_gradients::channels));
  m.impl("_sample_positions", TORCH_BOX(&sdfast::sample_gradients::positions));
}
