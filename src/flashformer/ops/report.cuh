// Log probabilities of a token and of the most likely ones, by the softmax of the logits as the model gives them. The sum of all comes
// with the blocks' first round. The n most likely tokens: of the block whose best one is the r-th best (from 0) at most the best
// n - r are among them, so that few blocks list few tokens each, from which the first block takes the best.
#pragma once
#include "rounds.cuh"

template <class M, class S, int kTeam = M::kFinishers>
struct Report {
  using At = Rounds<M, S, kTeam>;

  // For one finisher, after the first round, which found `all`.
  static FF_DEVICE void note(const Finisher<M>& f, const Meeting& meeting, const Part& all) {
    if (f.lane == 0) {
      store_shared_float(meeting.softmax, logit_of(all.count[1]));
      store_shared_float(meeting.softmax + 4, all.sum());
    }
    __syncwarp();
  }
  // Then, for the same: list this block's tokens that may be among the most likely ones.
  static FF_DEVICE void begin(const Finisher<M>& f, const Sampling& s, const Meeting& meeting, u32 step) {
    const u32 mine = load_shared(At::base(f) + At::kBest + blockIdx.x * 8 + 4);
    u32 rank = 0;
#pragma unroll 1
    for (u32 block = f.lane; block < M::kWorkers; block += 32) {
      const u32 other = load_shared(At::base(f) + At::kBest + block * 8 + 4);
      rank += other < mine || (other == mine && block < blockIdx.x) ? 1 : 0;
    }
    rank = __reduce_add_sync(kAllLanes, rank);
    if (rank >= s.reported) return;
    const u32 at_least = At::nth_best_of_blocks(f, 1, s.reported), most = s.reported - rank;
    Best two;
    u64 entry = kNothing, from = 0;  // lane l: the l-th
    bool missing = true;
#pragma unroll 1
    for (u32 place = 0; place < most; place++) {
      if (missing) two.find(f, s.raw, at_least, from);
      const u64 best = warp_min(two.first);
      if (best == kNothing) break;
      if (f.lane == place) entry = best;
      missing = two.take(best);
      from = best + 1;
    }
    if (f.lane < most) store_words(meeting.lists + 2 * (f.lane * width(s) + rank), (u32)entry, (u32)(entry >> 32), epoch_of(f, step));
  }

  // Behind `begin`, for one finisher of the first block: all that is listed, into shared memory; how many there are.
  static FF_DEVICE u32 gather(const Finisher<M>& f, const Sampling& s, const Meeting& meeting, u32 step) {
    const u32 n = s.reported, ranks = width(s), tag = epoch_of(f, step);
    Wait wait;
    u32 count = 0;
#pragma unroll 1
    for (u32 first = 0; first < n * ranks; first += 32) {
      const u32 at = first + f.lane, rank = at / ranks;
      u64 a = join(~0u, tag), b = a;
      if (rank + at % ranks < n)
        do load_words(meeting.lists + 2 * at, a, b);
        while ((split(a).tag != tag || split(b).tag != tag) && !wait.expired(f.watch));
      __syncwarp();
      const u64 entry = join(split(a).value, split(b).value);
      const u32 there = __ballot_sync(kAllLanes, entry != kNothing);
      if (there == 0) break;  // the lists have ended
      if (there >> f.lane & 1) store_shared64(place(f, count + __popc(there & ((1u << f.lane) - 1))), entry);
      count += __popc(there);
    }
    __syncwarp();
    return count;
  }
  // Where entry i of all that are listed is in shared memory.
  static FF_DEVICE u32 place(const Finisher<M>& f, u32 i) { return At::base(f) + At::kList + i * 8; }
  // For one finisher of the first block: put(place, entry) of those of so many that are reported, the most likely one first.
  template <class Put>
  static FF_DEVICE void sort(const Finisher<M>& f, const Sampling& s, u32 count, Put put) {
#pragma unroll 1
    for (u32 i = f.lane; i < count; i += 32) {
      const u64 entry = load_shared64(place(f, i));
      u32 before = 0;
#pragma unroll 1
      for (u32 k = 0; k < count; k++) before += load_shared64(place(f, k)) < entry ? 1 : 0;
      if (before < s.reported) put(before, entry);
    }
    __syncwarp();
  }
  // The same into shared memory, for `send`.
  static FF_DEVICE void keep(const Finisher<M>& f, const Sampling& s, u32 count) {
    if (f.lane < kMostReported) store_shared64(top(f, f.lane), kNothing);
    __syncwarp();
    sort(f, s, count, [&](u32 at, u64 entry) { store_shared64(top(f, at), entry); });
  }

  // For one finisher of each block: `chosen` is token number `made` of those to be reported. The host is told by the block that has its
  // row, and by the first; of one column also of the most likely tokens.
  static FF_DEVICE void send(const Finisher<M>& f, const Sampling& s, const Meeting& meeting, u32 made, u32 chosen, bool own) {
    u64* report = s.report + (u64)made * kReportWords;
    const float likeliest = load_shared_float(meeting.softmax), sum = load_shared_float(meeting.softmax + 4);
    if (own && f.lane == 0) store_host(report + 1, join(float_bits(s.raw[chosen]), float_bits(likeliest)));
    if (blockIdx.x != 0) return;
    if (f.lane == 0) store_host(report, (u64)(sum * (float)(1ull << kMassBits)));
    if constexpr (M::kColumns == 1)
      if (f.lane < s.reported) store_host(report + 2 + f.lane, load_shared64(top(f, f.lane)));
  }

 private:
  // A lane's two best of its tokens, and how many there are that may be listed.
  struct Best {
    u64 first, second;
    u32 count;

    // Those from `from` on that have at least the logit of order `at_least`.
    FF_DEVICE void find(const Finisher<M>& f, const float* logits, u32 at_least, u64 from) {
      first = second = kNothing;
      count = 0;
      constexpr u32 kAhead = M::kColumns > 1 ? 4 : 1;  // of one column it is rarely asked for: see shortlist.cuh
      each_row<32, 1, kAhead>(f, f.lane, logits, [&](u32 row, float x) {
        const u64 candidate = ranked(x, row);
        if ((u32)(candidate >> 32) > at_least || candidate < from) return;
        if (candidate < first) second = first, first = candidate;
        else if (candidate < second) second = candidate;
        count++;
      });
    }
    // The best of all lanes is listed. Whether a lane has more than it knows of, for a whole warp.
    FF_DEVICE bool take(u64 best) {
      if (first == best) first = second, second = kNothing, count--;
      return __any_sync(kAllLanes, first == kNothing && count > 0);
    }
  };
  // Of lists [place in its list][width: rank of its block].
  static FF_DEVICE u32 width(const Sampling& s) { return min(s.reported, M::kWorkers); }
  static FF_DEVICE u32 top(const Finisher<M>& f, u32 i) { return At::base(f) + At::kTop + i * 8; }
};
