// A sample's numbers with the channels last and a border of zeros, where they do not lie so already.
#pragma once

#include <new>
#include <utility>

#include "../common/rows.h"
#include "kernel.h"

namespace sdfast::sample_gradients {

// A buffer of one thread, on a cache line, zero at first.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t entries) : data_(static_cast<T*>(::operator new(entries * sizeof(T) + 64, kLine))) {
    std::memset(static_cast<void*>(data_), 0, entries * sizeof(T) + 64);
  }
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

// Of two rows that are kDistance apart, the blocks off the diagonal change places. The masks are constants: computed,
// they would take longer than the exchange.
template <class T, int kDistance, int... kLane>
SDFAST_INLINE void exchange(vec::Lanes<T>& first, vec::Lanes<T>& second, std::integer_sequence<int, kLane...>) {
  constexpr int kWidth = vec::kLanes<T>;
  const vec::Mask<T> low = {(kLane & kDistance ? kWidth + kLane - kDistance : kLane)...};
  const vec::Mask<T> high = {(kLane & kDistance ? kWidth + kLane : kLane + kDistance)...};
  const vec::Lanes<T> before = first;
  first = __builtin_shuffle(before, second, low);
  second = __builtin_shuffle(before, second, high);
}

template <class T, int kDistance = 1>
SDFAST_INLINE void exchange_all(vec::Lanes<T>* rows) {
  constexpr int kWidth = vec::kLanes<T>;
  if constexpr (kDistance < kWidth) {
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; ++i)
      if (!(i & kDistance))
        exchange<T, kDistance>(rows[i], rows[i + kDistance], std::make_integer_sequence<int, kWidth>());
    exchange_all<T, 2 * kDistance>(rows);
  }
}

// A square of lanes turned over its diagonal.
template <class T>
SDFAST_INLINE void transpose_square(T* to, int64_t pitch, const T* from, int64_t from_pitch) {
  constexpr int kWidth = vec::kLanes<T>;
  vec::Lanes<T> rows[kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) rows[i] = vec::load(from + i * from_pitch);
  exchange_all<T>(rows);
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) vec::store(to + i * pitch, rows[i]);
}

// to[x · pitch + c] = from[c · channel + x]
template <class T>
SDFAST_CLONES void transpose(T* to, int64_t pitch, const T* from, int64_t channel, int64_t count, int64_t channels) {
  constexpr int kWidth = vec::kLanes<T>;
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) {
    int64_t x = 0;
    for (; x + kWidth <= count; x += kWidth)
      transpose_square(to + x * pitch + c, pitch, from + c * channel + x, channel);
    for (; x < count; ++x)
      for (int64_t k = c; k < c + kWidth; ++k) to[x * pitch + k] = from[k * channel + x];
  }
  for (; c < channels; ++c)
    for (int64_t x = 0; x < count; ++x) to[x * pitch + c] = from[c * channel + x];
}

// `count` pixels, `step` apart, of `channels` channels, `channel` apart: channels last.
template <class T>
void pack_line(T* to, int64_t pitch, const T* from, int64_t step, int64_t channel, int64_t count, int64_t channels) {
  if (channel == 1 && step == channels && pitch == channels) {
    std::memcpy(to, from, count * channels * sizeof(T));
  } else if (channel == 1) {
    for (int64_t x = 0; x < count; ++x) std::memcpy(to + x * pitch, from + x * step, channels * sizeof(T));
  } else if (step == 1) {
    transpose(to, pitch, from, channel, count, channels);
  } else {
    for (int64_t x = 0; x < count; ++x)
      for (int64_t c = 0; c < channels; ++c) to[x * pitch + c] = from[x * step + c * channel];
  }
}

// How a packed image (rows, depth, height, width, channels) is cut out of a sample: its origin lies `before` positions
// in front of the sample's own.
struct Frame {
  int64_t rows, channels, pitch, size[kSpace], before[kSpace];  // pitch: from one pixel to the next

  int64_t entries() const { return rows * size[0] * size[1] * size[2] * pitch; }
};

// Copies what lies inside the frame; the border is left as it is, zero.
template <class T>
void pack(T* to, const Frame& frame, const T* from, const Layout& layout, const int64_t (&in)[kSpace]) {
  int64_t first[kSpace], count[kSpace];
  for (int axis = 0; axis < kSpace; ++axis) {
    first[axis] = std::max<int64_t>(0, -frame.before[axis]);  // of the sample
    const int64_t last = std::min(in[axis], frame.size[axis] - frame.before[axis]);
    count[axis] = last - first[axis];
    if (count[axis] <= 0) return;
  }
  const int64_t line = frame.size[2] * frame.pitch;
  for (int64_t row = 0; row < frame.rows; ++row)
    for (int64_t z = first[0]; z < first[0] + count[0]; ++z) {
      T* plane = to + (row * frame.size[0] + z + frame.before[0]) * frame.size[1] * line;
      const T* source = from + row * layout.row + z * layout.space[0] + first[1] * layout.space[1];
      source += first[2] * layout.space[2];
      T* start = plane + (first[1] + frame.before[1]) * line + (first[2] + frame.before[2]) * frame.pitch;
      const bool whole = count[2] == frame.size[2] && layout.space[1] == count[2] * layout.space[2];
      const int64_t together = whole ? count[1] : 1;  // lines that follow each other in both
      for (int64_t y = 0; y < count[1]; y += together)
        pack_line(start + y * line, frame.pitch, source + y * layout.space[1], layout.space[2], layout.channel,
                  together * count[2], frame.channels);
    }
}

}  // namespace sdfast::sample_gradients
