// Register tiles of the implicit GEMM: sums over output positions of (a few scalars) x (a few vectors).
#pragma once

#include <algorithm>

#include "../common/vec.h"
#include "cpu_ahead.h"

// One body for the widest vectors: taken where the processor has them, by `wide_vectors`.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SDFAST_WIDE __attribute__((target("arch=x86-64-v4")))
#define SDFAST_HAS_WIDE 1
#else
#define SDFAST_WIDE
#define SDFAST_HAS_WIDE 0
#endif

namespace sdfast::sample_gradients {

inline bool wide_vectors() {
#if SDFAST_HAS_WIDE
  static const bool found = __builtin_cpu_supports("x86-64-v4");
  return found;
#else
  return false;
#endif
}

template <class T, int kBytes>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes)));
};

// The positions that a tile sums over: lines of `columns` positions, at these offsets from either operand's start.
struct Lines {
  const int64_t *scalars, *vectors;
  int64_t begin, end, columns, scalar_step, vector_step;
  Ahead* ahead = nullptr;  // what to fetch meanwhile
};

// out[j, v] (+)= Σ_t scalars[t + j] · vectors[t + v · kApart], j < kJ, v < kV vectors, which lie side by side if not
// told
template <class T, int kBytes, int kJ, int kV, int kApart = kBytes / sizeof(T)>
SDFAST_INLINE void multiply(const T* scalars, const T* vectors, const Lines& lines, T* out, int64_t pitch, bool add) {
  using Lanes = typename Vector<T, kBytes>::type;
  constexpr int kWidth = kBytes / sizeof(T);
  Lanes sums[kJ][kV];
#pragma GCC unroll 16
  for (int j = 0; j < kJ; ++j)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) sums[j][v] = Lanes{};
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    if (lines.ahead) lines.ahead->fetch();
    const T* s = scalars + lines.scalars[line];
    const T* from = vectors + lines.vectors[line];
    for (int64_t x = 0; x < lines.columns; ++x) {
      Lanes lanes[kV];
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) std::memcpy(&lanes[v], from + v * kApart, kBytes);
#pragma GCC unroll 16
      for (int j = 0; j < kJ; ++j)
#pragma GCC unroll 3
        for (int v = 0; v < kV; ++v) sums[j][v] += lanes[v] * s[j];
      s += lines.scalar_step;
      from += lines.vector_step;
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kJ; ++j)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) {
      T* to = out + j * pitch + v * kWidth;
      if (add) {
        Lanes before;
        std::memcpy(&before, to, kBytes);
        sums[j][v] += before;
      }
      std::memcpy(to, &sums[j][v], kBytes);
    }
}

template <class T>
using Multiply = void (*)(const T*, const T*, const Lines&, T*, int64_t, bool);

template <class T, int kJ, int kV>
SDFAST_WIDE void multiply_wide(const T* s, const T* v, const Lines& lines, T* out, int64_t pitch, bool add) {
  multiply<T, 64, kJ, kV>(s, v, lines, out, pitch, add);
}

template <class T, int kJ, int kV>
SDFAST_CLONES void multiply_narrow(const T* s, const T* v, const Lines& lines, T* out, int64_t pitch, bool add) {
  multiply<T, 32, kJ, kV>(s, v, lines, out, pitch, add);
}

constexpr int kScalars[] = {1, 2, 3, 4, 6, 8, 12, 16};  // the tiles there are
constexpr int kKinds = sizeof kScalars / sizeof *kScalars;

template <class T, int kV>
struct Tiles {
  static constexpr Multiply<T> wide[kKinds] = {
      multiply_wide<T, 1, kV>, multiply_wide<T, 2, kV>, multiply_wide<T, 3, kV>,
      multiply_wide<T, 4, kV>, multiply_wide<T, 6, kV>, multiply_wide<T, 8, kV>,
      multiply_wide < T,       kV < 3 ? 12 : 1,         kV >,
      multiply_wide < T,       kV < 2 ? 16 : 1,         kV > };
  static constexpr Multiply<T> narrow[kKinds] = {multiply_narrow<T, 1, kV>,
                                                 multiply_narrow<T, 2, kV>,
                                                 multiply_narrow<T, 3, kV>,
                                                 multiply_narrow<T, 4, kV>,
                                                 multiply_narrow < T,
                                                 kV < 3 ? 6 : 1,
                                                 kV >
                                                 , multiply_narrow < T, kV < 2 ? 8 : 1, kV > };
};

// What fits beside the operands: 24 sums in 32 registers, 12 in 16.
inline int64_t most_scalars(int vectors, bool wide) {
  constexpr int64_t kWide[] = {16, 12, 8}, kNarrow[] = {8, 6, 4};
  return (wide ? kWide : kNarrow)[vectors - 1];
}

// A tile of about `share` scalars, at most `left`, against so many vectors.
template <class T>
struct Tile {
  int64_t scalars;
  Multiply<T> run;

  Tile(int64_t left, int64_t share, int vectors, bool wide) {
    const int64_t most = std::min(left, most_scalars(vectors, wide));
    int kind = 0;
    while (kind + 1 < kKinds && kScalars[kind] < share && kScalars[kind + 1] <= most) ++kind;
    scalars = kScalars[kind];
    const Multiply<T>* tables[] = {wide ? Tiles<T, 1>::wide : Tiles<T, 1>::narrow,
                                   wide ? Tiles<T, 2>::wide : Tiles<T, 2>::narrow,
                                   wide ? Tiles<T, 3>::wide : Tiles<T, 3>::narrow};
    run = tables[vectors - 1][kind];
  }
};

// All of `scalars` x `vectors` (rounded up to whole vectors, which both operand and result must hold).
template <class T>
void multiply_all(const T* scalar_data, int64_t scalars, const T* vector_data, int64_t entries, const Lines& lines,
                  T* out, int64_t pitch, bool add) {
  const bool wide = wide_vectors();
  const int64_t width = (wide ? 64 : 32) / sizeof(T);
  int64_t vectors_left = (entries + width - 1) / width;
  for (int64_t v = 0; vectors_left > 0;) {
    const int64_t parts = (vectors_left + 2) / 3;
    const int vectors = static_cast<int>((vectors_left + parts - 1) / parts);
    const int64_t most = most_scalars(vectors, wide), tiles = (scalars + most - 1) / most;
    const int64_t share = (scalars + tiles - 1) / tiles;
    for (int64_t j = 0; j < scalars;) {
      const Tile<T> tile(scalars - j, share, vectors, wide);
      tile.run(scalar_data + j, vector_data + v, lines, out + j * pitch + v, pitch, add);
      j += tile.scalars;
    }
    v += vectors * width;
    vectors_left -= vectors;
  }
}

// The same for convolutions of many small groups, a group a lane: out[j] (+)= Σ_t g[t] ∘ x[t + offsets[j]]
template <class T, int kBytes, int kJ>
SDFAST_INLINE void multiply_lanes(const T* x, const int64_t* offsets, const T* g, const Lines& lines, T* out,
                                  int64_t pitch, bool add) {
  using Lanes = typename Vector<T, kBytes>::type;
  Lanes sums[kJ];
#pragma GCC unroll 9
  for (int j = 0; j < kJ; ++j) sums[j] = Lanes{};
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    const T* from = x + lines.vectors[line];
    const T* given = g + lines.scalars[line];
    for (int64_t column = 0; column < lines.columns; ++column) {
      Lanes gradient;
      std::memcpy(&gradient, given, kBytes);
#pragma GCC unroll 9
      for (int j = 0; j < kJ; ++j) {
        Lanes input;
        std::memcpy(&input, from + offsets[j], kBytes);
        sums[j] += input * gradient;
      }
      from += lines.vector_step;
      given += lines.scalar_step;
    }
  }
#pragma GCC unroll 9
  for (int j = 0; j < kJ; ++j) {
    if (add) {
      Lanes before;
      std::memcpy(&before, out + j * pitch, kBytes);
      sums[j] += before;
    }
    std::memcpy(out + j * pitch, &sums[j], kBytes);
  }
}

template <class T, int kJ>
SDFAST_CLONES void multiply_groups(const T* x, const int64_t* offsets, const T* g, const Lines& lines, T* out,
                                   int64_t pitch, bool add) {
  multiply_lanes<T, 32, kJ>(x, offsets, g, lines, out, pitch, add);
}

}  // namespace sdfast::sample_gradients
