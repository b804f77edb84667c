// The kernels that pack codes, and the product of a stage's tiles with x, on one emulated warp after the other.
#include "code_tools.cuh"

template <class Kernel>
void each_thread(u64 threads, Kernel kernel) {
  blockDim.x = 256;
  for (u64 t = 0; t < threads; t++) blockIdx.x = u32(t / 256), threadIdx.x = t % 256, kernel();
}
extern "C" void pack_codes(const CodeJob* job, u64 threads) { each_thread(threads, [&] { flashformer_pack_codes(*job); }); }
extern "C" void pack_scales(const CodeJob* job, u64 threads) { each_thread(threads, [&] { flashformer_pack_scales(*job); }); }
extern "C" void expand(const ExpandJob* job, u64 threads) { each_thread(threads, [&] { flashformer_expand(*job); }); }
extern "C" void random_codes(u8* to, u64 values, u64 first, u32 seed, u32 kind, u32 instead, u32 of, u64 threads) {
  each_thread(threads, [&] { flashformer_random_codes(to, values, first, seed, kind, instead, of); });
}
extern "C" void random_scales(u8* to, u64 values, u64 first, u32 seed, u32 type, float base, u32 byte, u32 range, u64 threads) {
  each_thread(threads, [&] { flashformer_random_scales(to, values, first, seed, type, base, byte, range); });
}

struct Model {
  using Value = Bfloat16;
};
template <class S, bool kInteger = S::Format::Code::kInteger>
struct ProductOf {
  using Type = CodedProduct<Model, S>;
};
template <class S>
struct ProductOf<S, true> {
  using Type = IntegerProduct<Model, S>;
};

// One lane of one warp: as CodedLinear does it (linear_codes.cuh).
template <class S>
struct Consumer {
  using Product = typename ProductOf<S>::Type;
  const u64* chunks;  // offsets
  u32 tiles, warp;
  typename Product::X operand;

  void prepare(const u16* x) {
    struct {
      u32 value[S::kFragments][2];
    } from;
    for (int i = 0; i < S::kFragments; i++)
      std::memcpy(from.value[i], x + (warp % S::kWarpsColumns * S::kFragments + i) * 128 + lane * 4, sizeof from.value[i]);
    operand.prepare(from, lane);
  }

  template <int part, int first>
  void add_parts(Product& product, u32 group) const {
    if constexpr (part < S::kParts) {
      constexpr int kSize = S::kFragments / S::kParts + (part < S::kFragments % S::kParts ? 1 : 0);
      constexpr u32 kChunkTiles = S::kStack * S::kWarpsRows;
      const u32 chunk = group / S::kStack, left = tiles - chunk * kChunkTiles;
      Loaded<S, kSize, part + 1 == S::kParts> now;
      now.load(u32(chunks[chunk * S::kParts + part]), left < kChunkTiles ? left : kChunkTiles, group % S::kStack * 8 + warp, lane, 0);
      product.template add<first>(now, operand, lane);
      add_parts<part + 1, first + kSize>(product, group);
    }
  }
};

// sums [tiles][8 rows][kWarpsColumns][4 lanes] of a worker whose chunks are at these offsets of `tape`.
template <class S>
void multiply_tiles(const u8* tape, const u64* chunks, u32 tiles, const u16* x, float* sums) {
  shared = tape;
  for (u32 warp = 0; warp < 8; warp++)
    run_warp([=] {
      Consumer<S> consumer{chunks, tiles, warp};
      consumer.prepare(x);
      for (u32 group = 0; group * S::kWarpsRows < tiles; group++) {
        typename Consumer<S>::Product product;
        consumer.template add_parts<0, 0>(product, group);
        const float result = product.result(lane, consumer.operand);
        const u32 row = (group * S::kWarpsRows + warp / S::kWarpsColumns) * 8 + (lane >> 2);
        if (row < tiles * 8) sums[(row * S::kWarpsColumns + warp % S::kWarpsColumns) * 4 + (lane & 3)] = result;
      }
    });
}

#include "stages.h"
