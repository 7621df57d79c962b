// Computed: total += product, or total += product ∘ factor, over a lower triangle or a whole tile, on the CPU.
// Fused: the promotion of a float32 product to the float64 total, the second factor, the triangle.
// Never materialised: the promoted product, the product of the factors.
#include "cpu_triangle.h"
#include "kernel.h"

namespace sdfast::gram {
namespace {

template <class To, class From>
void add_all(Tensor& total, const Tensor& product, const OptionalTensor& factor, int64_t diagonal) {
  const int64_t rows = total.size(0), columns = total.size(1);
  To* to = total.mutable_data_ptr<To>();
  const From* from = product.const_data_ptr<From>();
  const From* other = factor ? factor->const_data_ptr<From>() : nullptr;
  const int64_t to_stride = total.stride(0), from_stride = product.stride(0);
  const int64_t other_stride = factor ? factor->stride(0) : 0;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 32768 / (columns + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      add_row(to + i * to_stride, from + i * from_stride, other ? other + i * other_stride : nullptr,
              columns_of(i, diagonal, columns));
  });
}

void add_product(Tensor total, Tensor product, OptionalTensor factor, std::optional<int64_t> diagonal) {
  const int64_t last = diagonal ? *diagonal : kAll;
  const bool wide = total.scalar_type() == ScalarType::Double;
  if (product.scalar_type() == ScalarType::Double)
    wide ? add_all<double, double>(total, product, factor, last) : add_all<float, double>(total, product, factor, last);
  else
    wide ? add_all<double, float>(total, product, factor, last) : add_all<float, float>(total, product, factor, last);
}

template <class To, class T>
void add_product_of(Tensor& total, const Tensor& left, const OptionalTensor& right) {
  if (!right && left.size(0) <= kFewRows)
    add_triangle<To, T>(total, left);
  else
    add_tiles<To, T>(total, left, right);
}

void add_products(Tensor total, Tensor left, OptionalTensor right) {
  const bool wide = total.scalar_type() == ScalarType::Double;
  if (left.scalar_type() == ScalarType::Double)
    add_product_of<double, double>(total, left, right);
  else
    wide ? add_product_of<double, float>(total, left, right) : add_product_of<float, float>(total, left, right);
}

void add_factor_products(Tensor total, Tensor a, Tensor b, OptionalTensor other_a, OptionalTensor other_b, bool bias) {
  const bool wide = total.scalar_type() == ScalarType::Double;
  if (a.scalar_type() == ScalarType::Double)
    add_factor_tiles<double, double>(total, a, b, other_a, other_b, bias);
  else
    wide ? add_factor_tiles<double, float>(total, a, b, other_a, other_b, bias)
         : add_factor_tiles<float, float>(total, a, b, other_a, other_b, bias);
}

}  // namespace
}  // namespace sdfast::gram

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("_gram_add", TORCH_BOX(&sdfast::gram::add_product));
  m.impl("_gram_rows", TORCH_BOX(&sdfast::gram::add_products));
  m.impl("_gram_factors", TORCH_BOX(&sdfast::gram::add_factor_products));
}
