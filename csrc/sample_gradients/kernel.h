// The geometry of a convolution seen per sample, shared by every backend that is written in C++.
//
// Sample i has the input a (r, groups · ci, D, H, W) and the gradient g (r, groups · co, D', H', W') of the output,
// where r rows of the batch may belong to one sample. With stride s, padding p and dilation d of each axis:
//
//   out[i, o, c, k] = Σ over rows and output positions t of  g[r, o, t] · a[r, c, t s + k d - p]    (a = 0 outside)
#pragma once

#include <cstdint>

namespace sdfast::sample_gradients {

constexpr int kSpace = 3;  // depth, height, width; a convolution of fewer dimensions has ones in front

struct Geometry {
  int64_t samples, rows, groups, inputs, outputs;  // channels are those of one group
  int64_t in[kSpace], out[kSpace], kernel[kSpace], stride[kSpace], padding[kSpace], dilation[kSpace];

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t lines() const { return rows * out[0] * out[1]; }  // rows of output positions along the last axis
  int64_t positions() const { return lines() * out[2]; }
  int64_t width() const { return groups * outputs * inputs * taps(); }  // of a sample's gradient

  // Padded positions that a kernel touches along an axis.
  int64_t extent(int axis) const { return (out[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1; }
};

// Where the numbers of one sample lie, in entries.
struct Layout {
  int64_t sample, row, channel, space[kSpace];
};

}  // namespace sdfast::sample_gradients
