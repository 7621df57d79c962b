// Computed: Y = H X for a symmetric H and a block of vectors X; and whether H is finite and symmetric.
// Fused: an entry h_ij below the diagonal serves y_i += h x_j and y_j += h x_i; float32 may be summed in float64.
// Never materialised: the upper triangle is not read by the product, and no float64 copy of a float32 H is made.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/stable.h"
#include "../common/vec.h"
#include "cpu_symmetry.h"

namespace sdfast::eigenspace {
namespace {

using vec::kLanes;
using vec::Lanes;

constexpr int64_t kTileRows = 64;
constexpr int64_t kTileColumns = 256;
constexpr int64_t kPanel = 32;  // columns of X that share one reading of H
constexpr int64_t kTasks = 8;   // fixed, each with its own Y: sums do not depend on the number of threads

// One pass over some columns of X, packed as (vector group, point, lane).
template <class S, class A>
struct Pass {
  const S* matrix;
  int64_t stride, points;
  const A* x;
};

// Rows i..i+R of H against columns [from, to), both ways.
template <class S, class A, int V, int R>
SDFAST_INLINE void off_diagonal(const Pass<S, A>& pass, const A* x, A* y, int64_t i, int64_t from, int64_t to) {
  constexpr int L = kLanes<A>;
  Lanes<A> row_x[R][V], row_y[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      row_x[r][v] = vec::load(x + ((i + r) * V + v) * L);
      row_y[r][v] = Lanes<A>{};
    }
  }
  const S* h = pass.matrix + i * pass.stride;
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t line = from; line < to; line += kLine) {
    // The next rows: their stretches are too short for the processor to see them coming.
    for (int r = 0; r < R; ++r) __builtin_prefetch(h + (R + r) * pass.stride + line);
    for (int64_t j = line; j < std::min(to, line + kLine); ++j) {
      Lanes<A> column_x[V], column_y[V];
      for (int v = 0; v < V; ++v) {
        column_x[v] = vec::load(x + (j * V + v) * L);
        column_y[v] = vec::load(y + (j * V + v) * L);
      }
      for (int r = 0; r < R; ++r) {
        const A entry = static_cast<A>(h[r * pass.stride + j]);
        for (int v = 0; v < V; ++v) {
          row_y[r][v] += entry * column_x[v];
          column_y[v] += entry * row_x[r][v];
        }
      }
      for (int v = 0; v < V; ++v) vec::store(y + (j * V + v) * L, column_y[v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      A* out = y + ((i + r) * V + v) * L;
      vec::store(out, vec::load(out) + row_y[r][v]);
    }
  }
}

// The triangle of rows [first, last) on the diagonal.
template <class S, class A, int V>
SDFAST_INLINE void on_diagonal(const Pass<S, A>& pass, const A* x, A* y, int64_t first, int64_t last) {
  constexpr int L = kLanes<A>;
  for (int64_t i = first; i < last; ++i) {
    if (i > first) off_diagonal<S, A, V, 1>(pass, x, y, i, first, i);
    const A entry = static_cast<A>(pass.matrix[i * pass.stride + i]);
    for (int v = 0; v < V; ++v) {
      A* out = y + (i * V + v) * L;
      vec::store(out, vec::load(out) + entry * vec::load(x + (i * V + v) * L));
    }
  }
}

// Rows [first, last) of the lower triangle times `groups` groups of V vectors, added to y.
template <class S, class A, int V, int R>
SDFAST_INLINE void triangle(const Pass<S, A>& pass, A* y, int64_t groups, int64_t first, int64_t last) {
  const int64_t group_size = pass.points * V * kLanes<A>;
  for (int64_t block = first; block < last; block += kTileRows) {
    const int64_t end = std::min(last, block + kTileRows);
    for (int64_t from = 0; from < block; from += kTileColumns) {
      const int64_t to = std::min(block, from + kTileColumns);
      for (int64_t g = 0; g < groups; ++g) {
        int64_t i = block;
        for (; i + R <= end; i += R)
          off_diagonal<S, A, V, R>(pass, pass.x + g * group_size, y + g * group_size, i, from, to);
        for (; i < end; ++i) off_diagonal<S, A, V, 1>(pass, pass.x + g * group_size, y + g * group_size, i, from, to);
      }
    }
    for (int64_t g = 0; g < groups; ++g)
      on_diagonal<S, A, V>(pass, pass.x + g * group_size, y + g * group_size, block, end);
  }
}

SDFAST_CLONES void triangle_narrow(const Pass<float, float>& pass, float* y, int64_t groups, int64_t a, int64_t b) {
  triangle<float, float, 1, 6>(pass, y, groups, a, b);
}
SDFAST_CLONES void triangle_wide(const Pass<float, float>& pass, float* y, int64_t groups, int64_t a, int64_t b) {
  triangle<float, float, 2, 4>(pass, y, groups, a, b);
}
SDFAST_CLONES void triangle_narrow(const Pass<float, double>& pass, double* y, int64_t groups, int64_t a, int64_t b) {
  triangle<float, double, 1, 6>(pass, y, groups, a, b);
}
SDFAST_CLONES void triangle_wide(const Pass<float, double>& pass, double* y, int64_t groups, int64_t a, int64_t b) {
  triangle<float, double, 2, 4>(pass, y, groups, a, b);
}
SDFAST_CLONES void triangle_narrow(const Pass<double, double>& pass, double* y, int64_t groups, int64_t a, int64_t b) {
  triangle<double, double, 1, 6>(pass, y, groups, a, b);
}
SDFAST_CLONES void triangle_wide(const Pass<double, double>& pass, double* y, int64_t groups, int64_t a, int64_t b) {
  triangle<double, double, 2, 4>(pass, y, groups, a, b);
}

// Columns [first, first + columns) of Y; columns <= kPanel.
template <class S, class A>
void multiply_panel(const S* matrix, int64_t stride, const Tensor& panel, A* out, int64_t first, int64_t columns) {
  const int64_t points = panel.size(0), width = panel.size(1);
  const A* from = panel.const_data_ptr<A>();
  const int64_t row_step = panel.stride(0), column_step = panel.stride(1);
  const bool wide = columns > kLanes<A>;
  const int64_t lanes = (wide ? 2 : 1) * kLanes<A>, groups = (columns + lanes - 1) / lanes;
  const int64_t size = groups * points * lanes;
  std::vector<A> x(size), sums(kTasks * size);
  for (int64_t c = 0; c < columns; ++c) {
    A* to = x.data() + c / lanes * points * lanes + c % lanes;
    for (int64_t i = 0; i < points; ++i) to[i * lanes] = from[i * row_step + (first + c) * column_step];
  }
  const Pass<S, A> pass = {matrix, stride, points, x.data()};
  const auto border = [points](int64_t task) {  // equal areas of the triangle
    return static_cast<int64_t>(std::sqrt(static_cast<double>(task) / kTasks) * points + 0.5);
  };
  torch::stable::parallel_for(0, kTasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      A* y = sums.data() + task * size;
      if (wide) {
        triangle_wide(pass, y, groups, border(task), border(task + 1));
      } else {
        triangle_narrow(pass, y, groups, border(task), border(task + 1));
      }
    }
  });
  for (int64_t i = 0; i < points; ++i) {
    int64_t task = 0;
    while (border(task + 1) <= i) ++task;  // earlier tasks end above row i
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t at = (c / lanes * points + i) * lanes + c % lanes;
      A sum = 0;
      for (int64_t t = task; t < kTasks; ++t) sum += sums[t * size + at];
      out[i * width + first + c] = sum;
    }
  }
}

template <class S, class A>
Tensor multiply(const Tensor& matrix, const Tensor& panel, ScalarType type) {
  Tensor out = new_tensor(matrix, {panel.size(0), panel.size(1)}, type);
  for (int64_t first = 0; first < panel.size(1); first += kPanel)
    multiply_panel<S, A>(matrix.const_data_ptr<S>(), matrix.stride(0), panel, out.mutable_data_ptr<A>(), first,
                         std::min(kPanel, panel.size(1) - first));
  return out;
}

// The Python side has checked the shapes: matrix (points, points) with rows of stride 1, panel (points, columns).
Tensor symmetric_product(const Tensor& matrix, const Tensor& panel) {
  const bool single = matrix.scalar_type() == ScalarType::Float, sum_single = panel.scalar_type() == ScalarType::Float;
  if (single && sum_single) return multiply<float, float>(matrix, panel, ScalarType::Float);
  if (single) return multiply<float, double>(matrix, panel, ScalarType::Double);
  return multiply<double, double>(matrix, panel, ScalarType::Double);
}

// (largest |h|, or infinity where an entry is NaN or infinite; largest |h - h transposed|) as float64.
Tensor symmetry(const Tensor& matrix) {
  const Extremes found = matrix.scalar_type() == ScalarType::Float ? extremes<float>(matrix) : extremes<double>(matrix);
  Tensor out = new_tensor(matrix, {2}, ScalarType::Double);
  double* values = out.mutable_data_ptr<double>();
  values[0] = found.largest;
  values[1] = found.asymmetry;
  return out;
}

}  // namespace
}  // namespace sdfast::eigenspace

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, library) {
  library.impl("_symmetric_product", TORCH_BOX(&sdfast::eigenspace::symmetric_product));
  library.impl("_symmetry", TORCH_BOX(&sdfast::eigenspace::symmetry));
}
