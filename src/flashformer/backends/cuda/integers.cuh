// The product of codes that are integers, or become some, with x: by integer matrix instructions, which take codes nearly as they are.
//
// x becomes 15-bit fixed point, x = scale * (256 high + low), with one power of two as the scale of a warp's columns, and its halves are two
// columns of B: instruction m16n8k32 multiplies steps of 32 columns, and column n of B holds step n / 2 of a slice of 128, high or low.
// As in linear.cuh rows 0-7 of A are a tile at one step and rows 8-15 the tile at the next, so that x costs two registers for 128 values
// (four, as it is kept here: of the steps of the first instruction, zero elsewhere, and of those of the second). Lane (g, t) finds the sum of
// row g and step t in its accumulators, and scales it by the scale of the group of these 32 columns.
#pragma once
#include "codes.cuh"

// d += a (16 x 32 bytes) * b (32 x 8 signed bytes); lane (g, t) holds a.x = (row g, k 4t..), a.y = (row g + 8, k 4t..), a.z = (row g, k 4t + 16..),
// a.w = (row g + 8, k 4t + 16..), b0 = (k 4t.., column g), b1 = (k 4t + 16.., column g), d as in `mma`.
template <bool kSigned>
FF_DEVICE void mma_bytes(int (&d)[4], const uint4& a, u32 b0, u32 b1) {
  if constexpr (kSigned)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// ---- codes: kDigits digits to the base of kBase, of each kOperands operands (of instruction f), whose sums `sum` makes one of ----
//
// kShift: what was taken from each code to make it signed. kJoined: bytes of two codes are multiplied as they are, and what is too much is
// taken away. An object of a code is what a lane keeps in registers for it.

// Of a lane's first step or its second: the sums with the halves of x, 256 high + low.
constexpr u32 kByteOnes = 0x01010101u;
FF_DEVICE int both_halves(const int (&set)[4], bool odd) { return (odd ? set[2] : set[0]) * 256 + (odd ? set[3] : set[1]); }

struct OneOperand {
  static constexpr bool kInteger = true, kJoined = false;
  static constexpr int kDigits = 1, kBase = 1, kOperands = 1, kShift = 0;
  static FF_DEVICE int sum(const int (&sets)[1][4], bool odd) { return both_halves(sets[0], odd); }
};

FF_DEVICE constexpr int step_column(int instruction, int a, int i) { return (2 * instruction + (a & 1)) * 32 + (a >> 1) * 16 + i; }

// -128 to 127: bytes as they are.
struct Byte : OneOperand {
  static constexpr bool kSigned = true;
  static constexpr int kBits = 8;
  static constexpr float kFactor = 1;
  static FF_DEVICE int column(int load, int r, int i) { return step_column(load, r, i); }
  static FF_DEVICE u32 place(const u8* codes) { return codes[0] | codes[1] << 8 | codes[2] << 16 | (u32)codes[3] << 24; }
  static FF_DEVICE uint4 operand(const uint4* raw, int f, int, int) { return raw[f]; }
};

// 0 to 15, which stand for 8 less. Low halves of bytes, of steps 0 and 1, are kept as they are; high halves, of steps 2 and 3, as 8 less, in
// two's complement. A byte is 16 times its high half and its low one: one instruction multiplies bytes, one their low halves, both with
// all steps of x, and each step's sum is among the two (see `step_sum`): 4 operations on registers make operands of 32 codes.
struct HalfByte : OneOperand {
  static constexpr bool kSigned = true, kJoined = true;
  static constexpr int kBits = 4, kShift = 8;
  static constexpr float kFactor = 1 / 16.f;
  static FF_DEVICE int column(int, int r, int i) { return step_column(i >> 2, r, i & 3); }
  static FF_DEVICE u32 place(const u8* codes) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) word |= (u32)((codes[i] & 15) ^ (i < 4 ? 0 : 8)) << (8 * (i & 3) + 4 * (i >> 2));
    return word;
  }
  // Both of signed bytes that are 16 times what a code stands for: of several columns.
  static FF_DEVICE uint4 operand(const uint4* raw, int f, int, int) {
    const uint4& v = raw[0];
    return f ? make_uint4(upper(v.x), upper(v.y), upper(v.z), upper(v.w)) : make_uint4(raised(v.x), raised(v.y), raised(v.z), raised(v.w));
  }
  static FF_DEVICE uint4 low(const uint4& v) { return make_uint4(v.x & kLow, v.y & kLow, v.z & kLow, v.w & kLow); }
  // Of a lane's step, from sums of bytes and of low halves. shift: what makes low halves signed. NOTE: 16 times the sum of a whole row may
  // need 32 bits, until that is added.
  static FF_DEVICE int step_sum(int bytes, int low, int shift, bool high) { return high ? bytes - low : (int)(low * 16u + shift); }

 private:
  static constexpr u32 kLow = 0x0f0f0f0fu;
  static FF_DEVICE u32 upper(u32 word) { return word & ~kLow; }
  static FF_DEVICE u32 raised(u32 word) { return and_xor(word << 4, ~kLow, 0x80808080u); }
};

// a >> 16, by the pipe that multiplies: the one that shifts is busy with permutations.
FF_DEVICE u32 upper_half(u32 a) {
  u32 r;
  asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x0100u), "r"(0u));
  return r;
}

// Numbers of 16 values, of which the lower eight have one sign and the upper eight one: integers times kFactor. V has the digits of the lower
// eight in bytes, kLower, the highest first, those of the upper eight, and the signs. A selector with its high bit set repeats the sign of a
// byte, which is 0 of all these: what one table does not know adds nothing to what the other knows.
// NOTE: to join what comes of the two tables would cost as many instructions again as matrix instructions are spared by it.
template <class V, int digits = 1>
struct ByteTable {
  static constexpr bool kInteger = true, kSigned = false, kJoined = false;
  static constexpr int kBits = 4, kDigits = digits, kBase = V::kBase, kOperands = 2, kShift = 0;
  static constexpr float kFactor = V::kFactor;
  static FF_DEVICE int column(int, int r, int i) { return step_column(r >> 1, 2 * (r & 1) + (i >> 2), i & 3); }
  static FF_DEVICE u32 place(const u8* codes) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) word |= (u32)(codes[i] & 15) << (4 * i);
    return word;
  }

  u32 table[digits][2][2];  // [digit][lower, upper][half]

  // NOTE: tables of two digits are kept, or the compiler would move them to registers for each permutation: a shuffle is opaque to it.
  FF_DEVICE ByteTable() {
#pragma unroll
    for (int i = 0; i < digits * 4; i++) {
      const u32 values = i / 2 % 2 ? V::kUpper[i / 4][i % 2] : V::kLower[i / 4][i % 2];
      table[i / 4][i / 2 % 2][i % 2] = digits > 1 ? __shfl_sync(kAllLanes, values, 0) : values;
    }
  }
  FF_DEVICE uint4 operand(const uint4* raw, int f, int digit, int upper) const {
    const u32 flip = upper ? 0x88888888u : 0, a = (f ? raw[0].z : raw[0].x) ^ flip, b = (f ? raw[0].w : raw[0].y) ^ flip;
    const u32(&of)[2] = table[digit][upper];
    return make_uint4(permute(of[0], of[1], a), permute(of[0], of[1], upper_half(a)), permute(of[0], of[1], b), permute(of[0], of[1], upper_half(b)));
  }
  static FF_DEVICE int sum(const int (&sets)[2][4], bool odd) {
    int all[4];
#pragma unroll
    for (int i = 0; i < 4; i++) all[i] = V::kLowerSign * sets[0][i] + V::kUpperSign * sets[1][i];
    return both_halves(all, odd);
  }
};
template <class V>
using DigitTable = ByteTable<V, 2>;

// total + scale (sum of code * x - zero * plain) + minimum * plain, of codes as they are kept; `plain`: what the sum were of codes that are 1.
template <class F>
FF_DEVICE float add_codes(float total, float sum, float plain, typename F::Scale::Raw scale, typename F::Scale::Raw offset) {
  if constexpr (F::kOffset != Offset::kNone) sum = fmaf(F::Code::kShift, plain, sum);
  return add_scaled<F>(total, sum, plain, scale, offset);
}

// ---- x ----

// 15-bit fixed point of values of which the largest magnitude has these bits.
// NOTE: at most 2^-14 of that is lost of each value, which is less than the rounding to bf16 costs the largest alone.
template <class T>
struct FixedPoint {
  float scale, factor;  // to fixed point, and back

  FF_DEVICE explicit FixedPoint(u32 largest) {
    u32 exponent = __float_as_uint(T::unpack((u16)largest)) >> 23;  // the largest value becomes 2^13 to 2^14
    exponent = exponent < 20 ? 20 : exponent;
    scale = __uint_as_float((267 - exponent) << 23);
    factor = __uint_as_float((exponent - 13) << 23);
    if (exponent == 255) factor = __int_as_float(0x7fffffff);  // integers cannot say what is not finite
  }
  // Of two pairs of values the high halves, and the low ones: four bytes each.
  FF_DEVICE uint2 halves(u32 first, u32 second) const {
    // Integers in the mantissas of 1.5 * 2^23 + 128 + value: byte 1 is the high half, byte 0 the low half plus 128.
    constexpr float kMagic = 12582912.f + 128.f;
    u32 v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = __float_as_uint(fmaf(pick(j >> 1 ? second : first, j & 1), scale, kMagic));
    const u32 a = permute(v[0], v[1], 0x5140), b = permute(v[2], v[3], 0x5140);
    return make_uint2(permute(a, b, 0x7632), permute(a, b, 0x5410) ^ 0x80808080u);
  }

 private:
  static FF_DEVICE float pick(u32 pair, int i) {
    if constexpr (T::kIsHalf) return T::unpack((u16)(i ? pair >> 16 : pair));
    return __uint_as_float(i ? pair & 0xffff0000u : pair << 16);
  }
};

// x as fixed point, with one scale for a warp's columns; made once a stage from the words that were gathered.
template <class M, class S>
struct IntegerOperand {
  using F = typename S::Format;
  using Code = typename F::Code;
  using T = typename M::Value;
  static constexpr int kSlices = S::kFragments;
  static constexpr bool kOffsets = F::kOffset != Offset::kNone;
  static constexpr int kSumSlices = F::kGroup ? kSlices : 1;
  // Whether zeros are put in when they are needed: of many columns they would take too many registers.
  static constexpr bool kLean = !Code::kJoined && S::kFragments > (Code::kDigits > 1 ? 12 : 16);
  static constexpr int kOperands = kLean || Code::kJoined ? 1 : 2;
  u32 x[kSlices][kOperands][2];  // [instruction][register]
  float sum[kSumSlices];         // of a lane's step, where there are offsets: as large as it were of codes that are 1
  int shift[kSumSlices];         // see `step_sum`
  float factor;                  // of the results
  Code code;

  template <class X>
  FF_DEVICE void prepare(const X& from, u32 lane) {
    const FixedPoint<T> point(warp_largest(from.value));
    factor = point.factor * Code::kFactor;
    const bool odd = lane & 4, upper = lane & 16, high_step = lane & 2;
#pragma unroll
    for (int i = 0; i < kSumSlices; i++) sum[i] = 0, shift[i] = 0;
#pragma unroll
    for (int i = 0; i < kSlices; i++) {
      const uint2 halves = point.halves(from.value[i][0], from.value[i][1]);
      const u32 high = halves.x, low = halves.y;
      const u32 other = __shfl_xor_sync(kAllLanes, odd ? high : low, 4);
      const u32 b0 = odd ? other : high, b1 = odd ? low : other;
      if constexpr (kOffsets || Code::kJoined) {
        int d[4] = {};  // (any row, high and low of step t)
        mma_bytes<true>(d, make_uint4(kByteOnes, kByteOnes, kByteOnes, kByteOnes), b0, b1);
        const int all = both_halves(d, false);
        if constexpr (kOffsets) sum[F::kGroup ? i : 0] += (float)all * (1 / Code::kFactor);
        if constexpr (Code::kJoined) shift[F::kGroup ? i : 0] -= high_step ? 0 : all * (16 * Code::kShift);
      }
#pragma unroll
      for (int f = 0; f < kOperands; f++) {
        const bool mine = kOperands == 1 || upper == (f == 1);
        x[i][f][0] = mine ? b0 : 0;
        x[i][f][1] = mine ? b1 : 0;
      }
    }
  }
  // Register r of the operand of instruction f.
  FF_DEVICE u32 operand(int slice, int f, int r, u32 lane) const {
    if constexpr (kLean) return (lane >> 4) == f ? x[slice][0][r] : 0;
    else return x[slice][f][r];
  }
};

// ---- the product ----

// One lane's part of the product of a tile with x.
template <class M, class S>
struct IntegerProduct {
  using F = typename S::Format;
  using Code = typename F::Code;
  using X = IntegerOperand<M, S>;
  static constexpr int kSets = Code::kJoined ? 2 : Code::kOperands;
  using Sets = int[kSets][4];
  static constexpr int kAtOnce = Code::kDigits > 1 ? 2 : S::kFragments;  // slices that are loaded at a time, at most
  static constexpr int kBatchSlices = Code::kDigits > 1 ? 0 : 4;  // of a batch of groups, at most

  float total = 0;
  Sets sets[F::kGroup ? 1 : Code::kDigits] = {};  // where all columns have one scale: over all slices
  WholeRow<S> row;

  // Add the product of what was loaded, whose first slice is `first` of x.
  template <int first, class Part>
  FF_DEVICE void add(const Part& part, const X& x, u32 lane) {
#pragma unroll
    for (int i = 0; i < Part::kSlices; i++) {
      const int slice = first + i;
      float sum = 0;
#pragma unroll
      for (int digit = 0; digit < Code::kDigits; digit++) {
        Sets& of = sets[F::kGroup ? 0 : digit];
        if constexpr (F::kGroup != 0) clear(of);
        if constexpr (Code::kJoined) {
          const u32(&all)[2] = x.x[slice][0];
          mma_bytes<true>(of[0], part.raw[i][0], all[0], all[1]);
          mma_bytes<true>(of[1], Code::low(part.raw[i][0]), all[0], all[1]);
        } else {
#pragma unroll
          for (int f = 0; f < 2; f++)
#pragma unroll
            for (int k = 0; k < Code::kOperands; k++)
              mma_bytes<Code::kSigned>(of[k], x.code.operand(part.raw[i], f, digit, k), x.operand(slice, f, 0, lane), x.operand(slice, f, 1, lane));
        }
        if constexpr (F::kGroup != 0) sum = sum * Code::kBase + (float)step_sum(of, x.shift[slice], lane);
      }
      if constexpr (F::kGroup != 0) total = add_codes<F>(total, sum, x.sum[slice], part.scale[i][0], part.offset[i][0]);
    }
    row.take(part);
  }

  FF_DEVICE float result(u32 lane, const X& x) {
    if constexpr (F::kGroup == 0) {
      float sum = 0;
#pragma unroll
      for (int digit = 0; digit < Code::kDigits; digit++) sum = sum * Code::kBase + (float)step_sum(sets[digit], x.shift[0], lane);
      total = add_codes<F>(total, sum, x.sum[0], row.scale, row.offset);
    }
    return row.divided(total * x.factor);
  }

 private:
  static FF_DEVICE int step_sum(const Sets& of, int shift, u32 lane) {
    if constexpr (Code::kJoined) return Code::step_sum(both_halves(of[0], lane & 1), both_halves(of[1], lane & 1), shift, lane & 2);
    else return Code::sum(of, lane & 1);
  }
  static FF_DEVICE void clear(Sets& of) {
#pragma unroll
    for (int k = 0; k < kSets; k++) of[k][0] = of[k][1] = of[k][2] = of[k][3] = 0;
  }
};
