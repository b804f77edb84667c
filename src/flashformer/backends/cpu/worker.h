// What one worker sees while it walks through a pass: its columns, its tape, the shared vectors, its share of every stage.
#pragma once
#include <algorithm>
#include <limits>

#include "columns.h"
#include "sampling.hpp"
#include "threads.h"

struct Range {  // tiles
  u32 first, count;
};

struct Segment {  // tiles of the embedding table that lie together
  u64 offset;
  u32 first, count;
};

struct alignas(64) Candidate {  // for the next token, one cache line each
  float score;
  u32 token;
};

// What all workers share.
template <class M>
struct Shared {
  const Params params;
  u8* const kv;                 // [slots][layers][kv heads][blocks] blocks
  float* const values;          // [columns] buffers of the plan
  float* const scratch;         // [workers][columns]
  Candidate* const candidates;  // [workers][columns]
  Barrier barrier;
  Schedule<M> schedule;
  std::atomic<u32> given_up{0};  // 1 + (stage << 16 | layer) of the first wait that took too long
};

constexpr int kAheadBytes = 128 << 10;  // what is fetched at a barrier at most: a part of the second cache

template <class M>
class Worker {
 public:
  Worker(Shared<M>& shared, u32 index) : index(index), s_(shared) {}

  const u32 index;

  const Pass<M>& pass() const { return s_.schedule.pass(parity_); }

  // Everything that this worker does for one stage, then the barrier, where the tape's next lines are fetched so that the memory
  // does not idle. After a wait that took too long nobody waits any more.
  template <class Operator>
  void run(u32 layer = 0) {
    Operator::run(*this, layer);
    const u8 *next = tape_ + kPrefetchBytes, *const last = next + kAheadBytes;
    const auto look_ahead = [&next, last] {
      for (int i = 0; i < 2 && next < last; i++, next += kLineBytes) prefetch(next);
    };
    if (s_.barrier.meet(goal_, M::kWorkers, s_.schedule.limit(), s_.given_up, look_ahead)) return;
    u32 none = 0;
    s_.given_up.compare_exchange_strong(none, 1 + (Operator::Stage::kWhere << 16 | layer));
  }

  // Go on with the pass that has been laid.
  void begin() {
    parity_ ^= 1;
    tape_ = s_.params.tape + s_.params.tape_start[index];
    for (u32 i = 0; i < M::kColumns; i++) {
      forget_candidate(i);
      finite_[i] = true;
    }
  }

  bool given_up() const { return s_.given_up.load(std::memory_order_relaxed); }
  Schedule<M>& schedule() const { return s_.schedule; }

  Range range(u32 i) const { return s_.params.ranges[index * M::kRanges + i]; }
  float* values(u32 column, int offset) const { return s_.values + column * M::kValues + offset; }
  const float* layer_vectors(u32 layer) const { return s_.params.vectors + u64(layer) * M::kLayerVectors; }
  const float* turns(u32 position) const { return s_.params.rope + u64(position) * M::kHeadDim; }
  float* scratch(u32 column = 0) const { return s_.scratch + (u64(index) * M::kColumns + column) * M::kScratch; }
  Candidate& candidate(u32 worker, u32 scored) const { return s_.candidates[worker * M::kColumns + scored]; }

  // The next tile of the tape, which is read straight ahead.
  const u8* next_tile(u64 bytes) {
    const u8* tile = tape_;
    tape_ += bytes;
    return tile;
  }

  // The tile of the embedding table that has a token's row.
  const u8* embedding_tile(u32 row) const {
    const Segment* segment = s_.params.embedding;
    while (row / kTileRows >= segment->first + segment->count) segment++;
    return s_.params.tape + segment->offset + u64(row / kTileRows - segment->first) * M::Table::tile_bytes(M::kTableColumns);
  }

  u8* kv_block(u32 slot, u32 layer, u32 head, u32 block) const {
    return s_.kv + (((u64(slot) * M::kLayers + layer) * M::kKvHeads + head) * M::kKvBlocks + block) * M::kKvBlockBytes;
  }

  const Column& scored(u32 i) const { return pass().columns[pass().scored[i]]; }

  // The logit of a row for scored column i, which is `column`.
  void logit(u32 i, const Column& column, u32 row, float value) {
    if (column.logits) column.logits[row] = value;
    finite_[i] &= value < kInfinity;
    const Sampling& s = column.sampling;
    if (s.flags) {
      if (s.flags & kReported) s.raw[row] = value;
      value = s.scores[row] = adjusted(s, value, row, s.flags & kPenalised ? s.seen[row] + column.unseen(row) : 0);
    }
    propose(i, row, value);
  }

  void propose(u32 i, u32 row, float score) {
    if (score > best_[i].score) best_[i] = {score, row};
  }

  void forget_candidate(u32 i) { best_[i] = {-kInfinity, kNoneAllowed}; }

  // NOTE: only here and not as the logits come: while this pass begins, others may still look at the candidates of the last one.
  void publish_candidate(u32 i) { candidate(index, i) = finite_[i] ? best_[i] : Candidate{kInfinity, kNotFinite}; }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  Shared<M>& s_;
  u64 goal_ = 0;
  u32 parity_ = 0;  // of the number of passes
  const u8* tape_ = nullptr;
  Candidate best_[M::kColumns]{};
  bool finite_[M::kColumns]{};  // the logits so far: neither NaN nor infinite
};
