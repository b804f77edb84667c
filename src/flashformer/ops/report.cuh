// Log probabilities of a token and of the most likely ones, by the softmax of the logits as the model gives them. Each block sums the
// mass of its tokens and lists those that may be among the best of all; the first block merges the lists once the token is chosen.
#pragma once
#include "select.cuh"

// NOTE: two copies by parity: others may write the next token's while the first block still reads this one's.
template <class M>
FF_DEVICE float* raw_logits(const Sampling& s, u32 step) {
  return s.raw + (step & 1) * M::kVocab;
}

template <class M, class S>
struct Report {
  using At = Meeting<M, S>;
  static constexpr u32 kSummary = 1 + kMostReported;  // words of a block: mass, then its list, ended by kNothing where it is shorter

  // The order of the largest of all blocks' `best`. Where a report is wanted, this block's part of it is made.
  static FF_DEVICE u32 begin(Finisher<M>& f, u32 step) {
    const Sampling& s = f.p.sampling;
    const u32 notes = f.shared + At::kNotes;
    u32 largest = order_of(f.best), likeliest = ~0u;
    const float* raw = raw_logits<M>(s, step);
    if (s.flags & kReported) shared_rows(f).each(raw, [&](u32, float x) { likeliest = min(likeliest, order_of(x)); });
    largest = __reduce_min_sync(kAllLanes, largest);
    likeliest = __reduce_min_sync(kAllLanes, likeliest);
    if (f.lane == 0) tell(notes + f.index * 8, largest, likeliest);
    f.sync();
    u32 at_least = 0;  // the best of all are no worse
    if (f.index == 0) {
#pragma unroll
      for (int i = 1; i < M::kFinishers; i++) {
        const uint2 other = load_shared2(notes + i * 8);
        largest = min(largest, other.x);
        likeliest = min(likeliest, other.y);
      }
      u32 all[At::kWords][2];
      At::template exchange<false>(f, step, 0, largest, likeliest, all);
#pragma unroll
      for (int i = 0; i < At::kWords; i++) {
        largest = min(largest, all[i][0]);
        likeliest = min(likeliest, all[i][1]);
      }
      largest = __reduce_min_sync(kAllLanes, largest);
      likeliest = __reduce_min_sync(kAllLanes, likeliest);
      if (s.flags & kReported) at_least = nth_smallest(all, s.reported);
      if (f.lane == 0) tell(notes + M::kFinishers * 8, largest, likeliest);
    }
    f.sync();
    const uint2 found = load_shared2(notes + M::kFinishers * 8);
    if (s.flags & kReported) {
      u64 total = 0;
      shared_rows(f).each(raw, [&](u32, float x) { total += mass((logit_of(found.y) - x) * kLog2E); });
#pragma unroll
      for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(kAllLanes, total, o);
      if (f.lane == 0) tell(notes + f.index * 8, (u32)total, (u32)(total >> 32));
      f.sync();
      if (f.index == 0) list(f, raw, at_least);
    }
    return found.x;
  }

  // The first block tells the host of the token of this step, which is `chosen`. All blocks have published their candidates for it.
  static FF_DEVICE void send(const Finisher<M>& f, u32 step, u32 chosen) {
    const Sampling& s = f.p.sampling;
    u64* report = s.report + (u64)(step + 1 - f.p.forced_count) * kReportWords;
    u64 total = 0, next[At::kWords];  // of the lists of blocks lane, lane + 32, ...: the first that is not in the report
    u64 taken = 0;                    // how many are, 5 bits a list
    static_assert(At::kWords * 5 <= 64 && kMostReported < 32, "cursors do not fit");
#pragma unroll
    for (int i = 0; i < At::kWords; i++) {
      const u32 block = f.lane + i * 32;
      total += block < M::kWorkers ? load_word(summary(s, block)) : 0;
      next[i] = block < M::kWorkers && s.reported ? load_word(summary(s, block) + 1) : kNothing;
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(kAllLanes, total, o);
#pragma unroll 1
    for (u32 place = 0; place < s.reported; place++) {
      u64 best = next[0];
#pragma unroll
      for (int i = 1; i < At::kWords; i++) best = min(best, next[i]);
      best = warp_min(best);
      if (f.lane == 0) store_host(report + 2 + place, best);
#pragma unroll
      for (int i = 0; i < At::kWords; i++)
        if (next[i] == best) {
          taken += 1ull << 5 * i;
          const u32 at = taken >> 5 * i & 31;
          next[i] = at < s.reported ? load_word(summary(s, f.lane + i * 32) + 1 + at) : kNothing;
        }
    }
    if (f.lane == 0) {
      const u32 likeliest = load_shared(f.shared + At::kNotes + M::kFinishers * 8 + 4);
      store_host(report, total);
      store_host(report + 1, join(load_volatile((const u32*)raw_logits<M>(s, step) + chosen), float_bits(logit_of(likeliest))));
    }
  }

 private:
  static FF_DEVICE u64* summary(const Sampling& s, u32 block) { return s.summaries + block * kSummary; }
  static FF_DEVICE void tell(u32 at, u32 a, u32 b) {
    store_shared(at, a);
    store_shared(at + 4, b);
  }
  static FF_DEVICE u64 warp_min(u64 x) {
    const u32 high = __reduce_min_sync(kAllLanes, (u32)(x >> 32));
    return join(__reduce_min_sync(kAllLanes, (u32)(x >> 32) == high ? (u32)x : ~0u), high);
  }

  // The n-th smallest of all blocks' second words, ~0 if there are fewer: bit by bit.
  static FF_DEVICE u32 nth_smallest(const u32 (&all)[At::kWords][2], u32 n) {
    u32 value = 0;
#pragma unroll 1
    for (u32 bit = 1u << 31; bit; bit >>= 1) {
      u32 below = 0;
#pragma unroll
      for (int i = 0; i < At::kWords; i++) below += all[i][1] < (value | bit) ? 1 : 0;
      if (__reduce_add_sync(kAllLanes, below) < n) value |= bit;
    }
    return value;
  }

  // For the first finisher: this block's mass, and its tokens of order `at_least` or better, best first, as many as are wanted.
  // NOTE: as many blocks as tokens are wanted have one that good, so nothing worse is among the best of all.
  static FF_DEVICE void list(const Finisher<M>& f, const float* raw, u32 at_least) {
    const Sampling& s = f.p.sampling;
    u64* to = summary(s, blockIdx.x);
    u64 total = 0, from = 0;
#pragma unroll
    for (int i = 0; i < M::kFinishers; i++) {
      const uint2 part = load_shared2(f.shared + At::kNotes + i * 8);
      total += join(part.x, part.y);
    }
    if (f.lane == 0) *to = total;
    const OwnRows<M, 32> rows(f, f.lane);
    for (u32 place = 0; place < s.reported; place++) {
      u64 best = kNothing;
      rows.each(raw, [&](u32 row, float x) {
        const u64 entry = ranked(x, row);
        if ((u32)(entry >> 32) <= at_least && entry >= from) best = min(best, entry);
      });
      best = warp_min(best);
      if (f.lane == 0) to[1 + place] = best;
      if (best == kNothing) break;
      from = best + 1;
    }
  }
};
