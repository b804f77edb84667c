// Attention over the KV cache, split over all blocks by bytes.
//
// A block of the cache is 16 positions of one head (see kv.cuh). The query heads that share the kv head are the columns of B. Each
// warp takes every eighth block and keeps its own running softmax; the warps meet in shared memory, and the block publishes one
// partial result (reference, sum, unnormalised output) per head. `Combine` joins the partials of all blocks. The reference, which
// weights are relative to, is the largest score, or the largest logarithm of a weight times the scale of its value.
//
// This token's own key and value never come from the cache: the block with the head's last piece computes them, appends them,
// and adds them as one more partial.
#pragma once
#include "kv.cuh"
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

// Attention of a head over some blocks of the cache: what a block's consumers do for one partial result.
template <class M>
struct HeadPiece {
  using Kv = KvBlock<M>;
  using T = typename Kv::Operand;
  using L = Layout<M>;
  static constexpr int kSteps = M::kHeadPad / 16;                // matrix instructions per head vector
  static constexpr bool kHold = kSteps <= 8;                     // the query stays in registers
  static constexpr int kPairs = ceil_div(M::kHeadDim / 2, 32);  // rotary pairs a lane
  static constexpr u32 kPadding = M::kHeadPad - M::kHeadDim;     // values; with several columns, a panel has been in their place
  static constexpr float kNever = -1e30f;  // a maximum before anything was seen

  // Whose attention it is: a virtual head of a token position, or of neighbours (units.cuh).
  struct Query {
    u32 layer, head, position, tag;
    const u64* vectors;  // words of the position's part of the qkv vector
    u8* cache;           // of its sequence
    // Of neighbour n alone.
    FF_DEVICE Query of(u32 n) const { return {layer, head, position + n, tag, vectors + n * M::kQkvWords, cache}; }
  };
  static constexpr u32 kNeighbours = L::kNeighbours;
  // Whose query a column of the matrix instructions is: the number of a neighbour.
  static FF_DEVICE u32 neighbour(u32 query) { return kNeighbours > 1 ? query / M::kVirtualGroup : 0; }
  // How many queries there are, of that many neighbours.
  static FF_DEVICE u32 all_queries(u32 head, u32 members) {
    static_assert(kNeighbours == 1 || M::kVirtualSplits == 1, "all virtual heads have as many queries then");
    return kNeighbours > 1 ? members * M::kVirtualGroup : Heads<M>::queries(head);
  }
  struct Vector {
    float low[kPairs], high[kPairs];  // dims i and i + head_dim / 2 for i = lane + 32 r
  };

  static FF_DEVICE bool has(u32 lane, int r) { return lane + 32 * r < M::kHeadDim / 2; }

  // Vectors of heads from the exchange; each lane keeps the pairs that the rotation mixes.
  template <int kCount>
  static FF_DEVICE void gather(Consumer<M>& c, Vector (&v)[kCount], const int (&at)[kCount], const Query& q) {
    const u64* words = q.vectors + c.lane;
    Wait wait;
    bool here;
#pragma unroll 1
    do {
      u64 w[kCount][kPairs][2] = {};
#pragma unroll
      for (int i = 0; i < kCount; i++)
#pragma unroll
        for (int r = 0; r < kPairs; r++)
          if (has(c.lane, r)) {
            w[i][r][0] = load_word(words + at[i] + 32 * r);
            w[i][r][1] = load_word(words + at[i] + 32 * r + M::kHeadDim / 2);
          }
      here = true;
#pragma unroll
      for (int i = 0; i < kCount; i++)
#pragma unroll
        for (int r = 0; r < kPairs; r++) {
          v[i].low[r] = v[i].high[r] = 0;
          if (has(c.lane, r)) {
            const Word low = split(w[i][r][0]), high = split(w[i][r][1]);
            v[i].low[r] = __uint_as_float(low.value);
            v[i].high[r] = __uint_as_float(high.value);
            here = here && low.tag == q.tag && high.tag == q.tag;
          }
        }
    } while (!__all_sync(kAllLanes, here) && !__any_sync(kAllLanes, wait.expired(c.watch)));
  }

  static FF_DEVICE Vector norm_weights(const Consumer<M>& c, u32 layer, int at) {
    const float* gamma = c.p.vectors + (u64)layer * M::kLayerVectors + at + c.lane;
    Vector v = {};
    if constexpr (M::kHeadNorm) {
#pragma unroll
      for (int r = 0; r < kPairs; r++)
        if (has(c.lane, r)) {
          v.low[r] = load_early(gamma + 32 * r);
          v.high[r] = load_early(gamma + 32 * r + M::kHeadDim / 2);
        }
    }
    return v;
  }

  static FF_DEVICE void normalise(Vector& v, const Vector& gamma) {
    if constexpr (M::kHeadNorm) {
      float sum = 0;
#pragma unroll
      for (int r = 0; r < kPairs; r++) sum += v.low[r] * v.low[r] + v.high[r] * v.high[r];
      const float scale = rsqrtf(warp_sum(sum) / M::kHeadDim + M::kHeadEps);
#pragma unroll
      for (int r = 0; r < kPairs; r++) {
        v.low[r] *= scale * gamma.low[r];
        v.high[r] *= scale * gamma.high[r];
      }
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

  static FF_DEVICE void turns(const Consumer<M>& c, float2 (&turn)[kPairs], u32 position) {
#pragma unroll
    for (int r = 0; r < kPairs; r++)
      turn[r] = has(c.lane, r) ? load_early(c.p.rope + (u64)position * (M::kHeadDim / 2) + c.lane + 32 * r) : make_float2(0, 0);
  }

  // A key, after its norm, as the cache takes it.
  static FF_DEVICE typename Kv::Scale turn_key(const Consumer<M>& c, Vector& v, const float2 (&turn)[kPairs]) {
    rotate(v, turn);
    Kv::mix(v.low, v.high, c.lane);
    return Kv::scale_of(v.low, v.high);
  }

  // What a matrix instruction sees of a query's value.
  static FF_DEVICE float rounded(float x) { return T::unpack((u16)T::pack(x, 0)); }

  // Warp w: query w of this piece into shared memory; with the newest position also its score against this token's key.
  // Warp 0 has the key, the first warp without a query (or the last) the value, of neighbours the last warps; of one column they append
  // them, too.
  static FF_DEVICE void prepare(Consumer<M>& c, const Query& first, u32 members, bool newest) {
    const u32 queries = Heads<M>::queries(first.head), kv_head = Heads<M>::kv_head(first.head);
    const u32 member = neighbour(c.warp), in_head = kNeighbours > 1 ? c.warp % M::kVirtualGroup : c.warp;
    if (in_head < queries && (kNeighbours == 1 || member < members)) {
      const Query q = kNeighbours > 1 ? first.of(member) : first;
      constexpr bool kEarly = kPairs <= 2;  // norm weights are here before the query; those of large heads would spill
      Vector query_norm = {}, key_norm = {};
      if (kEarly) query_norm = norm_weights(c, q.layer, M::kQueryNorm), key_norm = norm_weights(c, q.layer, M::kKeyNorm);
      float2 turn[kPairs];
      turns(c, turn, q.position);
      const int query_at = (Heads<M>::first_query(q.head) + in_head) * M::kHeadPad;
      Vector v[2];  // query, key
      if (newest) {
        gather(c, v, {query_at, Heads<M>::kKeys + (int)kv_head * M::kHeadPad}, q);
      } else {
        Vector only[1];
        gather(c, only, {query_at}, q);
        v[0] = only[0];
      }
      normalise(v[0], kEarly ? query_norm : norm_weights(c, q.layer, M::kQueryNorm));
      rotate(v[0], turn);
      Kv::mix(v[0].low, v[0].high, c.lane, 1.f / M::kKvMixed);
      const u32 at = c.shared + L::kQuery + c.warp * L::kQueryStride;
#pragma unroll
      for (int r = 0; r < kPairs; r++)
        if (has(c.lane, r)) {
          store_shared16(at + (c.lane + 32 * r) * 2, (u16)T::pack(v[0].low[r], 0));
          store_shared16(at + (c.lane + 32 * r + M::kHeadDim / 2) * 2, (u16)T::pack(v[0].high[r], 0));
        }
      if (L::kMany && c.lane < kPadding) store_shared16(at + (M::kHeadDim + c.lane) * 2, 0);
      if (newest) {
        normalise(v[1], kEarly ? key_norm : norm_weights(c, q.layer, M::kKeyNorm));
        const auto scale = turn_key(c, v[1], turn);
        float score = 0;
#pragma unroll
        for (int r = 0; r < kPairs; r++)
          score += rounded(v[0].low[r]) * Kv::rounded(v[1].low[r], scale) + rounded(v[0].high[r]) * Kv::rounded(v[1].high[r], scale);
        score = warp_sum(score);
        if (c.lane == 0) store_shared_float(c.shared + L::kNewScore + c.warp * 4, score * M::kScoreScale);
        if (!L::kMany && c.warp == 0 && q.head % M::kVirtualSplits == 0) append<false>(c, v[1], scale, q);
      }
    }
    const u32 with_value = kNeighbours > 1 ? kConsumers - 1 - c.warp : c.warp == value_warp(queries) ? 0 : 1;
    if (newest && with_value < members) {
      const Query q = kNeighbours > 1 ? first.of(with_value) : first;
      Vector v[1];
      gather(c, v, {Heads<M>::kValues + (int)kv_head * M::kHeadPad}, q);
      const auto scale = Kv::scale_of(v[0].low, v[0].high);
#pragma unroll
      for (int r = 0; r < kPairs; r++)
        if (has(c.lane, r)) {
          store_shared_float(new_value(c, with_value) + (c.lane + 32 * r) * 4, Kv::rounded(v[0].low[r], scale));
          store_shared_float(new_value(c, with_value) + (c.lane + 32 * r + M::kHeadDim / 2) * 4, Kv::rounded(v[0].high[r], scale));
        }
      if (L::kMany && c.lane < kPadding) store_shared_float(new_value(c, with_value) + (M::kHeadDim + c.lane) * 4, 0);
      if (!L::kMany && q.head % M::kVirtualSplits == 0) append<true>(c, v[0], scale, q);
    }
  }

  // The position's key into the cache, by one warp; and its value.
  static FF_DEVICE void append_key(Consumer<M>& c, const Query& q) {
    const Vector norm = norm_weights(c, q.layer, M::kKeyNorm);
    float2 turn[kPairs];
    turns(c, turn, q.position);
    Vector v[1];
    gather(c, v, {Heads<M>::kKeys + (int)Heads<M>::kv_head(q.head) * M::kHeadPad}, q);
    normalise(v[0], norm);
    const auto scale = turn_key(c, v[0], turn);
    append<false>(c, v[0], scale, q);
  }
  static FF_DEVICE void append_value(Consumer<M>& c, const Query& q) {
    Vector v[1];
    gather(c, v, {Heads<M>::kValues + (int)Heads<M>::kv_head(q.head) * M::kHeadPad}, q);
    append<true>(c, v[0], Kv::scale_of(v[0].low, v[0].high), q);
  }
  template <bool kIsValue>
  static FF_DEVICE void append(Consumer<M>& c, const Vector& v, const typename Kv::Scale& scale, const Query& q) {
    u32 position = q.position;
    asm volatile("" : "+r"(position));  // or the offsets below would be computed for all pieces at once, and spill
    const u64 first = ((u64)q.layer * M::kKvHeads + Heads<M>::kv_head(q.head)) * c.p.kv_blocks;
    u8* block = q.cache + (first + position / 16) * M::kKvBlockBytes;
    auto put = [&](u32 dim, float x) {
      const u32 at = kIsValue ? Kv::value(position & 15, dim) : Kv::key(position & 15, dim);
      Kv::put(block, at, x, scale);
    };
#pragma unroll
    for (int r = 0; r < kPairs; r++)
      if (has(c.lane, r)) {
        put(c.lane + 32 * r, v.low[r]);
        put(c.lane + 32 * r + M::kHeadDim / 2, v.high[r]);
      }
    if (c.lane == 0) Kv::template put_scale<kIsValue>(block, position & 15, scale);
  }

  // Scores of a lane's query i at two positions, of which `low` and `high` are seen, become weights relative to the largest so far; what was summed
  // before them is brought to the same reference. raise: logarithms of the scales of the values.
  static FF_DEVICE void weigh(
      float (&s)[4], int i, bool low, bool high, const float2& scale, const float2& raise, float (&top)[2], float (&sum)[2],
      float (&out)[kSteps][4]) {
    s[i] = low ? s[i] * scale.x : kNever;
    s[i + 2] = high ? s[i + 2] * scale.y : kNever;
    float weight[2] = {s[i], s[i + 2]};  // logarithms, with the scales of the values
    if constexpr (Kv::kScaled) {
      weight[0] = low ? s[i] + raise.x : kNever;
      weight[1] = high ? s[i + 2] + raise.y : kNever;
    }
    float most = fmaxf(weight[0], weight[1]);
#pragma unroll
    for (int o = 16; o >= 4; o >>= 1) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, o));
    most = fmaxf(most, top[i]);
    const float shrink = exp2_approx(top[i] - most);
    top[i] = most;
    weight[0] = low ? exp2_approx(weight[0] - most) : 0;
    weight[1] = high ? exp2_approx(weight[1] - most) : 0;
    float plain[2] = {weight[0], weight[1]};  // without those scales
    if constexpr (Kv::kScaled) {
      plain[0] = low ? exp2_approx(s[i] - most) : 0;
      plain[1] = high ? exp2_approx(s[i + 2] - most) : 0;
    }
    sum[i] = sum[i] * shrink + (plain[0] + plain[1]);
    s[i] = weight[0];
    s[i + 2] = weight[1];
#pragma unroll
    for (int j = 0; j < kSteps; j++) {
      out[j][i] *= shrink;
      out[j][i + 2] *= shrink;
    }
  }

  // Blocks first..first + count of a head: each warp its own, with a softmax of its own, ending in shared memory. `position`: of the first
  // of `members` neighbours. NOTE: a value that is no number shows in the neighbours in front of it, too.
  static FF_DEVICE void attend(Consumer<M>& c, float (&out)[kSteps][4], u32 first, u32 count, u32 position, u32 members) {
    const u32 g = c.lane >> 2, t = c.lane & 3;
    const u32 query = c.shared + L::kQuery + g * L::kQueryStride + t * 8;
    uint2 q[kHold ? kSteps : 1];
    if constexpr (kHold) {
#pragma unroll
      for (int j = 0; j < kSteps; j++) q[j] = load_shared2(query + j * 32);
    }
    float top[2] = {kNever, kNever}, sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kSteps; j++) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0;
#pragma unroll 1
    for (u32 done = 0; done < count; done += M::kKvChunkBlocks) {
      c.acquire();
#pragma unroll 1
      for (u32 b = (c.warp - done) % kConsumers; b < M::kKvChunkBlocks && done + b < count; b += kConsumers) {
        const typename Kv::Reader block(c.chunk_address() + b * M::kKvBlockBytes, c.lane);
        float s[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < kSteps; j += Kv::kSteps) {
          uint4 keys[Kv::kSteps];
          block.keys(keys, j);
#pragma unroll
          for (int k = j; k < j + Kv::kSteps && k < kSteps; k++) {
            const uint2 x = kHold ? q[kHold ? k : 0] : load_shared2(query + k * 32);
            mma<T>(s, keys[k - j], x.x, x.y);
          }
        }
        const u32 p = (first + done + b) * 16 + g;  // position of rows g; rows g + 8 follow
        const float2 scale = block.score_scale(g), raise = block.value_scale(g);
#pragma unroll
        for (int i = 0; i < 2; i++) {  // this lane's queries 2t and 2t + 1
          const u32 own = position + neighbour(2 * t + i);
          const bool low = p < own, high = p + 8 < own;
          weigh(s, i, low, high, scale, raise, top, sum, out);
        }
        const u32 b0 = transpose8x8(T::pack(s[0], s[1])), b1 = transpose8x8(T::pack(s[2], s[3]));
        const u32 at_value = (first + done + b) * 16 + 2 * t;
        const u32 last = position + (members - 1), mask0 = value_mask(at_value, last), mask1 = value_mask(at_value + 8, last);
#pragma unroll
        for (int j = 0; j < kSteps; j += Kv::kSteps) {
          uint4 values[Kv::kSteps];
          block.values(values, j, mask0, mask1);
#pragma unroll
          for (int k = j; k < j + Kv::kSteps && k < kSteps; k++) mma<T>(out[k], values[k - j], b0, b1);
        }
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

  // Which of the values at positions p and p + 1 exist.
  static FF_DEVICE u32 value_mask(u32 p, u32 position) { return p + 1 < position ? 0xffffffffu : p < position ? 0xffffu : 0; }

  // The results of the first `warps` warps become one partial per query, summed in the order of the warps.
  static FF_DEVICE void publish(Consumer<M>& c, const float (&out)[kSteps][4], u32 queries, bool newest, u32 warps, u32 tag, u64* piece) {
    const u32 g = c.lane >> 2, t = c.lane & 3;
    const u32 softmax = c.shared + L::kSoftmax, merge = c.shared + L::kMerge;
#pragma unroll 1
    for (u32 h0 = 0; h0 < queries; h0 += L::kMergeHeads) {
      if (h0) c.sync();
      if (c.warp < warps) {
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
      }
      c.sync();
      const u32 heads = queries - h0 < L::kMergeHeads ? queries - h0 : L::kMergeHeads;
      // NOTE: two dims a lane, since weighing the warps takes longer than adding their values.
#pragma unroll 1
      for (u32 e = (c.warp * 32 + c.lane) * 2; e < heads * M::kHeadPad; e += kConsumers * 64) {
        const u32 h = e / M::kHeadPad, dim = e % M::kHeadPad, query = h0 + h;
        const float own = load_shared_float(c.shared + L::kNewScore + query * 4);
        float most = newest ? own : kNever;
#pragma unroll
        for (int w = 0; w < kConsumers; w++)
          if (w < warps) most = fmaxf(most, load_shared_float(softmax + (w * 8 + query) * 8));
        float sum = newest ? exp2_approx(own - most) : 0, y[2] = {0, 0};
        if (newest) add_two(y, sum, new_value(c, neighbour(query)) + dim * 4);
#pragma unroll
        for (int w = 0; w < kConsumers; w++)
          if (w < warps) {
            const float share = exp2_approx(load_shared_float(softmax + (w * 8 + query) * 8) - most);
            sum += share * load_shared_float(softmax + (w * 8 + query) * 8 + 4);
            add_two(y, share, merge + ((w * L::kMergeHeads + h) * L::kMergeStride + dim) * 4);
          }
        store_words(piece + query * M::kHeadPad + dim, __float_as_uint(y[0]), __float_as_uint(y[1]), tag);
        if (dim == 0) store_words(piece + 8 * M::kHeadPad + query * 2, __float_as_uint(most), __float_as_uint(sum), tag);
      }
    }
  }

  // y += share x two floats of shared memory.
  static FF_DEVICE void add_two(float (&y)[2], float share, u32 at) {
    const uint2 v = load_shared2(at);
    y[0] += share * __uint_as_float(v.x);
    y[1] += share * __uint_as_float(v.y);
  }
  static FF_DEVICE u32 new_value(const Consumer<M>& c, u32 member) {
    return c.shared + L::kNewValue + (kNeighbours > 1 ? member * (M::kHeadPad * 4) : 0);
  }
  static FF_DEVICE u32 value_warp(u32 queries) { return queries < kConsumers ? queries : kConsumers - 1; }
};

template <class M, class S>
struct Attention {
  using Piece = HeadPiece<M>;

  static FF_DEVICE void run(Finisher<M>&, u32, u32) {}
  static FF_DEVICE void run(Producer<M>&, u32, u32) {}

  static FF_DEVICE void run(Consumer<M>& c, u32 step, u32 layer) {
    u32 piece = 0;
#pragma unroll 1
    for (;; piece++) {
      c.enter(S::kWhere, layer);
      // NOTE: computed anew for each piece: kept through the loop, it would spill.
      const u32 position = c.position(step);
      const KvShare<M> share(position, blockIdx.x);
      const u32 next = piece ? (share.next / share.per_head + piece) * share.per_head : share.next;
      if (next >= share.end) break;
      const u32 head = next / share.per_head, first = next - head * share.per_head;
      u32 count = share.end - next;
      if (count > share.per_head - first) count = share.per_head - first;
      const bool newest = first + count == share.per_head;
      c.sync();  // the piece before this one may still be read
      if (c.warp == 0) c.mark(0, step, layer, S::kWhere, 0);
      Piece::prepare(c, {layer, head, position, c.tag(step, layer), c.words(S::kInput), c.p.kv}, 1, newest);
      c.sync();
      if (c.warp == 0) c.mark(0, step, layer, S::kWhere, 1);
      float out[Piece::kSteps][4];
      Piece::attend(c, out, first, count, position, 1);
      const u32 warps = count < kConsumers ? count : kConsumers;  // that have seen any positions
      u64* const to = c.words(S::kOutput) + (u64)(blockIdx.x * M::kPieces + piece) * M::kPieceWords;
      Piece::publish(c, out, Piece::all_queries(head, 1), newest, warps, c.tag(step, layer), to);
      if (c.warp == 0) c.mark(1, step, layer, S::kWhere, 1);
    }
    if (piece == 0) return;
    __syncwarp();
    if (c.lane == 0) barrier_arrive(c.shared + Layout<M>::kAttended);
  }
};
