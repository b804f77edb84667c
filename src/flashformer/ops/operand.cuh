// x of a linear stage: how it lies in a warp's registers, and how it gets there.
#pragma once
#include "roles.cuh"

// Fragments of one warp in part `part` of a tile; Python: Geometry.part_sizes.
FF_DEVICE constexpr int part_size(int fragments, int parts, int part) { return fragments / parts + (part < fragments % parts ? 1 : 0); }

FF_DEVICE constexpr int part_begin(int fragments, int parts, int part) {
  return part ? part_begin(fragments, parts, part - 1) + part_size(fragments, parts, part - 1) : 0;
}

// This warp's columns of x as B operands. Lane (g, t) of slice c holds x[128 c + 16 g + 4 t ...+3].
template <class S>
struct Operand {
  static constexpr int kWarpColumns = S::kFragments * S::kFragmentColumns;
  static constexpr int kSlices = ceil_div(kWarpColumns, 128);
  static constexpr bool kWhole = S::kColumns == S::kWarpsColumns * kWarpColumns && kWarpColumns % 128 == 0;
  u32 value[kSlices][2];

  // Poll for slices [kBegin, kEnd) of this warp's part of the input vector, straight into the registers that multiply it.
  template <int kBegin, int kEnd, class C, class L>
  FF_DEVICE void gather(const C& c, u32 tag, L looks) {
    constexpr int kCount = kEnd - kBegin;
    constexpr int kBatch = kCount > 8 ? (C::Model::kBulkCopy ? 7 : 4) : kCount;  // loads in flight a lane; more would spill
    const u32 first = (c.warp % S::kWarpsColumns) * kWarpColumns + c.lane * 4;
    const u64* words = c.copy(S::kInput) + first / 2;
    u32 missing = 0;  // one bit a slice
#pragma unroll
    for (int i = kBegin; i < kEnd; i++) {
      value[i][0] = value[i][1] = 0;
      const bool exists = kWhole || (i * 128 + c.lane * 4 < kWarpColumns && first + i * 128 < S::kColumns);
      missing |= (exists ? 1u : 0u) << i;
    }
#pragma unroll 1
    do {
      if (!looks.again(c.watch)) break;
#pragma unroll
      for (int b = kBegin; b < kEnd; b += kBatch) {
        u64 w[kBatch][2] = {};  // set, or the last round's would stay alive
#pragma unroll
        for (int i = 0; i < kBatch; i++)
          if (b + i < kEnd && (missing >> (b + i) & 1)) load_words(words + (b + i) * 64, w[i][0], w[i][1]);
#pragma unroll
        for (int i = 0; i < kBatch; i++)
          if (b + i < kEnd && (missing >> (b + i) & 1)) {
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

// How a warp's part of a stage's input is gathered: first its early slices, then the late ones, where there are some.
template <class M, class S>
struct Input {
  static constexpr bool kLate = S::kLateSlices > 0;
  static constexpr int kSlices = Operand<S>::kSlices, kEarlySlices = kSlices - S::kLateSlices;
  Consumer<M>& c;
  u32 step, layer, began;

  FF_DEVICE Input(Consumer<M>& c, u32 step, u32 layer) : c(c), step(step), layer(layer) {}
  FF_DEVICE void gather_early(Operand<S>& x) {
    if constexpr (kLate) began = clock32();
    if (c.warp == 0) c.mark(0, step, layer, S::kWhere, 0);
    x.template gather<0, kEarlySlices>(c, c.tag(step, layer), Looks<M, kLate ? 0 : M::kFirstLook>(c.looks_place(S::kWhere)));
    if (c.warp == 0) c.mark(0, step, layer, S::kWhere, 1);
  }
  FF_DEVICE void gather_late(Operand<S>& x) const {
    c.watch.where = S::kLateWhere << 16 | layer;
    if (c.warp == 0) c.mark(0, step, layer, S::kLateWhere, 0);
    x.template gather<kEarlySlices, kSlices>(c, c.tag(step, layer), Looks<M>(c.looks_place(S::kLateWhere), began));
    if (c.warp == 0) c.mark(0, step, layer, S::kLateWhere, 1);
    c.watch.where = S::kWhere << 16 | layer;
  }
};
