// Attention, column by column: kv heads x blocks of the KV cache are cut into equal runs, one a worker; `Combine` joins the parts.
//
// The owner of a head's last block appends the column's key and value to it. Where columns of one sequence follow each other, `Append`
// is a stage of its own, so that all of them see those before.
#pragma once
#include <algorithm>
#include <limits>

#include "kv.h"
#include "rmsnorm.h"
#include "rope.h"
#include "worker.h"

constexpr int kChunkBlocks = 16;  // whose scores are held at a time
constexpr int kChunk = kChunkBlocks * kBlockPositions;

// How the blocks of all heads are shared: unit = head * blocks + block; worker w has the units [begin(w), begin(w + 1)).
template <class M>
struct Share {
  u64 blocks, units;

  explicit Share(u32 position) : blocks(position / kBlockPositions + 1), units(blocks * M::kKvHeads) {}
  u64 begin(u64 worker) const { return worker * units / M::kWorkers; }
  u64 owner(u64 unit) const { return ((unit + 1) * M::kWorkers - 1) / units; }
  u64 first_head(u64 worker) const { return begin(worker) / blocks; }
};

// Partial results: [workers][kPieces][kSplits * kQueries heads][kHeadPad outputs, then maximum and sum].
template <class M, class S>
inline float* partial(const Worker<M>& w, u32 column, u64 worker, u64 piece) {
  return w.values(column, S::kOutput) + (worker * M::kPieces + piece) * M::kSplits * M::kQueries * M::kPartial;
}

// Heads as attention takes them: normed, rotated, in the basis of the cache.
template <class M, class S>
struct Heads {
  using Kv = KvBlock<M>;

  // The query heads of a kv head, scaled for powers of two; those that only fill up the last split are zero.
  static void read_queries(const Worker<M>& w, u32 column, u32 layer, u32 head, float* query) {
    const float* from = w.values(column, S::kInput) + head * M::kGroup * M::kHeadPad;
    for (int g = 0; g < M::kSplits * M::kQueries; g++, query += M::kHeadPad, from += M::kHeadPad) {
      std::memset(query, 0, M::kHeadPad * sizeof(float));
      if (g >= M::kGroup) continue;
      std::memcpy(query, from, M::kHeadDim * sizeof(float));
      turn(w, column, query, w.layer_vectors(layer) + M::kQueryNorm);
      Kv::mix(query, 1.0f / M::kKvMixed);
      for (int d = 0; d < M::kHeadDim; d++) query[d] *= M::kScoreScale;
    }
  }

  // Key and value of a column's position go into the cache.
  static void append(const Worker<M>& w, u32 column, u32 layer, u32 head) {
    const Column& c = w.pass().columns[column];
    u8* block = w.kv_block(c.slot, layer, head, c.position / kBlockPositions);
    const int at = c.position % kBlockPositions;
    const float* from = w.values(column, S::kInput) + (M::kHeads + head) * M::kHeadPad;
    float* key = w.scratch();
    std::memcpy(key, from, M::kHeadDim * sizeof(float));
    turn(w, column, key, w.layer_vectors(layer) + M::kKeyNorm);
    Kv::mix(key);
    Kv::put_key(block, at, key);
    Kv::put_value(block, at, from + M::kKvHeads * M::kHeadPad);
  }

 private:
  // q/k norm and rotation of one head, in place.
  static void turn(const Worker<M>& w, u32 column, float* head, const float* gamma) {
    if (M::kHeadNorm) {
      float squares = 0;
      for (int d = 0; d < M::kHeadDim; d++) squares += head[d] * head[d];
      const float scale = 1.0f / std::sqrt(squares / float(M::kHeadDim) + M::kHeadEps);
      for (int d = 0; d < M::kHeadDim; d++) head[d] *= scale * gamma[d];
    }
    rope(head, w.turns(w.pass().columns[column].position), M::kHeadDim);
  }
};

// NOTE: a head's columns are appended in order, by one worker: what is written at an even position clears the place of the next.
template <class M, class S>
struct Append {
  using Stage = S;

  static void run(Worker<M>& w, u32 layer) {
    for (u32 head = w.index; head < u32(M::kKvHeads); head += M::kWorkers)
      for (u32 column = 0; column < w.pass().count; column++) Heads<M, S>::append(w, column, layer, head);
  }
};

template <class M, class S>
struct Attention {
  using Stage = S;
  using Kv = KvBlock<M>;
  static constexpr int kQ = M::kQueries;
  static constexpr int kVectors = kQ <= 4 ? kHalf / kLanes : 1;  // independent sums that fit the registers
  static constexpr int kStep = kVectors * kLanes;
  static constexpr int kColumns = M::kHeadPad / kHalf;

  static void run(Worker<M>& w, u32 layer) {
    for (u32 column = 0; column < w.pass().count; column++) run(w, column, layer);
  }

 private:
  static void run(Worker<M>& w, u32 column, u32 layer) {
    const Share<M> share(w.pass().columns[column].position);
    const u64 end = share.begin(w.index + 1);
    u64 count;
    for (u64 unit = share.begin(w.index); unit < end; unit += count) {
      const u32 head = u32(unit / share.blocks), first = u32(unit % share.blocks);
      count = std::min(end - unit, share.blocks - first);
      const u32 last = first + u32(count);
      if (last == share.blocks && !w.pass().chained) Heads<M, S>::append(w, column, layer, head);
      float* query = w.scratch();
      Heads<M, S>::read_queries(w, column, layer, head, query);
      float* out = partial<M, S>(w, column, w.index, head - share.first_head(w.index));
      for (int split = 0; split < M::kSplits; split++)
        attend(w, column, layer, head, first, last, query + split * kQ * M::kHeadPad, out + split * kQ * M::kPartial);
    }
  }

  // Softmax over the positions of blocks [first, last) as far as they exist, and the sum of their values, for kQ heads.
  static void attend(const Worker<M>& w, u32 column, u32 layer, u32 head, u32 first, u32 last, const float* query, float* out) {
    const Column& c = w.pass().columns[column];
    alignas(64) float scores[kQ][kChunk];
    for (int g = 0; g < kQ; g++) {
      std::memset(out + g * M::kPartial, 0, M::kHeadPad * sizeof(float));
      out[g * M::kPartial + M::kHeadPad] = -std::numeric_limits<float>::infinity();
      out[g * M::kPartial + M::kHeadPad + 1] = 0;
    }
    for (u32 chunk = first; chunk < last; chunk += kChunkBlocks) {
      const u32 end = std::min(chunk + kChunkBlocks, last);
      const int positions = int(std::min(end * kBlockPositions, c.position + 1) - chunk * kBlockPositions);
      const u8* blocks = w.kv_block(c.slot, layer, head, chunk);
      for (u32 block = 0; block < end - chunk; block++) score(scores, block * kBlockPositions, query, blocks + block * M::kKvBlockBytes);
      for (int g = 0; g < kQ; g++) {
        each_block(positions, blocks, [&](int at, int count, const u8* block) { Kv::scale_keys(scores[g] + at, count, block); });
        weigh(scores[g], positions, out + g * M::kPartial);
        each_block(positions, blocks, [&](int at, int count, const u8* block) { Kv::scale_values(scores[g] + at, count, block); });
      }
      for (int part = 0; part < kColumns; part++)
        for (int i = 0; i < kHalf; i += kStep) gather(out + part * kHalf + i, scores, positions, blocks, part, i);
    }
  }

  // Calls `work` with the first position of each block, how many there are in it, and the block.
  template <class Work>
  static void each_block(int positions, const u8* block, const Work& work) {
    for (int at = 0; at < positions; at += kBlockPositions, block += M::kKvBlockBytes)
      work(at, std::min(positions - at, kBlockPositions), block);
  }

  // NOTE: keys and values take turns, in which hardware prefetchers lose their way: each line fetches that of the next chunk.
  static void prefetch_next(const u8* line) { prefetch(line + kChunkBlocks * M::kKvBlockBytes); }

  // Scores of the 16 positions of one block.
  static void score(float (&scores)[kQ][kChunk], int at, const float* query, const u8* block) {
    for (int i = 0; i < kHalf; i += kStep) {
      Vec total[kQ][kVectors] = {};
      for (int d = 0; d < M::kHeadDim; d += 2) {
        prefetch_next(block + Kv::key_bytes(d));
        for (int v = 0; v < kVectors; v++) {
          Vec even, odd;
          Kv::keys(block, d, i + v * kLanes, even, odd);
          for (int g = 0; g < kQ; g++) {
            total[g][v] += even * query[g * M::kHeadPad + d];
            total[g][v] += odd * query[g * M::kHeadPad + d + 1];
          }
        }
      }
      for (int g = 0; g < kQ; g++)
        for (int v = 0; v < kVectors; v++) store(scores[g] + at + i + v * kLanes, total[g][v]);
    }
  }

  // Scores -> weights relative to the largest so far; what was summed before is scaled down to it.
  static void weigh(float* scores, int positions, float* out) {
    const int padded = round_up(positions, kHalf);
    float &largest = out[M::kHeadPad], &total = out[M::kHeadPad + 1];
    Vec best = splat(largest), sums{};
    for (int j = positions; j < padded; j++) scores[j] = -std::numeric_limits<float>::infinity();
    for (int j = 0; j < padded; j += kLanes) best = larger(load(scores + j), best);
    const float now = maximum(best), scale = exp2_fast(largest - now);
    for (int j = 0; j < padded; j++) scores[j] = exp2_fast(scores[j] - now);
    for (int j = positions; j < padded; j++) scores[j] = 0;
    for (int j = 0; j < padded; j += kLanes) sums += load(scores + j);
    total = total * scale + sum(sums);
    largest = now;
    for (int d = 0; d < M::kHeadPad; d++) out[d] *= scale;
  }

  // out[g] += weights x values, for kStep dimensions from i on of column block c.
  static void gather(float* out, const float (&weights)[kQ][kChunk], int positions, const u8* blocks, int c, int i) {
    Vec total[kQ][kVectors];
    for (int g = 0; g < kQ; g++)
      for (int v = 0; v < kVectors; v++) total[g][v] = load(out + g * M::kPartial + v * kLanes);
    for (int j = 0; j < positions; j += 2) {
      const u8* block = blocks + u64(j / kBlockPositions) * M::kKvBlockBytes;
      prefetch_next(block + Kv::value_bytes(j % kBlockPositions, c));
      for (int v = 0; v < kVectors; v++) {
        Vec even, odd;
        Kv::values(block, j % kBlockPositions, c, i + v * kLanes, even, odd);
        for (int g = 0; g < kQ; g++) {
          total[g][v] += even * weights[g][j];
          total[g][v] += odd * weights[g][j + 1];
        }
      }
    }
    for (int g = 0; g < kQ; g++)
      for (int v = 0; v < kVectors; v++) store(out + g * M::kPartial + v * kLanes, total[g][v]);
  }
};

// The parts of each head become its output, always summed in the order of the positions.
template <class M, class S>
struct Combine {
  using Stage = S;

  static void run(Worker<M>& w, u32) {
    for (u32 column = 0; column < w.pass().count; column++) join(w, column);
  }

 private:
  static void join(Worker<M>& w, u32 column) {
    const Share<M> share(w.pass().columns[column].position);
    const Range own = w.range(S::kRange);
    for (u32 tile = own.first; tile < own.first + own.count; tile++) {
      const u32 row = tile * kTileRows, head = row / M::kHeadPad, d = row % M::kHeadPad;
      const u64 kv_head = head / M::kGroup, first = kv_head * share.blocks;
      const u64 begin = share.owner(first), end = share.owner(first + share.blocks - 1) + 1;
      float largest = -std::numeric_limits<float>::infinity(), total = 0, out[kTileRows] = {};
      for (u64 p = begin; p < end; p++) {
        if (share.begin(p) == share.begin(p + 1)) continue;  // more workers than units
        const float* part = partial<M, typename S::Source>(w, column, p, kv_head - share.first_head(p)) + head % M::kGroup * M::kPartial;
        const float maximum = part[M::kHeadPad], now = maximum > largest ? maximum : largest;
        const float before = exp2_fast(largest - now), scale = exp2_fast(maximum - now);
        total = total * before + part[M::kHeadPad + 1] * scale;
        for (int r = 0; r < kTileRows; r++) out[r] = out[r] * before + part[d + r] * scale;
        largest = now;
      }
      float* to = w.values(column, S::kOutput) + row;
      for (int r = 0; r < kTileRows; r++) to[r] = out[r] / total;
    }
  }
};
