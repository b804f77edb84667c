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

// Slices of a part of a group of tiles, as soon as its chunk has landed: the first ones of the part, or the last, or both.
template <class S, bool kFirst = true, bool kLast = true, class C, class Part>
FF_DEVICE void load_part(C& c, Part& to, u32 tiles, u32 groups, u32 group) {
  constexpr u32 kChunkTiles = S::kStack * S::kWarpsRows;
  const u32 at = group % S::kStack, left = tiles - group / S::kStack * kChunkTiles;
  if (kFirst && at == 0) c.acquire();
  to.load(c.chunk_address(), left < kChunkTiles ? left : kChunkTiles, at * kConsumers + c.warp, c.lane);
  if (kLast && (at + 1 == S::kStack || group + 1 == groups)) c.release();
}

// All groups of tiles of a block, handed over a few at a time.
template <class M, class S>
struct CodedLinear {
  using Product = typename ProductOf<M, S>::Type;
  using X = typename Product::X;

  // NOTE: to load the next group before the work on this one costs more instructions than the loads cost time.
  static FF_DEVICE void multiply(Consumer<M>& c, const Operand<S>& from, u32 tiles, u32 groups) {
    X x;
    x.prepare(from, c.lane);
    float sums[kQuad] = {};
#pragma unroll 1
    for (u32 group = 0; group < groups; group++) {
      Product product;
      add_parts<0, 0>(c, product, x, tiles, groups, group);
#pragma unroll
      for (int i = 0; i < kQuad - 1; i++) sums[i] = sums[i + 1];
      sums[kQuad - 1] = product.result(c.lane, x);
      if (group % kQuad == kQuad - 1 || group + 1 == groups) c.hand_over(sum_quads(sums, c.lane));
    }
  }

 private:
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
    Loaded<S, kSize, part + 1 == S::kParts, false, from, kCount> now;
    load_part<S, from == 0, from + kCount == kSize>(c, now, tiles, groups, group);
    u32 lane = c.lane;
    if constexpr (X::kLean) asm volatile("" : "+r"(lane));  // what follows from it stays here: hoisted, it would spill
    product.template add<first + from>(now, x, lane);
    if constexpr (from + kCount < kSize) add_slices<part, first, from + kCount>(c, product, x, tiles, groups, group);
  }
  // Four tiles' sums of a lane -> lane (g, t): row g of tile t, summed over the lanes that had columns of it.
  static FF_DEVICE float sum_quads(const float (&v)[4], u32 lane) {
    const bool upper = lane & 2, odd = lane & 1;
    const float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(kAllLanes, upper ? v[0] : v[2], 2);
    const float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(kAllLanes, upper ? v[1] : v[3], 2);
    return (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 1);
  }
};
