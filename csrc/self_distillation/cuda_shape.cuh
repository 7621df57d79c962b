// How a launch over rows is cut into blocks and teams: by the number of classes and rows alone.
#pragma once

#include "../common/launch.cuh"
#include "../common/pieces.cuh"

#include <algorithm>

namespace sdfast::self_distillation {

constexpr int kRowThreads = 256;             // of a block that takes several rows
constexpr int64_t kOneBlockEntries = 16384;  // a batch no larger is one block's work, and then one launch's
constexpr int kStaticSharedBytes = 8192;     // room left to the reductions

// Threads for a row of `pieces`: some four pieces each within a warp, then up to eight, then more warps.
inline int team_size_for(int64_t pieces) {
  const int64_t wanted = pieces <= 4           ? pieces
                         : pieces <= 8 * kWarp ? std::clamp<int64_t>((pieces + 3) / 4, 4, kWarp)
                                               : std::clamp<int64_t>((pieces + 7) / 8, 128, kMaxThreads);
  int size = 1;
  while (size < wanted) size *= 2;
  return size;
}

struct Shape {
  int team_size, threads, cache_slots, shared_bytes;
  bool one_block;
};

inline Shape shape_for(const CudaStream& stream, int64_t rows, int64_t classes, int piece_size) {
  constexpr int kWithoutAsking = 48 << 10;
  const int64_t pieces = (classes + piece_size - 1) / piece_size;
  Shape shape;
  shape.team_size = team_size_for(pieces);
  shape.one_block = rows <= 1 || rows * classes <= kOneBlockEntries;
  shape.threads = std::max(shape.team_size, kRowThreads);
  if (shape.team_size > kWarp)
    shape.threads = shape.team_size;
  else if (shape.one_block && rows * shape.team_size > kRowThreads)
    shape.threads = kMaxThreads;
  const int64_t slot_bytes = int64_t{16} * shape.threads;
  const int64_t slots = (pieces + shape.team_size - 1) / shape.team_size;
  int64_t room = kWithoutAsking - kStaticSharedBytes;
  if (slots * slot_bytes > room) room = stream.max_shared_bytes() - kStaticSharedBytes;
  shape.cache_slots = static_cast<int>(std::min(slots, room / slot_bytes));
  shape.shared_bytes = static_cast<int>(shape.cache_slots * slot_bytes);
  return shape;
}

}  // namespace sdfast::self_distillation
