// x of a linear stage: how it lies in a warp's registers, and how it gets there.
#pragma once
#include "roles.cuh"

// Fragments of one warp in part `part` of a tile; Python: Geometry.part_sizes.
FF_DEVICE constexpr int part_size(int fragments, int parts, int part) { return fragments / parts + (part < fragments % parts ? 1 : 0); }

// The last warps on a tile may be short: they lack a fragment, the last one of their last part; Python: Geometry.short_warps.
// In its place they multiply zeros by what x has behind theirs: the next warp's, or what nobody writes.
template <class S>
FF_DEVICE bool is_short(u32 warp) {
  return S::kShortWarps > 0 && warp % S::kWarpsColumns >= S::kWarpsColumns - S::kShortWarps;
}
// How many of the warps in front of one are.
template <class S>
FF_DEVICE u32 short_before(u32 warp) {
  if constexpr (S::kShortWarps == 0) return 0;
  constexpr u32 kLong = S::kWarpsColumns - S::kShortWarps;
  const u32 column = warp % S::kWarpsColumns, in_tile = column > kLong ? column - kLong : 0;
  return S::kWarpsRows == 1 ? in_tile : warp / S::kWarpsColumns * S::kShortWarps + in_tile;
}
// The first fragment of a tile that a warp has.
template <class S>
FF_DEVICE u32 first_fragment(u32 warp) {
  return warp % S::kWarpsColumns * S::kFragments - short_before<S>(warp % S::kWarpsColumns);
}

// This warp's columns of x as B operands. Lane (g, t) of slice c holds x[128 c + 16 g + 4 t ...+3].
template <class S>
struct Operand {
  static constexpr int kWarpColumns = S::kFragments * S::kFragmentColumns;
  static constexpr int kSlices = ceil_div(kWarpColumns, 128);
  static constexpr bool kWhole = S::kColumns == S::kWarpsColumns * kWarpColumns && kWarpColumns % 128 == 0;
  u32 value[kSlices][2];

  // Poll for this warp's part of the input vector, straight into the registers that multiply it.
  template <class C>
  FF_DEVICE void gather(const C& c, u32 step, u32 layer) {
    using M = typename C::Model;
    constexpr int kBatch = M::kBulkCopy || kSlices <= 8 ? kSlices : 4;  // loads in flight a lane: others would spill
    const u32 first = first_fragment<S>(c.warp) * S::kFragmentColumns + c.lane * 4;
    const u32 place = c.copy() * M::kVersions + c.version_of(step, layer, S::kInWrites);
    const u64* exchange = c.words(0);
    asm volatile("" : "+l"(exchange));  // NOTE: so that no pointer is kept through all layers
    const u32* pairs = reinterpret_cast<const u32*>(exchange + S::kInput + place * S::kInVersion) +
                       (first / M::kRun * (M::kRun / 2 * S::kInRoom) + first % M::kRun / 2);
#pragma unroll
    for (int i = 0; i < kSlices; i++) {
      const bool exists = kWhole || (i * 128 + c.lane * 4 < kWarpColumns && first + i * 128 < S::kColumns);
      value[i][0] = value[i][1] = exists ? kAbsent : 0;
    }
    Looks<M> looks(c.looks_place(S::kWhere));
    if constexpr (S::kNewcomers) await_sums(c, looks, c.tag(step, layer));
    bool here;
#pragma unroll 1
    do {
      if (!looks.again(c.watch)) break;
      here = true;
#pragma unroll
      for (int b = 0; b < kSlices; b += kBatch) {
#pragma unroll
        for (int i = b; i < b + kBatch && i < kSlices; i++)
          if (!is_here(i)) load_pairs(pairs + i * (64 * S::kInRoom), value[i][0], value[i][1]);
#pragma unroll
        for (int i = b; i < b + kBatch && i < kSlices; i++) here = here && is_here(i);
      }
    } while (!looks.found(here, c.lane));
  }

 private:
  FF_DEVICE bool is_here(int i) const { return value[i][0] != kAbsent && value[i][1] != kAbsent; }

  // Until all owners of the residual have said their sums of squares.
  template <class C, class Look>
  static FF_DEVICE void await_sums(const C& c, Look& looks, u32 tag) {
    const u64* words = c.words(S::kMomentIn) + c.copy() * C::Model::kMomentStride;
    bool here;
#pragma unroll 1
    do {
      if (!looks.again(c.watch)) break;
      here = true;
#pragma unroll 1
      for (u32 i = c.lane; i < S::kInBlocks; i += 32) here = here && split(load_word_acquire(words + i)).tag == tag;
    } while (!looks.found(here, c.lane));
  }
};
