// Computed: the lower triangle of X Xᵀ added to a total. Fused: the turning of X, the promotion of the sums.
// Never materialised: a product of the size of the total in the dtype of X; what stands above the diagonal.
//
// Columns are shared out to the threads, each of which sums up a triangle of its own: no thread waits for another, and
// the order of the sums depends on the number of threads alone.
#pragma once

#include <vector>

#include "../sample_gradients/cpu_multiply.h"
#include "../sample_gradients/cpu_pack.h"
#include "cpu_add.h"

namespace sdfast::gram {

constexpr int64_t kColumns = 128;    // that are turned at once: a strip of them stays in the first cache
constexpr int64_t kPromoted = 1024;  // terms of a sum in the dtype of X
constexpr int64_t kStrip = 32;       // columns of the triangle that are computed together

// Entries from one row of the triangle to the next: whole cache lines, an odd number of them, so that rows do not crowd
// into a few sets of the cache.
template <class T>
int64_t pitch_of(int64_t rows) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return ((rows + kStrip - 1) / kStrip * kStrip / kLine | 1) * kLine;
}

// Into the second cache, while what came before is multiplied: short pieces of many rows, which no prefetcher foresees.
template <class T>
void fetch(const T* x, int64_t stride, int64_t rows, int64_t count) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < count; k += 64 / sizeof(T)) __builtin_prefetch(x + i * stride + k, 0, 2);
}

// total[i, j] += Σ_k x[i, k] x[j, k] for j <= i and the columns from `begin` to `end`.
template <class T>
void sum_columns(const T* x, int64_t stride, int64_t rows, int64_t begin, int64_t end, double* total) {
  using sample_gradients::Buffer;
  const int64_t pitch = pitch_of<T>(rows), offset = 0;
  const Buffer<T> turned(kColumns * pitch), sums(rows * pitch);
  for (int64_t part = begin; part < end; part += kPromoted) {
    const int64_t last = std::min(part + kPromoted, end);
    for (int64_t first = part; first < last; first += kColumns) {
      const int64_t count = std::min(kColumns, last - first);
      sample_gradients::transpose(turned.get(), pitch, x + first, stride, count, rows);
      if (first + count < end) fetch(x + first + count, stride, rows, std::min(kColumns, end - first - count));
      const sample_gradients::Lines lines = {&offset, &offset, 0, 1, count, pitch, pitch};
      for (int64_t j = 0; j < rows; j += kStrip)
        sample_gradients::multiply_all(turned.get() + j, rows - j, turned.get() + j, std::min(kStrip, rows - j), lines,
                                       sums.get() + j * pitch + j, pitch, first > part);
    }
    for (int64_t i = 0; i < rows; ++i) add_row<double, T>(total + i * rows, sums.get() + i * pitch, nullptr, i + 1);
  }
}

template <class To, class T>
void add_triangle(Tensor& total, const Tensor& x) {
  const int64_t rows = x.size(0), columns = x.size(1), threads = torch::stable::get_num_threads();
  const int64_t parts = std::max<int64_t>(1, std::min(threads, columns / kColumns));
  const int64_t share = (columns + parts - 1) / parts;
  std::vector<double> sums(parts * rows * rows);
  const T* data = x.const_data_ptr<T>();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      sum_columns(data, x.stride(0), rows, part * share, std::min(columns, (part + 1) * share),
                  sums.data() + part * rows * rows);
  });
  To* to = total.mutable_data_ptr<To>();
  const int64_t grain = std::max<int64_t>(1, 65536 / (parts * rows + 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t part = 0; part < parts; ++part)
        add_row<To, double>(to + i * total.stride(0), sums.data() + (part * rows + i) * rows, nullptr, i + 1);
  });
}

}  // namespace sdfast::gram
