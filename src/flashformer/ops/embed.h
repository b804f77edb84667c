// The embedding of the present token becomes the residual vector; every worker copies its own tiles.
#pragma once
#include "worker.h"

template <class M, class S>
struct Embed {
  using Stage = S;

  static void run(Worker<M>& w, u32) {
    using V = typename M::Value;
    const u16* row = w.embedding_row(w.token);
    float* to = w.values(S::kOutput);
    const Range own = w.range(S::kRange);
    for (u32 c = own.first * kTileRows; c < (own.first + own.count) * kTileRows; c++) {
      const u16* line = row + c / kLine * kTileRows * kLine;
      to[c] = V::widen(line[V::place(c % kLine / kHalf, c % kHalf)]);
    }
  }
};
