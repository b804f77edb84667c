// The embedding row of the token: each owner of hidden tiles takes its part as the residual and publishes it.
#pragma once
#include "vectors.cuh"

template <class M, class S>
struct Embed {
  using T = typename M::Value;

  static FF_DEVICE void run(Producer<M>&, u32) {}
  static FF_DEVICE void run(Consumer<M>&, u32) {}
  static FF_DEVICE void run(Finisher<M>& f, u32 step) {
    f.enter(S::kWhere, 0);
    const uint2 tiles = f.tiles(0);
    const u32 row = f.lane & 7;
    const VectorOut<M, S> to(f, step, 0);
    // Four tiles at a time, one an octet.
    for (u32 local = f.index * 4 + (f.lane >> 3); local < round_up(tiles.y, 4 * M::kFinishers); local += 4 * M::kFinishers) {
      const u32 tile = tiles.x + local, index = tile * 8 + row;
      const bool mine = local < tiles.y, real = mine && index < M::kHidden;
      const float y = real ? T::unpack(__ldg(f.p.embedding + (u64)f.token * M::kHidden + index)) : 0;
      const float gamma = real ? __ldg(f.p.vectors + S::kGamma + index) : 0;
      if (mine) store_shared_float(f.residual(local, row), y);
      const float out = y * gamma, next = __shfl_down_sync(kAllLanes, out, 1);
      if (mine && !(row & 1)) to.put(f, index, 0, T::pack(out, next));
    }
    to.done_with_moments(f, f.tag(step, 0), tiles);
    f.fetch_gamma(f.p.vectors + S::kNextGamma, tiles);
  }
};
