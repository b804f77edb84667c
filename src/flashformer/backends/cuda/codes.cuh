// Weights of 4 or 8 bits: how codes lie in a lane's registers, how they become A operands, and the product of a tile with x.
//
// A slice is 8 rows x 128 columns of codes: what four matrix instructions multiply, as in linear.cuh: instruction p has the tile
// at step 2 p in rows 0-7 and at step 2 p + 1 in rows 8-15, and column n of B holds step n. The codes become fp16 values by a
// few operations on whole registers, often with a constant added (1024 + q is q in the mantissa of 1024), which is taken out of the sum
// together with the zero point: it was multiplied by the sum of x. Nothing is masked: each of the four has sums of its own, and a lane picks
// what lies on the diagonal, which is columns 32 t to 32 t + 31 of the slice and so belongs to one group of at least 32 columns.
#pragma once
#include "prelude.cuh"

// What is told by the generated source: `F::Code`, `F::Scale`, kGroup (columns that share a scale: 16, 32, 64, 128; 0: all), kOffset.
enum class Offset { kNone, kZero, kMinimum };

FF_DEVICE u32 permute(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
// (a & mask) ^ flip. NOTE: the compiler makes two operations of it where both are constants.
FF_DEVICE u32 and_xor(u32 a, u32 mask, u32 flip) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(a), "r"(mask), "r"(flip));
  return r;
}
FF_DEVICE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// ---- scales, of one row and group each ----

template <class T>
struct Scale16 {
  static constexpr int kBytes = 2;
  static constexpr bool kDivided = false;
  using Raw = u16;
  static FF_DEVICE Raw load(u32 at) { return load_shared16(at); }
  static FF_DEVICE float value(Raw raw) { return T::unpack(raw); }
};
using HalfScale = Scale16<Float16>;
using BfloatScale = Scale16<Bfloat16>;

struct FloatScale {
  static constexpr int kBytes = 4;
  static constexpr bool kDivided = false;
  using Raw = u32;
  static FF_DEVICE Raw load(u32 at) { return load_shared(at); }
  static FF_DEVICE float value(Raw raw) { return __uint_as_float(raw); }
};

template <class S>
struct Scale8 {
  static constexpr int kBytes = 1;
  using Raw = u32;
  static FF_DEVICE Raw load(u32 at) { return load_shared8(at); }
};

// e8m0, whose 0, 2^-127, is subnormal as a float. NOTE: its NaN becomes infinite, which is no more finite.
struct ExponentScale : Scale8<ExponentScale> {
  static constexpr bool kDivided = false;
  static FF_DEVICE float value(Raw raw) { return __uint_as_float(max(raw << 23, 0x00400000u)); }
};

// e4m3: in a float's place all but the bias of the exponent is right, also for subnormals.
struct E4m3Scale : Scale8<E4m3Scale> {
  static constexpr bool kDivided = true;  // by a float of each row
  static FF_DEVICE float value(Raw raw) {
    return __uint_as_float((u32)((int)(raw << 24) >> 4) & 0x87f00000u) * __uint_as_float((127 + 120) << 23);
  }
};

// ---- codes ----
//
// place: where the 8 codes of a lane in one instruction of 4 bits (4 of 8 bits) go in a register. They come in the order of the operand:
// x (row g, step 2 p, first pair), y (step 2 p + 1, first pair), z (step 2 p, second pair), w (step 2 p + 1, second pair).
// operand: what comes out again; values of x and z are (code + kEvenBias), those of y and w are (code + kOddBias) / kOddFactor.

// column: which column of a slice, beside 4 t, code i of register r of a lane's load of 16 bytes is.

FF_DEVICE constexpr int half_column(int r, int i) { return (2 * r + (i >> 1 & 1)) * 16 + (i >> 2) * 2 + (i & 1); }

// 0 to 15. Nibble k of a register is code 2 k for k < 4, else 2 (k - 4) + 1.
struct Integer4 {
  static constexpr bool kInteger = false;
  static constexpr int kBits = 4;
  static FF_DEVICE int column(int, int r, int i) { return half_column(r, i); }
  static constexpr float kEvenBias = 1024, kOddBias = 64, kOddFactor = 0.0625f, kFactor = 1;
  static constexpr float kZero = 8;  // of a format without zero points
  static FF_DEVICE u32 place(const u8* codes) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) word |= (u32)(codes[i] & 15) << (4 * (i / 2 + i % 2 * 4));
    return word;
  }
  static FF_DEVICE uint4 operand(const uint4* raw, int p) {
    const u32 q = word_of(raw[0], p), r = q >> 8;
    return make_uint4((q & 0x000f000fu) | 0x64006400u, (q & 0x00f000f0u) | 0x64006400u, (r & 0x000f000fu) | 0x64006400u,
                      (r & 0x00f000f0u) | 0x64006400u);
  }
};

// Registers of 8-bit codes: 2 p has step 2 p, 2 p + 1 has step 2 p + 1, byte i is column i.
template <class Code>
struct Octets {
  static constexpr bool kInteger = false;
  static constexpr int kBits = 8;
  static FF_DEVICE int column(int load, int r, int i) { return (load * 4 + r) * 16 + i; }
  static constexpr float kOddFactor = 1;
  static FF_DEVICE uint4 operand(const uint4* raw, int p) {
    const u32 even = word_of(raw[p / 2], p % 2 * 2), odd = word_of(raw[p / 2], p % 2 * 2 + 1);
    return make_uint4(Code::low(even), Code::low(odd), Code::high(even), Code::high(odd));
  }
};

// -128 to 127, stored with 128 added.
struct Integer8 : Octets<Integer8> {
  static constexpr float kEvenBias = 1152, kOddBias = 1152, kFactor = 1;
  static constexpr float kZero = 0;
  static FF_DEVICE u32 place(const u8* codes) { return (codes[0] | codes[1] << 8 | codes[2] << 16 | (u32)codes[3] << 24) ^ 0x80808080u; }
  static FF_DEVICE u32 low(u32 q) { return permute(q, 0x64646464u, 0x4140); }
  static FF_DEVICE u32 high(u32 q) { return permute(q, 0x64646464u, 0x4342); }
};

// e4m3. Before sm_89 its bits are put where fp16 has them: all is right but the bias of the exponent.
struct Float8 : Octets<Float8> {
  static constexpr float kEvenBias = 0, kOddBias = 0, kZero = 0;
  static FF_DEVICE u32 place(const u8* codes) { return codes[0] | codes[1] << 8 | codes[2] << 16 | (u32)codes[3] << 24; }
#if __CUDA_ARCH__ >= 890
  static constexpr float kFactor = 1;
  static FF_DEVICE u32 widen(u16 pair) {
    u32 r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
    return r;
  }
  static FF_DEVICE u32 low(u32 q) { return widen((u16)q); }
  static FF_DEVICE u32 high(u32 q) { return widen((u16)(q >> 16)); }
#else
  static constexpr float kFactor = 256;
  static FF_DEVICE u32 widen(u32 spread) { return (spread & 0x80008000u) | (spread >> 1 & 0x3f803f80u); }
  static FF_DEVICE u32 low(u32 q) { return widen(permute(q, 0, 0x1404)); }
  static FF_DEVICE u32 high(u32 q) { return widen(permute(q, 0, 0x3424)); }
#endif
};

// Numbers of 16 values. The three low bits of code k are nibble k of a register; its high bit is that of byte k (k < 4), or the bit in
// front of nibble 2 (k - 4) + 1. In nibbles the codes come in pairs that share a half register: 0, 2, 1, 3, then those of z and w.
template <class Values>
struct Nibbles {
  static constexpr bool kInteger = false;
  static constexpr int kBits = 4;
  static FF_DEVICE int column(int, int r, int i) { return half_column(r, i); }
  static constexpr float kEvenBias = 0, kOddBias = 0, kOddFactor = 1, kFactor = 1, kZero = 0;
  static FF_DEVICE u32 place(const u8* codes) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const u32 k = i / 4 * 4 + i % 2 * 2 + i / 2 % 2;  // (pair i / 2, value i % 2) -> nibble
      word |= (u32)(codes[i] & 7) << (4 * k) | (u32)(codes[i] >> 3 & 1) << (k < 4 ? 8 * k + 7 : 8 * (k - 4) + 3);
    }
    return word;
  }
  static FF_DEVICE uint4 operand(const uint4* raw, int p) {
    const u32 q = word_of(raw[0], p), low = q & 0x77777777u;
    uint2 a = Values::look_up(low, q), b = Values::look_up(low >> 16, q << 4);
    return make_uint4(a.x, a.y, b.x, b.y);
  }
};

// 16 values whose upper eight are the lower eight with a minus, each a high byte of an fp16 value: fp4 (e2m1). V has `kHigh`, 8 bytes.
template <class V>
struct SignedTable : Nibbles<SignedTable<V>> {
  static FF_DEVICE uint2 look_up(u32 low, u32 signs) {
    const u32 high = permute(V::kHigh[0], V::kHigh[1], low) | (signs & 0x80808080u);
    return make_uint2(high << 8 & 0xff00ff00u, high & 0xff00ff00u);
  }
};

// Any 16 values, as fp16. V has `kHigh` and `kLow`, 16 bytes each.
template <class V>
struct FullTable : Nibbles<FullTable<V>> {
  static FF_DEVICE u32 bytes(const u32 (&of)[4], u32 low, u32 mask) {
    return (permute(of[0], of[1], low) & ~mask) | (permute(of[2], of[3], low) & mask);
  }
  static FF_DEVICE uint2 look_up(u32 low, u32 upper) {
    const u32 mask = permute(upper, 0, 0xba98);  // each byte's sign, eight times
    const u32 l = bytes(V::kLow, low, mask), h = bytes(V::kHigh, low, mask);
    return make_uint2(permute(l, h, 0x6240), permute(l, h, 0x7351));
  }
};

// ---- the product ----

FF_DEVICE u32 larger_halves(u32 a, u32 b) {
  u32 r;
#if __CUDA_ARCH__ >= 900
  asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
  const u32 high = (a & 0xffff0000u) > (b & 0xffff0000u) ? a & 0xffff0000u : b & 0xffff0000u;
  const u32 low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff;
  r = high | low;
#endif
  return r;
}

// The largest magnitude of a warp's 16-bit values, as their bits: these have the same order, and a NaN is larger than all.
template <int n>
FF_DEVICE u32 warp_largest(const u32 (&pairs)[n][2]) {
  u32 top = 0;
#pragma unroll
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) top = larger_halves(top, pairs[i][j] & 0x7fff7fffu);
  top = (top >> 16) > (top & 0xffff) ? top >> 16 : top & 0xffff;
  asm("redux.sync.max.u32 %0, %0, 0xffffffff;" : "+r"(top));
  return top;
}

// x as fp16 and what belongs to it: made once a stage from the words that were gathered.
// NOTE: fp16 holds 3 bits more than bf16, but not its range: x is scaled by a power of two so that the largest value of a warp fits. What is
// lost is below 2^-29 of that value.
template <class M, class S>
struct CodedOperand {
  using F = typename S::Format;
  using Code = typename F::Code;
  static constexpr int kSlices = S::kFragments;
  static constexpr bool kLean = false;  // see IntegerOperand
  static constexpr bool kBiased = Code::kEvenBias != 0, kOffsets = F::kOffset != Offset::kNone;
  static constexpr int kSums = F::kGroup == 16 ? 2 : (kBiased ? 1 : 0) + (kOffsets ? 1 : 0);
  static constexpr int kSumSlices = F::kGroup ? kSlices : 1;  // where all columns have one scale they have one sum, too
  u32 value[kSlices][2];
  float unscale;
  // Group 16: of the even and of the odd step. Else what the biases (and the zero of all) add to a product, then the plain sum.
  float sum[kSumSlices][kSums ? kSums : 1];

  template <class X>
  FF_DEVICE void prepare(const X& from, u32) {
    unscale = Code::kFactor;
#pragma unroll
    for (int i = 0; i < kSlices; i++) value[i][0] = from.value[i][0], value[i][1] = from.value[i][1];
    if constexpr (!M::Value::kIsHalf) {
      const u32 top = warp_largest(value);
      const u32 exponent = 268 - (top >> 7) < 253 ? 268 - (top >> 7) : 253;  // the largest value becomes 2^14 to 2^15
      const float scale = __uint_as_float(exponent << 23);
      unscale *= __uint_as_float((254 - exponent) << 23);
#pragma unroll
      for (int i = 0; i < kSlices; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          value[i][j] = Float16::pack_finite(__uint_as_float(value[i][j] << 16) * scale, __uint_as_float(value[i][j] & 0xffff0000u) * scale);
    }
    if constexpr (kSums > 0) {
#pragma unroll
      for (int i = 0; i < kSumSlices; i++)
#pragma unroll
        for (int j = 0; j < kSums; j++) sum[i][j] = 0;
#pragma unroll
      for (int i = 0; i < kSlices; i++) {
        float d[4] = {};  // (any row, steps 2 t and 2 t + 1)
        mma<Float16>(d, make_uint4(kOnes, kOnes, kOnes, kOnes), value[i][0], value[i][1]);
        float(&to)[kSums] = sum[F::kGroup ? i : 0];
        if constexpr (F::kGroup == 16) {
          to[0] += d[0];
          to[1] += d[1];
        } else {
          constexpr float kZero = F::kOffset == Offset::kNone ? Code::kZero : 0;
          if constexpr (kBiased) to[0] += (Code::kEvenBias + kZero) * d[0] + (Code::kOddBias + kZero) * d[1];
          if constexpr (kOffsets) to[kSums - 1] += d[0] + d[1];
        }
      }
    }
  }

 private:
  static constexpr u32 kOnes = 0x3c003c00u;
};

// Where a lane finds the scale of its row and columns in a part of `size` slices: tile after tile, warp after warp, group after group. Scales of
// whole rows, and divisors behind all scales of a tile, come once a tile, with the last part.
template <class S, int size, bool kLast>
struct ScalePlace {
  using F = typename S::Format;
  static constexpr int kSliceBytes = 128 * F::Code::kBits;
  static constexpr int kRowsBytes = 8 * F::Scale::kBytes;  // the scales of a tile's rows
  static constexpr int kGroupBytes = kRowsBytes * (F::kOffset != Offset::kNone ? 2 : 1);
  static constexpr int kSliceStep = F::kGroup ? 128 / (F::kGroup ? F::kGroup : 1) * kGroupBytes : 0;
  static constexpr int kTileScales = F::kGroup ? S::kWarpsColumns * size * kSliceStep : kGroupBytes;  // bytes
  static constexpr int kTileBytes = kTileScales + (F::Scale::kDivided && kLast ? 8 * 4 : 0);

  static FF_DEVICE u32 at(u32 chunk, u32 tiles, u32 warp, u32 lane) {
    const u32 first = scales(chunk, tiles, warp) + (lane >> 2) * F::Scale::kBytes;
    if constexpr (F::kGroup == 0) return first;
    else return first + warp % S::kWarpsColumns * (size * kSliceStep) + (lane & 3) * 32 / F::kGroup * kGroupBytes;
  }
  static FF_DEVICE u32 divisor(u32 chunk, u32 tiles, u32 warp, u32 lane) { return scales(chunk, tiles, warp) + kTileScales + (lane >> 2) * 4; }

 private:
  static FF_DEVICE u32 scales(u32 chunk, u32 tiles, u32 warp) {  // the first of the tile
    return chunk + tiles * (S::kWarpsColumns * size * kSliceBytes) + warp / S::kWarpsColumns * kTileBytes;
  }
};

// The scales of a row in kCount slices of a part of `size`. kAll: of all columns, not only of the 32 of a slice that a lane sums.
template <class S, int size, bool kLast, bool kAll, int kCount>
struct LoadedScales {
  using F = typename S::Format;
  using Place = ScalePlace<S, size, kLast>;
  using Raw = typename F::Scale::Raw;
  static constexpr int kPicks = F::kGroup == 0 ? 1 : kAll ? 128 / (F::kGroup ? F::kGroup : 1) : F::kGroup == 16 ? 2 : 1;  // in a slice
  static constexpr int kScales = F::kGroup ? kCount : 1;  // of a whole row: one, which comes with the last part
  static constexpr bool kOffsets = F::kOffset != Offset::kNone;
  Raw scale[kScales][kPicks], offset[kScales][kPicks];
  float divisor;

  // lane: whose row, and columns. first: slice of the part.
  FF_DEVICE void load(u32 at, u32 tiles, u32 warp, u32 lane, u32 first) {
    const u32 scales = Place::at(at, tiles, warp, kAll ? lane & ~3u : lane) + first * Place::kSliceStep;
    if constexpr (F::kGroup != 0 || kLast) {
#pragma unroll
      for (int i = 0; i < kScales; i++)
#pragma unroll
        for (int j = 0; j < kPicks; j++) {
          const u32 from = scales + i * Place::kSliceStep + j * Place::kGroupBytes;
          scale[i][j] = F::Scale::load(from);
          if constexpr (kOffsets) offset[i][j] = F::Scale::load(from + Place::kRowsBytes);
        }
    }
    if constexpr (F::Scale::kDivided && kLast) {
      divisor = load_shared_float(Place::divisor(at, tiles, warp, lane));
      if (divisor == 0) divisor = 1;  // NOTE: rows of padding have none; theirs are zeros
    }
  }
};

// What a lane needs of those slices: codes and scales, from a chunk that has landed.
template <class S, int size, bool kLast, bool kAll = false, int kCount = size>
struct Loaded : LoadedScales<S, size, kLast, kAll, kCount> {
  using Scales = LoadedScales<S, size, kLast, kAll, kCount>;
  static constexpr int kLoads = S::Format::Code::kBits / 4;  // of 16 bytes, a slice
  static constexpr int kSlices = kCount;
  uint4 raw[kCount][kLoads];

  // From the chunk at `at`, which has so many tiles; `warp` counts the warps of all its tiles.
  FF_DEVICE void load(u32 at, u32 tiles, u32 warp, u32 lane, u32 first) {
    load_codes(at, warp, lane, first);
    Scales::load(at, tiles, warp, lane, first);
  }

 protected:
  FF_DEVICE void load_codes(u32 at, u32 warp, u32 lane, u32 first) {
    constexpr int kSliceBytes = Scales::Place::kSliceBytes;
    const u32 codes = at + (warp * size + first) * kSliceBytes + lane * 16;
#pragma unroll
    for (int i = 0; i < kCount; i++)
#pragma unroll
      for (int j = 0; j < kLoads; j++) raw[i][j] = load_shared4(codes + i * kSliceBytes + j * 512);
  }
};

// What comes once for a lane's row, with the last part, and is applied to the sum of all.
template <class S>
struct WholeRow {
  using F = typename S::Format;
  typename F::Scale::Raw scale, offset;  // where all columns have one
  float divisor;

  template <int size, bool kLast, bool kAll, int kCount>
  FF_DEVICE void take(const LoadedScales<S, size, kLast, kAll, kCount>& part) {
    if constexpr (F::kGroup == 0 && kLast) scale = part.scale[0][0], offset = part.offset[0][0];
    if constexpr (F::Scale::kDivided && kLast) divisor = part.divisor;
  }
  FF_DEVICE float divided(float sum) const { return F::Scale::kDivided ? __fdividef(sum, divisor) : sum; }
};

// total + scale (sum of code * x - zero * plain) + minimum * plain.
template <class F>
FF_DEVICE float add_scaled(float total, float sum, float plain, typename F::Scale::Raw scale, typename F::Scale::Raw offset) {
  // NOTE: said in full, so that no bit depends on which of the code's copies it is (`with_groups`).
  if constexpr (F::kOffset == Offset::kZero) sum = fmaf(-F::Scale::value(offset), plain, sum);
  total = fmaf(F::Scale::value(scale), sum, total);
  return F::kOffset == Offset::kMinimum ? fmaf(F::Scale::value(offset), plain, total) : total;
}

// One lane's part of the product of a tile with x.
template <class M, class S>
struct CodedProduct {
  using F = typename S::Format;
  using Code = typename F::Code;
  using Scale = typename F::Scale;
  using Raw = typename Scale::Raw;
  using X = CodedOperand<M, S>;
  static constexpr int kAtOnce = S::kFragments;  // slices that are loaded at a time, at most
  static constexpr int kBatchSlices = 4;  // of a batch of groups, at most

  float total = 0;
  float set[4][4];  // where all columns have one scale: sums over all slices
  WholeRow<S> row;

  FF_DEVICE CodedProduct() {
    if constexpr (F::kGroup == 0) clear();
  }

  // Add the product of what was loaded, whose first slice is `first` of x.
  template <int first, class Part>
  FF_DEVICE void add(const Part& part, const X& x, u32 lane) {
    const u32 t = lane & 3;
#pragma unroll
    for (int i = 0; i < Part::kSlices; i++) {
      const int slice = first + i;
      if constexpr (F::kGroup != 0) clear();
#pragma unroll
      for (int p = 0; p < 4; p++) mma<Float16>(set[p], Code::operand(part.raw[i], p), x.value[slice][0], x.value[slice][1]);
      if constexpr (F::kGroup == 16) {
        const float(&sum)[X::kSums] = x.sum[slice];
        total = scaled(total, pick(0, t), Code::kEvenBias, sum[0], sum[0], part.scale[i][0], part.offset[i][0]);
        total = scaled(total, pick(3, t) * Code::kOddFactor, Code::kOddBias, sum[1], sum[1], part.scale[i][1], part.offset[i][1]);
      } else if constexpr (F::kGroup != 0) {
        total = scaled(total, both(t), 1, x.sum[slice][0], x.sum[slice][kPlain], part.scale[i][0], part.offset[i][0]);
      }
    }
    row.take(part);
  }

  FF_DEVICE float result(u32 lane, const X& x) {
    if constexpr (F::kGroup == 0) total = scaled(0, both(lane & 3), 1, x.sum[0][0], x.sum[0][kPlain], row.scale, row.offset);
    return row.divided(total * x.unscale);
  }

 private:
  FF_DEVICE void clear() {
#pragma unroll
    for (int p = 0; p < 4; p++) set[p][0] = set[p][1] = set[p][2] = set[p][3] = 0;
  }
  static constexpr int kPlain = X::kSums ? X::kSums - 1 : 0;  // where x has the plain sum
  FF_DEVICE float both(u32 t) const { return pick(0, t) + pick(3, t) * Code::kOddFactor; }
  // Of the four instructions' sums the one on the diagonal.
  FF_DEVICE float pick(int i, u32 t) const {
    const float low = t & 1 ? set[1][i] : set[0][i], high = t & 1 ? set[3][i] : set[2][i];
    return t & 2 ? high : low;
  }
  // total + scale (sum of code * x - bias * biased - zero * plain) + minimum * plain.
  static FF_DEVICE float scaled(float total, float sum, float bias, float biased, float plain, Raw scale, Raw offset) {
    if constexpr (X::kBiased) {
      constexpr float kZero = F::kGroup == 16 && F::kOffset == Offset::kNone ? Code::kZero : 0;
      sum -= (bias + kZero) * biased;
    }
    return add_scaled<F>(total, sum, plain, scale, offset);
  }
};
