// What a consumer does in a linear stage whose weights are codes.
#pragma once
#include "integers.cuh"
#include "operand.cuh"

constexpr int kQuad = 4;  // groups of tiles of codes that are handed over at once

// How codes are multiplied: as integers where they are some, else as fp16 values.
template <class M, class S, bool kInteger = S::Format::Code::kInteger>
struct ProductOf {
  using Type = CodedProduct<M, S>;
};
template <class M, class S>
struct ProductOf<M, S, true> {
  using Type = IntegerProduct<M, S>;
};

// Where a group of tiles is in the chunk of a part.
template <class S>
struct GroupChunk {
  u32 tiles, warp;    // tiles of the chunk, the group's first warp among those of them
  bool begins, ends;  // whether the chunk begins, or ends, with this group

  FF_DEVICE GroupChunk(u32 of_tiles, u32 of_groups, u32 group) {
    constexpr u32 kChunkTiles = S::kStack * S::kWarpsRows;
    const u32 at = group % S::kStack, left = of_tiles - group / S::kStack * kChunkTiles;
    tiles = left < kChunkTiles ? left : kChunkTiles;
    warp = at * kConsumers;
    begins = at == 0;
    ends = at + 1 == S::kStack || group + 1 == of_groups;
  }
};

// Slices of a part of a group of tiles, as soon as its chunk has landed: the first ones of the part, or the last, or both.
template <class S, bool kFirst = true, bool kLast = true, class C, class Part>
FF_DEVICE void load_part(C& c, Part& to, u32 tiles, u32 groups, u32 group, u32 from = 0) {
  const GroupChunk<S> chunk(tiles, groups, group);
  if (kFirst && chunk.begins) c.acquire();
  to.load(c.chunk_address(), chunk.tiles, chunk.warp + c.warp, c.lane, from);
  if (kLast && chunk.ends) c.release();
}

// All groups of tiles of a block, handed over a few at a time.
template <class M, class S>
struct CodedLinear {
  using Product = typename ProductOf<M, S>::Type;
  using X = typename Product::X;
  using Sums = float[kQuad];  // of the latest groups

  static FF_DEVICE void multiply(Consumer<M>& c, const Operand<S>& from, u32 tiles, u32 groups) {
    X x;
    x.prepare(from, c.lane);
    Sums sums = {};
    u32 group = 0;
#pragma unroll 1
    for (; group + kBatch <= groups; group += kBatch) add_groups<kBatch>(c, sums, x, tiles, groups, group);
    if (kBatch > 1 && group < groups) add_groups<1>(c, sums, x, tiles, groups, group);
  }

 private:
  // Groups that are multiplied at a time: one of few slices waits for its chunk, for its codes and for each instruction.
  // NOTE: not more, nor of more slices: measured slower. To load the next group before the work on one costs more than the loads do.
  static constexpr int kBatch = S::kParts == 1 && 2 * S::kFragments <= Product::kBatchSlices ? 2 : 1;

  template <int kCount>
  static FF_DEVICE void add_groups(Consumer<M>& c, Sums& sums, const X& x, u32 tiles, u32 groups, u32 group) {
    Product products[kCount];
    if constexpr (kCount == 1) {
      add_parts<0, 0>(c, products[0], x, tiles, groups, group);
    } else {
      Loaded<S, S::kFragments, true> codes[kCount];
#pragma unroll
      for (int i = 0; i < kCount; i++) load_part<S>(c, codes[i], tiles, groups, group + i);
#pragma unroll
      for (int i = 0; i < kCount; i++) products[i].template add<0>(codes[i], x, c.lane);
    }
#pragma unroll
    for (int i = 0; i < kCount; i++) {
#pragma unroll
      for (int j = 0; j < kQuad - 1; j++) sums[j] = sums[j + 1];
      sums[kQuad - 1] = products[i].result(c.lane, x);
    }
    if ((group + kCount) % kQuad == 0 || group + kCount == groups) c.hand_over(sum_quads(sums, c.lane));
  }
  // Part `part` of a group, and those after it: its slices are `first`... of x.
  template <int part, int first>
  static FF_DEVICE void add_parts(Consumer<M>& c, Product& product, const X& x, u32 tiles, u32 groups, u32 group) {
    if constexpr (part < S::kParts) {
      add_slices<part, first, 0>(c, product, x, tiles, groups, group);
      add_parts<part + 1, first + part_size(S::kFragments, S::kParts, part)>(c, product, x, tiles, groups, group);
    }
  }
  // Slice `from` of the part, and those after it. NOTE: all at once, if their product leaves enough registers.
  template <int part, int first, int from>
  static FF_DEVICE void add_slices(Consumer<M>& c, Product& product, const X& x, u32 tiles, u32 groups, u32 group) {
    constexpr int kSize = part_size(S::kFragments, S::kParts, part);
    constexpr int kCount = Product::kAtOnce < kSize - from ? Product::kAtOnce : kSize - from;
    Loaded<S, kSize, part + 1 == S::kParts, false, kCount> now;
    load_part<S, from == 0, from + kCount == kSize>(c, now, tiles, groups, group, from);
    u32 lane = c.lane;
    if constexpr (X::kLean) asm volatile("" : "+r"(lane));  // what follows from it stays here: hoisted, it would spill
    product.template add<first + from>(now, x, lane);
    if constexpr (from + kCount < kSize) add_slices<part, first, from + kCount>(c, product, x, tiles, groups, group);
  }
  // Four tiles' sums of a lane -> lane (g, t): row g of tile t, summed over the lanes that had columns of it.
  static FF_DEVICE float sum_quads(const Sums& v, u32 lane) {
    const bool upper = lane & 2, odd = lane & 1;
    const float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(kAllLanes, upper ? v[0] : v[2], 2);
    const float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(kAllLanes, upper ? v[1] : v[3], 2);
    return (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 1);
  }
};
