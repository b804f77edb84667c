// What one worker sees while it walks through a token: its tape, the shared vectors, its share of every stage.
#pragma once
#include <algorithm>
#include <limits>

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
struct Shared {
  const Params params;
  u8* const kv;                 // [layers][kv heads][blocks] blocks
  float* const values;          // buffers of the plan
  float* const scratch;         // [workers]
  Candidate* const candidates;  // [workers]
  Barrier barrier;
  Launch launch{};
  std::atomic<u32> cancel{0};    // set by the host: end after the present token
  u32 cancelled[2] = {0, 0};     // worker 0's look at it, by parity of the step, so that all workers see the same
  std::atomic<u32> given_up{0};  // 1 + (stage << 16 | layer) of the first wait that took too long
};

constexpr int kAheadBytes = 128 << 10;  // what is fetched at a barrier at most: a part of the second cache

template <class M>
class Worker {
 public:
  Worker(Shared& shared, u32 index) : index(index), s_(shared) {}

  const u32 index;
  u32 token = 0;
  u32 position = 0;
  bool wants_head = false;

  // Everything that this worker does for one stage, then the barrier, where the tape's next lines are fetched so that the memory
  // does not idle. After a wait that took too long nobody waits any more.
  template <class Operator>
  void run(u32 layer = 0) {
    Operator::run(*this, layer);
    const u8 *next = tape_ + kPrefetchBytes, *const last = next + kAheadBytes;
    const auto look_ahead = [&next, last] {
      for (int i = 0; i < 2 && next < last; i++, next += kLineBytes) prefetch(next);
    };
    if (s_.barrier.meet(goal_, M::kWorkers, s_.launch.limit, s_.given_up, look_ahead)) return;
    u32 none = 0;
    s_.given_up.compare_exchange_strong(none, 1 + (Operator::Stage::kWhere << 16 | layer));
  }

  void begin(u32 step) {
    const Launch& l = s_.launch;
    if (step < l.forced_count) token = l.forced[step];
    position = l.start + step;
    wants_head = l.logits || step + 1 >= l.forced_count;
    tape_ = s_.params.tape + s_.params.tape_start[index];
    logits_ = l.logits ? l.logits + u64(step) * M::kVocab : nullptr;
    forget_candidate();
    finite_ = true;
    if (index == 0) s_.cancelled[step & 1] = s_.cancel.load(std::memory_order_relaxed);
  }

  // After the last barrier of a step: whether the launch ends here, the same for every worker.
  bool ends(u32 step) const {
    const Launch& l = s_.launch;
    if (s_.cancelled[step & 1] || s_.given_up.load(std::memory_order_relaxed)) return true;
    if (step + 1 < l.forced_count) return false;
    for (u32 i = 0; i < l.stop_count; i++)
      if (l.stop[i] == token) return true;
    return token >= M::kVocab;  // none could be chosen
  }

  Range range(u32 i) const { return s_.params.ranges[index * M::kRanges + i]; }
  float* values(int offset) const { return s_.values + offset; }
  const float* layer_vectors(u32 layer) const { return s_.params.vectors + u64(layer) * M::kLayerVectors; }
  const float* turns() const { return s_.params.rope + u64(position) * M::kHeadDim; }
  float* scratch() const { return s_.scratch + u64(index) * M::kScratch; }
  const Candidate& candidate(u32 worker) const { return s_.candidates[worker]; }
  const Sampling& sampling() const { return s_.launch.sampling; }
  u64* report() const { return sampling().report + u64(position + 1 - s_.launch.start - s_.launch.forced_count) * kReportWords; }

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

  u8* kv_block(u32 layer, u32 head, u32 block) const {
    return s_.kv + ((u64(layer) * M::kKvHeads + head) * M::kKvBlocks + block) * M::kKvBlockBytes;
  }

  void logit(u32 row, float value) {
    if (logits_) logits_[row] = value;
    finite_ &= value < kInfinity;
    const Sampling& s = sampling();
    if (s.flags) {
      if (s.flags & kReported) s.raw[row] = value;
      value = s.scores[row] = adjusted(s, value, row);
    }
    propose(row, value);
  }

  void propose(u32 row, float score) {
    if (score > best_.score) best_ = {score, row};
  }

  void forget_candidate() { best_ = {-kInfinity, kNoneAllowed}; }

  // NOTE: only here and not as the logits come: while this step begins, others may still look at the candidates of the last one.
  void publish_candidate() { s_.candidates[index] = finite_ ? best_ : Candidate{kInfinity, kNotFinite}; }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  Shared& s_;
  u64 goal_ = 0;
  const u8* tape_ = nullptr;
  float* logits_ = nullptr;
  Candidate best_{};
  bool finite_ = true;  // the logits so far: neither NaN nor infinite
};
