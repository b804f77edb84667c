// The embedding row of the token, or what the layers before the first one that it goes through have made of it: each owner of hidden tiles
// takes its part as the residual and publishes it.
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
    const u32 row = f.lane & 7, layer = f.first_layer(step);
    const float* gammas = f.p.vectors + (layer ? S::kLastGamma : S::kGamma);
    const VectorOut<M, S> to(f, step, layer);
    // Four tiles at a time, one an octet.
    for (u32 local = f.index * 4 + (f.lane >> 3); local < round_up(tiles.y, 4 * M::kFinishers); local += 4 * M::kFinishers) {
      const u32 tile = tiles.x + local, index = tile * 8 + row;
      const bool mine = local < tiles.y, real = mine && index < M::kHidden;
      float y = 0;
      if (real) y = layer ? f.p.resumed[index] : T::unpack(__ldg(f.p.embedding + (u64)f.token * M::kHidden + index));
      const float gamma = real ? __ldg(gammas + index) : 0;
      if (mine) store_shared_float(f.residual(local, row), y);
      const float out = y * gamma, next = __shfl_down_sync(kAllLanes, out, 1);
      if (mine && !(row & 1)) to.put(f, index, 0, T::pack(out, next));
    }
    to.done_with_moments(f, f.tag(step, layer), tiles);
    f.fetch_gamma(f.p.vectors + (u64)layer * M::kLayerVectors + S::kNextGamma, tiles);
  }
};
