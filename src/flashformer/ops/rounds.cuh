// Where all blocks meet within a token that is chosen by more than its score: in each round every block tells its part, and all
// learn what comes of all parts. All finishers share the work on a token, or each works on tokens of its own. They have the shared memory
// of the reductions, which are over.
#pragma once
#include "roles.cuh"

#include "sampling.hpp"

// Tag of what finishers tell each other of the token, or the pass, that is being made.
template <class M>
FF_DEVICE u32 epoch_of(const Finisher<M>& f, u32 step) { return f.p.epoch + Block<M>::fresh(step); }

// use(row, its kEach values) for every kLanes-th group of rows of the head among those that this block has, ascending.
// NOTE: values are fetched some rows ahead, the more the fewer warps share them: the trip is longer than what is done with them.
template <u32 kLanes, u32 kEach, u32 kAhead = (kLanes > 32 ? 3 : 6), class M, class Use>
FF_DEVICE void each_row(const Finisher<M>& f, u32 lane, const float* values, Use use) {
  constexpr u32 kRows = 4 / kEach, kStep = kLanes * kRows;
  const uint2 tiles = f.tiles(M::kHeadTiles);
  const u32 end = min((tiles.x + tiles.y) * 8, M::kVocab);
  u32 row = tiles.x * 8 + lane * kRows;
  float4 next[kAhead];
#pragma unroll
  for (u32 k = 0; k < kAhead; k++) next[k] = row + k * kStep < end ? *(const float4*)(values + (row + k * kStep) * kEach) : float4{};
#pragma unroll 1
  for (; row < end; row += kStep) {
    float4 v = next[0];
#pragma unroll
    for (u32 k = 1; k < kAhead; k++) next[k - 1] = next[k];
    if (row + kAhead * kStep < end) next[kAhead - 1] = *(const float4*)(values + (row + kAhead * kStep) * kEach);
    if constexpr (kEach == 2) {
      use(row, v.x, v.y);
      if (row + 1 < end) use(row + 1, v.z, v.w);
    } else {
#pragma unroll 1
      for (u32 i = row; i < min(row + kRows, end); i++) {
        use(i, v.x);
        v = {v.y, v.z, v.w, v.x};
      }
    }
  }
}

FF_DEVICE u64 warp_min(u64 x) {
  const u32 high = __reduce_min_sync(kAllLanes, (u32)(x >> 32));
  return join(__reduce_min_sync(kAllLanes, (u32)(x >> 32) == high ? (u32)x : ~0u), high);
}

// The n-th best of all lanes' orders, or up to 1/256 of their range above it: at least n are no worse. ~0 where there are fewer than n below ~0.
template <int kEach>
FF_DEVICE u32 nth_best(const u32 (&orders)[kEach], u32 n) {
  u32 least = ~0u, most = 0, there = 0;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    least = min(least, orders[i]);
    if (orders[i] != ~0u) most = orders[i] > most ? orders[i] : most, there++;
  }
  if (__reduce_add_sync(kAllLanes, there) < n) return ~0u;
  u32 low = __reduce_min_sync(kAllLanes, least), high = __reduce_max_sync(kAllLanes, most);
#pragma unroll 1
  for (u32 i = 0; i < 8; i++) {
    const u32 middle = low + (high - low) / 2;
    u32 enough = 0;
#pragma unroll
    for (int k = 0; k < kEach; k++) enough += orders[k] <= middle ? 1 : 0;
    enough = __reduce_add_sync(kAllLanes, enough) >= n;
    low = enough ? low : middle;
    high = enough ? middle : high;
  }
  return high;
}

// What a block tells in a round, and what comes of all: the words have other meanings in the first round than in later ones.
struct Part {
  static constexpr int kWords = 10;
  u64 candidate;  // `ranked`: the best score, and its token
  u32 order;      // of the candidate's logit
  u32 news;       // first round: is the launch cancelled? Later the largest order within `probe` that a token has
  u32 count[2];  // first round: the orders of the largest logit and of the largest one as the model gives them
  // First round: [0] as a float, the sum of exponentials of what the model gives, relative to its largest one; [1] how many tokens a block
  // lists (`Lists`), of which nothing comes for all.
  u64 mass[2];

  static FF_DEVICE Part of(u64 candidate, bool first) {  // and nothing else
    return {candidate, ~0u, 0, {first ? ~0u : 0, first ? ~0u : 0}, {0, 0}};
  }
  static FF_DEVICE Part nothing(bool first) { return of(kNothing, first); }
  static FF_DEVICE Part unpack(const u32 (&w)[kWords]) {
    return {join(w[0], w[1]), w[2], w[3], {w[4], w[5]}, {join(w[6], w[7]), join(w[8], w[9])}};
  }
  FF_DEVICE void pack(u32 (&w)[kWords]) const {
    const u32 words[kWords] = {(u32)candidate, (u32)(candidate >> 32), order, news, count[0], count[1],
                               (u32)mass[0], (u32)(mass[0] >> 32), (u32)mass[1], (u32)(mass[1] >> 32)};
#pragma unroll
    for (int i = 0; i < kWords; i++) w[i] = words[i];
  }

  FF_DEVICE float score() const { return logit_of((u32)(candidate >> 32)); }
  FF_DEVICE u32 token() const { return (u32)candidate; }
  FF_DEVICE float sum() const { return __uint_as_float((u32)mass[0]); }
  FF_DEVICE float sum(u32 largest) const {  // relative to another one. NOTE: of nothing, and infinity - infinity, come no NaN
    const float factor = exp2_approx((logit_of(count[1]) - logit_of(largest)) * kLog2E);
    return sum() > 0 && count[1] != largest ? sum() * factor : sum();
  }

  FF_DEVICE void add_logit(float x) { merge({kNothing, ~0u, 0, {~0u, order_of(x)}, {__float_as_uint(1.f), 0}}, true); }
  FF_DEVICE void merge(const Part& o, bool first) {
    if (o.candidate < candidate) {
      candidate = o.candidate;
      order = o.order;
    }
    news = news > o.news ? news : o.news;
    if (first) {
      const u32 largest = min(count[1], o.count[1]);
      mass[0] = __float_as_uint(sum(largest) + o.sum(largest));
      count[0] = min(count[0], o.count[0]);
      count[1] = largest;
    } else {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        count[i] += o.count[i];
        mass[i] += o.mass[i];
      }
    }
  }
  // With those of all lanes.
  FF_DEVICE void merge_lanes(bool first) {
    const u64 best = warp_min(candidate);
    order = __reduce_min_sync(kAllLanes, candidate == best ? order : ~0u);
    candidate = best;
    news = __reduce_max_sync(kAllLanes, news);
    if (first) {
      const u32 largest = __reduce_min_sync(kAllLanes, count[1]);
      mass[0] = __float_as_uint(warp_sum(sum(largest)));
      count[0] = __reduce_min_sync(kAllLanes, count[0]);
      count[1] = largest;
    } else {
      constexpr int kLow = 27;  // bits whose sum fits
#pragma unroll
      for (int i = 0; i < 2; i++) {
        count[i] = __reduce_add_sync(kAllLanes, count[i]);
        const u32 low = __reduce_add_sync(kAllLanes, (u32)mass[i] & ((1u << kLow) - 1));
        mass[i] = ((u64)__reduce_add_sync(kAllLanes, (u32)(mass[i] >> kLow)) << kLow) + low;
      }
    }
  }
};

constexpr int kMostListed = kMostReported * (kMostReported + 1) / 2;  // tokens that a report's lists hold: see report.cuh

// Where blocks meet for one token, and what stays of it.
struct Meeting {
  u64* rounds;  // [2 by epoch][2 by round][blocks] parts
  u64* lists;   // of the report
  u32 softmax;  // in shared memory: (largest, sum of exponentials) of the logits as the model gives them
};

// `kTeam` finishers work on a token: all, or one.
template <class M, class S, int kTeam = M::kFinishers>
struct Rounds {
  static constexpr u32 kLanes = kTeam * 32;
  // Of a team in shared memory:
  static constexpr int kOwn = 0, kAll = kOwn + kTeam * Part::kWords * 4;  // parts of the finishers: of this block, of all
  // [blocks] (order of the largest logit, or of one column what is listed; order of the likeliest)
  static constexpr int kBest = kAll + kTeam * Part::kWords * 4;
  static constexpr int kList = kBest + M::kWorkers * 8;                   // of the report
  static constexpr int kTop = kList + kMostListed * 8;                    // of one column the same in order, as far as it is reported
  static constexpr int kBytes = kTop + (M::kColumns == 1) * kMostReported * 8;
  static constexpr int kSoftmax = kBytes * (M::kFinishers / kTeam);       // [columns] see Meeting
  static constexpr int kEnd = kSoftmax + M::kColumns * 8;
  static constexpr u64 kGivenUp = 0;  // in the place of a candidate, better than any: a wait took too long
  static_assert(kEnd <= Layout<M>::kResidual && Part::kWords == S::kPartWords, "see codegen.py");

  static FF_DEVICE u32 base(const Finisher<M>& f) { return f.shared + (kTeam == M::kFinishers ? 0 : f.index * kBytes); }
  static FF_DEVICE u32 lane(const Finisher<M>& f) { return (kTeam == M::kFinishers ? f.index * 32 : 0) + f.lane; }

  // All blocks' parts as one, for a team of all finishers.
  static FF_DEVICE Part meet(const Finisher<M>& f, const Sampling& s, const Meeting& meeting, u32 step, u32 round, Part mine) {
    const Round r = round_of(f, meeting, step, round);
    // NOTE: a loop, so that the code is there once.
#pragma unroll 1
    for (int place = kOwn; place <= kAll; place += kAll - kOwn) {
      if (place == kAll) {
        Looks<M> looks(f.looks_place(S::kWhere));
        mine = look<1>(f, looks, r);
      }
      mine = merge_finishers(f, place, mine, r.first);
      if (place == kOwn && f.index == 0 && f.lane == 0) publish(s, r, mine);
      __syncwarp();
    }
    return mine;
  }
  // The same for a team of one, in two halves.
  static FF_DEVICE void tell(const Finisher<M>& f, const Sampling& s, const Meeting& meeting, u32 step, u32 round, Part mine) {
    const Round r = round_of(f, meeting, step, round);
    mine.merge_lanes(r.first);
    if (f.lane == 0) publish(s, r, mine);
    __syncwarp();
  }
  static FF_DEVICE Part hear(const Finisher<M>& f, Looks<M>& looks, const Meeting& meeting, u32 step, u32 round) {
    const Round r = round_of(f, meeting, step, round);
    Part all = look<2>(f, looks, r);
    all.merge_lanes(r.first);
    return all;
  }

  // An order that the best tokens of at least n blocks have or surpass; `which`: 0 by their logits, 1 by those of the model itself.
  static FF_DEVICE u32 nth_best_of_blocks(const Finisher<M>& f, u32 which, u32 n) {
    u32 best[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const u32 block = f.lane + i * 32;
      best[i] = block < M::kWorkers ? load_shared(base(f) + kBest + block * 8 + which * 4) : ~0u;
    }
    return nth_best(best, n);
  }

 private:
  static constexpr int kEach = ceil_div((int)M::kWorkers, 32);

  struct Round {
    u64* parts;
    u32 tag;
    bool first;
  };
  // NOTE: two copies by round, since a fast block may be a round ahead of a slow one, and two by token.
  static FF_DEVICE Round round_of(const Finisher<M>& f, const Meeting& meeting, u32 step, u32 round) {
    const u32 epoch = epoch_of(f, step), tag = epoch * S::kRoundTags + round % S::kRoundTags;
    return {meeting.rounds + (epoch % 2 * 2 + round % 2) * M::kWorkers * Part::kWords, tag, round == 0};
  }

  static FF_DEVICE void publish(const Sampling& s, const Round& r, Part& mine) {
    if (s.flags & kSelected && mine.token() < M::kVocab) mine.order = order_of(s.scores[2 * mine.token()]);
    u32 w[Part::kWords];
    mine.pack(w);
#pragma unroll
    for (int i = 0; i < Part::kWords; i += 2) store_words(r.parts + blockIdx.x * Part::kWords + i, w[i], w[i + 1], r.tag);
  }

  // This finisher's share of all blocks' parts, `kTogether` a lane at a time: a trip to memory for each, and registers for all.
  template <u32 kTogether>
  static FF_DEVICE Part look(const Finisher<M>& f, Looks<M>& looks, const Round& r) {
    Part sum = Part::nothing(r.first);
#pragma unroll 1
    for (u32 block = lane(f); block - f.lane < M::kWorkers; block += kLanes * kTogether) {
      u64 w[kTogether][Part::kWords];
#pragma unroll
      for (u32 i = 0; i < kTogether * Part::kWords; i++) w[i / Part::kWords][i % Part::kWords] = join(0, r.tag);
      bool here;
      do {
        if (!looks.again(f.watch)) {
          sum.candidate = kGivenUp;
          return sum;
        }
#pragma unroll
        for (u32 k = 0; k < kTogether; k++)
#pragma unroll
          for (int i = 0; i < Part::kWords; i += 2) {
            const u64* from = r.parts + block * Part::kWords + (k * kLanes * Part::kWords + i);
            if (block + k * kLanes < M::kWorkers) load_words(from, w[k][i], w[k][i + 1]);
          }
        here = true;
#pragma unroll
        for (u32 i = 0; i < kTogether * Part::kWords; i++) here = here && split(w[i / Part::kWords][i % Part::kWords]).tag == r.tag;
      } while (!looks.found(here, f.lane));
#pragma unroll
      for (u32 k = 0; k < kTogether; k++) {
        if (block + k * kLanes >= M::kWorkers) break;
        u32 values[Part::kWords];
#pragma unroll
        for (int i = 0; i < Part::kWords; i++) values[i] = split(w[k][i]).value;
        const Part part = Part::unpack(values);
        if (r.first) {
          const u32 best = base(f) + kBest + (block + k * kLanes) * 8;
          store_shared(best, M::kColumns > 1 ? part.count[0] : (u32)part.mass[1]);
          store_shared(best + 4, part.count[1]);
        }
        sum.merge(part, r.first);
      }
    }
    __syncwarp();
    return sum;
  }

  // The parts of all lanes of all finishers as one.
  static FF_DEVICE Part merge_finishers(const Finisher<M>& f, int place, Part mine, bool first) {
    // NOTE: a loop, so that the code is there once.
#pragma unroll 1
    for (bool met = false;; met = true) {
      mine.merge_lanes(first);
      if (met) return mine;
      u32 w[Part::kWords];
      mine.pack(w);
      if (f.lane == 0)
#pragma unroll
        for (int i = 0; i < Part::kWords; i++) store_shared(f.shared + place + (f.index * Part::kWords + i) * 4, w[i]);
      f.sync();
      mine = Part::nothing(first);
      if (f.lane < M::kFinishers) {
#pragma unroll
        for (int i = 0; i < Part::kWords; i++) w[i] = load_shared(f.shared + place + (f.lane * Part::kWords + i) * 4);
        mine = Part::unpack(w);
      }
      __syncwarp();
    }
  }
};
