// Computed: X Yᵀ, or the lower triangle of X Xᵀ, or either times another such product, added to a total. Fused: the
// turning of X and Y, the second factor, the promotion of the sums. Never materialised: a product of the total's size.
//
// The columns of all rows are turned once, into bands of rows; tiles of two bands are handed out to whichever thread is
// free, those on the diagonal last, as they are half the work. An entry is summed by one thread and always in the same
// order: it does not depend on the number of threads.
#pragma once

#include <atomic>
#include <cmath>
#include <deque>

#include "cpu_add.h"
#include "cpu_panels.h"

namespace sdfast::gram {

constexpr int64_t kTallest = 144;     // rows of a band: a tile and its operands stay in the second cache
constexpr int64_t kLowest = 64;       // below which operands are fetched for too few products
constexpr int64_t kTerms = 4096;      // of a sum in the operands' dtype
constexpr int64_t kTurned = 1 << 23;  // entries of a side that are turned at once

// Rows in bands, of which some columns at a time are turned: panels of each band and strip of columns.
template <class T>
class Bands {
 public:
  Bands(const Tensor& x, int64_t most_columns)
      : data_(x.const_data_ptr<T>()), stride_(x.stride(0)), rows_(x.size(0)), height_(height(rows_)) {
    strips_ = (most_columns + kColumns - 1) / kColumns;
    for (int64_t i = 0; i < count() * strips_; ++i) panels_.emplace_back(rows(i / strips_));
  }

  int64_t count() const { return (rows_ + height_ - 1) / height_; }
  int64_t height() const { return height_; }
  int64_t first(int64_t band) const { return band * height_; }
  int64_t rows(int64_t band) const { return std::min(height_, rows_ - first(band)); }
  const Panels<T>& panels(int64_t band, int64_t strip) const { return panels_[band * strips_ + strip]; }

  // Panel by panel: the few rows of one are read along, as the hardware foresees.
  void turn(int64_t begin, int64_t end) {
    const int64_t lanes = Panels<T>::lanes(), per_band = height_ / lanes;
    torch::stable::parallel_for(0, (rows_ + lanes - 1) / lanes, 1, [&](int64_t unit, int64_t last) {
      for (; unit < last; ++unit)
        for (int64_t column = begin; column < end; column += kColumns)
          panels_[unit / per_band * strips_ + (column - begin) / kColumns].turn(
              unit % per_band, data_ + unit * lanes * stride_ + column, stride_, std::min(kColumns, end - column));
    });
  }

 private:
  // Bands that give each thread several tiles, where they are not too low for that.
  static int64_t height(int64_t rows) {
    const double threads = static_cast<double>(torch::stable::get_num_threads());
    const int64_t wanted = std::min(rows / kLowest, static_cast<int64_t>(std::ceil(std::sqrt(8 * threads))));
    const int64_t bands = std::max<int64_t>({1, (rows + kTallest - 1) / kTallest, wanted});
    const int64_t whole = kTogether * Panels<T>::lanes();
    return std::max(whole, ((rows + bands - 1) / bands + whole - 1) / whole * whole);
  }

  const T* data_;
  int64_t stride_, rows_, height_, strips_;
  std::deque<Panels<T>> panels_;
};

// A tile of two bands.
struct Place {
  int64_t i, j;
  bool diagonal;
};

// The tiles: of a triangle those below the diagonal, then those on it.
inline Place place_of(int64_t number, int64_t bands, int64_t others, bool triangle) {
  if (!triangle) return {number / others, number % others, false};
  for (int64_t i = 1; i < bands; ++i) {
    if (number < i) return {i, number, false};
    number -= i;
  }
  return {number, number, true};
}

// Both sides of a product; of a triangle they are one.
template <class T>
class Sides {
 public:
  Sides(const Tensor& left, const OptionalTensor& right, int64_t most_columns) : left_(left, most_columns) {
    if (right) right_.emplace(*right, most_columns);
  }

  void turn(int64_t begin, int64_t end) {
    left_.turn(begin, end);
    if (right_) right_->turn(begin, end);
  }

  int64_t pitch() const { return right().height(); }
  int64_t tile_entries() const { return left_.height() * pitch(); }

  // apply(place) for every tile, each by the next thread that is free.
  template <class Apply>
  void over_tiles(const Apply& apply) const {
    const int64_t bands = left_.count(), others = right().count();
    const int64_t tiles = right_ ? bands * others : bands * (bands + 1) / 2;
    const int64_t threads = std::min<int64_t>(tiles, torch::stable::get_num_threads());
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t number = next++; number < tiles; number = next++) apply(place_of(number, bands, others, !right_));
    });
  }

  // sums[i, j] = Σ_k x[i, k] y[j, k] over the turned columns; of a tile on the diagonal at least what is below it.
  void sum_tile(const Place& place, int64_t columns, T* sums) const {
    for (int64_t first = 0; first < columns; first += kColumns)
      multiply_strip(left_.panels(place.i, first / kColumns), right().panels(place.j, first / kColumns), place.diagonal,
                     std::min(kColumns, columns - first), sums, pitch(), first > 0, [] {});
  }

  // apply(row of the tile, row and column of the total, entries) for all that belongs to the total.
  template <class Apply>
  void over_rows(const Place& place, const Apply& apply) const {
    const int64_t column = right().first(place.j);
    for (int64_t i = 0; i < left_.rows(place.i); ++i)
      apply(i, left_.first(place.i) + i, column, place.diagonal ? i + 1 : right().rows(place.j));
  }

 private:
  const Bands<T>& right() const { return right_ ? *right_ : left_; }

  Bands<T> left_;
  std::optional<Bands<T>> right_;
};

// total += X Yᵀ, without `other` the lower triangle of X Xᵀ.
template <class To, class T>
void add_tiles(Tensor& total, const Tensor& x, const OptionalTensor& other) {
  const int64_t columns = x.size(1), longest = std::max<int64_t>({1, x.size(0), other ? other->size(0) : 0});
  const int64_t terms = std::min(kTerms, std::max<int64_t>(1, kTurned / longest / kColumns) * kColumns);
  Sides<T> sides(x, other, std::min(columns, terms));
  To* to = total.mutable_data_ptr<To>();
  for (int64_t begin = 0; begin < columns; begin += terms) {
    const int64_t end = std::min(columns, begin + terms);
    sides.turn(begin, end);
    sides.over_tiles([&](const Place& place) {
      const sample_gradients::Buffer<T> sums(sides.tile_entries());
      sides.sum_tile(place, end - begin, sums.get());
      sides.over_rows(place, [&](int64_t i, int64_t row, int64_t column, int64_t count) {
        add_row<To, T>(to + row * total.stride(0) + column, sums.get() + i * sides.pitch(), nullptr, count);
      });
    });
  }
}

// total += (A A'ᵀ + one) ∘ (B B'ᵀ), without the others its lower triangle; at most kTerms columns each.
template <class To, class T>
void add_factor_tiles(Tensor& total, const Tensor& a, const Tensor& b, const OptionalTensor& other_a,
                      const OptionalTensor& other_b, To one) {
  Sides<T> inputs(a, other_a, a.size(1)), gradients(b, other_b, b.size(1));
  inputs.turn(0, a.size(1));
  gradients.turn(0, b.size(1));
  To* to = total.mutable_data_ptr<To>();
  inputs.over_tiles([&](const Place& place) {
    const sample_gradients::Buffer<T> first(inputs.tile_entries()), second(inputs.tile_entries());
    inputs.sum_tile(place, a.size(1), first.get());
    gradients.sum_tile(place, b.size(1), second.get());
    inputs.over_rows(place, [&](int64_t i, int64_t row, int64_t column, int64_t count) {
      const T *x = first.get() + i * inputs.pitch(), *y = second.get() + i * inputs.pitch();
      add_factors(to + row * total.stride(0) + column, x, y, one, count);
    });
  });
}

}  // namespace sdfast::gram
