// The product of codes with several columns. These share what it costs to unpack codes, which therefore become 16-bit values of the model's
// type, exactly: x stays as it is, and a product is that of plain weights (panel.cuh), with scales on top of it.
#pragma once
#include "integers.cuh"
#include "panel.cuh"

// a * b + c of two values in a register.
template <class T>
FF_DEVICE u32 fma_pairs(u32 a, u32 b, u32 c) {
  u32 r;
  if constexpr (T::kIsHalf) asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Two of a power of two, and two of minus a positive integer that T holds exactly.
template <class T>
FF_DEVICE constexpr u32 power_pair(int exponent) {
  const u32 one = (u32)(exponent + (T::kIsHalf ? 15 : 127)) << (T::kIsHalf ? 10 : 7);
  return one << 16 | one;
}
template <class T>
FF_DEVICE constexpr u32 minus_pair(int value) {
  constexpr int kMantissa = T::kIsHalf ? 10 : 7;
  int exponent = 0;
  while (value >> (exponent + 1)) exponent++;
  const u32 rest = (u32)(value - (1 << exponent)) << (kMantissa - exponent);
  return power_pair<T>(exponent) | 0x80008000u | rest << 16 | rest;
}

// The operand of bytes whose upper bit is clear, four at an even step and four at an odd one, minus `zero`: a byte b in the mantissa of
// kWhole is kWhole + b.
template <class T, int zero>
FF_DEVICE uint4 byte_values(u32 even, u32 odd) {
  constexpr int kWhole = T::kIsHalf ? 1024 : 128;
  constexpr u32 kUpper = T::kIsHalf ? 0x64646464u : 0x43434343u;  // the upper byte of that, four times
  const auto pair = [](u32 bytes, u32 selector) {
    return fma_pairs<T>(permute(bytes, kUpper, selector), power_pair<T>(0), minus_pair<T>(kWhole + zero));
  };
  return make_uint4(pair(even, 0x4140), pair(odd, 0x4140), pair(even, 0x4342), pair(odd, 0x4342));
}

// Codes as A operands of T: `operand` of instruction p, which has columns 32 p to 32 p + 31 of a slice. They are what codes stand for, or
// what offsets are added to where there are any, divided by kFactor. kTerms: how many operands add up to them.
template <class T, class F, class Code = typename F::Code>
struct CodeValues {  // those that codes.cuh makes fp16 values of
  static constexpr float kZero = F::kOffset == Offset::kNone ? Code::kZero : 0, kFactor = Code::kFactor;
  static constexpr int kTerms = 1;
  static FF_DEVICE uint4 operand(const uint4* raw, int p, int) {
    const uint4 v = Code::operand(raw, p);
    return make_uint4(value<0>(v.x), value<1>(v.y), value<0>(v.z), value<1>(v.w));
  }

 protected:
  template <int odd>
  static FF_DEVICE u32 value(u32 pair) {
    constexpr bool kBiased = Code::kEvenBias != 0;
    constexpr float kBias = (odd ? Code::kOddBias : Code::kEvenBias) + kZero, kFactor = odd ? Code::kOddFactor : 1;
    if constexpr (T::kIsHalf) {
      if constexpr (!kBiased) return pair;
      else return fma_pairs<T>(pair, power_pair<T>(kFactor == 1 ? 0 : -4), minus_pair<T>((int)kBias));
    } else {
      float low = Float16::unpack((u16)pair), high = Float16::unpack((u16)(pair >> 16));
      if constexpr (kBiased) low = low * kFactor - kBias, high = high * kFactor - kBias;
      return T::pack(low, high);
    }
  }
};

// Whether bf16 holds the values of a table, too: fp16 has three bits more.
template <class V>
FF_DEVICE constexpr bool fits_bfloat16() {
  u32 rest = 0;
  for (u32 word : V::kLow) rest |= word & 0x07070707u;
  return rest == 0;
}

// Where it does not, a value is the sum of two.
template <class T, class F, class V>
struct CodeValues<T, F, FullTable<V>> {
  static constexpr int kTerms = T::kIsHalf || fits_bfloat16<V>() ? 1 : 2;
  static constexpr float kFactor = 1;
  static FF_DEVICE uint4 operand(const uint4* raw, int p, int term) {
    return values(FullTable<V>::operand(raw, p), term);
  }
  static FF_DEVICE uint4 values(const uint4& v, int term) {
    return make_uint4(value(v.x, term), value(v.y, term), value(v.z, term), value(v.w, term));
  }

 private:
  static FF_DEVICE u32 value(u32 pair, int term) {
    if constexpr (T::kIsHalf) return pair;
    const float low = Float16::unpack((u16)pair), high = Float16::unpack((u16)(pair >> 16));
    const u32 most = T::pack(low, high);
    return term == 0 ? most : T::pack(low - __uint_as_float(most << 16), high - __uint_as_float(most & 0xffff0000u));
  }
};

// Those that integer instructions take as bytes: their registers are (step, first or second half of it).
template <class T, class F>
struct CodeValues<T, F, HalfByte> {
  static constexpr int kTerms = 1, kZero = F::kOffset == Offset::kNone ? HalfByte::kShift : 0;
  static constexpr float kFactor = 1;
  static FF_DEVICE uint4 operand(const uint4* raw, int p, int) {
    return byte_values<T, kZero>(codes(word_of(raw[0], p & 1), p >> 1), codes(word_of(raw[0], (p & 1) + 2), p >> 1));
  }

 private:
  static FF_DEVICE u32 codes(u32 word, int upper) { return upper ? and_xor(word >> 4, 0x0f0f0f0fu, 0x08080808u) : word & 0x0f0f0f0fu; }
};

// Small multiples, as bytes that are 64 more.
template <class T, class F, class V>
struct CodeValues<T, F, ByteTable<V, 1>> {
  static constexpr int kTerms = 1, kZero = 64;
  static constexpr float kFactor = V::kFactor;
  static FF_DEVICE uint4 operand(const uint4* raw, int p, int) {
    return byte_values<T, kZero>(bytes(word_of(raw[0], p >> 1 << 1) >> 16 * (p & 1)), bytes(word_of(raw[0], (p >> 1 << 1) + 1) >> 16 * (p & 1)));
  }

 private:
  static FF_DEVICE constexpr u32 shifted(u32 multiples, int sign) { return sign > 0 ? 0x40404040u + multiples : 0x40404040u - multiples; }
  static FF_DEVICE u32 bytes(u32 codes) {
    return permute(shifted(V::kLower[0][0], V::kLowerSign), shifted(V::kLower[0][1], V::kLowerSign), codes) |
           permute(shifted(V::kUpper[0][0], V::kUpperSign), shifted(V::kUpper[0][1], V::kUpperSign), codes ^ 0x8888u);
  }
};

// Others, as fp16.
template <class T, class F, class V>
struct CodeValues<T, F, ByteTable<V, 2>> {
  static constexpr int kTerms = CodeValues<T, F, FullTable<V>>::kTerms;
  static constexpr float kFactor = 1;
  static FF_DEVICE uint4 operand(const uint4* raw, int p, int term) {
    const uint2 even = look_up(word_of(raw[0], p >> 1 << 1) >> 16 * (p & 1)), odd = look_up(word_of(raw[0], (p >> 1 << 1) + 1) >> 16 * (p & 1));
    return CodeValues<T, F, FullTable<V>>::values(make_uint4(even.x, odd.x, even.y, odd.y), term);
  }

 private:
  static FF_DEVICE uint2 look_up(u32 codes) {
    const u32 sevens = permute(0x80808080u, 0x80808080u, codes) ^ 0x80808080u;  // 127 for each of the upper eight
    const u32 mask = sevens | sevens << 1, low = codes & 0x7777u;
    const u32 l = FullTable<V>::bytes(V::kLow, low, mask), h = FullTable<V>::bytes(V::kHigh, low, mask);
    return make_uint2(permute(l, h, 0x5140), permute(l, h, 0x7362));
  }
};

template <class T, class F>
struct CodeValues<T, F, Byte> {
  static constexpr int kTerms = 1;
  static constexpr float kFactor = 1;
  static FF_DEVICE uint4 operand(const uint4* raw, int p, int) {
    const u32 even = word_of(raw[p >> 1], p & 1), odd = word_of(raw[p >> 1], (p & 1) + 2);
    return make_uint4(value(even, 0x4140), value(odd, 0x4140), value(even, 0x4342), value(odd, 0x4342));
  }

 private:
  static FF_DEVICE u32 value(u32 bytes, u32 selector) {
    constexpr u32 kOne = power_pair<T>(0);
    if constexpr (T::kIsHalf) return fma_pairs<T>(permute(bytes ^ 0x80808080u, 0x64646464u, selector), kOne, minus_pair<T>(1024 + 128));
    // The seven lower bits are 128 + bits as a mantissa. What is too much of it is 128, or 256 of a negative byte: its upper bit counts
    // one in the exponent.
    const u32 pair = permute(bytes, 0x43434343u, selector);
    return fma_pairs<T>(pair & 0x437f437fu, kOne, (pair & 0x43804380u) | 0x80008000u);
  }
};

// One slice of a part, of 16 columns: a lane needs the scales of two rows, 2 t and 2 t + 1.
template <class S, int size, bool kLast>
struct WideSlice : Loaded<S, size, kLast, true, 1> {
  using Even = Loaded<S, size, kLast, true, 1>;
  typename Even::Scales odd;

  FF_DEVICE void load(u32 at, u32 tiles, u32 warp, u32 lane, u32 slice) {
    const u32 row = (lane & 3) * 8;  // of a lane that has it, the even one
    this->load_codes(at, warp, lane, slice);
    Even::Scales::load(at, tiles, warp, row, slice);
    odd.load(at, tiles, warp, row + 4, slice);
  }
};

// One lane's part of the product of a tile with all columns: row g, columns t + 4 j.
template <class M, class S>
struct CodedColumns {
  using T = typename M::Value;
  using F = typename S::Format;
  using Scale = typename F::Scale;
  using Values = CodeValues<T, F>;
  static constexpr int kGroups = M::kColumnGroups;
  static constexpr bool kOffsets = F::kOffset != Offset::kNone;
  static constexpr bool kRow = F::kGroup == 0;  // all columns of the matrix have one scale
  static constexpr bool kLastDiffers = kRow || Scale::kDivided;
  template <int size, bool kLast>
  using Part = Loaded<S, size, kLast, true>;

  float total[kGroups] = {};
  float plain[kGroups] = {};  // kRow: sum of x, where there are offsets

  static FF_DEVICE void prepare(Panel<M, S>&) {}

  // Add a part. place(cell, cells): where so many cells of x are.
  template <int size, bool kLast, class Place>
  FF_DEVICE void add(const Part<size, kLast>& part, const Panel<M, S>& panel, Place place) {
#pragma unroll
    for (int i = 0; i < size; i++) {
      uint4 a[4][Values::kTerms];
#pragma unroll
      for (int p = 0; p < 4; p++)
#pragma unroll
        for (int k = 0; k < Values::kTerms; k++) a[p][k] = Values::operand(part.raw[i], p, k);
      const u32 x = place(4 * i, 4) + panel.own();
      with_groups<kGroups, kOffsets ? 1 : 2>(panel.columns, [&](auto first, auto n) {
        float d[4 / kCells][n.value][4] = {}, ones[4 / kCells][n.value][4] = {};
#pragma unroll
        for (int p = 0; p < 4; p++)
#pragma unroll
          for (int j = 0; j < n.value; j++) {
            const uint2 b = load_shared2(x + p * Panel<M, S>::kCellBytes + (first.value + j) * 256);
#pragma unroll
            for (int k = 0; k < Values::kTerms; k++) mma<T>(d[p / kCells][j], a[p][k], b.x, b.y);
            if constexpr (kOffsets) mma<T>(ones[p / kCells][j], make_uint4(kOnes, kOnes, kOnes, kOnes), b.x, b.y);
          }
#pragma unroll
        for (int unit = 0; unit < 4 / kCells; unit++)
#pragma unroll
          for (int j = 0; j < n.value; j++) finish(part, i, unit * kCells, first.value + j, d[unit][j], ones[unit][j]);
      });
    }
  }

  // Of 16 columns: a slice of two tiles, whose x is at `x`, so that it is read once for both.
  template <class Slice>
  static FF_DEVICE void add_two(CodedColumns (&sums)[2], const Slice (&slices)[2], u32 x) {
    constexpr int kUnits = F::kGroup == 16 ? 8 : F::kGroup == 32 ? 4 : 2, kSteps = 8 / kUnits;  // sums that are scaled, of so many steps
    uint4 a[2][Values::kTerms];  // of two steps
#pragma unroll
    for (int unit = 0; unit < kUnits; unit++) {
      float d[2][4] = {}, ones[4] = {};
#pragma unroll
      for (int step = unit * kSteps; step < (unit + 1) * kSteps; step++) {
        const uint4 columns = load_shared4(x + step * (Panel<M, S>::kCellBytes / 2));
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
          for (int k = 0; k < Values::kTerms; k++) {
            uint4& w = a[tile][k];
            if (step % 2 == 0) w = Values::operand(slices[tile].raw[0], step / 2, k);
            mma<T>(d[tile], columns, step % 2 ? w.y : w.x, step % 2 ? w.w : w.z);
          }
        if constexpr (kOffsets) mma<T>(ones, columns, kOnes, kOnes);
      }
#pragma unroll
      for (int tile = 0; tile < 2; tile++) sums[tile].finish_wide(slices[tile], unit * (128 / kUnits), d[tile], ones);
    }
  }

  // With the last part; of 16 columns with its last slice.
  template <int size, bool kLast>
  FF_DEVICE void result(float (&sums)[kGroups], const Part<size, kLast>& part, const Panel<M, S>&) const {
    WholeRow<S> row;
    row.take(part);
#pragma unroll
    for (int j = 0; j < kGroups; j++) sums[j] = of_row(row, j);
  }
  template <int size, bool kLast>
  FF_DEVICE void result(float (&sums)[kGroups], const WideSlice<S, size, kLast>& slice) const {
    WholeRow<S> rows[2];
    rows[0].take(slice);
    rows[1].take(slice.odd);
#pragma unroll
    for (int j = 0; j < kGroups; j++) sums[j] = of_row(rows[j % 2], j);
  }

 private:
  FF_DEVICE float of_row(const WholeRow<S>& row, int j) const {
    const float sum = kRow ? add_scaled<F>(0, total[j], plain[j], row.scale, row.offset) : total[j];
    return row.divided(sum * Values::kFactor);
  }

  // Scale the sums of 16 columns from `column` of a slice on.
  template <class Slice>
  FF_DEVICE void finish_wide(const Slice& slice, int column, const float (&d)[4], const float (&ones)[4]) {
    const int group = kRow ? 0 : column / (F::kGroup ? F::kGroup : 1);
#pragma unroll
    for (int j = 0; j < kGroups; j++) {
      const typename Slice::Scales& of = j % 2 ? slice.odd : slice;
      if constexpr (kRow) {
        total[j] += d[j];
        if constexpr (kOffsets) plain[j] += ones[j];
      } else {
        total[j] = add_scaled<F>(total[j], d[j], ones[j], of.scale[0][group], of.offset[0][group]);
      }
    }
  }

  // Cells whose sum is scaled. NOTE: more than two would be a longer chain of instructions that wait for each other.
  static constexpr int kCells = F::kGroup == 16 || F::kGroup == 32 ? 1 : 2;

  // Scale the sums of one cell or two.
  template <int size, bool kLast>
  FF_DEVICE void finish(const Part<size, kLast>& part, int slice, int cell, int j, const float (&d)[4], const float (&ones)[4]) {
    if constexpr (kRow) {
      total[j] += d[0] + d[3];
      if constexpr (kOffsets) plain[j] += ones[0] + ones[3];
    } else if constexpr (F::kGroup == 16) {
      const auto &scale = part.scale[slice], &offset = part.offset[slice];
      total[j] = add_scaled<F>(total[j], d[0], ones[0], scale[2 * cell], offset[2 * cell]);
      total[j] = add_scaled<F>(total[j], d[3], ones[3], scale[2 * cell + 1], offset[2 * cell + 1]);
    } else {
      const int group = cell * 32 / F::kGroup;
      total[j] = add_scaled<F>(total[j], d[0] + d[3], ones[0] + ones[3], part.scale[slice][group], part.offset[slice][group]);
    }
  }
  static constexpr u32 kOnes = power_pair<T>(0);
};
