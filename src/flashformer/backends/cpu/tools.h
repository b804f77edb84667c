// What is done around the model itself: packing weights into the tapes, and reading memory, to check it or to measure it.
// Each entry point works alone on its part; the host calls them from as many threads as it likes.
#pragma once
#include <type_traits>
#include <vector>

#include "prelude.h"

// The third type of values that files hold; see Bfloat16 and Float16.
struct Float32 {
  static inline float widen(u32 bits) { return bits_as<float>(bits); }
};

// `count` values at `from` (aligned or not) -> the 16-bit type To; whether any is not finite there.
template <class To, class From>
inline bool convert(u16* to, const u8* from, u32 count) {
  using Bits = std::conditional_t<std::is_same_v<From, Float32>, u32, u16>;
  u32 strange = 0;
  for (u32 i = 0; i < count; i++) {
    Bits bits;
    std::memcpy(&bits, from + i * sizeof bits, sizeof bits);
    if constexpr (std::is_same_v<To, From>) to[i] = bits;
    else to[i] = To::narrow(From::widen(bits));
    strange |= !To::finite(to[i]);
  }
  return strange;
}

// A row's values -> its lines, which lie kTileRows lines apart.
template <class To>
inline void write_lines(u16* to, const u16* row, u32 lines) {
  for (u32 l = 0; l < lines; l++, row += kLine, to += kTileRows * kLine)
    for (int i = 0; i < kHalf; i++)
      for (int half = 0; half < 2; half++) to[To::place(half, i)] = row[half * kHalf + i];
}

template <class To, class From, u32 kBytes>
bool pack(const PackJob& j) {
  std::vector<u16> row(j.lines * kLine);  // between its groups of columns and after them it stays zero
  bool strange = false;
  for (u32 r = 0; r < j.rows; r++) {
    const u8* from = j.source + u64(r) * j.columns * kBytes;
    for (u32 c = 0, at = 0; c < j.columns; c += j.column_group, at += j.column_stride)
      strange |= convert<To, From>(row.data() + at, from + u64(c) * kBytes, j.column_group);
    write_lines<To>(reinterpret_cast<u16*>(j.tape + j.row_offset[r]), row.data(), j.lines);
  }
  return strange;
}

template <class To>
bool pack_from(const PackJob& j) {
  if (j.source_type == kFromBfloat16) return pack<To, Bfloat16, 2>(j);
  if (j.source_type == kFromFloat16) return pack<To, Float16, 2>(j);
  return pack<To, Float32, 4>(j);
}

// Puts some rows of a weight into their places; 1 if any value is not finite, 0 if all are.
FF_ENTRY u32 flashformer_pack(const PackJob* job) {
  return job->type == kFromFloat16 ? pack_from<Float16>(*job) : pack_from<Bfloat16>(*job);
}

// The codes of a row, `columns` of them -> their places (formats.h).
inline void write_codes(u8* to, const u8* row, u32 columns, u32 bits) {
  constexpr u32 kPlane = 4, kFragment = 32;  // columns
  for (u32 c = 0; bits == 8 && c < columns; c += kPlane) std::memcpy(to + u64(c) * kTileRows, row + c, kPlane);
  for (u32 c = 0; bits == 4 && c < columns; c += kFragment)
    for (u32 i = 0; i < kPlane; i++) {
      u32 word = 0;
      for (u32 k = 0; k < kFragment / kPlane; k++) word |= u32(row[c + k * kPlane + i]) << (4 * k);
      std::memcpy(to + u64(c) / 2 * kTileRows + i * sizeof word, &word, sizeof word);
    }
}

// Puts codes, scales and divisors of some rows of a weight into their places.
FF_ENTRY void flashformer_pack_codes(const CodeJob* job) {
  const CodeJob& j = *job;
  std::vector<u8> row(j.tape_columns);  // between its groups of columns and after them it stays zero
  for (u32 r = 0; r < j.rows; r++) {
    const u8* from = j.codes + u64(r) * j.columns;
    for (u32 c = 0, at = 0; c < j.columns; c += j.column_group, at += j.column_stride) std::memcpy(row.data() + at, from + c, j.column_group);
    write_codes(j.tape + j.row_offset[r], row.data(), j.tape_columns, j.bits);
    const u8* scale = j.scales + u64(r) * j.scale_count * j.scale_bytes;
    u8* to = j.tape + j.scale_offset[r];
    for (u32 i = 0; i < j.scale_count; i++, scale += j.scale_bytes, to += kTileRows * j.scale_bytes) std::memcpy(to, scale, j.scale_bytes);
    if (j.divisors) std::memcpy(j.tape + j.divisor_offset[r], j.divisors + r, sizeof(float));
  }
}

// A plain read: a checksum of `words` (a multiple of 64) 64-bit words to which each one's value and place contribute.
FF_ENTRY u64 flashformer_read(const u64* from, u64 words) {
  typedef u64 Words __attribute__((vector_size(64)));
  Words sums[8] = {}, sums_of_sums[8] = {};  // Fletcher's checksum in each of 64 lanes
  for (u64 i = 0; i < words; i += 64)
    for (int k = 0; k < 8; k++) {
      prefetch(from + i + k * 8 + kPrefetchBytes / 8);
      Words now;
      std::memcpy(&now, from + i + k * 8, sizeof now);
      sums[k] += now;
      sums_of_sums[k] += sums[k];
    }
  u64 all = 0;
  const auto mix = [&all](u64 value) {  // one to one in `all`, and every bit reaches many
    all = (all ^ value) * 0x9e3779b97f4a7c15u;
    all ^= all >> 29;
  };
  for (int k = 0; k < 8; k++)
    for (int lane = 0; lane < 8; lane++) {
      mix(sums[k][lane]);
      mix(sums_of_sums[k][lane]);
    }
  return all;
}
