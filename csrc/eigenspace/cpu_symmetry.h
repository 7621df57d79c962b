// Whether a matrix is finite and symmetric, in one pass over its rows; only one that is not is compared tile by tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "../common/stable.h"
#include "../common/vec.h"

namespace sdfast::eigenspace {

constexpr int64_t kCompared = 64;  // rows and columns of a tile that is compared with its mirror image

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// As bits, in which sizes compare as integers do, and NaN and infinity are the largest.
template <class T>
struct Found {
  Bits<T> largest = 0, different = 0;
};

// Tile rows [i, i_end) x columns [j, j_end) against its mirror image.
template <class T>
SDFAST_INLINE Found<T> compare(const T* matrix, int64_t stride, int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
  constexpr int64_t kStride = kCompared + 64 / sizeof(T);  // rows apart by more than one cache set
  T mirror[kCompared * kStride];
  for (int64_t c = j; c < j_end; ++c) {
    const T* row = matrix + c * stride + i;
    for (int64_t r = 0; r < i_end - i; ++r) mirror[r * kStride + c - j] = row[r];
  }
  Bits<T> largest = 0, different = 0;
  for (int64_t r = 0; r < i_end - i; ++r) {
    const T *row = matrix + (i + r) * stride + j, *other = mirror + r * kStride;
#pragma omp simd reduction(max : largest) reduction(| : different)
    for (int64_t c = 0; c < j_end - j; ++c) {
      Bits<T> a, b;
      std::memcpy(&a, row + c, sizeof a);
      std::memcpy(&b, other + c, sizeof b);
      different |= a ^ b;
      a &= ~Bits<T>{0} >> 1;
      b &= ~Bits<T>{0} >> 1;
      largest = std::max(largest, std::max(a, b));
    }
  }
  return {largest, different};
}

SDFAST_CLONES void compare_tile(const float* matrix, int64_t stride, int64_t i, int64_t i_end, int64_t j, int64_t j_end,
                                Found<float>* found) {
  *found = compare(matrix, stride, i, i_end, j, j_end);
}
SDFAST_CLONES void compare_tile(const double* matrix, int64_t stride, int64_t i, int64_t i_end, int64_t j,
                                int64_t j_end, Found<double>* found) {
  *found = compare(matrix, stride, i, i_end, j, j_end);
}

// Only where a tile differs from its mirror image.
template <class T>
double asymmetry_of(const T* matrix, int64_t stride, int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
  double largest = 0;
  for (int64_t r = i; r < i_end; ++r) {
    for (int64_t c = j; c < j_end; ++c)
      largest = std::max(largest, std::fabs(static_cast<double>(matrix[r * stride + c]) - matrix[c * stride + r]));
  }
  return largest;
}

// Weights of the points: sum_ij w_ij (a_i b_j - b_i a_j) is 0 modulo 2^64 for every symmetric w of 32-bit words, and
// for any other with a probability of about 2^-32, however few words differ and by however little.
struct Weights {
  std::vector<uint32_t> a, b;
  explicit Weights(int64_t points) : a(points), b(points) {
    std::mt19937 draw(2019);
    for (uint32_t& weight : a) weight = draw();
    for (uint32_t& weight : b) weight = draw();
  }
};

// Of one row: the sums of its entries' words, low and high, with a and with b; its largest entry as bits.
template <class T>
struct RowSums {
  uint64_t low_a, low_b, high_a, high_b;
  Bits<T> largest;
};

SDFAST_CLONES void sum_row(const float* row, int64_t points, const uint32_t* a, const uint32_t* b,
                           RowSums<float>* out) {
  uint64_t sum_a = 0, sum_b = 0;
  uint32_t largest = 0;
#pragma omp simd reduction(+ : sum_a, sum_b) reduction(max : largest)
  for (int64_t j = 0; j < points; ++j) {
    uint32_t word;
    std::memcpy(&word, row + j, sizeof word);
    sum_a += uint64_t{word} * a[j];
    sum_b += uint64_t{word} * b[j];
    largest = std::max(largest, word & ~0u >> 1);
  }
  *out = {sum_a, sum_b, 0, 0, largest};
}

SDFAST_CLONES void sum_row(const double* row, int64_t points, const uint32_t* a, const uint32_t* b,
                           RowSums<double>* out) {
  uint64_t low_a = 0, low_b = 0, high_a = 0, high_b = 0, largest = 0;
#pragma omp simd reduction(+ : low_a, low_b, high_a, high_b) reduction(max : largest)
  for (int64_t j = 0; j < points; ++j) {
    uint64_t words;
    std::memcpy(&words, row + j, sizeof words);
    low_a += (words & ~0u) * a[j];
    low_b += (words & ~0u) * b[j];
    high_a += (words >> 32) * a[j];
    high_b += (words >> 32) * b[j];
    largest = std::max(largest, words & ~uint64_t{0} >> 1);
  }
  *out = {low_a, low_b, high_a, high_b, largest};
}

template <class T>
double as_size(Bits<T> largest) {
  T size;
  std::memcpy(&size, &largest, sizeof size);
  return std::isfinite(size) ? size : std::numeric_limits<double>::infinity();
}

struct Extremes {
  double largest = 0, asymmetry = 0;
};

// A tile's rows are too short for the processor to see them coming.
template <class T>
void prefetch_tiles(const T* matrix, int64_t stride, int64_t i, int64_t i_end, int64_t j) {
  const int64_t rows = i_end - i;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < kCompared; c += 64 / sizeof(T)) __builtin_prefetch(matrix + (i + r) * stride + j + c);
    for (int64_t c = 0; c < rows; c += 64 / sizeof(T)) __builtin_prefetch(matrix + (j + r) * stride + i + c);
  }
}

// Tile by tile.
template <class T>
Extremes compared_extremes(const Tensor& matrix) {
  const int64_t points = matrix.size(0), stride = matrix.stride(0), blocks = (points + kCompared - 1) / kCompared;
  const T* entries = matrix.const_data_ptr<T>();
  std::vector<Extremes> rows(blocks);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = (block % 2 ? blocks - 1 - block / 2 : block / 2) * kCompared;  // long rows beside short ones
      const int64_t i_end = std::min(points, i + kCompared);
      Bits<T> largest = 0;
      for (int64_t j = 0; j <= i; j += kCompared) {
        const int64_t j_end = std::min(points, j + kCompared);
        if (j + kCompared <= i) prefetch_tiles(entries, stride, i, i_end, j + kCompared);
        Found<T> found;
        compare_tile(entries, stride, i, i_end, j, j_end, &found);
        largest = std::max(largest, found.largest);
        if (found.different)
          rows[block].asymmetry = std::max(rows[block].asymmetry, asymmetry_of(entries, stride, i, i_end, j, j_end));
      }
      rows[block].largest = as_size<T>(largest);
    }
  });
  Extremes all;
  for (const Extremes& row : rows) {
    all.largest = std::max(all.largest, row.largest);
    all.asymmetry = std::max(all.asymmetry, row.asymmetry);
  }
  return all;
}

// largest: of |h|, or infinity where an entry is NaN or infinite. asymmetry: the largest |h - h transposed|.
template <class T>
Extremes extremes(const Tensor& matrix) {
  const int64_t points = matrix.size(0), stride = matrix.stride(0);
  const T* entries = matrix.const_data_ptr<T>();
  const Weights weights(points);
  std::vector<RowSums<T>> rows(points);
  torch::stable::parallel_for(0, points, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sum_row(entries + i * stride, points, weights.a.data(), weights.b.data(), &rows[i]);
  });
  uint64_t low = 0, high = 0;
  Bits<T> largest = 0;
  for (int64_t i = 0; i < points; ++i) {
    low += weights.a[i] * rows[i].low_b - weights.b[i] * rows[i].low_a;
    high += weights.a[i] * rows[i].high_b - weights.b[i] * rows[i].high_a;
    largest = std::max(largest, rows[i].largest);
  }
  if (low != 0 || high != 0) return compared_extremes<T>(matrix);
  return {as_size<T>(largest), 0};
}

}  // namespace sdfast::eigenspace
