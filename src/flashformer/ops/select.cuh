// Top-k, top-p and min-p over all blocks' logits, exactly: a radix search for the order (`order_of`) of the last token that is kept.
//
// A round takes the next bits of the order: each block counts its tokens by those bits, and sums their probability mass, in shared
// memory; adds what it found to one histogram of all; and when all have, each finds the same bin for itself. Sums are of integers,
// so that they do not depend on who comes first. A bin with one token ends the search, as a rule after two rounds.
#pragma once
#include "roles.cuh"

#include "sampling.hpp"

// Every kLanes-th row of the head of those that this block has, from the `lane`-th on.
template <class M, u32 kLanes>
struct OwnRows {
  u32 first, end;

  FF_DEVICE OwnRows(const Finisher<M>& f, u32 lane) {
    const uint2 tiles = f.tiles(M::kHeadTiles);
    first = tiles.x * 8 + lane;
    end = min((tiles.x + tiles.y) * 8, M::kVocab);
  }

  // use(row, its value), ascending. NOTE: values are fetched some rows ahead: the trip is longer than what is done with them.
  template <class Use>
  FF_DEVICE void each(const float* values, Use use) const {
    constexpr u32 kAhead = 4;
    float next[kAhead];
#pragma unroll
    for (u32 k = 0; k < kAhead; k++) next[k] = first + k * kLanes < end ? values[first + k * kLanes] : 0;
#pragma unroll 1
    for (u32 row = first; row < end; row += kLanes) {
      const float value = next[0];
#pragma unroll
      for (u32 k = 1; k < kAhead; k++) next[k - 1] = next[k];
      if (row + kAhead * kLanes < end) next[kAhead - 1] = values[row + kAhead * kLanes];
      use(row, value);
    }
  }
};

// Those of one lane of all finishers together.
template <class M>
FF_DEVICE auto shared_rows(const Finisher<M>& f) {
  return OwnRows<M, M::kFinishers * 32>(f, f.index * 32 + f.lane);
}

// Where all blocks meet within a token, and the shared memory that finishers have until it ends: that of reductions and attention.
template <class M, class S>
struct Meeting {
  static constexpr int kNotes = 0;     // what the finishers of a block tell each other: 8 bytes each, then 8 for all
  static constexpr int kScratch = 64;  // the histogram
  static constexpr int kWords = ceil_div((int)M::kWorkers, 32);

  // The words (a, b) of all blocks in round `round` of this token, for the first finisher: lane l gets those of l, l + 32, ...
  // With kFence, what this block wrote before is visible to whoever has met it.
  template <bool kFence>
  static FF_DEVICE void exchange(const Finisher<M>& f, u32 step, u32 round, u32 a, u32 b, u32 (&all)[kWords][2]) {
    const u32 epoch = f.p.epoch + Block<M>::fresh(step);
    if constexpr (kFence) fence_device();
    u64* words = f.words(S::kRounds) + round * 2 * M::kWorkers;
    if (f.lane == 0) store_words(words + 2 * blockIdx.x, a, b, epoch);
    Looks<M> looks(f.looks_place(S::kWhere));
    bool here;
#pragma unroll 1
    do {
      if (!looks.again(f.watch)) break;
      u64 w[kWords][2];  // all at once: one trip a look
#pragma unroll
      for (int i = 0; i < kWords; i++) {
        w[i][0] = w[i][1] = join(~0u, epoch);
        if (f.lane + i * 32 < M::kWorkers) load_words(words + 2 * (f.lane + i * 32), w[i][0], w[i][1]);
      }
      here = true;
#pragma unroll
      for (int i = 0; i < kWords; i++) {
        here = here && split(w[i][0]).tag == epoch && split(w[i][1]).tag == epoch;
        all[i][0] = split(w[i][0]).value;
        all[i][1] = split(w[i][1]).value;
      }
    } while (!looks.found(here, f.lane));
    if constexpr (kFence) fence_device();
  }
};

template <class M, class S>
struct Selection {
  using L = Layout<M>;
  using At = Meeting<M, S>;

  // The order of the last token that is kept; `largest` is that of the largest logit. The same for all finishers of all blocks.
  static FF_DEVICE u32 limit(Finisher<M>& f, u32 step, u32 largest) {
    const Sampling& s = f.p.sampling;
    u32 limit = ~0u, levels = 0;
    u64 total = 0;  // mass of what top-k keeps; 0: not known
    // Top-k, then top-p of what it left. NOTE: a loop, so that the code is there once.
#pragma unroll 1
    for (u32 phase = 0; phase < 2; phase++) {
      if (!(s.flags & (phase ? kTopP : kTopK))) continue;
      Range r{0, 32, limit};
      Weight before{}, bin{};
      u64 target = phase == 0 ? s.top_k : total ? top_p_mass(s, total) : 0;
      u32 level = 0;
      bool follows = phase == 1;  // what top-k counted in the same range serves top-p, too
#pragma unroll 1
      do {
        const bool known = follows && level < levels;
        const u32 round = known ? level : phase * kLevels + level;
        u32* histogram = s.histograms + ((step & 1) * 2 * kLevels + round) * kBins * 3;
        if (!known) count(f, step, round, histogram, r, logit_of(largest));
        load(f, histogram);
        const u32 found = find(f, phase, target, before, bin);
        r.prefix = r.prefix << (r.left - r.shift()) | found;
        r.left = r.shift();
        follows = follows && limit >> r.left == r.prefix;
        level++;
      } while (r.left > 0 && bin.count != 1);
      const u32 last = r.prefix << r.left | ((1u << r.left) - 1);
      if (last < limit) limit = last;
      if (phase == 0) {
        total = before.mass + bin.mass;
        levels = level;
      }
    }
    if (s.flags & kMinP) {
      const u32 least = order_of(logit_of(largest) + s.min_p_margin);
      if (least < limit) limit = least;
    }
    return limit;
  }

 private:
  static constexpr int kFit = (L::kResidual - At::kScratch) / 12 * 32 / 33;
  static constexpr int kBits = kFit >= 2048 ? 11 : kFit >= 1024 ? 10 : kFit >= 512 ? 9 : 8;  // of a round
  static constexpr u32 kBins = 1u << kBits, kLevels = ceil_div(32, kBits);
  static constexpr u32 kStride = M::kFinishers * 32;
  static constexpr u32 kPlaces = kBins / 32 * 33;  // NOTE: lanes that read a run of bins each would meet in the same bank
  static_assert(kFit >= 256, "this model leaves too little shared memory for a histogram");
  static_assert(1 + 2 * kLevels <= S::kMostRounds && 4 * kLevels * kBins * 3 <= S::kHistogramWords, "see codegen.py");

  struct Range {  // orders that begin with `prefix` in front of their last `left` bits, and are not above `most`
    u32 prefix, left, most;
    FF_DEVICE u32 shift() const { return left > kBits ? left - kBits : 0; }  // bits behind this round's
    FF_DEVICE bool has(u32 order) const { return order <= most && (left == 32 || order >> left == prefix); }
    FF_DEVICE u32 bin(u32 order) const { return order >> shift() & ((1u << (left - shift())) - 1); }
  };
  struct Weight {
    u32 count;
    u64 mass;
  };

  static FF_DEVICE u32 counts(const Finisher<M>& f) { return f.shared + At::kScratch; }
  static FF_DEVICE u32 masses(const Finisher<M>& f) { return counts(f) + kPlaces * 4; }
  static FF_DEVICE u32 place(u32 bin) { return bin + bin / 32; }

  // This block's share of the histogram, added to all others'; returns when all have added theirs.
  // NOTE: a block sums masses of at most 2^13 tokens, so that halves of 18 bits do not overflow.
  static FF_DEVICE void count(Finisher<M>& f, u32 step, u32 round, u32* histogram, const Range& r, float largest) {
    constexpr u32 kHalf = kMassBits / 2;
    const Sampling& s = f.p.sampling;
    const u32 thread = f.index * 32 + f.lane, low = masses(f), high = low + kPlaces * 4;
    for (u32 i = thread; i < kPlaces * 3; i += kStride) store_shared(counts(f) + i * 4, 0);
    f.sync();
    shared_rows(f).each(s.scores, [&](u32, float x) {
      const u32 order = order_of(x);
      if (!r.has(order)) return;
      const u32 at = place(r.bin(order)) * 4;
      add_shared(counts(f) + at, 1);
      if (s.flags & kTopP) {
        const u64 m = mass((largest - x) * s.mass_scale);
        add_shared(low + at, (u32)m & ((1u << kHalf) - 1));
        add_shared(high + at, (u32)(m >> kHalf));
      }
    });
    // The histograms of the token before, which nobody reads any more, are cleared for the next one.
    if (round == 0 || (round == kLevels && !(s.flags & kTopK))) {
      u32* other = s.histograms + (~step & 1) * 2 * kLevels * kBins * 3;
      for (u32 i = blockIdx.x * kStride + thread; i < 2 * kLevels * kBins * 3; i += M::kWorkers * kStride) other[i] = 0;
    }
    f.sync();
    for (u32 bin = thread; bin < kBins; bin += kStride) {
      const u32 at = place(bin) * 4, n = load_shared(counts(f) + at);
      if (n == 0) continue;
      add_global(histogram + bin, n);
      const u64 m = load_shared(low + at) + ((u64)load_shared(high + at) << kHalf);
      if (m) add_global((u64*)(histogram + kBins) + bin, m);
    }
    f.sync();
    if (f.index == 0) {
      u32 nothing[At::kWords][2];
      At::template exchange<true>(f, step, 1 + round, 0, 0, nothing);
    }
    f.sync();
  }

  static FF_DEVICE void load(const Finisher<M>& f, const u32* histogram) {
    const bool with_mass = f.p.sampling.flags & kTopP;
#pragma unroll 4
    for (u32 bin = f.index * 32 + f.lane; bin < kBins; bin += kStride) {
      const u64 m = with_mass ? load_word((const u64*)(histogram + kBins) + bin) : 0;
      store_shared(counts(f) + place(bin) * 4, load_volatile(histogram + bin));
      store_shared(masses(f) + place(bin) * 8, (u32)m);
      store_shared(masses(f) + place(bin) * 8 + 4, (u32)(m >> 32));
    }
    f.sync();
  }

  // The first bin with which what came `before` reaches the target: of counts in phase 0, of masses in phase 1, where target 0 stands
  // for top-p's share of all. `before` grows by the bins in front of it. Every warp searches for itself.
  static FF_DEVICE u32 find(Finisher<M>& f, u32 phase, u64& target, Weight& before, Weight& bin) {
    constexpr u32 kRun = kBins / 32;  // bins a lane
    Weight mine{};
#pragma unroll 4
    for (u32 i = 0; i < kRun; i++) {
      const Weight w = read(f, f.lane * kRun + i);
      mine.count += w.count;
      mine.mass += w.mass;
    }
    Weight sum = mine;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const u32 n = __shfl_up_sync(kAllLanes, sum.count, o);
      const u64 m = __shfl_up_sync(kAllLanes, sum.mass, o);
      if (f.lane >= o) {
        sum.count += n;
        sum.mass += m;
      }
    }
    const u64 all = __shfl_sync(kAllLanes, sum.mass, 31);
    if (target == 0) target = top_p_mass(f.p.sampling, all);
    const u32 votes = __ballot_sync(kAllLanes, reaches(phase, before, sum, target)), winner = votes ? __ffs(votes) - 1 : 31;
    before.count += __shfl_sync(kAllLanes, sum.count - mine.count, winner);
    before.mass += __shfl_sync(kAllLanes, sum.mass - mine.mass, winner);
    u32 at = winner * kRun;
#pragma unroll 1
    for (const u32 end = at + kRun;; at++) {
      bin = read(f, at);
      if (reaches(phase, before, bin, target) || at + 1 == end) break;
      before.count += bin.count;
      before.mass += bin.mass;
    }
    f.sync();
    return at;
  }
  static FF_DEVICE Weight read(const Finisher<M>& f, u32 bin) {
    const uint2 m = load_shared2(masses(f) + place(bin) * 8);
    return {load_shared(counts(f) + place(bin) * 4), join(m.x, m.y)};
  }
  static FF_DEVICE bool reaches(u32 phase, const Weight& before, const Weight& more, u64 target) {
    return phase == 0 ? before.count + more.count >= target : before.mass + more.mass >= target;
  }
};
