// total += product, total += product ∘ factor, or total += (product + one) ∘ factor, of one row.
#pragma once

#include "../common/stable.h"
#include "../common/vec.h"

namespace sdfast::gram {

template <class To, class From>
SDFAST_INLINE void add(To* total, const From* product, const From* factor, int64_t count) {
  using Wide = std::conditional_t<sizeof(To) >= sizeof(From), To, From>;
  if (factor) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j)
      total[j] += static_cast<To>(static_cast<Wide>(product[j]) * static_cast<Wide>(factor[j]));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) total[j] += static_cast<To>(product[j]);
  }
}

template <class To, class From>
SDFAST_CLONES void add_row(To* total, const From* product, const From* factor, int64_t count) {
  add(total, product, factor, count);
}

template <class To, class From>
SDFAST_CLONES void add_factors(To* total, const From* product, const From* factor, To one, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) total[j] += (static_cast<To>(product[j]) + one) * static_cast<To>(factor[j]);
}

}  // namespace sdfast::gram
