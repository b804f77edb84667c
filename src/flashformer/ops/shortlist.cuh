// Lists of the tokens that matter, by which top-k, and a report's most likely tokens, are known after the first round.
//
// The n-th best of some tokens is at most as good as the n-th best of all, so nothing that is worse is among the best n. While the head is
// still streaming, finishers tell each other their best tokens so far (`Early`); behind it each block lists those that are no worse than the
// n-th best of these, and tells how many there are with its part of the first round. For n = 50, 60 to 70 of 128,256 tokens are listed
// where their order is random; of a real model's, whose frequent tokens are neighbours, 180. Where there are more than there is room for,
// everything goes on as without lists.
#pragma once
#include "select.cuh"

enum ListKind : u32 {
  kKept,    // that top-k may keep
  kLikely,  // that may be reported
};

// What finishers tell each other within the head, S.
// NOTE: one place each will do: who tells of the next token has heard all parts of this one, which are told by blocks that have looked.
template <class M, class S>
struct Early {
  // For each finisher before each of its `turns` turns, and behind the last one.
  static FF_DEVICE void turn(Finisher<M>& f, u32 step, u32 turn, u32 turns) {
    if (turn < M::kFinishers) f.largest = f.likeliest = f.worst_kept = f.worst_likely = ~0u;
    const Sampling& s = f.p.sampling;
    if (!(s.flags & (kTopK | kReported))) return;
    const u32 tag = epoch_of(f, step);
    u64* const words = f.words(S::kEarly);
    // NOTE: late, so that few better ones follow, but so soon that all are there when they are looked for, and that a finisher has caught up
    // with its tiles before the last one comes: looking for them takes some 3 us, of both kinds 6. Who looks must have told.
    const u32 last = turns > M::kFinishers ? turns - M::kFinishers : 0, looks = last - last / 8;
    if (is_first(turn, looks - turns / 16)) {
      const u32 largest = __reduce_min_sync(kAllLanes, f.largest), likeliest = __reduce_min_sync(kAllLanes, f.likeliest);
      if (f.lane < 2) store_word(words + f.lane * kWords + blockIdx.x * M::kFinishers + f.index, f.lane == kKept ? largest : likeliest, tag);
    }
    if (!is_first(turn, looks)) return;
    const u32 kept = s.flags & kTopK ? s.top_k : 0, likely = s.flags & kReported ? s.reported : 0;
#pragma unroll 1
    for (u32 kind = kKept; kind <= kLikely; kind++) {
      const u32 n = kind == kKept ? kept : likely, worst = n ? look(f, words + kind * kWords, tag, n) : ~0u;
      f.worst_kept = kind == kKept ? worst : f.worst_kept;
      f.worst_likely = kind == kLikely ? worst : f.worst_likely;
    }
  }

 private:
  static constexpr u32 kWords = M::kWorkers * M::kFinishers;  // of a kind

  // Is it a finisher's first turn from `from` on?
  static FF_DEVICE bool is_first(u32 turn, u32 from) { return turn >= from && (turn < M::kFinishers || turn - M::kFinishers < from); }

  static FF_DEVICE u32 look(const Finisher<M>& f, const u64* words, u32 tag, u32 n) {
    constexpr int kEach = ceil_div((int)kWords, 32);
    const u64* const own = words + f.lane;
    u32 orders[kEach];
    Wait wait;
    bool here;
#pragma unroll 1
    do {
      here = true;
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        const Word w = split(f.lane + i * 32 < kWords ? load_word(own + i * 32) : join(~0u, tag));
        orders[i] = w.value;
        here = here && w.tag == tag;
      }
    } while (!__all_sync(kAllLanes, here) && !__any_sync(kAllLanes, wait.expired(f.watch)));
    return nth_best(orders, n);
  }
};

// The lists of a token, in its stage, S.
// NOTE: what runs once a token comes from memory: little code is fast code.
template <class M, class S>
struct Lists {
  using At = Rounds<M, S>;
  static constexpr u32 kTooMany = ~0u;

  // Is there a list? The same for all finishers of all blocks.
  static FF_DEVICE bool wanted(const Finisher<M>& f, u32 kind) {
    return (kind == kLikely || kRoom > 0) && worst(f, kind) != ~0u;
  }
  // A token of this block, for whoever finds it. `order`: how good it is; `candidate`: as `ranked`.
  static FF_DEVICE void add(const Finisher<M>& f, u32 kind, u32 step, u32 order, u64 candidate) {
    if (!wanted(f, kind) || order > worst(f, kind)) return;
    const u32 place = add_shared(counter(f, kind), 1);
    if (place >= kMost) return;
    u64* const entry = list(f, kind, blockIdx.x) + place * kEntryWords;
    store_words(entry, (u32)candidate, (u32)(candidate >> 32), epoch_of(f, step));
    store_words(entry + 2, order, 0, epoch_of(f, step));
  }
  // How many tokens this block has of both kinds, for what it tells in the first round. They are counted anew from `forget` on.
  static FF_DEVICE u64 counts(const Finisher<M>& f) {
    return min(load_shared(counter(f, kKept)), kCountMask) | min(load_shared(counter(f, kLikely)), kCountMask) << kCountBits;
  }
  static FF_DEVICE void forget(const Finisher<M>& f) {
    if (f.index == 0 && f.lane < 2) store_shared(counter(f, f.lane), 0);
  }

  // After the first round, for one finisher of a block: how many tokens all blocks list, or kTooMany, which is the same in all blocks; and if it
  // is to `take` them, these tokens to `orders` and `candidates`.
  static FF_DEVICE u32 gather(const Finisher<M>& f, u32 kind, u32 step, bool take) {
    constexpr int kAtOnce = 2;
    const u32 room = kind == kKept ? kRoom : kMostListed;
    u32 count = 0;
    bool fit = true;
#pragma unroll 1
    for (u32 first = 0; first < M::kWorkers; first += 32) {  // where each token comes from, in the place of its order
      const u32 block = first + f.lane, told = block < M::kWorkers ? load_shared(At::base(f) + At::kBest + block * 8) : 0;
      const u32 own = told >> kind * kCountBits & kCountMask;
      u32 end = own;
#pragma unroll 1
      for (u32 o = 1; o < 32; o <<= 1) {
        const u32 before = __shfl_up_sync(kAllLanes, end, o);
        end += f.lane >= o ? before : 0;
      }
      fit = fit && own <= kMost;
      const u32 at = count + end - own;
#pragma unroll 1
      for (u32 k = 0; k < own && at + k < room; k++) store_shared(orders(f, kind) + (at + k) * 4, block * kMost + k);
      count += __shfl_sync(kAllLanes, end, 31);
    }
    if (!__all_sync(kAllLanes, fit) || count > room) return kTooMany;
    __syncwarp();
    const u64* const entries = list(f, kind, 0);
    const u32 tag = epoch_of(f, step);
#pragma unroll 1
    for (u32 first = f.lane; take && first - f.lane < count; first += 32 * kAtOnce) {
      u64 w[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce * 4; i++) w[i / 4][i % 4] = join(0, tag);
      Wait wait;
      bool here;
      do {
        here = true;
#pragma unroll
        for (int k = 0; k < kAtOnce; k++)
          if (first + k * 32 < count) {
            const u64* const entry = entries + load_shared(orders(f, kind) + (first + k * 32) * 4) * kEntryWords;
            load_words(entry, w[k][0], w[k][1]);
            load_words(entry + 2, w[k][2], w[k][3]);
          }
#pragma unroll
        for (int i = 0; i < kAtOnce * 4; i++) here = here && split(w[i / 4][i % 4]).tag == tag;
      } while (!__all_sync(kAllLanes, here) && !__any_sync(kAllLanes, wait.expired(f.watch)));
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (first + k * 32 < count) {
          store_shared(orders(f, kind) + (first + k * 32) * 4, split(w[k][2]).value);
          store_shared64(candidates(f, kind) + (first + k * 32) * 8, join(split(w[k][0]).value, split(w[k][1]).value));
        }
    }
    __syncwarp();
    return count;
  }
  // In shared memory, of each token that was gathered.
  static FF_DEVICE u32 orders(const Finisher<M>& f, u32 kind) { return f.shared + (kind == kKept ? kKeptOrders : kLikelyOrders); }
  static FF_DEVICE u32 candidates(const Finisher<M>& f, u32 kind) {
    return kind == kKept ? f.shared + kKeptCandidates : At::base(f) + At::kList;
  }

 private:
  static constexpr u32 kMost = S::kShortlist, kEntryWords = 4;  // of a block; in memory: candidate, order, nothing
  static constexpr u32 kCountBits = 16, kCountMask = (1u << kCountBits) - 1;
  static constexpr int kLikelyOrders = round_up(At::kEnd, 8), kKeptCandidates = kLikelyOrders + kMostListed * 4;
  static constexpr int kFit = (Layout<M>::kResidual - kKeptCandidates) / 12 / 2 * 2, kRoom = kFit < 512 ? kFit : 512;
  static constexpr int kKeptOrders = kKeptCandidates + kRoom * 8;
  static_assert(kMost < kCountMask && kMostListed % 2 == 0 && kKeptCandidates <= Layout<M>::kResidual, "");

  static FF_DEVICE u32 worst(const Finisher<M>& f, u32 kind) { return kind == kKept ? f.worst_kept : f.worst_likely; }
  // NOTE: nothing else is there where blocks meet in rounds.
  static FF_DEVICE u32 counter(const Finisher<M>& f, u32 kind) { return f.shared + Layout<M>::kBest + kind * 4; }
  static FF_DEVICE u64* list(const Finisher<M>& f, u32 kind, u32 block) {
    return f.words(S::kShortlists) + (kind * M::kWorkers + block) * (kMost * kEntryWords);
  }
};

// Rounds without other blocks, for the finisher that has gathered all tokens that may be kept.
template <class M, class S>
struct Shortlist {
  using All = Lists<M, S>;
  // Rounds, of which the longest search takes some 100. NOTE: where a wait was given up the lists are not whole, and there may be no end.
  static constexpr u32 kPatience = 1000;

  // The first candidate: those that are not listed are dropped. Is it the choice?
  static FF_DEVICE bool begin(const Finisher<M>& f, u32 count, const Sampling& s, Selection<M>& selection, Part& all) {
    Part part = Part::nothing(false);
#pragma unroll 1
    for (u32 i = f.lane; i < count; i += 32)
      if (order(f, i) <= selection.limit && candidate(f, i) < part.candidate) part.candidate = candidate(f, i), part.order = order(f, i);
    all.candidate = warp_min(part.candidate);
    all.order = __reduce_min_sync(kAllLanes, part.candidate == all.candidate ? part.order : ~0u);
    return selection.settled(s, all);
  }
  static FF_DEVICE Part tally(const Finisher<M>& f, u32 count, const Sampling& s, const Selection<M>& selection) {
    Part part = Part::nothing(false);
#pragma unroll 1
    for (u32 i = f.lane; i < count; i += 32) {
      if (order(f, i) <= selection.reach && candidate(f, i) < part.candidate) part.candidate = candidate(f, i), part.order = order(f, i);
      selection.count(part, order(f, i), s.flags & kTopP ? mass_of(s, logit_of(order(f, i)), selection.cut.largest) : 0);
    }
    part.merge_lanes(false);
    return part;
  }

 private:
  static FF_DEVICE u32 order(const Finisher<M>& f, u32 i) { return load_shared(All::orders(f, kKept) + i * 4); }
  static FF_DEVICE u64 candidate(const Finisher<M>& f, u32 i) { return load_shared64(All::candidates(f, kKept) + i * 8); }
};
