// The words that all CPU headers share: integer types, 16-bit values, and SIMD through the compiler's vector extensions.
//
// A *line* is 64 bytes: of 16-bit values, two halves of 16 each, such as 32 columns of a row of weights (kv.h: of keys and values).
// `V::place` says where a value lies in its line, so that `V::load` turns a line into floats with the fewest instructions.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__ARM_FP16_FORMAT_IEEE)
#include <arm_neon.h>
#endif

#define FF_ENTRY extern "C" __attribute__((visibility("default")))  // a function that the host calls

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef u32 VecBits __attribute__((vector_size(kLanes * 4)));

constexpr int kHalf = 16;              // values in half a line
constexpr int kLine = 2 * kHalf;       // values in a line
constexpr int kLineBytes = kLine * 2;  // a cache line
constexpr int kPrefetchBytes = 4096;   // how far ahead of a long read: hardware prefetchers stop at the end of a page

constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// NOTE: into the second cache: what the first one waits for are few lines, and a long read would be held to their pace.
inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec splat(float value) { return Vec{} + value; }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Sum of the lanes, in a fixed order.
inline float sum(Vec v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}

// Largest lane.
inline float maximum(Vec v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  float best = lane[0];
  for (int i = 1; i < kLanes; i++) best = lane[i] > best ? lane[i] : best;
  return best;
}

// --- 16-bit values ---------------------------------------------------------------------------------------------------------

struct Bfloat16 {
  // The halves alternate: a line is 16 words of 32 bits, and a shift or a mask turns each word into a float.
  static constexpr int place(int half, int i) { return 2 * i + half; }

  // Elements i .. i + kLanes of both halves of a line.
  static inline void load(const u16* line, int i, Vec& first, Vec& second) {
    VecBits words;
    std::memcpy(&words, line + 2 * i, sizeof words);
    first = bits_as<Vec>(words << 16);
    second = bits_as<Vec>(words & 0xffff0000u);
  }

  static inline float widen(u16 value) { return bits_as<float>(u32(value) << 16); }

  // Rounds to nearest, ties to even; a NaN stays one.
  static inline u16 narrow(float value) {
    const u32 b = bits_as<u32>(value);
    const u32 rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return u16((b & 0x7fffffff) > 0x7f800000 ? (b >> 16) | 0x40 : rounded);
  }

  static inline bool finite(u16 value) { return (value & 0x7f80) != 0x7f80; }
};

struct Float16 {
  static constexpr int place(int half, int i) { return half * kHalf + i; }

  static inline void load(const u16* line, int i, Vec& first, Vec& second) {
    first = widen_lanes(line + i);
    second = widen_lanes(line + kHalf + i);
  }

  static inline Vec widen_lanes(const u16* from) {
#if defined(__AVX512F__)
    return bits_as<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return bits_as<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__ARM_NEON) && defined(__ARM_FP16_FORMAT_IEEE)
    return bits_as<Vec>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
#else
    Vec v;
    for (int i = 0; i < kLanes; i++) v[i] = widen(from[i]);
    return v;
#endif
  }

  // Shifting the exponent into place leaves a factor of 2^-112, also right for subnormals; infinities and NaNs need their own.
  static inline float widen(u16 value) {
    const u32 magnitude = u32(value & 0x7fff) << 13;
    const float finite = bits_as<float>(magnitude) * 0x1p112f;
    const u32 b = (value & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits_as<u32>(finite);
    return bits_as<float>(b | u32(value & 0x8000) << 16);
  }

  // Rounds to nearest, ties to even; too large becomes infinity, a NaN stays one.
  static inline u16 narrow(float value) {
    const u32 b = bits_as<u32>(value), magnitude = b & 0x7fffffff;
    const u32 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    const u32 subnormal = bits_as<u32>(bits_as<float>(magnitude) + 0.5f) - bits_as<u32>(0.5f);  // adding 0.5 rounds to 2^-24
    const u32 special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return u16(b >> 16 & 0x8000) | u16(magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? subnormal : normal);
  }

  static inline bool finite(u16 value) { return (value & 0x7c00) != 0x7c00; }
};

// --- exponentials ----------------------------------------------------------------------------------------------------------

// 2^x without branches, so that loops over it vectorise: Taylor polynomial of 2^f for |f| <= 1/2 (relative error below 3e-7
// with rounding), exponent added as an integer. x is clamped to [-126, 127]; a NaN stays one.
inline float exp2_fast(float x) {
  x = x < -126.0f ? -126.0f : x;
  x = x > 127.0f ? 127.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
  const float shifted = x + magic;
  const float f = x - (shifted - magic);
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return bits_as<float>(bits_as<u32>(p) + (bits_as<u32>(shifted) << 23));
}

constexpr float kLog2E = 1.44269504f;
