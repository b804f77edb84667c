// The embedding of each column's token becomes its residual vector; every worker copies its own tiles.
#pragma once
#include "formats.h"
#include "worker.h"

template <class M, class S>
struct Embed {
  using Stage = S;

  static void run(Worker<M>& w, u32) {
    const Range own = w.range(S::kRange);
    for (u32 column = 0; column < w.pass().count; column++) {
      const u32 token = w.pass().columns[column].token;
      const u8* tile = w.embedding_tile(token);
      float* to = w.values(column, S::kOutput);
      for (u32 c = own.first * kTileRows; c < (own.first + own.count) * kTileRows; c++)
        to[c] = c < M::kHidden ? M::Table::value(tile, token % kTileRows, int(c), M::kTableColumns) : 0.0f;
    }
  }
};
