// A linear stage: y = W x, and what is folded into it (RMSNorm scale, bias, SwiGLU, residual, candidate for the next token).
//
// A tile is 8 rows. A fragment is 8 rows x 32 columns of 16-bit values: one A operand (16 x 16) whose rows 0-7 are the tile at one step
// of 16 columns and whose rows 8-15 are the same tile at the next step. x is the B operand: column n holds step n of a slice of 128,
// so that x costs two registers a lane for 128 values, and a row's sum is what lands on the diagonal. Fragments of codes: codes.cuh.
#pragma once
#include "integers.cuh"
#include "sample.cuh"

enum class Epilogue { kStore, kSwiglu, kResidual, kLogits };

// Fragments of one warp in part `part` of a tile; Python: Geometry.part_sizes.
FF_DEVICE constexpr int part_size(int fragments, int parts, int part) { return fragments / parts + (part < fragments % parts ? 1 : 0); }

// This warp's columns of x as B operands. Lane (g, t) of slice c holds x[128 c + 16 g + 4 t ...+3].
template <class S>
struct Operand {
  static constexpr int kWarpColumns = S::kFragments * S::kFragmentColumns;
  static constexpr int kSlices = ceil_div(kWarpColumns, 128);
  static constexpr bool kWhole = S::kColumns == S::kWarpsColumns * kWarpColumns && kWarpColumns % 128 == 0;
  u32 value[kSlices][2];

  // Poll for this warp's part of the input vector, straight into the registers that multiply it.
  template <class C>
  FF_DEVICE void gather(const C& c, u32 tag) {
    constexpr int kBatch = kSlices > 8 ? (C::Model::kBulkCopy ? 7 : 4) : kSlices;  // loads in flight a lane; more would spill
    const u32 first = (c.warp % S::kWarpsColumns) * kWarpColumns + c.lane * 4;
    const u64* words = c.copy(S::kInput) + first / 2;
    u32 missing = 0;  // one bit a slice
#pragma unroll
    for (int i = 0; i < kSlices; i++) {
      value[i][0] = value[i][1] = 0;
      const bool exists = kWhole || (i * 128 + c.lane * 4 < kWarpColumns && first + i * 128 < S::kColumns);
      missing |= (exists ? 1u : 0u) << i;
    }
    Looks<typename C::Model> looks(c.looks_place(S::kWhere));
#pragma unroll 1
    do {
      if (!looks.again(c.watch)) break;
#pragma unroll
      for (int b = 0; b < kSlices; b += kBatch) {
        u64 w[kBatch][2] = {};  // set, or the last round's would stay alive
#pragma unroll
        for (int i = 0; i < kBatch; i++)
          if (b + i < kSlices && (missing >> (b + i) & 1)) load_words(words + (b + i) * 64, w[i][0], w[i][1]);
#pragma unroll
        for (int i = 0; i < kBatch; i++)
          if (b + i < kSlices && (missing >> (b + i) & 1)) {
            const Word low = split(w[i][0]), high = split(w[i][1]);
            if (low.tag == tag && high.tag == tag) {
              value[b + i][0] = low.value;
              value[b + i][1] = high.value;
              missing &= ~(1u << (b + i));
            }
          }
      }
    } while (!looks.found(missing == 0, c.lane));
  }
};

// The scale of an RMSNorm from the blocks' sums of squares, which arrive with the vector itself.
template <class M, class S>
FF_DEVICE float norm_scale(const Finisher<M>& f, u32 tag) {
  constexpr int kWords = ceil_div(M::kOwners, 32);
  const u64* words = f.copy(S::kMomentIn) + f.lane;
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

// How codes are multiplied: as integers where they are some, else as fp16 values.
template <class M, class S, bool kInteger = S::Format::Code::kInteger>
struct ProductOf {
  using Type = CodedProduct<M, S>;
};
template <class M, class S>
struct ProductOf<M, S, true> {
  using Type = IntegerProduct<M, S>;
};

// A part of a group of tiles, as soon as its chunk has landed.
template <class S, class C, class Part>
FF_DEVICE void load_part(C& c, Part& to, u32 tiles, u32 groups, u32 group) {
  constexpr u32 kChunkTiles = S::kStack * S::kWarpsRows;
  const u32 at = group % S::kStack, left = tiles - group / S::kStack * kChunkTiles;
  if (at == 0) c.acquire();
  to.load(c.chunk_address(), left < kChunkTiles ? left : kChunkTiles, at * kConsumers + c.warp, c.lane);
  if (at + 1 == S::kStack || group + 1 == groups) c.release();
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
    x.gather(c, c.tag(step, layer));
    if (c.warp == 0) c.mark(0, step, layer, S::kWhere, 1);
    const u32 groups = (tiles + S::kWarpsRows - 1) / S::kWarpsRows;
    if constexpr (S::kCoded) {
      multiply_codes(c, x, tiles, groups);
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
    u32 turn = f.turn;
    if constexpr (S::kNorm)
      if (turn < turns) scale = norm_scale<M, S>(f, tag);
#pragma unroll 1
    for (; turn < turns; turn += M::kFinishers) {
      // Which tile and row this lane finishes: after the sums below, the octets of the warp hold up to four tiles of a pass, and of codes
      // lane (g, t) has row g of tile t of a pass.
      // NOTE: all that does not need the sums comes before the wait for them.
      constexpr int kPasses = S::kCoded ? S::kWarpsRows : S::kWarpsColumns == 1 ? 2 : 1;
      const u32 octet = f.lane >> 3, row = S::kCoded ? f.lane >> 2 : f.lane & 7;
      u32 tile[kPasses];
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
          publish_pairs(f, h, tile[pass] * 2, mine[pass] && row < 4, row, out_tag);
        } else if constexpr (S::kEpilogue == Epilogue::kResidual) {
          y += residual[pass];
          publish_pairs(f, y * gamma[pass], tile[pass] * 4, mine[pass], row, out_tag);
          if (mine[pass]) store_shared_float(f.residual(tile[pass] - tiles.x, row), y);
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
      f.publish_moment(S::kMomentOut, out_tag, tiles);
      const u32 next = S::kNextLayer ? (layer + 1) % M::kLayers : layer;
      f.fetch_gamma(f.p.vectors + (u64)next * M::kLayerVectors + S::kNextGamma, tiles);
    }
  }

 private:
  static constexpr int kTogether = S::kCoded ? 4 : 1;  // groups that are handed over at once
  static constexpr int kRowLanes = S::kCoded ? 4 : 1;  // lanes from a row to the next, as a finisher has them

  // Multiply part `part` of the group, and those after it: its chunk's fragments are `first`... of this warp's x.
  // NOTE: where the last group has fewer tiles than warps, a warp without one multiplies what is left in the slot; nobody looks.
  template <int part, int first>
  static FF_DEVICE void multiply(Consumer<M>& c, const Operand<S>& x, float (&d)[2][4], u32 octet) {
    if constexpr (part < S::kParts) {
      constexpr int kSize = part_size(S::kFragments, S::kParts, part);
      c.acquire();
      uint4 a[kSize];
      const u32 at = c.chunk_address() + c.warp * (kSize * 512) + c.lane * 16;
#pragma unroll
      for (int i = 0; i < kSize; i++) a[i] = load_shared4(at + i * 512);
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

  // The same of codes: all groups, handed over a few at a time.
  // NOTE: to load the next group before the work on this one costs more instructions than the loads cost time.
  static FF_DEVICE void multiply_codes(Consumer<M>& c, const Operand<S>& x, u32 tiles, u32 groups) {
    using Product = typename ProductOf<M, S>::Type;
    typename Product::X operand;
    operand.prepare(x, c.lane);
    float sums[kTogether] = {};
#pragma unroll 1
    for (u32 group = 0; group < groups; group++) {
      Product product;
      add_parts<0, 0>(c, product, operand, tiles, groups, group);
#pragma unroll
      for (int i = 0; i < kTogether - 1; i++) sums[i] = sums[i + 1];
      sums[kTogether - 1] = product.result(c.lane, operand);
      if (group % kTogether == kTogether - 1 || group + 1 == groups) c.hand_over(sum_quads(sums, c.lane));
    }
  }
  template <int part, int first, class Product>
  static FF_DEVICE void add_parts(Consumer<M>& c, Product& product, const typename Product::X& operand, u32 tiles, u32 groups, u32 group) {
    if constexpr (part < S::kParts) {
      constexpr int kSize = part_size(S::kFragments, S::kParts, part);
      Loaded<S, kSize, part + 1 == S::kParts> now;
      load_part<S>(c, now, tiles, groups, group);
      product.template add<first>(now, operand, c.lane);
      add_parts<part + 1, first + kSize>(c, product, operand, tiles, groups, group);
    }
  }
  // Four tiles' sums of a lane -> lane (g, t): row g of tile t, summed over the lanes that had columns of it.
  static FF_DEVICE float sum_quads(const float (&v)[4], u32 lane) {
    const bool upper = lane & 2, odd = lane & 1;
    const float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(kAllLanes, upper ? v[0] : v[2], 2);
    const float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(kAllLanes, upper ? v[1] : v[3], 2);
    return (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 1);
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

  // Rows come in pairs: the lane of the even row publishes both.
  static FF_DEVICE void publish_pairs(Finisher<M>& f, float y, u32 word, bool mine, u32 row, u32 tag) {
    const float next = __shfl_down_sync(kAllLanes, y, kRowLanes);
    if (mine && !(row & 1)) f.publish(S::kOutput + word + row / 2, T::pack(y, next), tag);
  }
};
