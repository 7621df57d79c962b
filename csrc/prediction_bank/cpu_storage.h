// The rows of a bank on the CPU, dense or top-k, read and written in the dtype a kernel computes in; and which row of a
// batch writes each of them.
#pragma once

#include "../common/rows.h"

#include <numeric>

namespace sdfast::prediction_bank {

// A bank's tensors. `classes` is absent where all of a row is stored.
struct Storage {
  void* predictions;
  ScalarType type;
  int32_t* classes = nullptr;  // (N, k)
  int32_t* seen;
  int64_t samples, columns, top_k = 0;

  Storage(Tensor& predictions, Tensor& classes, Tensor& seen, int64_t columns)
      : predictions(predictions.mutable_data_ptr()),
        type(predictions.scalar_type()),
        seen(seen.mutable_data_ptr<int32_t>()),
        samples(seen.numel()),
        columns(columns) {
    if (classes.numel() > 0) this->classes = classes.mutable_data_ptr<int32_t>(), top_k = classes.size(1);
  }

  // The row itself where it lies dense in T, else a copy in scratch.
  template <class T>
  const T* read(int64_t index, T* scratch) const {
    const int64_t width = classes ? top_k + 1 : columns;
    T* to = classes ? scratch + columns : scratch;  // scratch has room for columns + width
    const T* values = stored<T>(index * width, width, to);
    if (!classes) return values;
    const int32_t* at = classes + index * top_k;
    std::fill_n(scratch, columns, values[top_k] / static_cast<T>(std::max<int64_t>(1, columns - top_k)));
    for (int64_t j = 0; j < top_k; ++j) scratch[at[j]] = values[j];
    return scratch;
  }

  template <class T>
  void write_dense(int64_t index, const T* row) const {
    ++seen[index];
    store(index * columns, row, columns);
  }

  template <class T>
  void write(int64_t index, const T* row, std::vector<int32_t>& order) const {
    if (!classes) return write_dense(index, row);
    ++seen[index];
    order.resize(columns);
    std::iota(order.begin(), order.end(), 0);
    const auto before = [&](int32_t a, int32_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); };
    std::nth_element(order.begin(), order.begin() + top_k, order.end(), before);
    std::sort(order.begin(), order.begin() + top_k, before);
    double rest = 0;
    for (int64_t j = top_k; j < columns; ++j) rest += row[order[j]];
    for (int64_t j = 0; j < top_k; ++j) {
      classes[index * top_k + j] = order[j];
      store(index * (top_k + 1) + j, row + order[j], 1);
    }
    const T tail = static_cast<T>(rest);
    store(index * (top_k + 1) + top_k, &tail, 1);
  }

 private:
  template <class T>
  const T* stored(int64_t at, int64_t count, T* to) const {
    const auto from = [&](const auto* first) {
      if constexpr (std::is_same_v<decltype(first), const T*>) {
        return first;
      } else {
        for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(first[j]);
        return static_cast<const T*>(to);
      }
    };
    if (type == ScalarType::Float) return from(static_cast<const float*>(predictions) + at);
    if (type == ScalarType::Double) return from(static_cast<const double*>(predictions) + at);
    detail::read_bfloat16(to, static_cast<const BFloat16*>(predictions) + at, 1, count);
    return to;
  }

  template <class T>
  void store(int64_t at, const T* from, int64_t count) const {
    const auto copy = [&](auto* to) {
      using Stored = std::remove_reference_t<decltype(*to)>;
      if constexpr (std::is_same_v<Stored, T>)
        std::copy_n(from, count, to);
      else
        for (int64_t j = 0; j < count; ++j) to[j] = static_cast<Stored>(from[j]);
    };
    if (type == ScalarType::Float) return copy(static_cast<float*>(predictions) + at);
    if (type == ScalarType::Double) return copy(static_cast<double*>(predictions) + at);
    auto* to = static_cast<BFloat16*>(predictions) + at;
    if constexpr (std::is_same_v<T, float>)
      detail::write_bfloat16(to, from, count);
    else
      for (int64_t j = 0; j < count; ++j) to[j] = static_cast<BFloat16>(static_cast<float>(from[j]));
  }
};

enum Role : uint8_t { kAlone, kSharesOnly, kWritesLast };  // of a row whose index comes once, or several times

// The rows' roles by a table of the batch's own size: the last row of an index writes. `taken(i)` leaves a row out.
template <class Taken>
std::vector<uint8_t> roles_of(const int64_t* indices, int64_t rows, const Taken& taken, bool unique) {
  std::vector<uint8_t> roles(rows, kAlone);
  int64_t size = 16;
  while (size < 2 * rows) size *= 2;
  std::vector<int64_t> last(size, -1);
  for (int64_t i = 0; i < rows; ++i) {
    if (!taken(i)) continue;
    int64_t slot = static_cast<int64_t>((static_cast<uint64_t>(indices[i]) * 0x9E3779B97F4A7C15u) >> 20) & (size - 1);
    while (last[slot] >= 0 && indices[last[slot]] != indices[i]) slot = (slot + 1) & (size - 1);
    if (last[slot] >= 0) {
      if (unique)
        fail<std::invalid_argument>("indices: rows ", last[slot], " and ", i, " are both ", indices[i],
                                    ", in a bank with unique=True");
      roles[last[slot]] = kSharesOnly;
      roles[i] = kWritesLast;
    }
    last[slot] = i;
  }
  return roles;
}

}  // namespace sdfast::prediction_bank
