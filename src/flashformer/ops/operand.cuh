// x of a linear stage: how it lies in a warp's registers, and how it gets there.
#pragma once
#include "roles.cuh"

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
    // Loads in flight a lane: others would spill.
    constexpr int kBatch = kSlices <= 8 ? kSlices : !C::Model::kBulkCopy ? 4 : kSlices <= 24 ? 7 : 8;
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
