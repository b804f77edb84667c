// A linear stage: y = W x, and what is folded into it (RMSNorm scale, bias, SwiGLU, residual, candidate for the next token).
//
// A tile is 8 rows. A fragment is 8 rows x 32 columns of 16-bit values: one A operand (16 x 16) whose rows 0-7 are the tile at one step
// of 16 columns and whose rows 8-15 are the same tile at the next step. x is the B operand: column n holds step n of a slice of 128,
// so that x costs two registers a lane for 128 values, and a row's sum is what lands on the diagonal. Fragments of codes: codes.cuh.
#pragma once
#include "linear_codes.cuh"
#include "sample.cuh"
#include "vectors.cuh"

enum class Epilogue { kStore, kSwiglu, kResidual, kLogits };

// The scale of an RMSNorm from the blocks' sums of squares, which arrive with the vector itself.
template <class M, class S>
FF_DEVICE float norm_scale(const Finisher<M>& f, u32 tag) {
  constexpr int kWords = ceil_div(M::kOwners, 32);
  const u64* words = f.words(S::kMomentIn) + f.copy() * M::kMomentStride + f.lane;
  float total = 0;
  bool here;
  Looks<M> looks(f.looks_place(S::kWhere));
#pragma unroll 1
  do {
    if (!looks.again(f.watch)) break;
    u64 w[kWords];  // all at once: one trip a look
#pragma unroll
    for (int i = 0; i < kWords; i++) w[i] = f.lane + i * 32 < M::kOwners ? load_word(words + i * 32) : join(0, tag);
    total = 0;
    here = true;
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      total += __uint_as_float(split(w[i]).value);
      here = here && split(w[i]).tag == tag;
    }
  } while (!looks.found(here, f.lane));
  return rsqrtf(warp_sum(total) / M::kHidden + S::kEps);
}

// Where a vector goes that all read; nothing of what a linear stage hands on otherwise.
template <class M, class S>
FF_DEVICE auto out_of(const Finisher<M>& f, u32 step, u32 layer) {
  if constexpr (S::kEpilogue == Epilogue::kResidual || S::kEpilogue == Epilogue::kSwiglu) return VectorOut<M, S>(f, step, layer);
  else return 0;
}
// Rows come in pairs, `lanes` apart: the lane of the even row puts both.
template <int lanes, class M, class Out>
FF_DEVICE void put_pairs(const Finisher<M>& f, const Out& out, float y, u32 row, u32 column, bool mine) {
  const float next = __shfl_down_sync(kAllLanes, y, lanes);
  if (mine && !(row & 1)) out.put(f, row, column, M::Value::pack(y, next));
}

template <class M, class S>
struct Linear {
  using T = typename M::Value;
  using L = Layout<M>;

  static FF_DEVICE void run(Producer<M>&, u32, u32) {}  // the tape already says it all

  static FF_DEVICE void run(Consumer<M>& c, u32 step, u32 layer) {
    c.enter(S::kWhere, layer);
    const u32 tiles = c.tiles(S::tile_word(layer)).y;
    if (tiles == 0) return;
    Operand<S> x;
    if (c.warp == 0) c.mark(0, step, layer, S::kWhere, 0);
    x.gather(c, step, layer);
    if (c.warp == 0) c.mark(0, step, layer, S::kWhere, 1);
    const u32 groups = (tiles + S::kWarpsRows - 1) / S::kWarpsRows;
    if constexpr (S::kCoded) {
      CodedLinear<M, S>::multiply(c, x, tiles, groups);
    } else {
      u32 octet = c.lane >> 3;
#pragma unroll 1
      for (u32 group = 0; group < groups; group++) {
        float d[2][4] = {};
        if constexpr (S::kFragments > 16) asm volatile("" : "+r"(octet));  // keep masks in the loop: hoisted, they would spill
        multiply<0, 0>(c, x, d, octet);
        c.hand_over((d[0][0] + d[0][3]) + (d[1][0] + d[1][3]));
      }
    }
  }

  static FF_DEVICE void run(Finisher<M>& f, u32 step, u32 layer) {
    f.enter(S::kWhere, layer);
    if (f.index == 0) f.mark(1, step, layer, S::kWhere, 0);
    const uint2 tiles = f.tiles(S::tile_word(layer));
    const u32 groups = (tiles.y + S::kWarpsRows - 1) / S::kWarpsRows, turns = (groups + kTogether - 1) / kTogether;
    const u32 tag = f.tag(step, layer);
    const u32 out_tag = S::kNextLayer ? tag + 1 : tag;
    float scale = 1;
    if constexpr (S::kEpilogue == Epilogue::kResidual) f.await_gamma();
    const auto out = out_of<M, S>(f, step, layer);
    u32 turn = f.turn;
    if constexpr (S::kNorm)
      if (turn < turns) scale = norm_scale<M, S>(f, tag);
#pragma unroll 1
    for (;; turn += M::kFinishers) {
      if constexpr (S::kEpilogue == Epilogue::kLogits) Early<M, S>::turn(f, step, turn, turns);
      if (turn >= turns) break;
      // Which tile and row this lane finishes: after the sums below, the octets of the warp hold up to four tiles of a pass, and of codes
      // lane (g, t) has row g of tile t of a pass.
      // NOTE: all that does not need the sums comes before the wait for them.
      constexpr int kPasses = S::kCoded ? S::kWarpsRows : S::kWarpsColumns == 1 ? 2 : 1;
      const u32 octet = f.lane >> 3, row = S::kCoded ? f.lane >> 2 : f.lane & 7;
      u32 own[kPasses], tile[kPasses];  // number of it among the block's, and among all
      float bias[kPasses], residual[kPasses], gamma[kPasses];
      bool mine[kPasses];
#pragma unroll
      for (int pass = 0; pass < kPasses; pass++) {
        const u32 in_group = S::kWarpsColumns == 8   ? 0
                             : S::kWarpsColumns == 4 ? octet & 1
                             : S::kWarpsColumns == 2 ? (octet >> 1) + 2 * (octet & 1)
                                                     : octet + 4 * pass;
        u32 local = turn * S::kWarpsRows + in_group;
        mine[pass] = local < tiles.y && octet < (S::kWarpsRows < 4 ? S::kWarpsRows : 4);
        if constexpr (S::kCoded) {  // the last groups of a turn are in the last quarters
          const u32 end = (turn + 1) * kTogether < groups ? (turn + 1) * kTogether : groups, group = end + (f.lane & 3) - kTogether;
          local = group * S::kWarpsRows + pass;
          mine[pass] = (int)group >= (int)(turn * kTogether) && local < tiles.y;
        }
        own[pass] = local;
        tile[pass] = tiles.x + local;
        const float* vectors = f.p.vectors + (u64)layer * M::kLayerVectors;
        if (S::kBias >= 0) bias[pass] = mine[pass] ? load_early(vectors + S::kBias + tile[pass] * 8 + row) : 0;
        if constexpr (S::kEpilogue == Epilogue::kResidual) {
          residual[pass] = mine[pass] ? load_shared_float(f.residual(local, row)) : 0;
          gamma[pass] = mine[pass] ? f.gamma(local, row) : 0;
        }
      }
      const u32 from = f.shared + L::kReduction + f.buffer() * L::kReductionBytes + f.lane * (S::kCoded ? 4 : 16);
      f.acquire();
      float v[kPasses];
      if constexpr (S::kCoded) {
        sum_columns(v, from);
      } else {
        const float4 a = load_shared_float4(from), b = load_shared_float4(from + 512);
        sum_warps(v, a, b, octet);
      }
#pragma unroll
      for (int pass = 0; pass < kPasses; pass++) {
        float y = v[pass] * scale;
        if (S::kBias >= 0) y += bias[pass];
        if constexpr (S::kEpilogue == Epilogue::kStore) {
          if (mine[pass]) store_word(f.words(S::kOutput) + tile[pass] * 8 + row, __float_as_uint(y), out_tag);
        } else if constexpr (S::kEpilogue == Epilogue::kSwiglu) {
          const float up = __shfl_down_sync(kAllLanes, y, 4 * kRowLanes);
          const float h = __fdividef(y, 1.f + __expf(-y)) * up;
          put_pairs<kRowLanes>(f, out, h, tile[pass] * 4 + row, 0, mine[pass] && row < 4);
        } else if constexpr (S::kEpilogue == Epilogue::kResidual) {
          y += residual[pass];
          put_pairs<kRowLanes>(f, out, y * gamma[pass], tile[pass] * 8 + row, 0, mine[pass]);
          if (mine[pass]) store_shared_float(f.residual(own[pass], row), y);
        } else {
          const u32 index = tile[pass] * 8 + row;
          if (mine[pass] && index < M::kVocab) {
            if (f.p.logits) f.p.logits[(u64)step * M::kVocab + index] = y;
            take_logit(f, step, index, y);
          }
        }
      }
      f.release();
    }
    f.turn = turn - turns;  // what is handed over in all stages goes round the finishers
    if (f.index == 0) f.mark(1, step, layer, S::kWhere, 1);
    if constexpr (S::kEpilogue == Epilogue::kResidual) {
      out.done_with_moments(f, out_tag, tiles);
      const u32 next = S::kNextLayer ? (layer + 1) % M::kLayers : layer;
      f.fetch_gamma(f.p.vectors + (u64)next * M::kLayerVectors + S::kNextGamma, tiles);
    }
  }

 private:
  static constexpr int kTogether = S::kCoded ? kQuad : 1;  // groups that are handed over at once
  static constexpr int kRowLanes = S::kCoded ? 4 : 1;  // lanes from a row to the next, as a finisher has them

  // Multiply part `part` of the group, and those after it: its chunk's fragments are `first`... of this warp's x.
  // NOTE: where the last group has fewer tiles than warps, a warp without one multiplies what is left in the slot; nobody looks.
  template <int part, int first>
  static FF_DEVICE void multiply(Consumer<M>& c, const Operand<S>& x, float (&d)[2][4], u32 octet) {
    if constexpr (part < S::kParts) {
      constexpr int kSize = part_size(S::kFragments, S::kParts, part);
      constexpr bool kEnds = part + 1 == S::kParts;
      c.acquire();
      uint4 a[kSize];
      const u32 before = c.warp * kSize - (kEnds ? short_before<S>(c.warp) : 0);
      const u32 at = c.chunk_address() + before * 512 + c.lane * 16;
      const bool lacks = kEnds && is_short<S>(c.warp);  // a fragment
#pragma unroll
      for (int i = 0; i < kSize; i++) a[i] = lacks && i + 1 == kSize ? make_uint4(0, 0, 0, 0) : load_shared4(at + i * 512);
      c.release();
#pragma unroll
      for (int i = 0; i < kSize; i++) {
        constexpr int kAlign = 4;
        const int slice = (first + i) / kAlign;
        const bool on = octet == (first + i) % kAlign;  // columns 2p and 2p + 1 hold the steps of fragment p
        mma<T>(d[i & 1], a[i], on ? x.value[slice][0] : 0, on ? x.value[slice][1] : 0);
      }
      multiply<part + 1, first + kSize>(c, x, d, octet);
    }
  }

  // a and b are four lanes' values of (warp lane / 8 and + 4, row lane % 8); sum them over the warps that share a tile.
  template <int kPasses>
  static FF_DEVICE void sum_warps(float (&v)[kPasses], const float4& a, const float4& b, u32 octet) {
    float low = (a.x + a.y) + (a.z + a.w), high = (b.x + b.y) + (b.z + b.w);
    if constexpr (S::kWarpsColumns == 8) {
      v[0] = low + high;
      v[0] += __shfl_xor_sync(kAllLanes, v[0], 8);
      v[0] += __shfl_xor_sync(kAllLanes, v[0], 16);
    } else if constexpr (S::kWarpsColumns == 4) {
      low += __shfl_xor_sync(kAllLanes, low, 8);
      low += __shfl_xor_sync(kAllLanes, low, 16);
      high += __shfl_xor_sync(kAllLanes, high, 8);
      high += __shfl_xor_sync(kAllLanes, high, 16);
      v[0] = octet & 1 ? high : low;
    } else if constexpr (S::kWarpsColumns == 2) {
      low += __shfl_xor_sync(kAllLanes, low, 8);
      high += __shfl_xor_sync(kAllLanes, high, 8);
      v[0] = octet & 1 ? high : low;
    } else {
      v[0] = low;
      v[1] = high;
    }
  }

  // The lanes' sums as they were handed over, over the warps that share a tile.
  template <int kPasses>
  static FF_DEVICE void sum_columns(float (&v)[kPasses], u32 from) {
#pragma unroll
    for (int pass = 0; pass < kPasses; pass++) {
      float part[S::kWarpsColumns];
#pragma unroll
      for (int i = 0; i < S::kWarpsColumns; i++) part[i] = load_shared_float(from + (pass * S::kWarpsColumns + i) * 128);
#pragma unroll
      for (int n = S::kWarpsColumns / 2; n; n /= 2)
#pragma unroll
        for (int i = 0; i < n; i++) part[i] += part[i + n];
      v[pass] = part[0];
    }
  }
};
