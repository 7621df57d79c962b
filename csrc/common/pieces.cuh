// How a team of threads walks a row: in pieces of 16 bytes, each read and written by one thread alone.
//
// Where every row starts on 16 bytes a piece is consecutive columns, one load or store. Elsewhere it is columns a team
// apart, so that each of its loads is still coalesced. Which columns a thread gets depends on C and that choice alone.
#pragma once

#include "stable.h"

#include <cstring>
#include <type_traits>

#include "reduce.cuh"

namespace sdfast {

template <class In>
using Accumulated = std::conditional_t<std::is_same_v<In, double>, double, float>;  // what sums and formulas are in

template <class In>
struct alignas(16) Piece {
  static constexpr int kSize = 16 / sizeof(In);
  In at[kSize];
};

template <class In>
__device__ inline void copy(Piece<In>* to, const Piece<In>* from) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

template <class In, bool kAligned>
struct Layout {
  static constexpr int kSize = Piece<In>::kSize;
  Team team;
  int columns;

  // Pieces of this thread.
  __device__ int steps() const {
    const int units = kAligned ? columns / kSize : columns;
    const int stride = kAligned ? team.size : team.size * kSize;
    return team.rank < units ? (units - team.rank - 1) / stride + 1 : 0;
  }
  __device__ int column(int step, int j) const {
    return kAligned ? (step * team.size + team.rank) * kSize + j : (step * kSize + j) * team.size + team.rank;
  }
  __device__ bool holds(int step, int j) const { return kAligned || column(step, j) < columns; }
  __device__ bool owns(int column) const {
    return ((kAligned ? column / kSize : column) & (team.size - 1)) == team.rank;
  }
};

// A read-only (rows, columns) tensor of any floating dtype and strides; absent where data is null.
struct Operand {
  const void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  ScalarType type = ScalarType::Float;

  Operand() = default;
  explicit Operand(const Tensor& tensor)
      : data(tensor.const_data_ptr()),
        row_stride(tensor.stride(0)),
        column_stride(tensor.stride(1)),
        type(tensor.scalar_type()) {}

  // Whether each row is whole pieces of In.
  template <class In>
  bool in_pieces(int64_t columns, ScalarType wanted) const {
    constexpr int kSize = Piece<In>::kSize;
    return type == wanted && column_stride == 1 && columns % kSize == 0 && row_stride % kSize == 0 &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  template <class T>
  __device__ T element(int64_t row, int column) const {
    const int64_t at = row * row_stride + column * column_stride;
    switch (type) {
      case ScalarType::Float:
        return static_cast<T>(static_cast<const float*>(data)[at]);
      case ScalarType::Double:
        return static_cast<T>(static_cast<const double*>(data)[at]);
      case ScalarType::BFloat16:
        return static_cast<T>(static_cast<float>(static_cast<const BFloat16*>(data)[at]));
      default:
        return static_cast<T>(static_cast<float>(static_cast<const Half*>(data)[at]));
    }
  }

  // The same of a tensor that is known to be of In: no code for other dtypes.
  template <class T, class In, bool kAligned>
  __device__ void load_own(int64_t row, const Layout<In, kAligned>& layout, int step, T fill,
                           T (&x)[Piece<In>::kSize]) const {
    load_from(static_cast<const In*>(data), row, layout, step, fill, x);
  }

  // The columns of one piece, in a dtype of its own; `fill` past the end of the row.
  template <class T, class In, bool kAligned>
  __device__ void load(int64_t row, const Layout<In, kAligned>& layout, int step, T fill,
                       T (&x)[Piece<In>::kSize]) const {
    const auto from = [&](const auto* typed) { load_from(typed, row, layout, step, fill, x); };
    switch (type) {
      case ScalarType::Float:
        return from(static_cast<const float*>(data));
      case ScalarType::Double:
        return from(static_cast<const double*>(data));
      case ScalarType::BFloat16:
        return from(static_cast<const BFloat16*>(data));
      default:
        return from(static_cast<const Half*>(data));
    }
  }

 private:
  template <class Held, class T, class In, bool kAligned>
  __device__ void load_from(const Held* typed, int64_t row, const Layout<In, kAligned>& layout, int step, T fill,
                            T (&x)[Piece<In>::kSize]) const {
#pragma unroll
    for (int j = 0; j < Piece<In>::kSize; ++j)
      x[j] = layout.holds(step, j) ? static_cast<T>(typed[row * row_stride + layout.column(step, j) * column_stride])
                                   : fill;
  }
};

// One row of an In tensor as raw pieces, kept in shared memory from the first pass on as far as there is room: a thread
// rereads only what it wrote itself, so that no barrier is needed. What does not fit is read again, from L2.
template <class In, bool kAligned>
class CachedRow {
 public:
  static constexpr int kSize = Piece<In>::kSize;

  // `slots` pieces a thread fit into shared memory
  __device__ CachedRow(const Operand& rows, int64_t row, const Layout<In, kAligned>& layout, int slots)
      : layout_(layout),
        first_(static_cast<const In*>(rows.data) + row * rows.row_stride),
        column_stride_(rows.column_stride),
        cache_(reinterpret_cast<Piece<In>*>(dynamic_shared()) + threadIdx.x),
        slots_(slots) {}

  __device__ Piece<In> fetch(int step) const {
    Piece<In> piece;
    if (step < filled_) {
      copy(&piece, cache_ + step * blockDim.x);
    } else if constexpr (kAligned) {
      copy(&piece, reinterpret_cast<const Piece<In>*>(first_ + layout_.column(step, 0)));
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        piece.at[j] = layout_.holds(step, j) ? first_[layout_.column(step, j) * column_stride_]
                                             : In(-std::numeric_limits<float>::infinity());
    }
    return piece;
  }

  // visit(step, piece) over this thread's pieces, -inf past the end of the row. kAhead pieces are loaded before the
  // first is used; an unaligned piece is several loads by itself.
  template <int kAhead, class Visit>
  __device__ void each(const Visit& visit) {
    constexpr int kInFlight = kAligned ? kAhead : 1;
    const int steps = layout_.steps();
    for (int begin = 0; begin < steps; begin += kInFlight) {
      Piece<In> pieces[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        if (begin + u < steps) pieces[u] = fetch(begin + u);
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int step = begin + u;
        if (step >= steps) break;
        if (step >= filled_ && step < slots_) copy(cache_ + step * blockDim.x, &pieces[u]);
        visit(step, pieces[u]);
      }
    }
    filled_ = slots_ < steps ? slots_ : steps;
  }

  __device__ In operator[](int column) const { return first_[column * column_stride_]; }

 private:
  const Layout<In, kAligned> layout_;
  const In* const first_;
  const int64_t column_stride_;
  Piece<In>* const cache_;
  const int slots_;
  int filled_ = 0;
};

// One row of a contiguous In tensor, written piece by piece; or of one in the dtype that sums have, where `wide` is
// set.
template <class In, bool kAligned>
struct OutputRow {
  In* first;
  Layout<In, kAligned> layout;
  Accumulated<In>* wide = nullptr;

  __device__ void store_one(int column, Accumulated<In> value) const {
    if (wide)
      wide[column] = value;
    else
      first[column] = static_cast<In>(value);
  }

  template <class T>
  __device__ void store(int step, const T (&values)[Piece<In>::kSize]) const {
    if (wide) {
#pragma unroll
      for (int j = 0; j < Piece<In>::kSize; ++j)
        if (layout.holds(step, j)) wide[layout.column(step, j)] = values[j];
      return;
    }
    Piece<In> piece;
#pragma unroll
    for (int j = 0; j < Piece<In>::kSize; ++j) piece.at[j] = static_cast<In>(values[j]);
    if constexpr (kAligned) {
      copy(reinterpret_cast<Piece<In>*>(first + layout.column(step, 0)), &piece);
    } else {
#pragma unroll
      for (int j = 0; j < Piece<In>::kSize; ++j)
        if (layout.holds(step, j)) first[layout.column(step, j)] = piece.at[j];
    }
  }
};

}  // namespace sdfast
