// The embedding rows of several columns' tokens: each owner of hidden tiles takes its part as the residual and publishes it.
#pragma once
#include "vectors.cuh"

template <class M, class S>
struct EmbedColumns {
  using T = typename M::Value;

  static FF_DEVICE void run(Producer<M>&, u32) {}
  static FF_DEVICE void run(Consumer<M>&, u32) {}
  static FF_DEVICE void run(Finisher<M>& f, u32 step) {
    f.enter(S::kWhere, 0);
    const uint2 tiles = f.tiles(0);
    const u32 columns = f.columns(), row = f.lane >> 2;
    const VectorOut<M, S> to(f, step, 0);
    // Lane (g, t) has row g, columns t + 4 j.
    u64 rows[M::kColumnGroups];
#pragma unroll
    for (int j = 0; j < M::kColumnGroups; j++) {
      const u32 column = (f.lane & 3) + 4 * j;
      rows[j] = column < columns ? (u64)f.column(column).token * M::kHidden : 0;
    }
#pragma unroll 1
    for (u32 local = f.index; local < tiles.y; local += M::kFinishers) {
      const u32 index = (tiles.x + local) * 8 + row;
      const bool real = index < M::kHidden;
      const float gamma = real ? __ldg(f.p.vectors + S::kGamma + index) : 0;
      float y[M::kColumnGroups];
#pragma unroll
      for (int j = 0; j < M::kColumnGroups; j++) y[j] = real ? T::unpack(__ldg(f.p.embedding + rows[j] + index)) : 0;
#pragma unroll
      for (int j = 0; j < M::kColumnGroups; j++) {
        const u32 column = (f.lane & 3) + 4 * j;
        const float out = y[j] * gamma, next = __shfl_down_sync(kAllLanes, out, 4);
        if (column >= columns) continue;
        store_shared_float(f.residual(local, row, column), y[j]);
        if (!(row & 1)) to.put(f, index, column, T::pack(out, next));
      }
    }
    to.done_with_moments(f, f.tag(step, 0), tiles);
    f.fetch_gamma(f.p.vectors + S::kNextGamma, tiles);
  }
};
