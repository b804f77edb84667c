// The product of codes with two to eight columns, by integer matrix instructions, which take codes nearly as they are (integers.cuh).
//
// A warp makes fixed point of its part of x before it multiplies, in place: of each cell and column (panel.cuh) 32 high halves, then 32 low
// ones, a byte each, in the order in which a lane wants them. As with one column, each column has one scale for all that a warp has of it.
// Column n of an operand is half n % 2 of, with two columns, step n / 2 % 2 of column n / 4; with more, of column n / 2 of a group of four, whose
// two steps have an instruction each: of one the rows of the first step count, of the other those of the second.
// With more columns, or half as many of codes of two operands, there would be more instructions than are spared in unpacking.
#pragma once
#include "codes_columns.cuh"

// Whether a stage has them.
template <class M, class S>
FF_DEVICE constexpr bool integer_columns() {
  if constexpr (S::kCoded) {
    using Code = typename S::Format::Code;
    if constexpr (Code::kInteger) return Code::kDigits == 1 && Code::kOperands * M::kColumns <= kIntegerColumns && Panel<M, S>::kHeld;
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

  float total[kGroups] = {};  // of a column's step, or of a column
  float plain[kGroups] = {};  // kRow: the sum of x, where there are offsets

  // Make fixed point of all of x.
  static FF_DEVICE void prepare(const X& panel) {
    constexpr int kAtOnce = S::kFragments <= 8 ? 2 : 1;  // columns. NOTE: a single vector would wait for each of its instructions
    const u32 quad = panel.lane & 7, mine = panel.first + (panel.lane >> 3) * X::kCellBytes;  // of a slice each lane has four values
    const u32 to = mine + (quad & 3) * 8 + (quad >> 2) * 4;
#pragma unroll 1
    for (u32 column = 0; column < panel.columns; column += kAtOnce) {
      u32 values[kAtOnce][S::kFragments][2];
#pragma unroll
      for (int c = 0; c < kAtOnce; c++)
#pragma unroll
        for (int i = 0; i < S::kFragments; i++) {
          const uint2 v = load_shared2(mine + quad * 8 + i * kSliceBytes + (column + c) * 64);
          values[c][i][0] = v.x, values[c][i][1] = v.y;
        }
      __syncwarp();  // the values are where the bytes will be
#pragma unroll
      for (int c = 0; c < kAtOnce; c++) {
        const FixedPoint<T> point(warp_largest(values[c]));
#pragma unroll
        for (int i = 0; i < S::kFragments; i++) {
          const uint2 halves = point.halves(values[c][i][0], values[c][i][1]);
          store_shared(to + i * kSliceBytes + (column + c) * 64, halves.x);
          store_shared(to + i * kSliceBytes + (column + c) * 64 + 32, halves.y);
        }
        if (panel.lane == 0) store_shared_float(panel.factors + (column + c) * 4, point.factor * Code::kFactor);
      }
    }
    __syncwarp();
  }

  // Add a part. place(cell, cells): where so many cells of x are.
  template <int size, bool kLast, class Place>
  FF_DEVICE void add(const Part<size, kLast>& part, const X& panel, Place place) {
    const u32 lane = panel.lane, n = lane >> 2;
    const Code code;
    const u32 own = (kTwo ? (n >> 1 & 1) * X::kCellBytes + (n >> 2) * 64 : (n >> 1) * 64) + (n & 1) * 32 + (lane & 3) * 8;
#pragma unroll
    for (int i = 0; i < size; i++) {
      uint4 a[2][Code::kOperands];
#pragma unroll
      for (int f = 0; f < 2; f++)
#pragma unroll
        for (int k = 0; k < Code::kOperands; k++) a[f][k] = code.operand(part.raw[i], f, 0, k);
      const u32 x = place(4 * i, 4) + own;
      const int at = kRow ? 0 : i;
      with_groups<kGroups, 2>(panel.columns, [&](auto first, auto groups) {
#pragma unroll
        for (int j = first.value; j < first.value + groups.value; j++) add_slice(j, a, x + j * 256, part.scale[at], part.offset[at], lane & 1);
      });
    }
  }

  // With the last part.
  template <int size, bool kLast>
  FF_DEVICE void result(float (&sums)[kGroups], const Part<size, kLast>& part, const X& panel) const {
    WholeRow<S> row;
    row.take(part);
#pragma unroll
    for (int j = 0; j < kGroups; j++) {
      float sum = of_column(total[j], panel.lane);
      if constexpr (kRow) sum = add_codes<F>(0, sum, of_column(plain[j], panel.lane), row.scale, row.offset);
      sums[j] = row.divided(sum * load_shared_float(panel.factors + ((panel.lane & 3) % M::kColumns + 4 * j) * 4));
    }
  }

 private:
  static constexpr bool kTwo = M::kColumns == 2;
  static constexpr int kSteps = kTwo ? 1 : 2;  // instructions for the two steps of an A operand
  static constexpr bool kEachStep = F::kGroup == 32;                         // has a scale of its own,
  static constexpr int kSets = kEachStep || F::kGroup == 64 ? 2 : 1;         // or each A operand, or all of a slice
  static constexpr u32 kSliceBytes = 4 * X::kCellBytes;

  // A slice's product with column group j, whose x is at `x`. odd: with two columns, whether this lane's sums are of the odd steps.
  template <class Raw, int picks>
  FF_DEVICE void add_slice(int j, const uint4 (&a)[2][Code::kOperands], u32 x, const Raw (&scale)[picks], const Raw (&offset)[picks], bool odd) {
    int sets[kSets][kSteps][Code::kOperands][4] = {}, ones[kSets][kEachStep ? kSteps : 1][4] = {};
#pragma unroll
    for (int f = 0; f < 2; f++)
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        const uint2 b = load_shared2(x + (2 * f + step) * X::kCellBytes);
#pragma unroll
        for (int k = 0; k < Code::kOperands; k++) mma_bytes<Code::kSigned>(sets[f % kSets][step][k], a[f][k], b.x, b.y);
        if constexpr (kOffsets)
          mma_bytes<true>(ones[f % kSets][kEachStep ? step : 0], make_uint4(kByteOnes, kByteOnes, kByteOnes, kByteOnes), b.x, b.y);
      }
#pragma unroll
    for (int i = 0; i < kSets; i++) {
      if constexpr (kTwo) {
        const bool next = kEachStep && odd;
        const int at = kEachStep ? 2 * i : i;
        add_sum(j, Code::sum(sets[i][0], odd), ones[i][0], next ? scale[(at + 1) % picks] : scale[at], next ? offset[(at + 1) % picks] : offset[at]);
      } else if constexpr (kEachStep) {
#pragma unroll
        for (int step = 0; step < 2; step++)
          add_sum(j, Code::sum(sets[i][step], step), ones[i][step], scale[(2 * i + step) % picks], offset[(2 * i + step) % picks]);
      } else {
        add_sum(j, Code::sum(sets[i][0], false) + Code::sum(sets[i][1], true), ones[i][0], scale[i], offset[i]);
      }
    }
  }
  template <class Raw>
  FF_DEVICE void add_sum(int j, int codes, const int (&ones)[4], Raw scale, Raw offset) {
    const float sum = (float)codes, all = kOffsets ? (float)both_halves(ones, false) * (1 / Code::kFactor) : 0;
    if constexpr (kRow) {
      total[j] += sum;
      if constexpr (kOffsets) plain[j] += all;
    } else {
      total[j] = add_codes<F>(total[j], sum, all, scale, offset);
    }
  }

  // Lane (g, t): of column t, where there were lanes for its even and its odd steps.
  static FF_DEVICE float of_column(float sum, u32 lane) {
    if constexpr (!kTwo) return sum;
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    return __shfl_sync(kAllLanes, sum, (lane & ~3u) + 2 * (lane & 1));
  }
};
