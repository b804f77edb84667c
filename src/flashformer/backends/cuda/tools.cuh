// Kernels around the model's own: packing weights into the tapes, random weights for benchmarks, and the plain read that
// tells what this device's memory can do.
#pragma once
#include "prelude.cuh"

enum SourceType { kFromBfloat16 = 0, kFromFloat16 = 1, kFromFloat32 = 2 };

FF_DEVICE float load_source(const void* source, u64 index, u32 type) {
  if (type == kFromFloat32) return ((const float*)source)[index];
  const u16 v = ((const u16*)source)[index];
  return type == kFromFloat16 ? Float16::unpack(v) : Bfloat16::unpack(v);
}

FF_DEVICE bool finite(float x) { return fabsf(x) <= 3.4e38f; }

// Two source values as the kernel wants them. 16-bit values of the right kind pass through untouched.
template <class T>
FF_DEVICE u32 convert_pair(const void* source, u64 index, u32 columns, u32 type, u32* strange) {
  const float a = load_source(source, index, type), b = columns > 1 ? load_source(source, index + 1, type) : 0;
  if (!finite(a) || !finite(b)) atomicOr(strange, 1u);
  return T::pack(a, b);
}

// One weight's place on the tapes: see tape.py and linear.cuh. Filled by pack.py.
struct Placement {
  u8* tape;
  const u64* tile_offset;               // [tiles][parts] bytes: a tile's fragments in each of its chunks
  u32 first_row, rows, columns;         // of the weight: those that are packed now, and how long they are
  u32 row_base, row_group, row_stride;  // row r of the weight is row base + r / group * stride + r % group of the stage
  u32 column_group, column_stride;      // the same for columns
  int half;                             // of an interleaved stage: 0 gate, 1 up; -1: not interleaved
  u32 warps_columns, fragments, parts, short_warps;
};

struct TileRow {
  u32 tile, row;
};
FF_DEVICE TileRow place_row(const Placement& p, u32 row) {
  if (p.half >= 0) return {row / 4, row % 4 + 4 * p.half};
  const u32 at = p.row_base + row / p.row_group * p.row_stride + row % p.row_group;
  return {at / 8, at % 8};
}

// The part that a fragment of a tile is in, and its place among those of the tile there.
struct InPart {
  u32 part, place;
};
FF_DEVICE InPart place_fragment(const Placement& p, u32 fragment) {
  const u32 end = (p.warps_columns - p.short_warps) * p.fragments;  // of the warps that are not short
  const u32 before = fragment < end ? 0 : (fragment - end) / (p.fragments - 1);  // warps in front of this one that are
  const u32 warp = (fragment + before) / p.fragments, f = (fragment + before) % p.fragments;
  const u32 small = p.fragments / p.parts, large = p.fragments % p.parts, many = large * (small + 1);  // `large` parts have one fragment more
  if (f < many) return {f / (small + 1), warp * (small + 1) + f % (small + 1)};
  const u32 part = large + (f - many) / small;
  return {part, warp * small + (f - many) % small - (part + 1 == p.parts ? before : 0)};
}

// The column of the weight that column `at` of the stage is, or `columns` where there is none.
FF_DEVICE u32 source_column(const Placement& p, u32 at) {
  const u32 in_group = at % p.column_stride, from = at / p.column_stride * p.column_group + in_group;
  return in_group < p.column_group && from < p.columns ? from : p.columns;
}

struct PackJob {
  const void* source;  // [rows][columns]
  u32* strange;        // set where a value is not finite
  Placement place;
  u32 type, half_type;
};

// Thread: one lane's 16 bytes of a fragment, which belong to one row of the weight.
template <class T>
FF_DEVICE void pack(const PackJob& j) {
  const Placement& p = j.place;
  const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  const u32 lane = thread & 31, total = p.warps_columns * p.fragments - p.short_warps;
  const u32 fragment = (u32)(thread / 32 % total), local = (u32)(thread / 32 / total) * 8 + lane / 4;
  if (local >= p.rows) return;
  const TileRow to = place_row(p, p.first_row + local);
  const InPart in = place_fragment(p, fragment);
  u32 v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 at = fragment * 32 + (lane & 3) * 4 + (i & 1) * 16 + (i >> 1) * 2;  // column of the stage
    const u32 from = source_column(p, at), count = from == p.columns ? 0 : source_column(p, at + 1) == from + 1 && from + 1 < p.columns ? 2 : 1;
    v[i] = count ? convert_pair<T>(j.source, (u64)local * p.columns + from, count, j.type, j.strange) : 0;
  }
  u8* out = p.tape + p.tile_offset[to.tile * p.parts + in.part] + (u64)in.place * 512 + (to.row * 4 + (lane & 3)) * 16;
  *(uint4*)out = make_uint4(v[0], v[1], v[2], v[3]);
}

extern "C" __global__ void flashformer_pack(const __grid_constant__ PackJob job) {
  if (job.half_type) pack<Float16>(job);
  else pack<Bfloat16>(job);
}

// Source values -> 16-bit values of the kernel, two a thread.
extern "C" __global__ void flashformer_convert(const void* source, u32* to, u64 values, u32 type, u32 half_type, u32* strange) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (2 * i >= values) return;
  const u32 count = values - 2 * i > 1 ? 2 : 1;
  to[i] = half_type ? convert_pair<Float16>(source, 2 * i, count, type, strange)
                    : convert_pair<Bfloat16>(source, 2 * i, count, type, strange);
}

// Number n of a stream of random bits: a counter through an integer hash, so any part can be made alone.
FF_DEVICE u32 random_bits(u64 n, u32 seed) {
  u32 h = (u32)n * 0x9E3779B1u ^ (u32)(n >> 32) * 0x85EBCA77u ^ seed;
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}

// Random bf16 values, uniform in [-scale, scale).
extern "C" __global__ void flashformer_random(u32* to, u64 pairs, u64 first, u32 seed, float scale) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= pairs) return;
  auto draw = [&](u64 n) { return ((int)(random_bits(n, seed) >> 8) - (1 << 23)) * (scale / (1 << 23)); };
  to[i] = Bfloat16::pack(draw(2 * (first + i)), draw(2 * (first + i) + 1));
}

// A plain read of `bytes` by vector loads: every block takes every gridDim.x-th piece of 32 KB.
extern "C" __global__ void __launch_bounds__(512) flashformer_read(const uint4* from, u64 bytes, u32* sink) {
  constexpr u32 kPiece = 2048;  // uint4
  u32 all = 0;
  for (u64 piece = blockIdx.x; (piece + 1) * kPiece * 16 <= bytes; piece += gridDim.x) {
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint4* p = from + piece * kPiece + i * 512 + threadIdx.x;
      asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v[i].x), "=r"(v[i].y), "=r"(v[i].z), "=r"(v[i].w) : "l"(p));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) all ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  if (all == 0x12345678u) *sink = all;
}

// The same by the copy engine, a ring of 8 x 16 KB a block, as the model's kernel reads.
extern "C" __global__ void __launch_bounds__(160) flashformer_read_bulk(const u8* from, u64 bytes, u32* sink) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) u8 memory[];
  __shared__ u64 barriers[16];
  constexpr u32 kChunk = 16384, kSlots = 8;
  const u32 ring = shared_address(memory), full = shared_address(barriers), empty = full + kSlots * 8, t = threadIdx.x;
  const u64 count = bytes / kChunk / gridDim.x;
  if (t == 0) {
    for (u32 s = 0; s < kSlots; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, 4);
    }
    fence_copy_engine();
  }
  __syncthreads();
  if (t == 128) {
    for (u64 i = 0; i < count; i++) {
      const u32 s = i % kSlots;
      while (!barrier_try(empty + s * 8, (i / kSlots & 1) ^ 1)) {
      }
      bulk_copy(ring + s * kChunk, from + (i * gridDim.x + blockIdx.x) * kChunk, kChunk, full + s * 8);
    }
  } else if (t < 128) {
    u32 all = 0;
    for (u64 i = 0; i < count; i++) {
      const u32 s = i % kSlots;
      while (!barrier_try(full + s * 8, i / kSlots & 1)) {
      }
      all ^= load_shared(ring + s * kChunk + t * 4);
      __syncwarp();
      if ((t & 31) == 0) barrier_arrive(empty + s * 8);
    }
    if (all == 0x12345678u) *sink = all;
  }
#endif
}
