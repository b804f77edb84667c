// Attention of many tokens: their keys and values go into the KV cache first, then each sees what is there.
//
// As in attention.cuh keys and values are A operands, and queries the columns of B: tiles of eight tokens of a head. A warp has some of them, of
// heads that share a kv head, and reads a block of the cache once for all. Blocks of the cache come through shared memory, for eight warps. A
// token's softmax runs over the blocks in their order.
#pragma once
#include "attention.cuh"
#include "prefill.cuh"

// Keys and values into the cache, queries as attention reads them.
template <class M>
struct CachePrefill {
  using Piece = HeadPiece<M>;
  using Kv = KvBlock<M>;
  using T = typename Kv::Operand;
  using P = Prefill<M>;

  static FF_DEVICE void run(const PrefillBlock<M, true>&, u32) {}
  static FF_DEVICE void run(const PrefillBlock<M, false>& b, u32 layer) {
    Consumer<M> c{{b.p.model, b.shared, b.warp, b.lane, b.watch}};
    constexpr u32 kVectors = M::kHeads + 2 * M::kKvHeads, kWarps = P::kWarps;  // of a token
    const auto query_norm = Piece::norm_weights(c, layer, M::kQueryNorm), key_norm = Piece::norm_weights(c, layer, M::kKeyNorm);
#pragma unroll 1
    for (u32 item = blockIdx.x * kWarps + b.warp; item < b.p.count * kVectors; item += gridDim.x * kWarps) {
      const u32 token = item / kVectors, number = item % kVectors, position = b.p.model.start + token;
      const float* from = b.p.qkv + (u64)token * M::kQkvWords + number * M::kHeadPad + b.lane;
      typename Piece::Vector v;
#pragma unroll
      for (int r = 0; r < Piece::kPairs; r++) {
        v.low[r] = Piece::has(b.lane, r) ? from[32 * r] : 0;
        v.high[r] = Piece::has(b.lane, r) ? from[32 * r + M::kHeadDim / 2] : 0;
      }
      float2 turn[Piece::kPairs];
      Piece::turns(c, turn, position);
      const u32 kv_head = (number - M::kHeads) % M::kKvHeads;
      const typename Piece::Query whose{layer, kv_head * M::kVirtualSplits, position, 0, nullptr, b.p.model.kv};
      if (number < M::kHeads) {
        Piece::normalise(v, query_norm);
        Piece::rotate(v, turn);
        Kv::mix(v.low, v.high, b.lane, 1.f / M::kKvMixed);
        u16* to = b.p.queries + ((u64)token * M::kHeads + number) * M::kHeadPad + b.lane;
#pragma unroll
        for (int r = 0; r < Piece::kPairs; r++)
          if (Piece::has(b.lane, r)) {
            to[32 * r] = (u16)T::pack(v.low[r], 0);
            to[32 * r + M::kHeadDim / 2] = (u16)T::pack(v.high[r], 0);
          }
        if constexpr (Piece::kPadding > 0)
          if (b.lane < Piece::kPadding) to[M::kHeadDim] = 0;
      } else if (number < M::kHeads + M::kKvHeads) {
        Piece::normalise(v, key_norm);
        const auto scale = Piece::turn_key(c, v, turn);
        Piece::template append<false>(c, v, scale, whose);
      } else {
        Piece::template append<true>(c, v, Kv::scale_of(v.low, v.high), whose);
      }
    }
  }
};

template <class M>
struct AttentionPrefill {
  using Piece = HeadPiece<M>;
  using Kv = KvBlock<M>;
  using T = typename Kv::Operand;
  using P = Prefill<M>;
  static constexpr int kSteps = Piece::kSteps, kWarps = P::kWarps;
  static constexpr int kMost = M::kHeadPad <= 128 ? 4 : 2;  // tiles of queries of a warp: what its registers hold of the results
  static constexpr int kHeads = M::kGroup < kMost ? M::kGroup : kMost, kSplits = ceil_div(M::kGroup, kHeads);
  static constexpr int kTokenTiles = kMost / kHeads, kTiles = kHeads * kTokenTiles;
  static constexpr int kWarpTokens = 8 * kTokenTiles, kTokens = kWarps * kWarpTokens;
  // Shared memory: queries of all warps, then some blocks of the cache at a time.
  static constexpr int kQueryStride = M::kHeadPad * 2 + 16, kQueries = kWarps * kTiles * 8 * kQueryStride;
  static constexpr int kChunk = M::kKvBlockBytes <= 8192 ? 4 : 2, kBuffers = 3, kChunkBytes = kChunk * M::kKvBlockBytes;
  static constexpr int kRing = P::kRing, kCache = round_up(kRing + kQueries, 128);
  static_assert(kCache + kBuffers * kChunkBytes <= M::kSharedBytes);

  static FF_DEVICE void run(const PrefillBlock<M, true>&, u32) {}
  static FF_DEVICE void run(const PrefillBlock<M, false>& b, u32 layer) {
    const u32 groups = ceil_div(b.p.count, (u32)kTokens), heads = M::kKvHeads * kSplits;
#pragma unroll 1
    for (u32 item = blockIdx.x; item < groups * heads; item += gridDim.x)  // the last tokens first: they see the most
      attend(b, layer, item % heads, (groups - 1 - item / heads) * kTokens);
  }

 private:
  static FF_DEVICE u32 head_of(u32 kv_head, u32 split, u32 tile) {
    const u32 in_group = split * kHeads + tile % kHeads;
    return kv_head * M::kGroup + (in_group < M::kGroup ? in_group : M::kGroup - 1);  // NOTE: behind the last one there is it again
  }

  static FF_DEVICE void attend(const PrefillBlock<M, false>& b, u32 layer, u32 head, u32 first_token) {
    asm volatile("" : "+r"(layer), "+r"(head), "+r"(first_token));  // or what follows from them would be kept through all stages
    const u32 kv_head = head / kSplits, split = head % kSplits, start = b.p.model.start;
    const u32 g = b.lane >> 2, t = b.lane & 3, token = first_token + b.warp * kWarpTokens;  // the warp's first
    const u32 behind = b.p.count - first_token < kTokens ? b.p.count : first_token + kTokens;
    const u32 blocks = (start + behind - 1) / 16 + 1, chunks = ceil_div(blocks, (u32)kChunk);
    const u32 seen = token + kWarpTokens < behind ? start + token + kWarpTokens : start + behind;  // positions that the warp's last token sees
    const u8* cache = b.p.model.kv + ((u64)layer * M::kKvHeads + kv_head) * b.p.model.kv_blocks * M::kKvBlockBytes;
    const auto load = [&](u32 chunk) {
      if (chunk < chunks) {
        const u32 nbytes = (chunk + 1 == chunks ? blocks - chunk * kChunk : kChunk) * M::kKvBlockBytes;
        const u32 to = b.shared + kCache + chunk % kBuffers * kChunkBytes;
        for (u32 at = b.thread * 16; at < nbytes; at += kWarps * 512) async_copy16(to + at, cache + (u64)chunk * kChunkBytes + at);
      }
      async_commit();
    };
    b.sync();  // what the item before left in shared memory has been read
    const u32 queries = b.shared + kRing + b.warp * kTiles * 8 * kQueryStride;
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll 1
      for (u32 row = 0; row < 8; row++) {
        const u32 at = token + n / kHeads * 8 + row, of = at < b.p.count ? at : b.p.count - 1;
        const uint4* from = (const uint4*)(b.p.queries + ((u64)of * M::kHeads + head_of(kv_head, split, n)) * M::kHeadPad);
        for (u32 i = b.lane; i < M::kHeadPad / 8; i += 32) async_copy16(queries + (n * 8 + row) * kQueryStride + i * 16, from + i);
      }
#pragma unroll
    for (int i = 0; i < kBuffers - 1; i++) load(i);  // the queries are of the first group
    float out[kTiles][kSteps][4], top[kTiles][2], sum[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      top[n][0] = top[n][1] = Piece::kNever;
      sum[n][0] = sum[n][1] = 0;
#pragma unroll
      for (int j = 0; j < kSteps; j++) out[n][j][0] = out[n][j][1] = out[n][j][2] = out[n][j][3] = 0;
    }
#pragma unroll 1
    for (u32 chunk = 0; chunk < chunks; chunk++) {
      async_wait_groups<kBuffers - 2>();
      b.sync();  // it has landed for all, and all are through with the one before it
      load(chunk + kBuffers - 1);
#pragma unroll 1
      for (u32 i = 0; i < kChunk; i++) {
        const u32 block = chunk * kChunk + i;
        if (block * 16 >= seen) break;
        add_block(b, b.shared + kCache + chunk % kBuffers * kChunkBytes + i * M::kKvBlockBytes, block * 16, start + token, queries, out, top, sum);
      }
    }
    async_wait_groups<0>();
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      float inverse[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float all = sum[n][i];
#pragma unroll
        for (int o = 16; o >= 4; o >>= 1) all += __shfl_xor_sync(kAllLanes, all, o);
        inverse[i] = 1 / all;
      }
      const u32 at = token + n / kHeads * 8 + g, column = head_of(kv_head, split, n) * M::kHeadPad + 2 * t;
      const bool mine = at < b.p.count && split * kHeads + n % kHeads < M::kGroup;
#pragma unroll
      for (int j = 0; j < kSteps; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          using V = typename M::Value;
          const u32 dims = transpose8x8(V::pack(out[n][j][2 * half] * inverse[0], out[n][j][2 * half + 1] * inverse[1]));
          if (mine) b.p.attended[b.pair(column + j * 16 + half * 8, at, M::kAttendedOctets)] = dims;
        }
    }
  }

  // A block of the cache, whose first position is `position`, for tokens from position `own` on. See HeadPiece::attend.
  static FF_DEVICE void add_block(
      const PrefillBlock<M, false>& b, u32 at, u32 position, u32 own, u32 queries, float (&out)[kTiles][kSteps][4], float (&top)[kTiles][2],
      float (&sum)[kTiles][2]) {
    const u32 g = b.lane >> 2, t = b.lane & 3, query = queries + g * kQueryStride + t * 8;
    const typename Kv::Reader block(at, b.lane);
    float s[kTiles][4] = {};
#pragma unroll
    for (int j = 0; j < kSteps; j += Kv::kSteps) {
      uint4 keys[Kv::kSteps];
      block.keys(keys, j);
#pragma unroll
      for (int k = j; k < j + Kv::kSteps && k < kSteps; k++)
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
          const uint2 x = load_shared2(query + n * 8 * kQueryStride + k * 32);
          mma<T>(s[n], keys[k - j], x.x, x.y);
        }
    }
    const float2 scale = block.score_scale(), raise = block.value_scale();
    u32 weights[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {  // this lane's queries 2 t and 2 t + 1
        const u32 of = own + n / kHeads * 8 + 2 * t + i;
        const bool low = position + g <= of, high = position + g + 8 <= of;
        Piece::weigh(s[n], i, low, high, scale, raise, top[n], sum[n], out[n]);
      }
      weights[n][0] = transpose8x8(T::pack(s[n][0], s[n][1]));
      weights[n][1] = transpose8x8(T::pack(s[n][2], s[n][3]));
    }
    // NOTE: weights are zero where there is no position yet, but what an earlier text left there may be a NaN.
    const u32 behind = b.p.model.start + b.p.count, first = position + 2 * t;
    const u32 mask0 = Piece::value_mask(first, behind), mask1 = Piece::value_mask(first + 8, behind);
#pragma unroll
    for (int j = 0; j < kSteps; j += Kv::kSteps) {
      uint4 values[Kv::kSteps];
      block.values(values, j, mask0, mask1);
#pragma unroll
      for (int k = j; k < j + Kv::kSteps && k < kSteps; k++)
#pragma unroll
        for (int n = 0; n < kTiles; n++) mma<T>(out[n][k], values[k - j], weights[n][0], weights[n][1]);
    }
  }
};
