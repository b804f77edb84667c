// Attention of many tokens: their keys and values go into the KV cache first, then each sees what is there.
//
// Queries are the rows of A: tiles of eight tokens of a head, of which a warp has some, of heads that share a kv head. Fragments of the cache,
// which attention.cuh multiplies as A operands, are two B operands each. Blocks of the cache come through shared memory, for eight warps, and a
// token's softmax runs over them in their order, two at a time. What its weights are relative to is the largest score so far; results are brought
// to a new one only where a token of the warp has one, which is rare, and those of other tokens are multiplied by 1 then: no bit depends on it.
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
  static FF_DEVICE void run(PrefillBlock<M, false>& b, u32 layer) {
    b.enter();
    Consumer<M> c{{b.p.model, b.shared, b.warp, b.lane, b.watch()}};
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
  static constexpr int kHeads = M::kGroup < 3 ? M::kGroup : kMost, kSplits = ceil_div(M::kGroup, kHeads);  // NOTE: a divisor of kMost
  static constexpr int kTokenTiles = kMost / kHeads, kRows = kMost / 2;  // pairs of tiles are the 16 rows of A
  static constexpr int kWarpTokens = 8 * kTokenTiles, kTokens = kWarps * kWarpTokens;
  // Of the cache at a time; their tiles of eight positions. NOTE: with the scales of two, it would spill.
  static constexpr int kBlocks = Kv::kScaled ? 1 : 2, kPositions = 16 * kBlocks, kColumns = 2 * kBlocks;
  // Shared memory: queries of all warps, then some blocks of the cache at a time.
  static constexpr int kQueryStride = M::kHeadPad * 2 + 16, kQueries = kWarps * kMost * 8 * kQueryStride;
  static constexpr int kChunk = M::kKvBlockBytes <= 8192 ? 4 : 2, kBuffers = 3, kChunkBytes = kChunk * M::kKvBlockBytes;
  static constexpr int kRing = P::kRing, kCache = round_up(kRing + kQueries, 128);
  static_assert(kCache + kBuffers * kChunkBytes <= M::kSharedBytes && kChunk % kBlocks == 0);

  static FF_DEVICE void run(const PrefillBlock<M, true>&, u32) {}
  static FF_DEVICE void run(PrefillBlock<M, false>& b, u32 layer) {
    b.enter();
#pragma unroll 1
    for (u32 item = blockIdx.x; Item(b, item).exists; item += gridDim.x) attend(b, layer, item);
  }

 private:
  // What a block does at a time: some tokens of heads that share a kv head.
  struct Item {
    bool exists;
    u32 kv_head, split, token;  // and the warp's first token
    u32 own, seen;              // its position, and what the warp's last one sees
    u32 blocks, chunks;         // of the cache that all of them see

    // NOTE: computed where it is needed: kept, it would spill.
    FF_DEVICE Item(const PrefillBlock<M, false>& b, u32 item) {
      u32 count = b.p.count, start = b.p.model.start;
      asm volatile("" : "+r"(count), "+r"(start), "+r"(item));
      constexpr u32 kAll = M::kKvHeads * kSplits;
      const u32 groups = ceil_div(count, (u32)kTokens);
      exists = item < groups * kAll;
      kv_head = item % kAll / kSplits;
      split = item % kAll % kSplits;
      const u32 first = (groups - 1 - item / kAll) * kTokens;  // the last tokens come first: they see the most
      const u32 behind = count - first < kTokens ? count : first + kTokens;
      token = first + b.warp * kWarpTokens;
      own = start + token;
      seen = start + (token + kWarpTokens < behind ? token + kWarpTokens : behind);
      blocks = (start + behind - 1) / 16 + 1;
      chunks = ceil_div(blocks, (u32)kChunk);
    }
    FF_DEVICE u32 head(u32 tile) const {
      const u32 in_group = split * kHeads + tile % kHeads;
      return kv_head * M::kGroup + (in_group < M::kGroup ? in_group : M::kGroup - 1);  // NOTE: behind the last one there is it again
    }
  };
  // What a lane (g, t) has of a softmax: of rows g and g + 8 of A, and dims 2 t and 2 t + 1 of each eight.
  struct State {
    float out[kRows][2 * kSteps][4], top[kRows][2], sum[kRows][2];
  };

  static FF_DEVICE u32 queries_at(const PrefillBlock<M, false>& b) { return b.shared + kRing + b.warp * kMost * 8 * kQueryStride; }

  static FF_DEVICE void load_queries(const PrefillBlock<M, false>& b, const Item& of) {
    const u32 queries = queries_at(b);
#pragma unroll
    for (int n = 0; n < kMost; n++)
#pragma unroll 1
      for (u32 row = 0; row < 8; row++) {
        const u32 at = of.token + n / kHeads * 8 + row, token = at < b.p.count ? at : b.p.count - 1;
        const uint4* from = (const uint4*)(b.p.queries + ((u64)token * M::kHeads + of.head(n)) * M::kHeadPad);
        for (u32 i = b.lane; i < M::kHeadPad / 8; i += 32) async_copy16(queries + (n * 8 + row) * kQueryStride + i * 16, from + i);
      }
  }
  static FF_DEVICE void load_chunk(const PrefillBlock<M, false>& b, u32 layer, const Item& of, u32 chunk) {
    if (chunk < of.chunks) {
      const u8* cache = b.p.model.kv + ((u64)layer * M::kKvHeads + of.kv_head) * b.p.model.kv_blocks * M::kKvBlockBytes;
      const u32 nbytes = (chunk + 1 == of.chunks ? of.blocks - chunk * kChunk : kChunk) * M::kKvBlockBytes;
      const u32 to = b.shared + kCache + chunk % kBuffers * kChunkBytes;
      for (u32 at = b.thread() * 16; at < nbytes; at += kWarps * 512) async_copy16(to + at, cache + (u64)chunk * kChunkBytes + at);
    }
    async_commit();
  }

  static FF_DEVICE void attend(const PrefillBlock<M, false>& b, u32 layer, u32 item) {
    b.sync();  // what the item before left in shared memory has been read
    load_queries(b, Item(b, item));
#pragma unroll
    for (int i = 0; i < kBuffers - 1; i++) load_chunk(b, layer, Item(b, item), i);  // the queries are of the first group
    State state = {};
#pragma unroll
    for (int m = 0; m < kRows; m++) state.top[m][0] = state.top[m][1] = Piece::kNever;
#pragma unroll 1
    for (u32 block = 0; block < Item(b, item).blocks; block += kBlocks) {
      if (block % kChunk == 0) {
        async_wait_groups<kBuffers - 2>();
        b.sync();  // the chunk has landed for all, and all are through with the one before it
        load_chunk(b, layer, Item(b, item), block / kChunk + kBuffers - 1);
      }
      const Item of(b, item);
      const u32 position = block * 16, at = b.shared + kCache + block % (kBuffers * kChunk) * M::kKvBlockBytes;
      if (position + kPositions <= of.own + 1) add<true>(b, at, position, of.own, state);
      else if (position < of.seen) add<false>(b, at, position, of.own, state);
    }
    async_wait_groups<0>();
    const Item of(b, item);
    const u32 g = b.lane >> 2, t = b.lane & 3;
#pragma unroll
    for (int m = 0; m < kRows; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 n = 2 * m + h;
        const float inverse = 1 / over_row(state.sum[m][h], [](float x, float y) { return x + y; });
        const u32 at = of.token + n / kHeads * 8 + g, column = of.head(n) * M::kHeadPad + 2 * t;
        if (at >= b.p.count || of.split * kHeads + n % kHeads >= M::kGroup) continue;
#pragma unroll
        for (int j = 0; j < 2 * kSteps; j++) {
          const float* out = state.out[m][j] + 2 * h;
          b.p.attended[b.pair(column + j * 8, at, M::kAttendedOctets)] = M::Value::pack(out[0] * inverse, out[1] * inverse);
        }
      }
  }
  // Of what the four lanes of a row have.
  template <class Join>
  static FF_DEVICE float over_row(float x, Join join) {
    x = join(x, __shfl_xor_sync(kAllLanes, x, 1));
    return join(x, __shfl_xor_sync(kAllLanes, x, 2));
  }

  // Blocks of the cache, whose first position is `position`, for tokens from position `own` on. kSeen: all of them see all of these.
  template <bool kSeen>
  static FF_DEVICE void add(const PrefillBlock<M, false>& b, u32 at, u32 position, u32 own, State& state) {
    using Reader = typename Kv::Reader;
    const u32 g = b.lane >> 2, t = b.lane & 3, query = queries_at(b) + g * kQueryStride + t * 8;
    float s[kRows][kColumns][4] = {};
#pragma unroll
    for (int j = 0; j < kSteps; j += Kv::kSteps) {
      uint4 keys[kBlocks][Kv::kSteps];
#pragma unroll
      for (int i = 0; i < kBlocks; i++) Reader(at + i * M::kKvBlockBytes, b.lane).keys(keys[i], j);
#pragma unroll
      for (int k = j; k < j + Kv::kSteps && k < kSteps; k++)
#pragma unroll
        for (int m = 0; m < kRows; m++) {
          const u32 from = query + m * 16 * kQueryStride + k * 32;
          const uint2 low = load_shared2(from), high = load_shared2(from + 8 * kQueryStride);
#pragma unroll
          for (int i = 0; i < kBlocks; i++) multiply(s[m] + 2 * i, make_uint4(low.x, high.x, low.y, high.y), keys[i][k - j]);
        }
    }
    weigh<kSeen>(s, at, position, own, b.lane, state);
    const u32 behind = b.p.model.start + b.p.count;
#pragma unroll
    for (int i = 0; i < kBlocks; i++) {
      const Reader block(at + i * M::kKvBlockBytes, b.lane);
      uint4 weights[kRows];
#pragma unroll
      for (int m = 0; m < kRows; m++) {
        const float(&low)[4] = s[m][2 * i], (&high)[4] = s[m][2 * i + 1];
        weights[m] = make_uint4(T::pack(low[0], low[1]), T::pack(low[2], low[3]), T::pack(high[0], high[1]), T::pack(high[2], high[3]));
      }
      // NOTE: weights are zero where there is no position yet, but what an earlier text left there may be a NaN.
      const u32 first = position + i * 16 + 2 * t;
      const u32 mask0 = kSeen ? ~0u : Piece::value_mask(first, behind), mask1 = kSeen ? ~0u : Piece::value_mask(first + 8, behind);
#pragma unroll
      for (int j = 0; j < kSteps; j += Kv::kSteps) {
        uint4 values[Kv::kSteps];
        block.values(values, j, mask0, mask1);
#pragma unroll
        for (int k = j; k < j + Kv::kSteps && k < kSteps; k++)
#pragma unroll
          for (int m = 0; m < kRows; m++) multiply(state.out[m] + 2 * k, weights[m], values[k - j]);
      }
    }
  }
  // Two tiles of columns, which a fragment of the cache is.
  static FF_DEVICE void multiply(float (*sums)[4], const uint4& rows, const uint4& columns) {
    mma<T>(sums[0], rows, columns.x, columns.z);
    mma<T>(sums[1], rows, columns.y, columns.w);
  }

  // Scores become weights, and what was summed before them is brought to the same reference.
  template <bool kSeen>
  static FF_DEVICE void weigh(float (&s)[kRows][kColumns][4], u32 at, u32 position, u32 own, u32 lane, State& state) {
    const u32 g = lane >> 2, t = lane & 3;
    // Of positions 2 t and 2 t + 1 of each eight. NOTE: where all have one scale, scores are multiplied by it when they become weights.
    float scale[kColumns][2], raise[kColumns][2];
#pragma unroll
    for (int i = 0; i < kBlocks; i++) {
      const typename Kv::Reader block(at + i * M::kKvBlockBytes, lane);
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float2 of_scores = block.score_scale(2 * t + k), of_values = block.value_scale(2 * t + k);
        scale[2 * i][k] = of_scores.x, scale[2 * i + 1][k] = of_scores.y;
        raise[2 * i][k] = of_values.x, raise[2 * i + 1][k] = of_values.y;
      }
    }
    float shrink[kRows][2];
    bool moves = false;
#pragma unroll
    for (int m = 0; m < kRows; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 seen = own + (2 * m + h) / kHeads * 8 + g + 1;  // positions that the row's token sees
        float most = Piece::kNever;
#pragma unroll
        for (int n = 0; n < kColumns; n++)
#pragma unroll
          for (int k = 0; k < 2; k++) {
            float& score = s[m][n][2 * h + k];
            if constexpr (Kv::kScaled) score *= scale[n][k];
            if (!kSeen && position + n * 8 + 2 * t + k >= seen) score = Piece::kNever;
            most = fmaxf(most, raised(score, raise[n][k]));
          }
        most = over_row(most, [](float x, float y) { return fmaxf(x, y); });
        if constexpr (!Kv::kScaled) most *= M::kScoreScale;
        float& top = state.top[m][h];
        const bool rises = most > top;
        shrink[m][h] = rises ? exp2_approx(top - most) : 1;
        top = rises ? most : top;
        moves |= rises;
      }
    if (__any_sync(kAllLanes, moves)) {
#pragma unroll
      for (int m = 0; m < kRows; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          state.sum[m][h] *= shrink[m][h];
#pragma unroll
          for (int j = 0; j < 2 * kSteps; j++) {
            state.out[m][j][2 * h] *= shrink[m][h];
            state.out[m][j][2 * h + 1] *= shrink[m][h];
          }
        }
    }
#pragma unroll
    for (int m = 0; m < kRows; m++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int n = 0; n < kColumns; n++)
#pragma unroll
          for (int k = 0; k < 2; k++) {
            float& score = s[m][n][2 * h + k];
            const float top = state.top[m][h];
            const float weight = exp2_approx(Kv::kScaled ? raised(score, raise[n][k]) - top : fmaf(score, M::kScoreScale, -top));
            state.sum[m][h] += Kv::kScaled ? exp2_approx(score - top) : weight;  // without the scales of the values
            score = weight;
          }
  }
  // The logarithm of a weight. NOTE: of what is not seen scales may be no numbers.
  static FF_DEVICE float raised(float score, float raise) {
    if constexpr (Kv::kScaled) return score == Piece::kNever ? score : score + raise;
    else return score;
  }
};
