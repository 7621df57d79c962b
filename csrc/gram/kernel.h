// Which entries of a tile belong to the lower triangle of the whole Gram matrix.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sdfast::gram {

constexpr int64_t kAll = INT64_MAX;  // no triangle: every column

// Columns of row i, where `diagonal` is the column of row 0 that lies on the diagonal.
inline int64_t columns_of(int64_t i, int64_t diagonal, int64_t columns) {
  return diagonal == kAll ? columns : std::max<int64_t>(0, std::min(columns, i + diagonal + 1));
}

}  // namespace sdfast::gram
