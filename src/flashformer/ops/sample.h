// The choice of a token. Greedily: the largest logit, the lowest id among equals. With a temperature: the largest sum of logit /
// temperature and Gumbel noise among the tokens that top-k, top-p and min-p leave, which is a sample of their softmax.
//
// Logits lie where all workers see them; each finds the selection's limit for itself, and its best candidate among its own rows.
#pragma once
#include "worker.h"

// The order (`order_of`) of the last token that a selection keeps. Top-k first; top-p on what it left; min-p against the largest.
// Whoever ties with the last one stays, too.
class Selection {
 public:
  static u32 limit(const Sampling& s, u32 vocab) {
    Selection all{s, vocab, -std::numeric_limits<float>::infinity()};
    for (u32 i = 0; i < vocab; i++) all.largest_ = s.scores[i] > all.largest_ ? s.scores[i] : all.largest_;
    u32 limit = ~0u;
    if (s.flags & kTopK) limit = all.search(limit, [&](u32) { return u64(1); }, s.top_k);
    if (s.flags & kTopP) {
      const auto mass_of = [&](u32 i) { return mass((all.largest_ - s.scores[i]) * s.mass_scale); };
      u64 total = 0;
      for (u32 i = 0; i < vocab; i++) total += order_of(s.scores[i]) <= limit ? mass_of(i) : 0;
      limit = all.search(limit, mass_of, top_p_mass(s, total));
    }
    if (s.flags & kMinP) {
      const u32 order = order_of(all.largest_ + s.min_p_margin);
      limit = order < limit ? order : limit;
    }
    return limit;
  }

 private:
  static constexpr int kBits = 11;  // of the order, a round

  Selection(const Sampling& s, u32 vocab, float largest) : s_(s), vocab_(vocab), largest_(largest) {}

  // The smallest order at which the weights of all tokens up to it reach `target`; `most` if they never do.
  template <class WeightOf>
  u32 search(u32 most, WeightOf weight_of, u64 target) const {
    u32 prefix = 0, known = 0;  // the first `known` bits
    u64 before = 0;             // weight of smaller prefixes
    while (known < 32) {
      const u32 bits = 32 - known < kBits ? 32 - known : kBits, left = 32 - known - bits;
      u64 weights[1 << kBits] = {};
      for (u32 i = 0; i < vocab_; i++) {
        const u32 order = order_of(s_.scores[i]);
        if (order <= most && u64(order) >> (left + bits) == prefix) weights[order >> left & ((1u << bits) - 1)] += weight_of(i);
      }
      u32 bin = 0;
      while (bin < 1u << bits && before + weights[bin] < target) before += weights[bin++];
      if (bin == 1u << bits) return most;
      prefix = prefix << bits | bin;
      known += bits;
    }
    return prefix;
  }

  const Sampling& s_;
  const u32 vocab_;
  float largest_;
};

// A stage: this worker's candidate among its rows for each column with a temperature, S is the head's.
template <class M, class S>
struct Draw {
  using Stage = S;

  static void run(Worker<M>& w, u32 layer) {
    for (u32 i = 0; i < w.pass().scored_count; i++) {
      const Column& column = w.scored(i);
      if (column.sampling.flags & kSampled) draw(w, i, column, w.range(S::kRange + layer * M::kLayerRanges));
    }
  }

 private:
  static constexpr u32 kBatch = 64;

  static void draw(Worker<M>& w, u32 i, const Column& column, Range own) {
    const Sampling& s = column.sampling;
    const u32 limit = s.flags & kSelected ? Selection::limit(s, M::kVocab) : ~0u;
    const u32 end = std::min((own.first + own.count) * kTileRows, M::kVocab), position = column.position + 1;
    w.forget_candidate(i);
    if (s.flags & kSelected) {
      for (u32 row = own.first * kTileRows; row < end; row++)
        if (order_of(s.scores[row]) <= limit) w.propose(i, row, score(s, s.scores[row], position, row));
    } else {
      for (u32 row = own.first * kTileRows; row < end; row += kBatch) score_all(w, i, s, position, row, std::min(end - row, kBatch));
    }
    w.publish_candidate(i);
  }

  // Every token has noise: the loops vectorise.
  static void score_all(Worker<M>& w, u32 i, const Sampling& s, u32 position, u32 first, u32 count) {
    static_assert(kTileRows % 4 == 0, "a batch begins with a block of random numbers");
    u32 random[kBatch / 4][4];
    float noise[kBatch];
    for (u32 k = 0; k < kBatch / 4; k++) philox(s.seed, position, first / 4 + k, random[k]);
    for (u32 k = 0; k < kBatch; k++) noise[k] = gumbel(random[k / 4][k % 4]);
    for (u32 k = 0; k < count; k++) w.propose(i, first + k, fused(s.scores[first + k], s.inverse_temperature, noise[k]));
  }
};

template <class M>
struct Sample {
  // The token of scored column i: the best of all workers' candidates. Writes its log probabilities to `words`, where they are wanted.
  static u32 run(const Worker<M>& w, u32 i, const Column& column, u64* words) {
    Candidate best = w.candidate(0, i);
    for (u32 other = 1; other < M::kWorkers; other++) {
      const Candidate c = w.candidate(other, i);
      if (c.score > best.score) best = c;  // workers own ascending rows
    }
    if (best.token < M::kVocab && column.sampling.flags & kReported) report(column.sampling, words, best.token);
    return best.token;
  }

 private:
  static void report(const Sampling& s, u64* words, u32 chosen) {
    u64* top = words + 2;
    float largest = s.raw[0];
    for (u32 i = 1; i < M::kVocab; i++) largest = s.raw[i] > largest ? s.raw[i] : largest;
    u64 total = 0;
    for (u32 i = 0, kept = 0; i < M::kVocab; i++) {
      total += mass((largest - s.raw[i]) * kLog2E);
      const u64 entry = ranked(s.raw[i], i);
      if (kept == s.reported && (kept == 0 || entry > top[kept - 1])) continue;
      u32 at = kept < s.reported ? kept++ : kept - 1;
      for (; at > 0 && top[at - 1] > entry; at--) top[at] = top[at - 1];
      top[at] = entry;
    }
    words[0] = total;
    words[1] = u64(float_bits(largest)) << 32 | float_bits(s.raw[chosen]);
  }
};
