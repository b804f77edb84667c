// What a block of the KV cache holds, how attention reads it and how it writes it.
//
// A block is 16 positions of one kv head: keys as A operands of the matrix instruction (rows = positions, a fragment per step of
// 16 dims), then values as A operands (rows = dims, columns = positions), then scales, where there are any. The types of cache
// share this interface:
//
//   Operand                   the 16-bit type that the matrix instructions multiply
//   kSteps                    fragments that one load brings
//   Reader                    one block in shared memory, as a lane sees it
//   mix                       the basis in which keys are stored, and queries meet them
//   Scale, scale_of           what a vector is stored with
//   rounded                   what the cache will give back of a value
//   key, value                bytes from the beginning of a block to the value of a position and a dim
//   put, put_scale            write a value to its place, a vector's scale to its block
#pragma once
#include "prelude.cuh"

struct Native {};  // the types, besides those of codes at the end

template <class M, class Type = typename M::KvType>
struct KvBlock;

// ---- native: 16-bit values, a lane's 16 bytes are a fragment ----

template <class M>
struct KvBlock<M, Native> {
  using Operand = typename M::Value;
  static constexpr int kSteps = 1;
  static constexpr bool kScaled = false;
  static constexpr u32 kFragmentBytes = 512, kKeyBytes = M::kHeadPad * 32;

  struct Reader {
    u32 at;
    FF_DEVICE Reader(u32 block, u32 lane) : at(block + lane * 16) {}

    FF_DEVICE void keys(uint4 (&a)[kSteps], int step) const { a[0] = load_shared4(at + step * kFragmentBytes); }
    // Of the scores of positions `row` and `row` + 8, and the logarithms of the scales of their values.
    FF_DEVICE float2 score_scale(u32) const { return make_float2(M::kScoreScale, M::kScoreScale); }
    FF_DEVICE float2 value_scale(u32) const { return make_float2(0, 0); }
    // NOTE: weights are zero where there is no position yet, but what an earlier text left there may be a NaN.
    FF_DEVICE void values(uint4 (&a)[kSteps], int step, u32 mask0, u32 mask1) const {
      uint4 v = load_shared4(at + kKeyBytes + step * kFragmentBytes);
      v.x &= mask0;
      v.y &= mask0;
      v.z &= mask1;
      v.w &= mask1;
      a[0] = v;
    }
  };

  template <int n>
  static FF_DEVICE void mix(float (&)[n], float (&)[n], u32, float = 1) {}

  struct Scale {};
  template <int n>
  static FF_DEVICE Scale scale_of(const float (&)[n], const float (&)[n]) {
    return {};
  }
  static FF_DEVICE float rounded(float x, Scale) { return Operand::unpack((u16)Operand::pack(x, 0)); }

  static FF_DEVICE void put(u8* block, u32 at, float x, Scale) { *(u16*)(block + at) = (u16)Operand::pack(x, 0); }
  template <bool kIsValue>
  static FF_DEVICE void put_scale(u8*, u32, Scale) {}

  static FF_DEVICE u32 key(u32 position, u32 dim) {
    const u32 in = dim & 15;  // lane t holds dims 4t..4t+3 of a step: the same order as the query's registers
    return (dim >> 4) * 512 + ((position & 7) * 4 + (in >> 2)) * 16 + ((in >> 1 & 1) * 2 + (position >> 3)) * 4 + (in & 1) * 2;
  }
  static FF_DEVICE u32 value(u32 position, u32 dim) {
    return kKeyBytes + (dim >> 4) * 512 + ((dim & 7) * 4 + (position >> 1 & 3)) * 16 + ((position >> 3) * 2 + (dim >> 3 & 1)) * 4 +
           (position & 1) * 2;
  }
};

// ---- codes of 8 bits, then for each key and value its scale in bfloat16 ----
//
// A lane's 16 bytes are two fragments; where the steps are odd in number, its last 8 bytes are one. Codes become fp16 values, which
// hold them exactly. A key's scale multiplies its scores; a value's scale multiplies its weight, and the largest such product is the
// one that a softmax is relative to: so they stay in the range of fp16. Codes are always finite; what is not is in the scale.
//
// Some dims of keys are much larger than the rest, which would be left with few codes. A Hadamard transform of keys and queries evens
// them out and changes no score.

template <class M, class Code>
struct KvBlock {
  using Operand = Float16;
  static constexpr int kSteps = 2;
  static constexpr bool kScaled = true;
  static constexpr u32 kFragmentBytes = 256, kKeyBytes = M::kHeadPad * 16, kScales = 2 * kKeyBytes;

  struct Reader {
    u32 block, lane;
    FF_DEVICE Reader(u32 block, u32 lane) : block(block), lane(lane) {}

    FF_DEVICE void keys(uint4 (&a)[kSteps], int step) const { load(a, block, step); }
    FF_DEVICE void values(uint4 (&a)[kSteps], int step, u32, u32) const { load(a, block + kKeyBytes, step); }
    FF_DEVICE float2 score_scale(u32 row) const {
      const float2 scale = scales(row, 0);
      return make_float2(scale.x * (M::kScoreScale * Code::kFactor), scale.y * (M::kScoreScale * Code::kFactor));
    }
    FF_DEVICE float2 value_scale(u32 row) const {
      const float2 scale = scales(row, 4);
      return make_float2(log2_approx(scale.x * Code::kFactor), log2_approx(scale.y * Code::kFactor));
    }

   private:
    FF_DEVICE float2 scales(u32 row, u32 offset) const {
      const u32 both = load_shared(block + kScales + row * 8 + offset);
      return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
    }
    // Fragments `step` and, if there is one, `step` + 1.
    FF_DEVICE void load(uint4 (&a)[kSteps], u32 from, int step) const {
      if (step + 1 < M::kHeadPad / 16) {
        const uint4 v = load_shared4(from + step * kFragmentBytes + lane * 16);
        a[0] = widen(v.x, v.y);
        a[1] = widen(v.z, v.w);
      } else {
        const uint2 v = load_shared2(from + step * kFragmentBytes + lane * 8);
        a[0] = widen(v.x, v.y);
      }
    }
    static FF_DEVICE uint4 widen(u32 low, u32 high) {  // codes of rows g and g + 8
      return make_uint4(Code::even(low), Code::even(high), Code::odd(low), Code::odd(high));
    }
  };

  // Hadamard transform times `factor` of groups of kKvMixed dims: both halves (`low` and `high` have dims lane + 32 r of each), and a
  // power of two that divides them.
  template <int n>
  static FF_DEVICE void mix(float (&low)[n], float (&high)[n], u32 lane, float factor = 1) {
#pragma unroll
    for (int r = 0; r < n; r++) {
      const float x = low[r] * factor, y = high[r] * factor;
      low[r] = x + y;
      high[r] = x - y;
    }
    mix_half(low, lane);
    mix_half(high, lane);
  }

  struct Scale {
    float scale, inverse;
  };
  // For a vector spread over the lanes: its largest value has one of the codes that it may have, with which the least is lost, in squares.
  template <int n>
  static FF_DEVICE Scale scale_of(const float (&low)[n], const float (&high)[n]) {
    constexpr int kTries = sizeof M::kKvLargest / sizeof M::kKvLargest[0];
    u32 largest = __float_as_uint(M::kKvLeastScale * M::kKvLargest[0]);  // as bits, in whose order a NaN is larger than all
#pragma unroll
    for (int r = 0; r < n; r++) largest = max(largest, max(__float_as_uint(fabsf(low[r])), __float_as_uint(fabsf(high[r]))));
    largest = __reduce_max_sync(kAllLanes, largest);
    float scale[kTries], lost[kTries] = {};
#pragma unroll
    for (int i = 0; i < kTries; i++) {
      scale[i] = Bfloat16::unpack((u16)Bfloat16::pack(__uint_as_float(largest) * (1 / M::kKvLargest[i]), 0));
      if constexpr (kTries > 1) {
        const Scale tried{scale[i], 1 / scale[i]};
#pragma unroll
        for (int r = 0; r < n; r++) {
          // NOTE: said in full, so that no bit depends on which of the code's copies it is.
          const float a = fmaf(code_of(low[r], tried), tried.scale, -low[r]), b = fmaf(code_of(high[r], tried), tried.scale, -high[r]);
          lost[i] = fmaf(a, a, fmaf(b, b, lost[i]));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTries; i++) {
      if (kTries > 1) lost[i] = warp_sum(lost[i]);
      if (lost[i] < lost[0]) lost[0] = lost[i], scale[0] = scale[i];
    }
    return {scale[0], 1 / scale[0]};
  }
  static FF_DEVICE float code_of(float x, const Scale& s) { return Code::value(Code::encode(x * s.inverse)); }
  static FF_DEVICE float rounded(float x, const Scale& s) { return code_of(x, s) * s.scale; }

  static FF_DEVICE void put(u8* block, u32 at, float x, const Scale& s) { block[at] = (u8)Code::encode(x * s.inverse); }
  template <bool kIsValue>
  static FF_DEVICE void put_scale(u8* block, u32 position, const Scale& s) {
    *(u16*)(block + kScales + (position & 7) * 8 + kIsValue * 4 + (position >> 3) * 2) = (u16)(__float_as_uint(s.scale) >> 16);
  }

  static FF_DEVICE u32 key(u32 position, u32 dim) {
    return place(dim >> 4, (position & 7) * 4 + (dim >> 2 & 3), position >> 3, (dim & 1) * 2 + (dim >> 1 & 1));
  }
  static FF_DEVICE u32 value(u32 position, u32 dim) {
    return kKeyBytes + place(dim >> 4, (dim & 7) * 4 + (position >> 1 & 3), dim >> 3 & 1, (position & 1) * 2 + (position >> 3));
  }

 private:
  template <int n>
  static FF_DEVICE void mix_half(float (&x)[n], u32 lane) {
    constexpr u32 kSize = M::kKvMixed / 2;
#pragma unroll
    for (u32 bit = 1; bit < kSize && bit < 32; bit *= 2)
#pragma unroll
      for (int r = 0; r < n; r++) {
        const float other = __shfl_xor_sync(kAllLanes, x[r], bit);
        x[r] = lane & bit ? other - x[r] : x[r] + other;
      }
#pragma unroll
    for (int apart = 1; apart * 32 < kSize; apart *= 2)
#pragma unroll
      for (int r = 0; r < n; r++)
        if (!(r & apart)) {
          const float a = x[r], b = x[r + apart];
          x[r] = a + b;
          x[r + apart] = a - b;
        }
  }
  // The bytes of a word are four neighbours a, c, b, d: `even` takes a and b.
  static FF_DEVICE u32 place(u32 step, u32 lane, u32 word, u32 byte) {
    const bool alone = step % 2 == 0 && step + 1 == M::kHeadPad / 16;
    const u32 at = alone ? step * kFragmentBytes + lane * 8 : step / 2 * (2 * kFragmentBytes) + lane * 16 + step % 2 * 8;
    return at + word * 4 + byte;
  }
};

// A code: its values in bytes 0 and 2, or 1 and 3, of a word as two fp16 values, 1 / kFactor of what they stand for.

struct Int8 {
  static constexpr float kFactor = 1;
  static FF_DEVICE u32 encode(float x) { return __float2int_rn(x) & 255; }
  static FF_DEVICE float value(u32 code) { return (float)(signed char)code; }
  static FF_DEVICE u32 even(u32 codes) { return shifted(__byte_perm(codes ^ kOffset, kThousand, 0x5250)); }
  static FF_DEVICE u32 odd(u32 codes) { return shifted(__byte_perm(codes ^ kOffset, kThousand, 0x5351)); }

 private:
  static constexpr u32 kOffset = 0x80808080u;  // of 128: then a code has no sign,
  static constexpr u32 kThousand = 0x6464;     // and is the last bits of a fp16 value of 1024 and more
  static FF_DEVICE u32 shifted(u32 pair) {
    u32 r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(pair), "r"(0x64806480u));
    return r;
  }
};

struct Fp8 {  // e4m3: in the place of fp16, only the exponent's bias differs, by 8; also of subnormals
  static constexpr float kFactor = 256;
  // To nearest, ties to even.
  static FF_DEVICE u32 encode(float x) {
    const u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    const u32 normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    return (bits >> 24 & 0x80) | (fabsf(x) < 0x1p-6f ? __float2uint_rn(fabsf(x) * 0x1p9f) : normal & 0x7f);
  }
  static FF_DEVICE float value(u32 code) { return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f; }
  static FF_DEVICE u32 even(u32 codes) { return odd(codes << 8); }
  static FF_DEVICE u32 odd(u32 codes) { return (codes & 0x80008000u) | (codes >> 1 & 0x3f803f80u); }
};
