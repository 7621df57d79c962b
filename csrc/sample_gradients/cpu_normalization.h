// Sums over the positions of each sample: the gradients of a normalisation's scale and shift, in one sweep.
#pragma once

#include "../common/rows.h"
#include "kernel.h"

namespace sdfast::sample_gradients {

constexpr int64_t kTogether = 64;  // positions added up before they join the total: sums of sums round less

// A view (samples, rows, channels, positions), or (samples, rows, channels) statistics with positions = 0.
template <class T>
struct View {
  const T* data = nullptr;
  int64_t sample = 0, row = 0, channel = 0, position = 0;

  View() = default;
  explicit View(const Tensor& tensor)
      : data(tensor.const_data_ptr<T>()),
        sample(tensor.stride(0)),
        row(tensor.stride(1)),
        channel(tensor.stride(2)),
        position(tensor.dim() > 3 ? tensor.stride(3) : 0) {}
  const T* at(int64_t i, int64_t r) const { return data + i * sample + r * row; }
};

// Rows (samples, channels) to write or add to; absent when built from no tensor.
template <class T>
struct Sums {
  T* data = nullptr;
  int64_t stride = 0;
  bool add = false;

  Sums(std::optional<Tensor>& tensor, bool accumulate) : add(accumulate) {
    if (!tensor) return;
    data = tensor->mutable_data_ptr<T>();
    stride = tensor->stride(0);
  }
  void write(int64_t i, const T* from, int64_t channels) const {
    if (!data) return;
    T* to = data + i * stride;
    for (int64_t c = 0; c < channels; ++c) to[c] = add ? to[c] + from[c] : from[c];
  }
};

// Positions side by side: Σ_t g_t and Σ_t g_t (x_t - mean) of one channel.
template <class T>
SDFAST_CLONES void sum_positions(const T* x, const T* g, T mean, int64_t positions, T* scaled, T* plain) {
  vec::Total<T> products, gradients;
  vec::sweep<T>(positions, [&](int64_t t, auto count, auto slot) SDFAST_INLINE_LAMBDA {
    const vec::Lanes<T> given = vec::load_some(g + t, count, T(0));
    if (x) products[slot] += given * (vec::load_some(x + t, count, mean) - mean);
    gradients[slot] += given;
  });
  *scaled += products.sum();
  *plain += gradients.sum();
}

// Channels side by side: the same for `channels` channels at once; sums and means are dense.
template <class T>
SDFAST_CLONES void sum_channels(const T* x, int64_t x_step, const T* g, int64_t g_step, const T* mean,
                                int64_t positions, int64_t channels, T* scaled, T* plain) {
  vec::sweep<T>(channels, [&](int64_t c, auto count, auto) SDFAST_INLINE_LAMBDA {
    vec::Lanes<T> all_products{}, all_gradients{};
    const vec::Lanes<T> center = vec::load_some(mean + c, count, T(0));
    for (int64_t t = 0; t < positions; t += kTogether) {
      vec::Lanes<T> products{}, gradients{};
      for (int64_t p = t; p < std::min(positions, t + kTogether); ++p) {
        const vec::Lanes<T> given = vec::load_some(g + p * g_step + c, count, T(0));
        if (x) products += given * (vec::load_some(x + p * x_step + c, count, T(0)) - center);
        gradients += given;
      }
      all_products += products;
      all_gradients += gradients;
    }
    vec::store_some(scaled + c, vec::load_some(scaled + c, count, T(0)) + all_products, count);
    vec::store_some(plain + c, vec::load_some(plain + c, count, T(0)) + all_gradients, count);
  });
}

template <class T>
void sum_strided(const T* x, int64_t x_step, const T* g, int64_t g_step, T mean, int64_t positions, T* scaled,
                 T* plain) {
  for (int64_t t = 0; t < positions; t += kTogether) {
    T products = 0, gradients = 0;
    for (int64_t p = t; p < std::min(positions, t + kTogether); ++p) {
      if (x) products += g[p * g_step] * (x[p * x_step] - mean);
      gradients += g[p * g_step];
    }
    *scaled += products;
    *plain += gradients;
  }
}

// weight[i, c] (+)= Σ_r rstd[i, r, c] Σ_t g (x - mean[i, r, c]);  bias[i, c] (+)= Σ_{r,t} g
template <class T>
void channel_sums(int64_t samples, int64_t rows, int64_t channels, int64_t positions, const View<T>& x,
                  const View<T>& g, const View<T>& mean, const View<T>& rstd, const Sums<T>& weight,
                  const Sums<T>& bias) {
  torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scaled(channels), part(channels), plain(channels), center(channels);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(scaled.begin(), scaled.end(), T(0));
      std::fill(plain.begin(), plain.end(), T(0));
      for (int64_t r = 0; r < rows; ++r) {
        const T *given = g.at(i, r), *input = x.data ? x.at(i, r) : nullptr;
        std::fill(part.begin(), part.end(), T(0));
        for (int64_t c = 0; c < channels && input; ++c) center[c] = mean.at(i, r)[c * mean.channel];
        if (g.channel == 1 && (!input || x.channel == 1)) {
          sum_channels(input, x.position, given, g.position, center.data(), positions, channels, part.data(),
                       plain.data());
        } else {
          const bool dense = g.position == 1 && (!input || x.position == 1);
          for (int64_t c = 0; c < channels; ++c) {
            const T *gc = given + c * g.channel, *xc = input ? input + c * x.channel : nullptr;
            if (dense)
              sum_positions(xc, gc, center[c], positions, &part[c], &plain[c]);
            else
              sum_strided(xc, x.position, gc, g.position, center[c], positions, &part[c], &plain[c]);
          }
        }
        for (int64_t c = 0; c < channels && input; ++c) scaled[c] += part[c] * rstd.at(i, r)[c * rstd.channel];
      }
      weight.write(i, scaled.data(), channels);
      bias.write(i, plain.data(), channels);
    }
  });
}

// One position of `channels` side by side: its own mean and standard deviation, and what it adds to the sums.
template <class T>
SDFAST_CLONES void add_position(const T* x, const T* g, int64_t channels, bool centered, T eps, T* scaled, T* plain) {
  T mean = 0;
  if (centered) {
    vec::Total<T> sum;
    vec::sweep<T>(channels, [&](int64_t c, auto count, auto slot)
                                SDFAST_INLINE_LAMBDA { sum[slot] += vec::load_some(x + c, count, T(0)); });
    mean = sum.sum() / static_cast<T>(channels);
  }
  vec::Total<T> squares;
  vec::sweep<T>(channels, [&](int64_t c, auto count, auto slot) SDFAST_INLINE_LAMBDA {
    const vec::Lanes<T> offset = vec::load_some(x + c, count, mean) - mean;
    squares[slot] += offset * offset;
  });
  const T rstd = T(1) / std::sqrt(squares.sum() / static_cast<T>(channels) + eps);
  vec::sweep<T>(channels, [&](int64_t c, auto count, auto) SDFAST_INLINE_LAMBDA {
    const vec::Lanes<T> given = vec::load_some(g + c, count, T(0));
    const vec::Lanes<T> normalized = (vec::load_some(x + c, count, mean) - mean) * rstd;
    vec::store_some(scaled + c, vec::load_some(scaled + c, count, T(0)) + given * normalized, count);
    vec::store_some(plain + c, vec::load_some(plain + c, count, T(0)) + given, count);
  });
}

// Every position normalised over its own channels: weight[i, c] (+)= Σ_t g x̂, bias[i, c] (+)= Σ_t g. x, g: (samples,
// positions, channels) with the channels side by side, as views with positions for rows.
template <class T>
void position_sums(int64_t samples, int64_t positions, int64_t channels, const View<T>& x, const View<T>& g,
                   bool centered, T eps, const Sums<T>& weight, const Sums<T>& bias) {
  torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> sums(2 * channels), block(2 * channels);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t t = 0; t < positions; t += kTogether) {
        std::fill(block.begin(), block.end(), T(0));
        for (int64_t p = t; p < std::min(positions, t + kTogether); ++p)
          add_position(x.at(i, p), g.at(i, p), channels, centered, eps, block.data(), block.data() + channels);
        for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += block[c];
      }
      weight.write(i, sums.data(), channels);
      bias.write(i, sums.data() + channels, channels);
    }
  });
}

}  // namespace sdfast::sample_gradients
