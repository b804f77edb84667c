// What a block of the KV cache holds, how attention reads it and how it writes it.
//
// A block is 16 positions of one kv head: first the keys, then the values, each in lines of 64 bytes, so that scores and sums need no
// shuffles, then scales, where there are any. The types of cache share this interface:
//
//   mix                      a key to the basis in which it is stored, or a query
//   put_key, put_value       the vectors of a position into its block
//   key_bytes, value_bytes   where `keys` and `values` read
//   keys                     of dimensions d and d + 1: those of kLanes positions from i on
//   values                   of positions j and j + 1: kLanes dimensions from i on of column c (16 dimensions)
//   scale_keys, scale_values scores, or weights, of the positions of a block times the scales of its keys, or values
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "formats.h"

constexpr int kBlockPositions = kHalf;

struct Native {};  // the types, besides those of codes below

template <class M, class Type = typename M::KvType>
struct KvBlock;

// --- native: a line is two dimensions of 16 keys, or 16 dimensions of two values -------------------------------------------

template <class M>
struct KvBlock<M, Native> {
  using V = typename M::Value;
  static constexpr int kKeyLines = M::kHeadPad / 2, kColumns = M::kHeadPad / kHalf;

  static void mix(float*, float = 1) {}
  static void put_key(u8* block, int at, const float* key) {
    for (int d = 0; d < M::kHeadDim; d++) line(block + key_bytes(d))[V::place(d % 2, at)] = V::narrow(key[d]);
  }
  static void put_value(u8* block, int at, const float* value) {
    for (int d = 0; d < M::kHeadDim; d++) {
      u16* to = line(block + value_bytes(at, d / kHalf));
      to[V::place(at % 2, d % kHalf)] = V::narrow(value[d]);
      // NOTE: the other position of this line is read with weight zero, and what an earlier text left there may be a NaN.
      if (at % 2 == 0) to[V::place(1, d % kHalf)] = 0;
    }
  }

  static int key_bytes(int d) { return d / 2 * kLineBytes; }
  static int value_bytes(int j, int c) { return (kKeyLines + j / 2 * kColumns + c) * kLineBytes; }
  static void keys(const u8* block, int d, int i, Vec& even, Vec& odd) { V::load(line(block + key_bytes(d)), i, even, odd); }
  static void values(const u8* block, int j, int c, int i, Vec& even, Vec& odd) { V::load(line(block + value_bytes(j, c)), i, even, odd); }
  static void scale_keys(float*, int, const u8*) {}
  static void scale_values(float*, int, const u8*) {}

 private:
  static u16* line(u8* at) { return reinterpret_cast<u16*>(at); }
  static const u16* line(const u8* at) { return reinterpret_cast<const u16*>(at); }
};

// --- codes of 8 bits: a line is four dimensions of 16 keys, or 16 dimensions of four values --------------------------------

template <class M, class Code>
struct KvBlock {
  static constexpr int kKeyBytes = M::kHeadPad * kBlockPositions, kColumns = M::kHeadPad / kHalf;

  // NOTE: some dimensions of keys are much larger than the rest, which would be left with few codes. A Hadamard transform of keys and
  // queries evens them out and changes no score: of groups of both halves of a vector, and a power of two that divides them.
  static void mix(float* x, float factor = 1) {
    constexpr int kPart = M::kHeadDim / 2;
    for (int d = 0; d < kPart; d++) butterfly(x[d] *= factor, x[kPart + d] *= factor);
    for (int apart = 1; apart < M::kKvMixed / 2; apart *= 2)
      for (int d = 0; d < M::kHeadDim; d++)
        if (!(d % kPart & apart)) butterfly(x[d], x[d + apart]);
  }

  static void put_key(u8* block, int at, const float* key) {
    const float inverse = 1.0f / put_scale(key_scales(block) + at, key);
    for (int d = 0; d < M::kHeadDim; d++) block[key_bytes(d) + at] = Code::encode(key[d] * inverse);
  }
  static void put_value(u8* block, int at, const float* value) {
    const float inverse = 1.0f / put_scale(value_scales(block) + at, value);
    for (int d = 0; d < M::kHeadDim; d++) block[value_bytes(at, d / kHalf) + d % kHalf] = Code::encode(value[d] * inverse);
  }

  static int key_bytes(int d) { return d * kBlockPositions; }
  static int value_bytes(int j, int c) { return kKeyBytes + (j / 4 * kColumns + c) * kLineBytes + j % 4 * kHalf; }
  static void keys(const u8* block, int d, int i, Vec& even, Vec& odd) {
    even = Code::values(block + key_bytes(d) + i);
    odd = Code::values(block + key_bytes(d + 1) + i);
  }
  static void values(const u8* block, int j, int c, int i, Vec& even, Vec& odd) {
    even = Code::values(block + value_bytes(j, c) + i);
    odd = Code::values(block + value_bytes(j + 1, c) + i);
  }
  static void scale_keys(float* scores, int count, const u8* block) { scale(scores, count, key_scales(block)); }
  static void scale_values(float* weights, int count, const u8* block) { scale(weights, count, value_scales(block)); }

 private:
  static void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
  }
  template <class Bytes>
  static auto key_scales(Bytes* block) {
    return reinterpret_cast<std::conditional_t<std::is_const_v<Bytes>, const u16, u16>*>(block + 2 * kKeyBytes);
  }
  template <class Bytes>
  static auto value_scales(Bytes* block) {
    return key_scales(block) + kBlockPositions;
  }
  static void scale(float* values, int count, const u16* scales) {
    for (int i = 0; i < count; i++) values[i] *= Bfloat16::widen(scales[i]);
  }
  // With this scale the largest value has one of the codes that it may have: with which the least is lost, in squares.
  static float put_scale(u16* to, const float* vector) {
    constexpr int kTries = sizeof M::kKvLargest / sizeof M::kKvLargest[0];
    u32 largest = bits_as<u32>(M::kKvLeastScale * M::kKvLargest[0]);  // as bits, in whose order a NaN is larger than all
    for (int d = 0; d < M::kHeadDim; d++) largest = std::max(largest, bits_as<u32>(vector[d]) & 0x7fffffff);
    float least = 0;
    for (int i = 0; i < kTries; i++) {
      const u16 scale = Bfloat16::narrow(bits_as<float>(largest) * (1 / M::kKvLargest[i]));
      float lost = 0;
      if constexpr (kTries > 1) lost = loss(vector, Bfloat16::widen(scale));
      if (i == 0 || lost < least) least = lost, *to = scale;
    }
    return Bfloat16::widen(*to);
  }
  static float loss(const float* vector, float scale) {
    const float inverse = 1.0f / scale;
    float lost = 0;
    for (int d = 0; d < M::kHeadDim; d++) {
      const float off = Code::value(Code::encode(vector[d] * inverse)) * scale - vector[d];
      lost += off * off;
    }
    return lost;
  }
};

// NOTE: a code is always finite; what is not is in the scale.
struct Int8 : Integer {
  static u8 encode(float x) { return std::abs(x) <= 127.5f ? u8(std::int8_t(std::nearbyint(x))) : 0; }
};

struct Fp8 : E4m3 {
  // To nearest, ties to even.
  static u8 encode(float x) {
    const u32 bits = bits_as<u32>(x), magnitude = bits & 0x7fffffff;
    const u32 normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    const u32 subnormal = u32(std::nearbyint(std::min(std::abs(x), 1.0f) * 0x1p9f));
    return u8((bits >> 24 & 0x80) | ((magnitude < bits_as<u32>(0x1p-6f) ? subnormal : normal) & 0x7f));
  }
};
