// What a consumer does in a linear stage whose weights are codes.
#pragma once
#include "integers.cuh"
#include "operand.cuh"

constexpr int kQuad = 4;  // groups of tiles of codes that are handed over at once

// How slices [kBegin, kEnd) of codes are multiplied: as integers where they are some, else as fp16 values.
template <class M, class S, int kBegin, int kEnd, bool kInteger = S::Format::Code::kInteger>
struct ProductOf {
  using Type = CodedProduct<M, S, kBegin, kEnd>;
};
template <class M, class S, int kBegin, int kEnd>
struct ProductOf<M, S, kBegin, kEnd, true> {
  using Type = IntegerProduct<M, S, kBegin, kEnd>;
};

// Slices of a part of a group of tiles, the chunk's number `at`, as soon as that has landed: the first ones of the part that are read, or the
// last, or both. leaves: nothing of the chunk is read after it.
template <class S, bool kFirst, bool kLast, bool kRelease, class C, class Part>
FF_DEVICE void load_part(C& c, Part& to, u32 tiles, u32 group, u32 at, bool leaves) {
  constexpr u32 kChunkTiles = S::kStack * S::kWarpsRows;
  const u32 left = tiles - group / S::kStack * kChunkTiles;
  if (kFirst && at == 0) c.acquire();
  to.load(c.chunk_address(), left < kChunkTiles ? left : kChunkTiles, at * kConsumers + c.warp, c.lane);
  if (kLast && leaves) c.template leave<kRelease>();
}
template <class S, bool kFirst = true, bool kLast = true, bool kRelease = true, class C, class Part>
FF_DEVICE void load_part(C& c, Part& to, u32 tiles, u32 groups, u32 group) {
  const u32 at = group % S::kStack;
  load_part<S, kFirst, kLast, kRelease>(c, to, tiles, group, at, at + 1 == S::kStack || group + 1 == groups);
}

// A product and what it multiplies.
template <class Product>
struct Multiplied {
  Product& product;
  const typename Product::X& x;
};

// All groups of tiles of a block, handed over a few at a time.
template <class M, class S>
struct CodedLinear {
  using In = Input<M, S>;
  using Early = typename ProductOf<M, S, 0, In::kEarlySlices>::Type;
  using Sums = float[kQuad];

  static FF_DEVICE void multiply(Consumer<M>& c, const Operand<S>& x, const In& input, u32 tiles, u32 groups) {
    typename Early::X early_x;
    early_x.prepare(x, c.lane);
    Sums sums = {};
    if constexpr (In::kLate) {
      multiply_late(c, input, early_x, sums, tiles, groups);
    } else {
      u32 group = 0;
#pragma unroll 1
      for (; group + kBatch <= groups; group += kBatch) add_groups<true>(c, early_x, sums, tiles, groups, group);
      if (kBatch > 1 && group < groups) add_groups<false>(c, early_x, sums, tiles, groups, group);
    }
  }

 private:
  // Groups that are multiplied at a time: one of few slices waits for its chunk, its codes and its instructions, one after the other.
  // NOTE: not more, nor of more slices: measured slower. To load the next group before the work on one costs more than the loads do.
  static constexpr int kBatch = S::kParts == 1 && 2 * S::kFragments <= Early::kBatchSlices ? 2 : 1;

  // A batch of groups; kFull: all of them exist.
  template <bool kFull>
  static FF_DEVICE void add_groups(Consumer<M>& c, const typename Early::X& x, Sums& sums, u32 tiles, u32 groups, u32 group) {
    if constexpr (kBatch == 1) {
      Early product;
      add_parts<0, S::kParts, 0, In::kSlices, true>(c, tiles, groups, group, Multiplied<Early>{product, x});
      hand_over(c, sums, product.result(c.lane, x), group, groups);
    } else {
      constexpr bool kAligned = kBatch % S::kStack == 0;
      Loaded<S, S::kFragments, true> codes[kBatch] = {};
      Early product[kBatch];
#pragma unroll
      for (u32 i = 0; i < kBatch; i++) {
        if (!kFull && group + i >= groups) break;
        const u32 at = kAligned ? i % S::kStack : (group + i) % S::kStack;
        const bool leaves = at + 1 == S::kStack || (!(kFull && kAligned) && group + i + 1 == groups);
        load_part<S, true, true, true>(c, codes[i], tiles, group + i, at, leaves);
      }
      u32 lane = c.lane;
      if constexpr (Early::X::kLean) asm volatile("" : "+r"(lane));  // what follows from it stays here: hoisted, it would spill
#pragma unroll
      for (int i = 0; i < kBatch; i++) product[i].template add<0>(codes[i], x, lane);
#pragma unroll
      for (u32 i = 0; i < kBatch; i++)
        if (kFull || group + i < groups) push(sums, product[i].result(c.lane, x));
      if ((group + kBatch) % kQuad == 0 || group + kBatch >= groups) c.hand_over(sum_quads(sums, c.lane));
    }
  }

 private:
  // The same where x has late slices. Of a tile in many parts the first come before them. Tiles in few bytes would not last until these are
  // there: of some groups the early slices come first, and their chunks stay in the ring meanwhile.
  static FF_DEVICE void multiply_late(
      Consumer<M>& c, const In& input, const typename Early::X& early_x, Sums& sums, u32 tiles, u32 groups) {
    using Late = typename ProductOf<M, S, In::kEarlySlices, In::kSlices>::Type;
    constexpr int kAhead = ahead(), kEarlyParts = kAhead ? 0 : early_parts(S::kParts);
    typename Late::X late_x;
    float begun[kAhead ? kAhead : 1] = {};
    if constexpr (kAhead > 0) {
      Consumer<M> in_front = c;
#pragma unroll 1
      for (u32 group = 0; group < kAhead; group++) {
        Early early;
        if (group < groups)
          add_parts<0, S::kParts, 0, In::kEarlySlices, false>(in_front, tiles, groups, group, Multiplied<Early>{early, early_x});
        push(begun, early.result(c.lane, early_x));
      }
      gather_late(c, input, late_x);
    }
    u32 group = 0;
    if constexpr (kAhead > 0) {
#pragma unroll 1
      for (; group < kAhead && group < groups; group++) {
        Late late;
        add_parts<0, S::kParts, In::kEarlySlices, In::kSlices, true>(c, tiles, groups, group, Multiplied<Late>{late, late_x});
        hand_over(c, sums, begun[0] + late.result(c.lane, late_x), group, groups);
        push(begun, 0);
      }
    }
#pragma unroll 1
    for (; group < groups; group++) {
      Early early;
      Late late;
      const Multiplied<Early> first{early, early_x};
      add_parts<0, kEarlyParts, 0, In::kSlices, true>(c, tiles, groups, group, first);
      if (kAhead == 0 && group == 0) gather_late(c, input, late_x);
      add_parts<kEarlyParts, S::kParts, 0, In::kSlices, true>(c, tiles, groups, group, first, Multiplied<Late>{late, late_x});
      early.row = late.row;  // which came with the last part
      hand_over(c, sums, early.result(c.lane, early_x) + late.result(c.lane, late_x), group, groups);
    }
  }
  template <class X>
  static FF_DEVICE void gather_late(const Consumer<M>& c, const In& input, X& late_x) {
    Operand<S> rest;  // of its own, so that no words stay alive
    input.gather_late(rest);
    late_x.prepare(rest, c.lane);
  }
  // How many groups of tiles begin with their early slices alone; 0: tiles are in many parts.
  // NOTE: what all columns of a row have in common comes with the last part.
  static FF_DEVICE constexpr int ahead() {
    using F = typename S::Format;
    constexpr int kChunks = Layout<M>::kSlots < 6 ? Layout<M>::kSlots - 2 : 4;
    const bool able = S::kParts == 1 || (2 * S::kParts <= kChunks && F::kGroup != 0 && !F::Scale::kDivided);
    return able ? kChunks / S::kParts * S::kStack : 0;
  }
  // Of the first `parts` of a tile those in front of the late slices.
  static FF_DEVICE constexpr int early_parts(int parts) {
    return parts && part_begin(S::kFragments, S::kParts, parts) > In::kEarlySlices ? early_parts(parts - 1) : parts;
  }
  static FF_DEVICE void hand_over(Consumer<M>& c, Sums& sums, float sum, u32 group, u32 groups) {
    push(sums, sum);
    if (group % kQuad == kQuad - 1 || group + 1 == groups) c.hand_over(sum_quads(sums, c.lane));
  }
  // Slices [kFrom, kTo) of parts [part, kEnd) of a group; each product takes those of its own.
  template <int part, int kEnd, int kFrom, int kTo, bool kRelease, class... Products>
  static FF_DEVICE void add_parts(Consumer<M>& c, u32 tiles, u32 groups, u32 group, const Products&... products) {
    if constexpr (part < kEnd) {
      constexpr int kSize = part_size(S::kFragments, S::kParts, part), kBegin = part_begin(S::kFragments, S::kParts, part);
      constexpr int from = kFrom > kBegin ? kFrom - kBegin : 0, to = kTo - kBegin < kSize ? kTo - kBegin : kSize;
      if constexpr (from < to) add_slices<part, from, to, true, kRelease>(c, tiles, groups, group, products...);
      else c.template leave<kRelease>();
      add_parts<part + 1, kEnd, kFrom, kTo, kRelease>(c, tiles, groups, group, products...);
    }
  }
  // Slices [from, to) of a part. NOTE: all at once, if their product leaves enough registers.
  template <int part, int from, int to, bool kFirst, bool kRelease, class... Products>
  static FF_DEVICE void add_slices(Consumer<M>& c, u32 tiles, u32 groups, u32 group, const Products&... products) {
    constexpr int kSize = part_size(S::kFragments, S::kParts, part), kBegin = part_begin(S::kFragments, S::kParts, part);
    constexpr int kCount = Early::kAtOnce < to - from ? Early::kAtOnce : to - from;
    Loaded<S, kSize, part + 1 == S::kParts, false, from, kCount> now;
    load_part<S, kFirst, from + kCount == to, kRelease>(c, now, tiles, groups, group);
    u32 lane = c.lane;
    if constexpr (Early::X::kLean) asm volatile("" : "+r"(lane));  // what follows from it stays here: hoisted, it would spill
    (products.product.template add<kBegin>(now, products.x, lane), ...);
    if constexpr (from + kCount < to) add_slices<part, from + kCount, to, false, kRelease>(c, tiles, groups, group, products...);
  }
  // The last of some values, in the place of the first.
  template <int n>
  static FF_DEVICE void push(float (&values)[n], float value) {
#pragma unroll
    for (int i = 0; i < n - 1; i++) values[i] = values[i + 1];
    values[n - 1] = value;
  }
  // Four tiles' sums of a lane -> lane (g, t): row g of tile t, summed over the lanes that had columns of it.
  static FF_DEVICE float sum_quads(const float (&v)[4], u32 lane) {
    const bool upper = lane & 2, odd = lane & 1;
    const float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(kAllLanes, upper ? v[0] : v[2], 2);
    const float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(kAllLanes, upper ? v[1] : v[3], 2);
    return (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 1);
  }
};
