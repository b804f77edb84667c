// The embedding of the present token becomes the residual vector; every worker copies its own tiles.
#pragma once
#include "formats.h"
#include "worker.h"

template <class M, class S>
struct Embed {
  using Stage = S;

  static void run(Worker<M>& w, u32) {
    const u8* tile = w.embedding_tile(w.token);
    float* to = w.values(S::kOutput);
    const Range own = w.range(S::kRange);
    for (u32 c = own.first * kTileRows; c < (own.first + own.count) * kTileRows; c++)
      to[c] = c < M::kHidden ? M::Table::value(tile, w.token % kTileRows, int(c), M::kTableColumns) : 0.0f;
  }
};
