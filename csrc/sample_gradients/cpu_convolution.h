// One sample's convolution weight gradient at a time: packed with the channels last, then an implicit GEMM on it.
#pragma once

#include "cpu_multiply.h"
#include "cpu_pack.h"

namespace sdfast::sample_gradients {

// Positions summed before the tile leaves the registers: two operands' columns of that length fit the first cache, and
// sums of sums round less than one long sum.
template <class T>
constexpr int64_t kPositions = 512 / sizeof(T);
constexpr int64_t kTileBytes = 256 << 10;  // of results that wait to be written in the weight's own order

// Where the results of one kernel position and channel wait, and how far apart.
struct Waiting {
  const int64_t* taps;  // offset of each kernel position
  int64_t input_step;
  int64_t tap_step;  // from each kernel position to the next; 0 where that varies
};

template <class T, int kTaps, bool kAdd>
SDFAST_INLINE void write_channels(T* to, const T* from, const Waiting& waiting, int64_t inputs, int64_t taps) {
  if constexpr (kTaps > 0) {
    for (int64_t c = 0; c < inputs; ++c)
#pragma GCC unroll 9
      for (int tap = 0; tap < kTaps; ++tap) {
        const T value = from[waiting.taps[tap] + c * waiting.input_step];
        to[c * kTaps + tap] = kAdd ? to[c * kTaps + tap] + value : value;
      }
  } else {
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < inputs; ++c) {
        const T value = from[waiting.taps[tap] + c * waiting.input_step];
        to[c * taps + tap] = kAdd ? to[c * taps + tap] + value : value;
      }
  }
}

// to[c · taps + tap] (+)= what waits: one output channel of the weight.
template <class T>
void write_output(T* to, const T* from, const Waiting& waiting, int64_t inputs, int64_t taps, bool add) {
  if (waiting.tap_step && waiting.input_step == 1 && taps >= vec::kLanes<T> && !add) {
    transpose(to, taps, from, waiting.tap_step, inputs, taps);
  } else if (taps == 9) {
    add ? write_channels<T, 9, true>(to, from, waiting, inputs, taps)
        : write_channels<T, 9, false>(to, from, waiting, inputs, taps);
  } else if (taps == 1) {
    add ? write_channels<T, 1, true>(to, from, waiting, inputs, taps)
        : write_channels<T, 1, false>(to, from, waiting, inputs, taps);
  } else {
    add ? write_channels<T, 0, true>(to, from, waiting, inputs, taps)
        : write_channels<T, 0, false>(to, from, waiting, inputs, taps);
  }
}

inline Frame input_frame(const Geometry& geometry, int64_t channels, int64_t pitch) {
  Frame frame{geometry.rows, channels, pitch, {}, {}};
  for (int axis = 0; axis < kSpace; ++axis) {
    frame.size[axis] = geometry.extent(axis);
    frame.before[axis] = geometry.padding[axis];
  }
  return frame;
}

inline Frame gradient_frame(const Geometry& geometry, int64_t channels, int64_t pitch) {
  return {geometry.rows, channels, pitch, {geometry.out[0], geometry.out[1], geometry.out[2]}, {0, 0, 0}};
}

// Offsets of every line of output positions in a packed input and in a gradient laid out as `layout`.
struct LineOffsets {
  std::vector<int64_t> input, gradient;

  LineOffsets(const Geometry& geometry, int64_t input_pitch, const Layout& layout) {
    const int64_t height = geometry.extent(1), width = geometry.extent(2) * input_pitch;
    for (int64_t row = 0; row < geometry.rows; ++row)
      for (int64_t z = 0; z < geometry.out[0]; ++z)
        for (int64_t y = 0; y < geometry.out[1]; ++y) {
          const int64_t plane = row * geometry.extent(0) + z * geometry.stride[0];
          input.push_back((plane * height + y * geometry.stride[1]) * width);
          gradient.push_back(row * layout.row + z * layout.space[0] + y * layout.space[1]);
        }
  }
};

inline Layout packed_gradient(const Geometry& geometry, int64_t pitch) {
  const int64_t line = geometry.out[2] * pitch, plane = geometry.out[1] * line;
  return {0, geometry.out[0] * plane, 1, {plane, line, pitch}};
}

// Some whole lines, or a part of one line.
struct Block {
  int64_t begin, end, column, columns;  // lines; first position of each, positions of each
  bool first() const { return begin == 0 && column == 0; }
};

// apply(block) over all output positions, at most kPositions<T> at a time.
template <class T, class Apply>
void over_positions(const Geometry& geometry, const Apply& apply) {
  const int64_t width = geometry.out[2], step = std::max<int64_t>(1, kPositions<T> / width);
  for (int64_t line = 0; line < geometry.lines(); line += step)
    for (int64_t column = 0; column < width; column += kPositions<T>)
      apply(Block{line, std::min(geometry.lines(), line + step), column, std::min(kPositions<T>, width - column)});
}

// The implicit GEMM of one group: input channels of neighbouring kernel positions lie side by side in a packed line, in
// runs. Either the runs are vectors and the output channels scalars, or the other way round where that fills lanes
// better.
template <class T>
class DenseGroups {
 public:
  DenseGroups(const Geometry& geometry, const Layout& input, const Layout& gradient)
      : geometry_(geometry),
        input_(input),
        given_(gradient),
        frame_(input_frame(geometry, geometry.inputs, geometry.inputs)),
        merged_(geometry.dilation[2] == 1) {
    run_taps_ = merged_ ? geometry.kernel[2] : 1;
    run_ = run_taps_ * geometry.inputs;
    runs_ = geometry.taps() / run_taps_;
    outputs_are_vectors_ = 5 * whole(geometry.outputs) * run_ < 4 * whole(run_) * geometry.outputs;
    direct_ = gradient.channel == 1 && !outputs_are_vectors_;
    gradient_ = direct_ ? gradient : packed_gradient(geometry, geometry.outputs);
    pitch_ = outputs_are_vectors_ ? 0 : runs_ * whole(run_);
    const int64_t row_bytes = (outputs_are_vectors_ ? runs_ * run_ : pitch_) * static_cast<int64_t>(sizeof(T));
    block_ = std::min(whole(geometry.outputs), std::max(kWhole, kTileBytes / row_bytes / kWhole * kWhole));
    if (outputs_are_vectors_) pitch_ = block_;
  }

  // Lanes that the work fills with useful or useless numbers: what it costs.
  int64_t cost() const {
    const int64_t one = outputs_are_vectors_ ? whole(geometry_.outputs) * run_ : geometry_.outputs * whole(run_);
    return geometry_.groups * runs_ * one;
  }

  void run(const T* input, const T* gradient, T* out, int64_t out_stride, bool add) const {
    const int64_t units = geometry_.samples * geometry_.groups, threads = torch::stable::get_num_threads();
    const int64_t blocks = (geometry_.outputs + kWhole - 1) / kWhole;
    const int64_t shares = units >= 2 * threads ? 1 : std::min(blocks, (2 * threads + units - 1) / units);
    const int64_t share = (blocks + shares - 1) / shares * kWhole;  // output channels of one task
    torch::stable::parallel_for(0, units * shares, 1, [&](int64_t begin, int64_t end) {
      Task task(*this);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t unit = i / shares, sample = unit / geometry_.groups, group = unit % geometry_.groups;
        const int64_t first = i % shares * share, last = std::min(geometry_.outputs, first + share);
        if (first >= last) continue;
        task.fetch(input + sample * input_.sample + group * geometry_.inputs * input_.channel,
                   gradient + sample * given_.sample + group * geometry_.outputs * given_.channel);
        const bool next = geometry_.groups == 1 && i + 1 < end && sample + 1 < geometry_.samples && first == 0;
        T* to = out + sample * out_stride + group * geometry_.outputs * geometry_.inputs * geometry_.taps();
        task.foresee(to + first * geometry_.inputs * geometry_.taps(), last - first,
                     next ? input + (sample + 1) * input_.sample : nullptr,
                     next ? gradient + (sample + 1) * given_.sample : nullptr);
        for (int64_t o = first; o < last; o += block_) task.outputs(o, std::min(last, o + block_), to, add);
      }
    });
  }

 private:
  static constexpr int64_t kWhole = 64 / sizeof(T);
  static int64_t whole(int64_t count) { return (count + kWhole - 1) / kWhole * kWhole; }

  // What one thread holds: a packed sample, its packed gradient, and a tile of results.
  struct Task {
    const DenseGroups& all;
    LineOffsets offsets;
    std::vector<int64_t> run_offsets, tap_offsets;
    Buffer<T> input, packed, tile;
    const T* gradient = nullptr;
    Ahead ahead;

    explicit Task(const DenseGroups& groups)
        : all(groups),
          offsets(groups.geometry_, groups.geometry_.inputs, groups.gradient_),
          input(groups.frame_.entries() + kWhole),
          packed(groups.direct_ ? 0 : groups.geometry_.positions() * groups.geometry_.outputs + kWhole),
          tile((groups.outputs_are_vectors_ ? groups.runs_ * groups.run_ : groups.block_) * groups.pitch_) {
      const Geometry& g = all.geometry_;
      for (int64_t tap = 0; tap < g.taps(); ++tap) {
        const int64_t x = tap % g.kernel[2], y = tap / g.kernel[2] % g.kernel[1], z = tap / g.kernel[2] / g.kernel[1];
        const int64_t run = tap / all.run_taps_, within = tap % all.run_taps_ * g.inputs;
        if (within == 0)
          run_offsets.push_back(((z * g.dilation[0] * g.extent(1) + y * g.dilation[1]) * g.extent(2) +
                                 (all.merged_ ? 0 : x * g.dilation[2])) *
                                g.inputs);
        tap_offsets.push_back(all.outputs_are_vectors_ ? (run * all.run_ + within) * all.pitch_
                                                       : run * whole(all.run_) + within);
      }
    }

    void fetch(const T* from, const T* given) {
      const Geometry& g = all.geometry_;
      pack(input.get(), all.frame_, from, all.input_, g.in);
      gradient = all.direct_ ? given : packed.get();
      if (!all.direct_) pack(packed.get(), gradient_frame(g, g.outputs, g.outputs), given, all.given_, g.out);
    }

    // What will be written of this sample, and what will be read of the next one where its numbers lie side by side.
    void foresee(const T* to, int64_t outputs, const T* from, const T* given) {
      const Geometry& g = all.geometry_;
      const int64_t inputs = g.rows * g.inputs * g.in[0] * g.in[1] * g.in[2], results = g.positions() * g.outputs;
      ahead = {};
      ahead.write(to, outputs * g.inputs * g.taps());
      if (from && all.input_.sample == inputs && all.given_.sample == results) {
        ahead.read(from, inputs);
        ahead.read(given, results);
      }
      const int64_t vectors = all.outputs_are_vectors_ ? outputs : all.run_;
      const int64_t scalars = all.outputs_are_vectors_ ? all.run_ : outputs;
      ahead.share_out(g.lines() * all.runs_ * ((vectors + 3 * kWhole - 1) / (3 * kWhole)) * ((scalars + 7) / 8));
    }

    int64_t tap_step() const {
      const int64_t step = tap_offsets.size() > 1 ? tap_offsets[1] - tap_offsets[0] : 0;
      for (size_t tap = 1; tap < tap_offsets.size(); ++tap)
        if (tap_offsets[tap] - tap_offsets[tap - 1] != step) return 0;
      return step;
    }

    void outputs(int64_t first, int64_t last, T* to, bool add) {
      const Geometry& g = all.geometry_;
      const int64_t input_step = g.stride[2] * g.inputs, gradient_step = all.gradient_.space[2];
      over_positions<T>(g, [&](const Block& block) {
        const T* given = gradient + block.column * gradient_step + first;
        for (int64_t r = 0; r < all.runs_; ++r) {
          const T* run = input.get() + block.column * input_step + run_offsets[r];
          if (all.outputs_are_vectors_) {
            const Lines lines = {offsets.input.data(), offsets.gradient.data(), block.begin, block.end, block.columns,
                                 input_step,           gradient_step,           &ahead};
            multiply_all(run, all.run_, given, last - first, lines, tile.get() + r * all.run_ * all.pitch_, all.pitch_,
                         !block.first());
          } else {
            const Lines lines = {offsets.gradient.data(), offsets.input.data(), block.begin, block.end,
                                 block.columns,           gradient_step,        input_step,  &ahead};
            multiply_all(given, last - first, run, all.run_, lines, tile.get() + r * whole(all.run_), all.pitch_,
                         !block.first());
          }
        }
      });
      const Waiting waiting = {tap_offsets.data(), all.outputs_are_vectors_ ? all.pitch_ : 1, tap_step()};
      for (int64_t o = first; o < last; ++o)
        write_output(to + o * g.inputs * g.taps(),
                     tile.get() + (o - first) * (all.outputs_are_vectors_ ? 1 : all.pitch_), waiting, g.inputs,
                     g.taps(), add);
    }
  };

  Geometry geometry_;
  Layout input_, given_, gradient_;  // as given; gradient_: as it is read
  Frame frame_;
  bool merged_, outputs_are_vectors_, direct_;
  int64_t run_taps_, run_, runs_;  // kernel positions and entries of a run, runs of a group
  int64_t pitch_, block_;          // of the tile: from one row to the next, output channels
};

// Many small groups, depthwise convolutions above all: a group a lane, so that no lane is idle.
template <class T>
class GroupLanes {
 public:
  GroupLanes(const Geometry& geometry, const Layout& input, const Layout& gradient)
      : geometry_(geometry), input_(input), given_(gradient) {}

  int64_t cost() const {
    const int64_t lanes = (geometry_.groups + vec::kLanes<T> - 1) / vec::kLanes<T> * vec::kLanes<T>;
    return 2 * lanes * geometry_.outputs * geometry_.inputs * geometry_.taps();  // twice: bound by its loads
  }

  void run(const T* input, const T* gradient, T* out, int64_t out_stride, bool add) const {
    const int64_t parts = (geometry_.groups + kPart - 1) / kPart;
    torch::stable::parallel_for(0, geometry_.samples * parts, 1, [&](int64_t begin, int64_t end) {
      Task task(geometry_);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / parts, group = i % parts * kPart, count = std::min(kPart, geometry_.groups - group);
        task.fetch(input + sample * input_.sample + group * geometry_.inputs * input_.channel, input_,
                   gradient + sample * given_.sample + group * geometry_.outputs * given_.channel, given_, count);
        const int64_t width = geometry_.outputs * geometry_.inputs * geometry_.taps();
        task.write(out + sample * out_stride + group * width, count, add);
      }
    });
  }

 private:
  static constexpr int64_t kPart = 4 * vec::kLanes<T>;  // groups of one task

  struct Task {
    Geometry g;
    int64_t per_output;  // results of one output channel
    LineOffsets lines;
    std::vector<int64_t> offsets;
    Buffer<T> input, gradient, tile;

    explicit Task(const Geometry& geometry)
        : g(geometry),
          per_output(g.inputs * g.taps()),
          lines(g, g.inputs * kPart, packed_gradient(g, g.outputs * kPart)),
          input(input_frame(g, kPart, g.inputs * kPart).entries()),
          gradient(g.positions() * g.outputs * kPart),
          tile(g.outputs * per_output * kPart) {
      for (int64_t c = 0; c < g.inputs; ++c)
        for (int64_t z = 0; z < g.kernel[0]; ++z)
          for (int64_t y = 0; y < g.kernel[1]; ++y)
            for (int64_t x = 0; x < g.kernel[2]; ++x) {
              const int64_t plane = z * g.dilation[0] * g.extent(1) + y * g.dilation[1];
              offsets.push_back(((plane * g.extent(2) + x * g.dilation[2]) * g.inputs + c) * kPart);
            }
    }

    // Channel c of every group side by side; lanes without a group keep what they hold and are never read out.
    void fetch(const T* from, Layout from_layout, const T* given, Layout given_layout, int64_t count) {
      const int64_t from_channel = from_layout.channel, given_channel = given_layout.channel;
      from_layout.channel *= g.inputs;
      given_layout.channel *= g.outputs;
      for (int64_t c = 0; c < g.inputs; ++c)
        pack(input.get() + c * kPart, input_frame(g, count, g.inputs * kPart), from + c * from_channel, from_layout,
             g.in);
      for (int64_t o = 0; o < g.outputs; ++o)
        pack(gradient.get() + o * kPart, gradient_frame(g, count, g.outputs * kPart), given + o * given_channel,
             given_layout, g.out);
    }

    void write(T* to, int64_t count, bool add) {
      over_positions<T>(g, [&](const Block& block) {
        for (int64_t o = 0; o < g.outputs; ++o)
          for (int64_t lane = 0; lane < count; lane += vec::kLanes<T>) sum(o, lane, block);
      });
      for (int64_t group = 0; group < count; ++group)
        for (int64_t j = 0; j < g.outputs * per_output; ++j) {
          T& entry = to[group * g.outputs * per_output + j];
          const T value = tile.get()[j * kPart + group];
          entry = add ? entry + value : value;
        }
    }

    void sum(int64_t o, int64_t lane, const Block& block) {
      const int64_t gradient_step = g.outputs * kPart, input_step = g.stride[2] * g.inputs * kPart;
      const Lines positions = {lines.gradient.data(), lines.input.data(), block.begin, block.end,
                               block.columns,         gradient_step,      input_step};
      const T* from = input.get() + block.column * input_step + lane;
      const T* given = gradient.get() + block.column * gradient_step + o * kPart + lane;
      for (int64_t j = 0; j < per_output;) {
        const int64_t left = per_output - j;
        const auto run = left >= 9 ? multiply_groups<T, 9> : left >= 3 ? multiply_groups<T, 3> : multiply_groups<T, 1>;
        run(from, offsets.data() + j, given, positions, tile.get() + (o * per_output + j) * kPart + lane, kPart,
            !block.first());
        j += left >= 9 ? 9 : left >= 3 ? 3 : 1;
      }
    }
  };

  Geometry geometry_;
  Layout input_, given_;
};

}  // namespace sdfast::sample_gradients
