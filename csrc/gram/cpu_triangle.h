// Computed: the lower triangle of X Xᵀ added to a total. Fused: the turning of X, the promotion of the sums.
// Never materialised: a product of the size of the total in the dtype of X; what stands above the diagonal.
//
// Columns are shared out to the threads, each of which sums up a triangle of its own: no thread waits for another, and
// the order of the sums depends on the number of threads alone.
#pragma once

#include <vector>

#include "cpu_tiles.h"

namespace sdfast::gram {

constexpr int64_t kFewRows = 256;    // of a triangle: beyond, tiles of it are shared out
constexpr int64_t kPromoted = 1024;  // terms of a sum in the dtype of X

// The next columns of some rows at each call, into the second cache: short pieces, which no prefetcher foresees.
template <class T>
struct RowsAhead {
  const T* x;
  int64_t stride, rows, columns, share;
  int64_t row = 0;

  void fetch() {
    for (const int64_t last = std::min(rows, row + share); row < last; ++row)
      for (int64_t k = 0; k < columns; k += 64 / sizeof(T)) __builtin_prefetch(x + row * stride + k, 0, 2);
  }
};

// total[i, j] += Σ_k x[i, k] x[j, k] for j <= i and the columns from `begin` to `end`.
template <class T>
void sum_columns(const T* x, int64_t stride, int64_t rows, int64_t begin, int64_t end, double* total) {
  Panels<T> panels(rows);
  const int64_t pitch =
      panels.count() * panels.lanes() + panels.lanes();  // rows do not crowd into a few sets of a cache
  const sample_gradients::Buffer<T> sums(panels.count() * panels.lanes() * pitch);
  for (int64_t part = begin; part < end; part += kPromoted) {
    const int64_t last = std::min(part + kPromoted, end);
    for (int64_t first = part; first < last; first += kColumns) {
      const int64_t count = std::min(kColumns, last - first);
      for (int64_t panel = 0; panel < panels.count(); ++panel)
        panels.turn(panel, x + panel * panels.lanes() * stride + first, stride, count);
      const int64_t products = panels.count() * (panels.count() + kTogether) / kTogether;
      RowsAhead<T> ahead = {x + first + count, stride, rows, std::min(kColumns, end - first - count),
                            rows / products + 1};
      multiply_strip(panels, panels, true, count, sums.get(), pitch, first > part, [&] { ahead.fetch(); });
    }
    for (int64_t i = 0; i < rows; ++i) add_row<double, T>(total + i * rows, sums.get() + i * pitch, nullptr, i + 1);
  }
}

template <class To, class T>
void add_triangle(Tensor& total, const Tensor& x) {
  const int64_t rows = x.size(0), columns = x.size(1), threads = torch::stable::get_num_threads();
  if (rows == 0) return;
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
