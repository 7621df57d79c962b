// Rows of a CPU tensor of any floating dtype and stride, read and written in the dtype a kernel computes in.
#pragma once

#include "stable.h"

#include <algorithm>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "vec.h"

namespace sdfast {

namespace detail {

template <class T, class From>
SDFAST_INLINE void read(T* to, const From* from, int64_t stride, int64_t count) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(static_cast<float>(from[j]));
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(static_cast<float>(from[j * stride]));
  }
}

template <class T>
SDFAST_CLONES void read_bfloat16(T* to, const BFloat16* from, int64_t stride, int64_t count) {
  read(to, from, stride, count);
}
template <class T>
SDFAST_CLONES void read_half(T* to, const Half* from, int64_t stride, int64_t count) {
  read(to, from, stride, count);
}

template <class To>
SDFAST_INLINE void write(To* to, const float* from, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = static_cast<To>(from[j]);
}
SDFAST_CLONES inline void write_bfloat16(BFloat16* to, const float* from, int64_t count) { write(to, from, count); }
SDFAST_CLONES inline void write_half(Half* to, const float* from, int64_t count) { write(to, from, count); }

}  // namespace detail

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// A read-only (rows, columns) view; absent when built from no tensor.
struct Rows {
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t row_stride = 0, column_stride = 0, columns = 0;

  Rows() = default;
  explicit Rows(const Tensor& tensor)
      : data(tensor.const_data_ptr()),
        type(tensor.scalar_type()),
        row_stride(tensor.stride(0)),
        column_stride(tensor.stride(1)),
        columns(tensor.size(1)) {}

  explicit operator bool() const { return data != nullptr; }

  template <class T>
  bool direct() const {
    return column_stride == 1 && type == kType<T>;
  }

  // The row itself where it already has the wanted dtype and unit stride, else a copy in scratch.
  template <class T>
  const T* row(int64_t i, T* scratch) const {
    switch (type) {
      case ScalarType::Float:
        return from<T>(static_cast<const float*>(data) + i * row_stride, scratch);
      case ScalarType::Double:
        return from<T>(static_cast<const double*>(data) + i * row_stride, scratch);
      case ScalarType::BFloat16:
        detail::read_bfloat16(scratch, static_cast<const BFloat16*>(data) + i * row_stride, column_stride, columns);
        return scratch;
      default:
        detail::read_half(scratch, static_cast<const Half*>(data) + i * row_stride, column_stride, columns);
        return scratch;
    }
  }

 private:
  template <class T, class From>
  const T* from(const From* first, T* scratch) const {
    if constexpr (std::is_same_v<T, From>) {
      if (column_stride == 1) return first;
    }
    for (int64_t j = 0; j < columns; ++j) scratch[j] = static_cast<T>(first[j * column_stride]);
    return scratch;
  }
};

// A writable contiguous (rows, columns) tensor; absent when built from an empty one.
struct OutputRows {
  void* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t columns = 0;

  OutputRows() = default;
  explicit OutputRows(Tensor& tensor)
      : data(tensor.mutable_data_ptr()), type(tensor.scalar_type()), columns(tensor.size(1)) {}

  explicit operator bool() const { return data != nullptr; }

  // Where a kernel computing in T may write row i directly; null where it must go through `write`.
  template <class T>
  T* direct(int64_t i) const {
    const bool same = type == kType<T>;
    return same && data ? static_cast<T*>(data) + i * columns : nullptr;
  }

  void write(int64_t i, const float* from) const {
    if (type == ScalarType::BFloat16)
      detail::write_bfloat16(static_cast<BFloat16*>(data) + i * columns, from, columns);
    else
      detail::write_half(static_cast<Half*>(data) + i * columns, from, columns);
  }
  void write(int64_t, const double*) const {}  // float64 rows are always written directly
};

// A large fresh buffer costs more in page faults than in arithmetic: ask for 2 MiB pages before the first touch.
inline void use_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  if (last >= first + 2 * kPage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// How one row's columns are walked: in chunks whose borders depend on the column count alone, so that the sums are the
// same bits whether a thread takes the whole row or every thread takes a part of it.
struct Columns {
  static constexpr int64_t kChunk = 8192;
  int64_t count;
  bool parallel;

  // fold(begin, end) -> Result over the chunks, joined from left to right by join(Result, Result) -> Result
  template <class Result, class Fold, class Join>
  Result fold(const Fold& fold, const Join& join) const {
    if (count <= kChunk) return fold(int64_t{0}, count);
    const int64_t chunks = (count + kChunk - 1) / kChunk;
    std::vector<Result> parts(chunks);
    each(chunks, [&](int64_t c) { parts[c] = fold(c * kChunk, std::min(count, (c + 1) * kChunk)); });
    Result all = parts[0];
    for (int64_t c = 1; c < chunks; ++c) all = join(all, parts[c]);
    return all;
  }

  // apply(begin, end) over the chunks
  template <class Apply>
  void apply(const Apply& apply) const {
    each((count + kChunk - 1) / kChunk, [&](int64_t c) { apply(c * kChunk, std::min(count, (c + 1) * kChunk)); });
  }

 private:
  template <class Body>
  void each(int64_t chunks, const Body& body) const {
    if (!parallel) {
      for (int64_t c = 0; c < chunks; ++c) body(c);
      return;
    }
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) body(c);
    });
  }
};

// Rows go to threads; rows fewer than the threads and long are split by columns instead. body(begin, end,
// split_columns)
template <class Body>
void over_rows(int64_t rows, int64_t classes, const Body& body) {
  constexpr int64_t kGrain = 32768;  // entries worth waking a thread for
  if (rows < static_cast<int64_t>(torch::stable::get_num_threads()) && classes >= 2 * Columns::kChunk) {
    body(0, rows, true);
  } else if (rows * classes <= kGrain) {
    body(0, rows, false);
  } else {
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / classes),
                                [&](int64_t begin, int64_t end) { body(begin, end, false); });
  }
}

// A contiguous gradient beside (N, C) logits.
inline Tensor new_gradient(const Tensor& logits, ScalarType type) {
  Tensor gradient = new_tensor(logits, {logits.size(0), logits.size(1)}, type);
  use_huge_pages(gradient.mutable_data_ptr(), gradient.numel() * gradient.element_size());
  return gradient;
}

}  // namespace sdfast
