// The product of codes with two or four columns, by integer matrix instructions, which take codes nearly as they are (integers.cuh).
//
// A warp makes fixed point of its part of x before it multiplies, in place: of each cell and column (panel.cuh) 32 high halves, then 32 low
// ones, a byte each, in the order in which a lane wants them; the scales, one of each slice and column, lie behind the panels. Column n of an
// operand is half n % 2 of, with two columns, step n / 2 % 2 of column n / 4; with four, column n / 2, whose two steps have an instruction each.
// With more columns there would be more instructions than are spared in unpacking.
#pragma once
#include "codes_columns.cuh"

// Whether a stage has them.
template <class M, class S>
FF_DEVICE constexpr bool integer_columns() {
  if constexpr (S::kCoded) {
    using Code = typename S::Format::Code;
    if constexpr (Code::kInteger) return Code::kDigits == 1 && M::kColumns <= kIntegerColumns && S::kTogether == 1 && Panel<M, S>::kHeld;
  }
  return false;
}

template <class M, class S>
struct IntegerColumns {
  using T = typename M::Value;
  using F = typename S::Format;
  using Code = typename F::Code;
  using Scale = typename F::Scale;
  using X = Panel<M, S>;
  static constexpr int kGroups = M::kColumnGroups;
  static constexpr bool kOffsets = F::kOffset != Offset::kNone;
  static constexpr bool kRow = F::kGroup == 0;  // all columns of the matrix have one scale
  static constexpr bool kLastDiffers = kRow || Scale::kDivided;
  template <int size, bool kLast>
  using Part = Loaded<S, size, kLast, true>;

  float total = 0;  // of a column's step, or of a column
  float plain = 0;  // kRow: the sum of x, where there are offsets

  // Make fixed point of all of x.
  static FF_DEVICE void prepare(X& panel) {
    constexpr int kAtOnce = 4 / M::kColumns;  // slices. NOTE: a single vector would wait for each of its instructions
    const u32 lane = panel.lane, quad = lane & 7;  // of a slice each lane has four values
    const u32 first = panel.next(4), mine = first + (lane >> 3) * X::kCellBytes;
#pragma unroll 1
    for (int slice = 1; slice < S::kFragments; slice++) panel.next(4);
#pragma unroll 1
    for (int slice = 0; slice < S::kFragments; slice += kAtOnce) {
      uint2 from[kAtOnce][M::kColumns];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
#pragma unroll
        for (int c = 0; c < M::kColumns; c++)
          from[i][c] = exists(slice + i) ? load_shared2(mine + (slice + i) * kSliceBytes + c * 64 + quad * 8) : make_uint2(0, 0);
      __syncwarp();  // the values are where the bytes will be
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
#pragma unroll
        for (int c = 0; c < M::kColumns; c++) {
          const u32 values[1][2] = {{from[i][c].x, from[i][c].y}};
          const FixedPoint<T> point(warp_largest(values));
          const uint2 halves = point.halves(from[i][c].x, from[i][c].y);
          if (!exists(slice + i)) continue;
          const u32 to = mine + (slice + i) * kSliceBytes + c * 64 + (quad & 3) * 8 + (quad >> 2) * 4;
          store_shared(to, halves.x);
          store_shared(to + 32, halves.y);
          if (lane == 0) store_shared_float(panel.scales(first + (slice + i) * kSliceBytes) + c * 4, point.factor);
        }
    }
    __syncwarp();
  }

  // Add a part. place(cell, cells): where so many cells of x are.
  template <int size, bool kLast, class Place>
  FF_DEVICE void add(const Part<size, kLast>& part, const X& panel, Place place) {
    const u32 lane = panel.lane, n = lane >> 2;
    const bool odd = lane & 1;  // with two columns: whether this lane's sums are of the odd steps
    const u32 own = (kTwo ? (n >> 1 & 1) * X::kCellBytes + (n >> 2) * 64 : (n >> 1) * 64) + (n & 1) * 32 + (lane & 3) * 8;
#pragma unroll
    for (int i = 0; i < size; i++) {
      const u32 at = place(4 * i, 4), x = at + own;
      float slice = 0, slice_plain = 0;
#pragma unroll
      for (int f = 0; f < 2; f++) {
        uint4 a[Code::kOperands];
#pragma unroll
        for (int k = 0; k < Code::kOperands; k++) a[k] = Code::operand(part.raw[i], f, 0, k);
#pragma unroll
        for (int j = 0; j < kSteps; j++) {
          const uint2 b = load_shared2(x + (2 * f + j) * X::kCellBytes);
          int sets[Code::kOperands][4] = {}, ones[4] = {};
#pragma unroll
          for (int k = 0; k < Code::kOperands; k++) mma_bytes<Code::kSigned>(sets[k], a[k], b.x, b.y);
          if constexpr (kSums) mma_bytes<true>(ones, make_uint4(kOnes, kOnes, kOnes, kOnes), b.x, b.y);
          const bool second = kTwo ? odd : j == 1;
          float sum = (float)Code::sum(sets, second);
          if constexpr (Code::kUpperFactor != 1)
            if (f == 1) sum *= 1 / Code::kUpperFactor;
          const float all = kSums ? (float)both_halves(ones, false) : 0;
          if constexpr (!kOffsets && Code::kZero != 0) sum = fmaf(-Code::kZero, all, sum);
          if constexpr (kRow) {
            slice += sum;
            if constexpr (kOffsets) slice_plain += all;
          } else {
            const auto& scale = part.scale[i];
            const auto& offset = part.offset[i];
            if constexpr (kTwo && F::kGroup == 32)
              slice = add_scaled<F>(slice, sum, all, odd ? scale[2 * f + 1] : scale[2 * f], odd ? offset[2 * f + 1] : offset[2 * f]);
            else slice = add_scaled<F>(slice, sum, all, scale[(2 * f + j) * 32 / F::kGroup], offset[(2 * f + j) * 32 / F::kGroup]);
          }
        }
      }
      const float factor = load_shared_float(panel.scales(at) + (kTwo ? lane >> 1 & 1 : lane & 3) * 4);
      total = fmaf(factor, slice, total);
      if constexpr (kRow && kOffsets) plain = fmaf(factor, slice_plain, plain);
    }
  }

  // With the last part.
  template <int size, bool kLast>
  FF_DEVICE void result(float (&sums)[kGroups], const Part<size, kLast>& part, u32 lane) const {
    WholeRow<S> row;
    row.take(part);
    float sum = of_column(total, lane);
    if constexpr (kRow) sum = add_scaled<F>(0, sum, of_column(plain, lane), row.scale, row.offset);
    sums[0] = row.divided(sum * Code::kFactor);
  }

 private:
  static constexpr bool kTwo = M::kColumns == 2;
  static constexpr int kSteps = kTwo ? 1 : 2;                  // instructions for the two steps of an A operand
  static constexpr bool kSums = kOffsets || Code::kZero != 0;  // whether the sums of x are wanted
  static constexpr u32 kOnes = 0x01010101u, kSliceBytes = 4 * X::kCellBytes;

  static FF_DEVICE bool exists(int slice) { return slice < S::kFragments; }

  // Lane (g, t): of column t, where there were lanes for its even and its odd steps.
  static FF_DEVICE float of_column(float sum, u32 lane) {
    if constexpr (!kTwo) return sum;
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    return __shfl_sync(kAllLanes, sum, (lane & ~3u) + 2 * (lane & 1));
  }
};
