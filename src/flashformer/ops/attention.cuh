// Attention over the KV cache, split over all blocks by bytes.
//
// A block of the cache is 16 positions of one head: keys as A operands (rows = positions, one fragment per 16 dims), then values
// as A operands (rows = dims, columns = positions). The query heads that share the kv head are the columns of B. Each warp
// takes every eighth block and keeps its own running softmax; the warps meet in shared memory, and the block publishes one
// partial result (maximum, sum, unnormalised output) per head. `Combine` joins the partials of all blocks.
//
// This token's own key and value never come from the cache: the block with the head's last piece computes them, appends them,
// and adds them as one more partial.
#pragma once
#include "stream.cuh"

// Where the values of query head, key head, value head lie in the qkv vector, and which heads a virtual head serves.
template <class M>
struct Heads {
  static FF_DEVICE u32 kv_head(u32 virtual_head) { return virtual_head / M::kVirtualSplits; }
  static FF_DEVICE u32 first_query(u32 virtual_head) {
    return kv_head(virtual_head) * M::kGroup + virtual_head % M::kVirtualSplits * M::kVirtualGroup;
  }
  static FF_DEVICE u32 queries(u32 virtual_head) {  // of a virtual head: the last one of a group may have fewer
    const u32 left = M::kGroup - virtual_head % M::kVirtualSplits * M::kVirtualGroup;
    return left < M::kVirtualGroup ? left : M::kVirtualGroup;
  }
  static constexpr int kKeys = M::kHeads * M::kHeadPad;
  static constexpr int kValues = kKeys + M::kKvHeads * M::kHeadPad;
};

// Byte of (position, dim) in a block of the cache.
template <class M>
struct KvBlock {
  static FF_DEVICE u32 key(u32 position, u32 dim) {
    const u32 in = dim & 15;  // lane t holds dims 4t..4t+3 of a step: the same order as the query's registers
    return (dim >> 4) * 512 + ((position & 7) * 4 + (in >> 2)) * 16 + ((in >> 1 & 1) * 2 + (position >> 3)) * 4 + (in & 1) * 2;
  }
  static FF_DEVICE u32 value(u32 position, u32 dim) {
    return M::kHeadPad * 32 + (dim >> 4) * 512 + ((dim & 7) * 4 + (position >> 1 & 3)) * 16 +
           ((position >> 3) * 2 + (dim >> 3 & 1)) * 4 + (position & 1) * 2;
  }
};

template <class M, class S>
struct Attention {
  using T = typename M::Value;
  using L = Layout<M>;
  static constexpr int kSteps = M::kHeadPad / 16;                // matrix instructions per head vector
  static constexpr int kPairs = ceil_div(M::kHeadDim / 2, 32);  // rotary pairs a lane

  static FF_DEVICE void run(Finisher<M>&, u32, u32) {}
  static FF_DEVICE void run(Producer<M>&, u32, u32) {}

  static FF_DEVICE void run(Consumer<M>& c, u32 step, u32 layer) {
    c.enter(S::kWhere, layer);
    const u32 position = c.position(step), tag = c.tag(step, layer);
    const KvShare<M> share(position, blockIdx.x);
    u32 piece = 0;
#pragma unroll 1
    for (u32 next = share.next; next < share.end; piece++) {
      const u32 head = next / share.per_head, first = next - head * share.per_head;
      u32 count = share.end - next;
      if (count > share.per_head - first) count = share.per_head - first;
      next += count;
      const bool newest = first + count == share.per_head;
      prepare(c, layer, head, position, tag, newest);
      c.sync();
      float out[kSteps][4];
      attend(c, out, first, count, position);
      publish(c, out, head, newest, tag, c.words(S::kOutput) + (u64)(blockIdx.x * M::kPieces + piece) * M::kPieceWords);
    }
  }

  static constexpr float kNever = -1e30f;  // a maximum before anything was seen

 private:
  struct Vector {
    float low[kPairs], high[kPairs];  // dims i and i + head_dim / 2 for i = lane + 32 r
  };

  static FF_DEVICE bool has(u32 lane, int r) { return lane + 32 * r < M::kHeadDim / 2; }

  // A head's vector from the exchange; each lane keeps the pairs that the rotation mixes.
  static FF_DEVICE Vector gather(Consumer<M>& c, int at, u32 tag) {
    const u64* words = c.words(S::kInput) + at + c.lane;
    Wait wait;
    Vector v;
    bool all = false;
#pragma unroll 1
    for (int attempt = 0; !all; attempt++) {
      u64 w[kPairs][2];
#pragma unroll
      for (int r = 0; r < kPairs; r++)
        if (has(c.lane, r)) {
          w[r][0] = load_word(words + 32 * r);
          w[r][1] = load_word(words + 32 * r + M::kHeadDim / 2);
        }
      bool here = true;
#pragma unroll
      for (int r = 0; r < kPairs; r++) {
        v.low[r] = v.high[r] = 0;
        if (has(c.lane, r)) {
          const Word low = split(w[r][0]), high = split(w[r][1]);
          v.low[r] = __uint_as_float(low.value);
          v.high[r] = __uint_as_float(high.value);
          here = here && low.tag == tag && high.tag == tag;
        }
      }
      all = __all_sync(kAllLanes, here);
      if (!all && attempt == 0) wait.at_least(M::kRepollCycles);
      if (__any_sync(kAllLanes, !all && wait.expired(c.watch))) break;
    }
    return v;
  }

  static FF_DEVICE void normalise(Vector& v, const float* gamma, u32 lane) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kPairs; r++) sum += v.low[r] * v.low[r] + v.high[r] * v.high[r];
#pragma unroll
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
    const float scale = rsqrtf(sum / M::kHeadDim + M::kHeadEps);
#pragma unroll
    for (int r = 0; r < kPairs; r++)
      if (has(lane, r)) {
        v.low[r] *= scale * __ldg(gamma + lane + 32 * r);
        v.high[r] *= scale * __ldg(gamma + lane + 32 * r + M::kHeadDim / 2);
      }
  }

  static FF_DEVICE void rotate(Vector& v, const float2 (&turn)[kPairs]) {
#pragma unroll
    for (int r = 0; r < kPairs; r++) {
      const float low = v.low[r], high = v.high[r];
      v.low[r] = low * turn[r].x - high * turn[r].y;
      v.high[r] = high * turn[r].x + low * turn[r].y;
    }
  }

  // What the cache will give back: the value rounded to 16 bits.
  static FF_DEVICE float rounded(float x) { return T::unpack((u16)T::pack(x, 0)); }

  // Warp w: query head w of this piece into shared memory; with the newest position also its score against this token's key.
  // Warp 0 appends the key, the first warp without a query (or the last) the value.
  static FF_DEVICE void prepare(Consumer<M>& c, u32 layer, u32 head, u32 position, u32 tag, bool newest) {
    const u32 queries = Heads<M>::queries(head), kv_head = Heads<M>::kv_head(head);
    const float* vectors = c.p.vectors + (u64)layer * M::kLayerVectors;
    if (c.warp < queries) {
      float2 turn[kPairs];
#pragma unroll
      for (int r = 0; r < kPairs; r++)
        turn[r] = has(c.lane, r) ? __ldg(c.p.rope + (u64)position * (M::kHeadDim / 2) + c.lane + 32 * r) : make_float2(0, 0);
      Vector q = gather(c, (Heads<M>::first_query(head) + c.warp) * M::kHeadPad, tag);
      if (M::kHeadNorm) normalise(q, vectors + M::kQueryNorm, c.lane);
      rotate(q, turn);
      const u32 at = c.shared + L::kQuery + c.warp * L::kQueryStride;
#pragma unroll
      for (int r = 0; r < kPairs; r++)
        if (has(c.lane, r)) {
          store_shared16(at + (c.lane + 32 * r) * 2, (u16)T::pack(q.low[r], 0));
          store_shared16(at + (c.lane + 32 * r + M::kHeadDim / 2) * 2, (u16)T::pack(q.high[r], 0));
        }
      if (newest) {
        Vector k = gather(c, Heads<M>::kKeys + kv_head * M::kHeadPad, tag);
        if (M::kHeadNorm) normalise(k, vectors + M::kKeyNorm, c.lane);
        rotate(k, turn);
        float score = 0;
#pragma unroll
        for (int r = 0; r < kPairs; r++) score += rounded(q.low[r]) * rounded(k.low[r]) + rounded(q.high[r]) * rounded(k.high[r]);
#pragma unroll
        for (int o = 16; o; o >>= 1) score += __shfl_xor_sync(kAllLanes, score, o);
        if (c.lane == 0) store_shared_float(c.shared + L::kNewScore + c.warp * 4, score * M::kScoreScale);
        if (c.warp == 0 && head % M::kVirtualSplits == 0) append<false>(c, k, layer, kv_head, position);
      }
    }
    if (newest && c.warp == value_warp(queries)) {
      Vector v = gather(c, Heads<M>::kValues + kv_head * M::kHeadPad, tag);
#pragma unroll
      for (int r = 0; r < kPairs; r++)
        if (has(c.lane, r)) {
          store_shared_float(c.shared + L::kNewValue + (c.lane + 32 * r) * 4, rounded(v.low[r]));
          store_shared_float(c.shared + L::kNewValue + (c.lane + 32 * r + M::kHeadDim / 2) * 4, rounded(v.high[r]));
        }
      if (head % M::kVirtualSplits == 0) append<true>(c, v, layer, kv_head, position);
    }
  }

  template <bool kIsValue>
  static FF_DEVICE void append(Consumer<M>& c, const Vector& v, u32 layer, u32 kv_head, u32 position) {
    u8* block = c.p.kv + (((u64)layer * M::kKvHeads + kv_head) * c.p.kv_blocks + position / 16) * M::kKvBlockBytes;
    auto put = [&](u32 dim, float x) {
      const u32 at = kIsValue ? KvBlock<M>::value(position & 15, dim) : KvBlock<M>::key(position & 15, dim);
      *(u16*)(block + at) = (u16)T::pack(x, 0);
    };
#pragma unroll
    for (int r = 0; r < kPairs; r++)
      if (has(c.lane, r)) {
        put(c.lane + 32 * r, v.low[r]);
        put(c.lane + 32 * r + M::kHeadDim / 2, v.high[r]);
      }
  }

  // Blocks first..first + count of a head: each warp its own, with a softmax of its own, ending in shared memory.
  static FF_DEVICE void attend(Consumer<M>& c, float (&out)[kSteps][4], u32 first, u32 count, u32 position) {
    const u32 g = c.lane >> 2, t = c.lane & 3;
    uint2 q[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; j++) q[j] = load_shared2(c.shared + L::kQuery + g * L::kQueryStride + j * 32 + t * 8);
    float top[2] = {kNever, kNever}, sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kSteps; j++) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0;
#pragma unroll 1
    for (u32 done = 0; done < count; done += M::kKvChunkBlocks) {
      c.acquire();
#pragma unroll 1
      for (u32 b = (c.warp - done) % kConsumers; b < M::kKvChunkBlocks && done + b < count; b += kConsumers) {
        const u32 at = c.chunk_address() + b * M::kKvBlockBytes + c.lane * 16;
        float s[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < kSteps; j++) mma<T>(s, load_shared4(at + j * 512), q[j].x, q[j].y);
        const u32 p = (first + done + b) * 16 + g;  // position of rows g; rows g + 8 follow
        const bool low = p < position, high = p + 8 < position;
#pragma unroll
        for (int i = 0; i < 2; i++) {  // this lane's query heads 2t and 2t + 1
          s[i] = low ? s[i] * M::kScoreScale : kNever;
          s[i + 2] = high ? s[i + 2] * M::kScoreScale : kNever;
          float most = fmaxf(s[i], s[i + 2]);
#pragma unroll
          for (int o = 16; o >= 4; o >>= 1) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, o));
          most = fmaxf(most, top[i]);
          const float shrink = exp2_approx(top[i] - most);
          top[i] = most;
          s[i] = low ? exp2_approx(s[i] - most) : 0;
          s[i + 2] = high ? exp2_approx(s[i + 2] - most) : 0;
          sum[i] = sum[i] * shrink + (s[i] + s[i + 2]);
#pragma unroll
          for (int j = 0; j < kSteps; j++) {
            out[j][i] *= shrink;
            out[j][i + 2] *= shrink;
          }
        }
        const u32 b0 = transpose8x8(T::pack(s[0], s[1])), b1 = transpose8x8(T::pack(s[2], s[3]));
#pragma unroll
        for (int j = 0; j < kSteps; j++) mma<T>(out[j], load_shared4(at + M::kHeadPad * 32 + j * 512), b0, b1);
      }
      c.release();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int o = 16; o >= 4; o >>= 1) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], o);
      if (g == 0) {
        const u32 at = c.shared + L::kSoftmax + (c.warp * 8 + 2 * t + i) * 8;
        store_shared_float(at, top[i]);
        store_shared_float(at + 4, sum[i]);
      }
    }
  }

  // The warps' results become one partial per query head, summed in the order of the warps.
  static FF_DEVICE void publish(Consumer<M>& c, const float (&out)[kSteps][4], u32 head, bool newest, u32 tag, u64* piece) {
    const u32 g = c.lane >> 2, t = c.lane & 3, queries = Heads<M>::queries(head);
    const u32 softmax = c.shared + L::kSoftmax, merge = c.shared + L::kMerge;
    // NOTE: the appended key and value must be visible to all before this block's partial is: the next token reads them.
    if (newest && (c.warp == 0 || c.warp == value_warp(queries))) {
      fence_device();
      fence_copy_engine();
    }
#pragma unroll 1
    for (u32 h0 = 0; h0 < queries; h0 += L::kMergeHeads) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 h = 2 * t + i - h0;
        if (h < L::kMergeHeads) {
          const u32 at = merge + ((c.warp * L::kMergeHeads + h) * L::kMergeStride + g) * 4;
#pragma unroll
          for (int j = 0; j < kSteps; j++) {
            store_shared_float(at + j * 64, out[j][i]);
            store_shared_float(at + j * 64 + 32, out[j][i + 2]);
          }
        }
      }
      c.sync();
      const u32 heads = queries - h0 < L::kMergeHeads ? queries - h0 : L::kMergeHeads;
      for (u32 e = c.warp * 32 + c.lane; e < heads * M::kHeadPad; e += kConsumers * 32) {
        const u32 h = e / M::kHeadPad, dim = e % M::kHeadPad, query = h0 + h;
        const float own = load_shared_float(c.shared + L::kNewScore + query * 4);
        float most = newest ? own : kNever;
#pragma unroll
        for (int w = 0; w < kConsumers; w++) most = fmaxf(most, load_shared_float(softmax + (w * 8 + query) * 8));
        float sum = newest ? exp2_approx(own - most) : 0;
        float y = newest ? sum * load_shared_float(c.shared + L::kNewValue + dim * 4) : 0;
#pragma unroll
        for (int w = 0; w < kConsumers; w++) {
          const float share = exp2_approx(load_shared_float(softmax + (w * 8 + query) * 8) - most);
          sum += share * load_shared_float(softmax + (w * 8 + query) * 8 + 4);
          y += share * load_shared_float(merge + ((w * L::kMergeHeads + h) * L::kMergeStride + dim) * 4);
        }
        store_word(piece + query * M::kHeadPad + dim, __float_as_uint(y), tag);
        if (dim == 0) store_words(piece + 8 * M::kHeadPad + query * 2, __float_as_uint(most), __float_as_uint(sum), tag);
      }
      c.sync();
    }
  }

  static FF_DEVICE u32 value_warp(u32 queries) { return queries < kConsumers ? queries : kConsumers - 1; }
};

// Joins the partials of all blocks that share a head: a finisher takes 8 values, four pairs x eight pieces at a time.
template <class M, class S>
struct Combine {
  using T = typename M::Value;
  using Pieces = Attention<M, typename S::Source>;
  static constexpr int kBatch = 2;  // pieces in flight a lane

  static FF_DEVICE void run(Consumer<M>&, u32, u32) {}
  static FF_DEVICE void run(Producer<M>&, u32, u32) {}

  static FF_DEVICE void run(Finisher<M>& f, u32 step, u32 layer) {
    f.enter(S::kWhere, layer);
    const uint2 tiles = f.tiles(1);
    const u32 tag = f.tag(step, layer), pair = f.lane & 3;
    const KvShare<M> share(f.position(step), 0);
#pragma unroll 1
    for (u32 local = f.index; local < tiles.y; local += M::kFinishers) {
      const u32 at = (tiles.x + local) * 8, query = at / M::kHeadPad, dim = at % M::kHeadPad + pair * 2;
      const u32 in_group = query % M::kGroup;
      const u32 head = query / M::kGroup * M::kVirtualSplits + in_group / M::kVirtualGroup, column = in_group % M::kVirtualGroup;
      const u32 first = share.owner(head * share.per_head), last = share.owner((head + 1) * share.per_head - 1);
      float top = Pieces::kNever, sum = 0, y0 = 0, y1 = 0;
#pragma unroll 1
      for (u32 base = first + (f.lane >> 2); base <= last; base += 8 * kBatch) {
        const u64* words[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const u32 block = base + 8 * i <= last ? base + 8 * i : base;
          words[i] = f.words(S::kInput) +
                     (u64)(block * M::kPieces + head - share.first(block) / share.per_head) * M::kPieceWords;
        }
        u64 a[kBatch][4];
        Wait wait;
        bool here;
        do {
          here = true;
#pragma unroll
          for (int i = 0; i < kBatch; i++) {
            load_words(words[i] + column * M::kHeadPad + dim, a[i][0], a[i][1]);
            load_words(words[i] + 8 * M::kHeadPad + column * 2, a[i][2], a[i][3]);
          }
#pragma unroll
          for (int i = 0; i < kBatch; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) here = here && split(a[i][j]).tag == tag;
          if (!here) Wait().at_least(M::kCombineRepoll);
        } while (!here && !wait.expired(f.watch));
#pragma unroll
        for (int i = 0; i < kBatch; i++)
          if (base + 8 * i <= last)
            join_partial(top, sum, y0, y1, value(a[i][2]), value(a[i][3]), value(a[i][0]), value(a[i][1]));
      }
      __syncwarp();
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) {
        const float t = __shfl_xor_sync(kAllLanes, top, o), s = __shfl_xor_sync(kAllLanes, sum, o);
        const float z0 = __shfl_xor_sync(kAllLanes, y0, o), z1 = __shfl_xor_sync(kAllLanes, y1, o);
        join_partial(top, sum, y0, y1, t, s, z0, z1);  // lanes 0-3 take the others' in a fixed order
      }
      if (f.lane < 4) store_word(f.words(S::kOutput) + at / 2 + pair, T::pack(__fdividef(y0, sum), __fdividef(y1, sum)), tag);
    }
  }

 private:
  static FF_DEVICE float value(u64 w) { return __uint_as_float(split(w).value); }
  static FF_DEVICE void join_partial(float& top, float& sum, float& y0, float& y1, float t, float s, float z0, float z1) {
    const float most = fmaxf(top, t), old = exp2_approx(top - most), fresh = exp2_approx(t - most);
    sum = sum * old + s * fresh;
    y0 = y0 * old + z0 * fresh;
    y1 = y1 * old + z1 * fresh;
    top = most;
  }
};
