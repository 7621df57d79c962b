// Numbers that will soon be read or written, fetched into the second cache a few at a time while others are at work.
//
// What is asked for all at once stalls the work as surely as what was not asked for at all: a core has room for some
// sixteen lines on their way.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sdfast::sample_gradients {

class Ahead {
 public:
  // Of what lies side by side, in the order of the calls.
  template <class T>
  void read(const T* from, int64_t entries) {
    ranges_[count_++] = {reinterpret_cast<const char*>(from), entries * static_cast<int64_t>(sizeof(T)), false};
  }

  template <class T>
  void write(const T* to, int64_t entries) {
    ranges_[count_++] = {reinterpret_cast<const char*>(to), entries * static_cast<int64_t>(sizeof(T)), true};
  }

  // That so many calls of fetch() ask for all of it.
  void share_out(int64_t calls) {
    int64_t lines = 0;
    for (int range = 0; range < count_; ++range) lines += ranges_[range].left / kLine + 1;
    share_ = (lines / std::max<int64_t>(calls, 1) + 1) * kLine;
  }

  void fetch() {
    while (at_ < count_ && ranges_[at_].left <= 0) ++at_;
    if (at_ == count_) return;
    Range& range = ranges_[at_];
    const char* last = range.next + std::min(range.left, share_);
    range.left -= share_;
    if (range.written)
      for (; range.next < last; range.next += kLine) __builtin_prefetch(range.next, 1, 2);
    else
      for (; range.next < last; range.next += kLine) __builtin_prefetch(range.next, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Range {
    const char* next;
    int64_t left;  // bytes
    bool written;
  };
  Range ranges_[3];
  int count_ = 0, at_ = 0;
  int64_t share_ = 0;
};

}  // namespace sdfast::sample_gradients
