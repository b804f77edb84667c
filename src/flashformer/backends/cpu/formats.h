// What a tile of weights holds, format by format: its size, its product with x, and single values of it.
//
// A tile is kTileRows rows. Of 16-bit values it holds a line (32 columns) of each row, then the next line of each. Of codes it holds
// fragments of 32 columns, then the scales, group after group: those of the rows, then their offsets; at last what the rows are
// divided by, if by anything. A fragment's *plane* k is its columns 4 k to 4 k + 4; value i of a plane is column i % 4 of row i / 4, so that
// lanes are four columns of each row.
#pragma once
#include "prelude.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

static_assert(kTileRows == 4, "a plane is four columns of four rows");

constexpr int kTogether = kLanes == 16 ? 4 : 2;  // columns of a pass whose sums fit the registers

// --- 16-bit values ---------------------------------------------------------------------------------------------------------

template <class V>
struct Plain {
  static constexpr u64 tile_bytes(int columns) { return u64(columns) * kTileRows * 2; }
  static constexpr int x_sums(int) { return 0; }
  static void sum_x(float*, const float*, int) {}

  // sums[k] = tile * x[k]. NOTE: the same operations in the same order for every column, however many there are.
  template <int kCount>
  static inline void multiply(float (&sums)[kCount][kTileRows], const u8* from, const float* const* x, const float* const*, int columns) {
    const u16* tile = reinterpret_cast<const u16*>(from);
    Vec rows[kCount][kTileRows] = {};
    for (int line = 0; line < columns / kLine; line++) {
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; r++) prefetch(tile + r * kLine + kPrefetchBytes / 2);
#pragma GCC unroll 4
      for (int i = 0; i < kHalf; i += kLanes) {
        Vec x0[kCount], x1[kCount];
#pragma GCC unroll 4
        for (int k = 0; k < kCount; k++) {
          x0[k] = load(x[k] + line * kLine + i);
          x1[k] = load(x[k] + line * kLine + kHalf + i);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; r++) {
          Vec first, second;
          V::load(tile + r * kLine, i, first, second);
#pragma GCC unroll 4
          for (int k = 0; k < kCount; k++) {
            rows[k][r] += first * x0[k];
            rows[k][r] += second * x1[k];
          }
        }
      }
      tile += kTileRows * kLine;
    }
    for (int k = 0; k < kCount; k++)
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; r++) sums[k][r] = sum(rows[k][r]);
  }

  static inline float value(const u8* tile, int r, int c, int) {
    const u16* line = reinterpret_cast<const u16*>(tile) + (c / kLine * kTileRows + r) * kLine;
    return V::widen(line[V::place(c % kLine / kHalf, c % kHalf)]);
  }
};

// --- planes ----------------------------------------------------------------------------------------------------------------

constexpr int kPlane = 4;            // columns
constexpr int kFragmentColumns = 32;
constexpr int kPlanes = kFragmentColumns / kPlane;
constexpr int kVectors = kTileRows * kPlane / kLanes;  // of a plane
constexpr int kCodesAhead = 4 * kPrefetchBytes;        // NOTE: at the distance for lines, int8 was read a third slower

typedef float Quad __attribute__((vector_size(16)));
typedef u32 QuadBits __attribute__((vector_size(16)));
typedef std::int32_t VecInt __attribute__((vector_size(kLanes * 4)));

// The four floats at `from` for each of the rows that a vector holds.
inline Vec each_row(const float* from) {
#if defined(__AVX512F__)
  return bits_as<Vec>(_mm512_broadcast_f32x4(_mm_loadu_ps(from)));
#elif defined(__AVX__)
  return bits_as<Vec>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)));
#else
  return load(from);
#endif
}

// For vector v of a plane: each row's value in its four lanes.
inline Vec each_column(Quad rows, int v) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return bits_as<Vec>(_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(bits_as<__m128>(rows))));
#elif defined(__AVX__)
  const __m256 both = _mm256_set_m128(bits_as<__m128>(rows), bits_as<__m128>(rows));
  return bits_as<Vec>(v ? _mm256_permutevar_ps(both, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))
                        : _mm256_permutevar_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)));
#else
  return splat(rows[v]);
#endif
}

// --- scales: of each type, those of four rows, and one --------------------------------------------------------------------

template <class V>
struct Scale16 {
  static constexpr int kBytes = 2;
  static constexpr bool kDivided = false;
  static inline float one(const u8* from) {
    u16 value;
    std::memcpy(&value, from, sizeof value);
    return V::widen(value);
  }
};

struct HalfScale : Scale16<Float16> {
  static inline Quad rows(const u8* from) {
#if defined(__F16C__)
    return bits_as<Quad>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    return Quad{one(from), one(from + 2), one(from + 4), one(from + 6)};
#endif
  }
};

struct BfloatScale : Scale16<Bfloat16> {
  static inline Quad rows(const u8* from) {
    u16 __attribute__((vector_size(8))) values;
    std::memcpy(&values, from, sizeof values);
    return bits_as<Quad>(__builtin_convertvector(values, QuadBits) << 16);
  }
};

struct FloatScale {
  static constexpr int kBytes = 4;
  static constexpr bool kDivided = false;
  static inline Quad rows(const u8* from) {
    Quad values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static inline float one(const u8* from) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
};

template <class S>
struct Scale8 {
  static constexpr int kBytes = 1;
  static inline Quad rows(const u8* from) {
    u8 __attribute__((vector_size(4))) bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return S::values(__builtin_convertvector(bytes, QuadBits));
  }
  static inline float one(const u8* from) { return S::values(QuadBits{*from})[0]; }
};

// e8m0, whose 0, 2^-127, is subnormal as a float. NOTE: its NaN becomes infinite, which is no more finite.
struct ExponentScale : Scale8<ExponentScale> {
  static constexpr bool kDivided = false;
  static inline Quad values(QuadBits bytes) { return bits_as<Quad>(bytes << 23 | (QuadBits(bytes == 0) & 0x00400000u)); }
};

struct E4m3Scale : Scale8<E4m3Scale> {
  static constexpr bool kDivided = true;  // by a float of each row, which are behind the scales
  static inline Quad values(QuadBits bytes) { return bits_as<Quad>((bytes & 0x80) << 24 | (bytes & 0x7f) << 20) * 0x1p120f; }  // see E4m3
};

// --- codes -----------------------------------------------------------------------------------------------------------------

// Tables of 16 values that follow each other.
struct Unsigned4 {
  static constexpr bool kConsecutive = true;
  static constexpr float kValues[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

struct Signed4 {
  static constexpr bool kConsecutive = true;
  static constexpr float kValues[] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
};

// 4 bits, the numbers of the 16 values of T::kValues. Value i of all planes is a word of 32 bits, plane 0 lowest.
template <class T>
struct Nibbles {
  static constexpr int kFragmentBytes = kTileRows * kFragmentColumns / 2;

  // sums[n][v] += planes [kFirst, kFirst + kCount) of a fragment * (x[n] + at), in kChains sums that do not wait for each other.
  template <int kFirst, int kCount, int kColumns, int kChains>
  static inline void multiply(Vec (&sums)[kColumns][kVectors][kChains], const u8* fragment, const float* const* x, int at) {
    prefetch(fragment + kCodesAhead);
    for (int v = 0; v < kVectors; v++) {
      VecBits words;
      std::memcpy(&words, fragment + v * sizeof words, sizeof words);
#pragma GCC unroll 8
      for (int k = kFirst; k < kFirst + kCount; k++) {
        const Vec weights = values(words >> (4 * k));
#pragma GCC unroll 4
        for (int n = 0; n < kColumns; n++) sums[n][v][k % kChains] += weights * each_row(x[n] + at + kPlane * k);
      }
    }
  }

  // What the lowest four bits of each word stand for.
  static inline Vec values(VecBits words) {
#if defined(__AVX512F__)
    return bits_as<Vec>(_mm512_permutexvar_ps(bits_as<__m512i>(words), _mm512_loadu_ps(T::kValues)));
#else
    if constexpr (T::kConsecutive) {
      return __builtin_convertvector(VecInt(words & 15), Vec) + T::kValues[0];
    } else {
#if defined(__AVX2__)
      return bits_as<Vec>(_mm256_i32gather_ps(T::kValues, bits_as<__m256i>(words & 15), sizeof(float)));
#else
      Vec found;
      for (int i = 0; i < kLanes; i++) found[i] = T::kValues[words[i] & 15];
      return found;
#endif
    }
#endif
  }

  static inline float value(const u8* fragment, int r, int c) {
    u32 word;
    std::memcpy(&word, fragment + (r * kPlane + c % kPlane) * sizeof word, sizeof word);
    return T::kValues[word >> (4 * (c / kPlane)) & 15];
  }
};

// 8 bits, each what E makes of it; plane after plane.
template <class E>
struct Octets {
  static constexpr int kPlaneBytes = kTileRows * kPlane;
  static constexpr int kFragmentBytes = kPlanes * kPlaneBytes;

  template <int kFirst, int kCount, int kColumns, int kChains>
  static inline void multiply(Vec (&sums)[kColumns][kVectors][kChains], const u8* fragment, const float* const* x, int at) {
    for (int line = 0; line < kFragmentBytes; line += kLineBytes) prefetch(fragment + kCodesAhead + line);
#pragma GCC unroll 8
    for (int k = kFirst; k < kFirst + kCount; k++)
      for (int v = 0; v < kVectors; v++) {
        const Vec weights = E::values(fragment + k * kPlaneBytes + v * kLanes);
#pragma GCC unroll 4
        for (int n = 0; n < kColumns; n++) sums[n][v][k % kChains] += weights * each_row(x[n] + at + kPlane * k);
      }
  }

  static inline float value(const u8* fragment, int r, int c) {
    return E::value(fragment[c / kPlane * kPlaneBytes + r * kPlane + c % kPlane]);
  }
};

// Bytes with their sign, one in each lane.
inline VecInt signed_bytes(const u8* from) {
#if defined(__AVX512F__)
  return bits_as<VecInt>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return bits_as<VecInt>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  VecInt values;
  for (int i = 0; i < kLanes; i++) values[i] = std::int8_t(from[i]);
  return values;
#endif
}

struct Integer {
  static inline Vec values(const u8* from) { return __builtin_convertvector(signed_bytes(from), Vec); }
  static inline float value(u8 code) { return std::int8_t(code); }
};

// e4m3: sign, 4 bits of exponent with a bias of 7, 3 of mantissa. In a float's place all but the bias is right, also for subnormals.
struct E4m3 {
  static inline Vec values(const u8* from) { return bits_as<Vec>(VecBits(signed_bytes(from)) << 20 & 0x87f00000u) * 0x1p120f; }
  static inline float value(u8 code) { return bits_as<float>((u32(code) & 0x80) << 24 | (u32(code) & 0x7f) << 20) * 0x1p120f; }
};

// --- codes with scales -----------------------------------------------------------------------------------------------------

enum class Offset { kNone, kZero, kMinimum };

// kGroup columns share a scale: 16, a multiple of 32, or 0: the whole row.
template <class Code, int kGroup, Offset kOffset, class Scale>
struct Codes {
  static constexpr bool kOffsets = kOffset != Offset::kNone;
  static constexpr int kScaleBytes = kTileRows * Scale::kBytes;  // of a group
  // NOTE: short groups overlap by themselves; more sums than these would not fit the registers.
  static constexpr int kChains = kVectors == 1 && (kGroup == 0 || kGroup > kFragmentColumns) ? 4 : 2;

  static constexpr int group(int columns) { return kGroup ? kGroup : columns; }
  static constexpr int groups(int columns) { return (columns + group(columns) - 1) / group(columns); }
  static constexpr u64 code_bytes(int columns) { return u64(columns) / kFragmentColumns * Code::kFragmentBytes; }
  static constexpr u64 scale_bytes(int columns) { return u64(groups(columns)) * kScaleBytes * (kOffsets ? 2 : 1); }
  static constexpr u64 tile_bytes(int columns) {
    const u64 bytes = code_bytes(columns) + scale_bytes(columns) + (Scale::kDivided ? kTileRows * sizeof(float) : 0);
    return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  }

  // Offsets are multiplied by the sums of x over their group: one for each column of a plane.
  static constexpr int x_sums(int columns) { return kOffsets ? groups(columns) * kPlane : 0; }
  static void sum_x(float* to, const float* x, int columns) {
    if (!kOffsets) return;
    for (int c = 0; c < columns; to += kPlane) {
      const int end = c + group(columns) < columns ? c + group(columns) : columns;
      Quad total{}, plane;
      for (; c < end; c += kPlane) {
        std::memcpy(&plane, x + c, sizeof plane);
        total += plane;
      }
      std::memcpy(to, &total, sizeof total);
    }
  }

  // sums[k] = tile * x[k]; x_sums[k] as `sum_x` leaves them. NOTE: as in `Plain`, the same for every column.
  template <int kCount>
  static inline void multiply(
      float (&sums)[kCount][kTileRows], const u8* tile, const float* const* x, const float* const* x_sums, int columns) {
    Vec totals[kCount][kVectors] = {};
    const u8* scales = tile + code_bytes(columns);
    int group_sums = 0;
    const auto add = [&](const Vec(&parts)[kCount][kVectors][kChains]) {
      prefetch(scales + kCodesAhead);
      for (int v = 0; v < kVectors; v++) {
        const Vec scale = each_column(Scale::rows(scales), v);
        Vec offset{};
        if constexpr (kOffsets) offset = each_column(Scale::rows(scales + kScaleBytes), v);
#pragma GCC unroll 4
        for (int n = 0; n < kCount; n++) {
          Vec part = parts[n][v][0];
          for (int i = 1; i < kChains; i++) part += parts[n][v][i];
          if constexpr (kOffset == Offset::kZero) part -= offset * each_row(x_sums[n] + group_sums);
          totals[n][v] += part * scale;
          if constexpr (kOffset == Offset::kMinimum) totals[n][v] += offset * each_row(x_sums[n] + group_sums);
        }
      }
      scales += kScaleBytes * (kOffsets ? 2 : 1);
      group_sums += kPlane;
    };
    for (int c = 0; c < columns;) {
      if constexpr (kGroup == kFragmentColumns / 2) {
        Vec low[kCount][kVectors][kChains] = {}, high[kCount][kVectors][kChains] = {};
        Code::template multiply<0, kPlanes / 2>(low, tile, x, c);
        add(low);
        Code::template multiply<kPlanes / 2, kPlanes / 2>(high, tile, x, c);
        add(high);
        c += kFragmentColumns, tile += Code::kFragmentBytes;
      } else {
        Vec parts[kCount][kVectors][kChains] = {};
        const int end = c + group(columns) < columns ? c + group(columns) : columns;
        for (; c < end; c += kFragmentColumns, tile += Code::kFragmentBytes) Code::template multiply<0, kPlanes>(parts, tile, x, c);
        add(parts);
      }
    }
    for (int n = 0; n < kCount; n++) {
      float lanes[kTileRows][kPlane];
      std::memcpy(lanes, totals[n], sizeof lanes);
      for (int r = 0; r < kTileRows; r++) sums[n][r] = (lanes[r][0] + lanes[r][2]) + (lanes[r][1] + lanes[r][3]);
      if constexpr (Scale::kDivided)
        for (int r = 0; r < kTileRows; r++) sums[n][r] /= divisor(scales + r * sizeof(float));
    }
  }

  static inline float value(const u8* tile, int r, int c, int columns) {
    const u8* scale = tile + code_bytes(columns) + u64(c / group(columns)) * kScaleBytes * (kOffsets ? 2 : 1) + r * Scale::kBytes;
    const float code = Code::value(tile + c / kFragmentColumns * Code::kFragmentBytes, r, c % kFragmentColumns);
    const float offset = kOffsets ? Scale::one(scale + kScaleBytes) : 0.0f;
    if (kOffset == Offset::kZero) return (code - offset) * Scale::one(scale);
    if (Scale::kDivided) return code * (Scale::one(scale) / divisor(tile + code_bytes(columns) + scale_bytes(columns) + r * sizeof(float)));
    return code * Scale::one(scale) + offset;
  }

 private:
  // NOTE: rows of padding have none; theirs are zeros.
  static inline float divisor(const u8* from) {
    const float value = FloatScale::one(from);
    return value == 0 ? 1 : value;
  }
};
