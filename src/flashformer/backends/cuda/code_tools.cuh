// Codes and their scales -> tapes: what codes.cuh reads.
#pragma once
#include "integers.cuh"
#include "tools.cuh"

enum CodeLayout { kInteger4 = 0, kInteger8 = 1, kFloat8 = 2, kTable = 3, kHalfByte = 4, kByte = 5, kByteTable = 6 };  // on the tape

// See pack.py for who fills it.
struct CodeJob {
  const u8* codes;          // [rows][columns]
  const u8* scales;         // [rows][groups][scale_values] of scale_bytes each
  const u64* scale_offset;  // [tiles][parts] bytes: a tile's scales in each of its chunks
  Placement place;
  u32 layout;
  u32 group, groups;  // columns of a group (0: one for all), and how many a row has
  u32 scale_values, scale_bytes;
};

// Thread: one lane's 16 bytes of codes of a slice (of 8 bits: of half a slice).
template <class Code>
FF_DEVICE void pack_codes(const CodeJob& j) {
  constexpr u32 kLoads = Code::kBits / 4, kCodes = 32 / Code::kBits;  // of 16 bytes, a slice; in a register
  const Placement& p = j.place;
  const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  const u32 lane = thread & 31, total = p.warps_columns * p.fragments * kLoads;
  const u32 load = (u32)(thread / 32 % total), local = (u32)(thread / 32 / total) * 8 + lane / 4;
  if (local >= p.rows) return;
  const TileRow to = place_row(p, p.first_row + local);
  const u32 fragment = load / kLoads;
  const InPart in = place_fragment(p, fragment);
  u32 word[4];
#pragma unroll
  for (u32 r = 0; r < 4; r++) {
    u8 codes[kCodes];
#pragma unroll
    for (u32 i = 0; i < kCodes; i++) {
      const u32 from = source_column(p, fragment * 128 + Code::column(load % kLoads, r, i) + (lane & 3) * 4);
      codes[i] = from < p.columns ? j.codes[(u64)local * p.columns + from] : 0;
    }
    word[r] = Code::place(codes);
  }
  u8* out = p.tape + p.tile_offset[to.tile * p.parts + in.part] + (u64)(in.place * kLoads + load % kLoads) * 512;
  *(uint4*)(out + (to.row * 4 + (lane & 3)) * 16) = make_uint4(word[0], word[1], word[2], word[3]);
}

struct NoValues {
  static constexpr u32 kHigh[2] = {}, kLower[1][2] = {}, kUpper[1][2] = {};
  static constexpr float kFactor = 1;
  static constexpr int kBase = 1;
};

extern "C" __global__ void flashformer_pack_codes(const __grid_constant__ CodeJob job) {
  if (job.layout == kInteger4) pack_codes<Integer4>(job);
  else if (job.layout == kInteger8) pack_codes<Integer8>(job);
  else if (job.layout == kFloat8) pack_codes<Float8>(job);
  else if (job.layout == kHalfByte) pack_codes<HalfByte>(job);
  else if (job.layout == kByte) pack_codes<Byte>(job);
  else if (job.layout == kByteTable) pack_codes<ByteTable<NoValues>>(job);
  else pack_codes<SignedTable<NoValues>>(job);
}

// Thread: one scale, or offset.
extern "C" __global__ void flashformer_pack_scales(const __grid_constant__ CodeJob j) {
  const Placement& p = j.place;
  const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  const u32 value = (u32)(thread % j.scale_values), group = (u32)(thread / j.scale_values % j.groups), local = (u32)(thread / j.scale_values / j.groups);
  if (local >= p.rows) return;
  const TileRow to = place_row(p, p.first_row + local);
  u32 part = p.parts - 1, before = 0;  // groups in front of this one in the tile's scales of that part
  if (j.group) {
    const u32 fragment = group * j.group / 128;
    const InPart in = place_fragment(p, fragment);
    part = in.part;
    before = (in.place * 128 + group * j.group % 128) / j.group;
  }
  u8* out = p.tape + j.scale_offset[to.tile * p.parts + part] + ((before * j.scale_values + value) * 8 + to.row) * j.scale_bytes;
  const u8* from = j.scales + thread * j.scale_bytes;
  if (j.scale_bytes == 1) *out = *from;
  else if (j.scale_bytes == 2) *(u16*)out = *(const u16*)from;
  else *(u32*)out = *(const u32*)from;
}

// ---- the embedding table of a model whose head has codes is made of the same codes ----

enum CodeKind { kIntegers4 = 0, kIntegers8 = 1, kFloats8 = 2, kTables = 3 };  // what codes stand for
enum ScaleType { kBfloat16Scale = 0, kFloat16Scale = 1, kFloat32Scale = 2, kExponentScale = 3, kE4m3Scale = 4 };

struct ExpandJob {
  const u8* codes;   // [rows][columns]
  const u8* scales;  // [rows][groups][scale_values]
  const float* divisors;  // [rows] of scales that are e4m3
  u16* to;           // [rows][columns]
  u64 values;
  u32 columns, kind, scale_type, half_type, group, groups, scale_values;
  u32 minimum;      // whether the second of two scale values is a minimum; else it is a zero point
  float table[16];
};

FF_DEVICE float code_value(const ExpandJob& j, u8 code) {
  if (j.kind == kIntegers4) return (float)code - (j.scale_values == 1 ? 8 : 0);
  if (j.kind == kIntegers8) return (signed char)code;
  if (j.kind == kTables) return j.table[code & 15];
  return E4m3Scale::value(code);
}
FF_DEVICE float scale_value(const ExpandJob& j, u64 index) {
  if (j.scale_type == kExponentScale) return ExponentScale::value(j.scales[index]);
  if (j.scale_type == kE4m3Scale) return E4m3Scale::value(j.scales[index]);
  if (j.scale_type == kFloat32Scale) return ((const float*)j.scales)[index];
  const u16 v = ((const u16*)j.scales)[index];
  return j.scale_type == kFloat16Scale ? Float16::unpack(v) : Bfloat16::unpack(v);
}

// Thread: one value. NOTE: each operation is rounded for itself, as quant/forms.py does it.
extern "C" __global__ void flashformer_expand(const __grid_constant__ ExpandJob j) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= j.values) return;
  const u64 at = (i / j.columns * j.groups + (j.group ? i % j.columns / j.group : 0)) * j.scale_values;
  float value = code_value(j, j.codes[i]);
  const float scale = j.scale_type == kE4m3Scale ? __fdiv_rn(scale_value(j, at), j.divisors[i / j.columns]) : scale_value(j, at);
  const float offset = j.scale_values == 2 ? scale_value(j, at + 1) : 0;
  if (j.minimum) value = __fadd_rn(__fmul_rn(value, scale), offset);
  else value = __fmul_rn(__fsub_rn(value, offset), scale);
  j.to[i] = (u16)(j.half_type ? Float16::pack(value, 0) : Bfloat16::pack(value, 0));
}

// ---- random codes and scales, for benchmarks: random_weights.py makes the same ----

extern "C" __global__ void flashformer_random_codes(u8* to, u64 values, u64 first, u32 seed, u32 kind, u32 instead, u32 of) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= values) return;
  const u32 h = random_bits(first + i, seed);
  u32 code = kind == kIntegers4 || kind == kTables ? h >> 28 : h >> 24;
  if (kind == kFloats8 && (code & 0x7f) == 0x7f) code ^= 1;  // that one is no number
  to[i] = (u8)(code == of ? instead : code);
}

extern "C" __global__ void flashformer_random_scales(u8* to, u64 values, u64 first, u32 seed, u32 scale_type, float base, u32 byte, u32 range) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= values) return;
  const u32 drawn = random_bits(first + i, seed);
  const float scale = base * (1.f + (drawn & 255) * 0.001953125f);
  if (scale_type >= kExponentScale) to[i] = (u8)(byte + drawn % range);
  else if (scale_type == kFloat32Scale) ((float*)to)[i] = scale;
  else ((u16*)to)[i] = (u16)(scale_type == kFloat16Scale ? Float16::pack(scale, 0) : Bfloat16::pack(scale, 0));
}
