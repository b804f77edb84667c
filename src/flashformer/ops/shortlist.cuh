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
    const u32 tag = f.p.epoch + Block<M>::fresh(step);
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
template <class M, class S>
struct Lists {
  using At = Rounds<M, S>;

  // A token of this block, of which `order` says how good it is, by whoever finds it; `candidate`: as `ranked`.
  static FF_DEVICE void add(const Finisher<M>& f, ListKind kind, u32 step, u32 order, u64 candidate) {
    const u32 place = add_shared(counter(f, kind), 1);
    if (place >= kMost) return;
    u64* const entry = list(f, kind, blockIdx.x) + place * kEntryWords;
    store_words(entry, (u32)candidate, (u32)(candidate >> 32), epoch(f, step));
    store_words(entry + 2, order, 0, epoch(f, step));
  }
  // How many tokens this block has of both kinds, for what it tells in the first round. They are counted anew from `forget` on.
  static FF_DEVICE u64 counts(const Finisher<M>& f) {
    return min(load_shared(counter(f, kKept)), kCountMask) | min(load_shared(counter(f, kLikely)), kCountMask) << kCountBits;
  }
  static FF_DEVICE void forget(const Finisher<M>& f) {
    if (f.index == 0 && f.lane < 2) store_shared(counter(f, (ListKind)f.lane), 0);
  }

  // After the first round, for a finisher: how many tokens all blocks list, or kTooMany; the same in all blocks.
  static FF_DEVICE u32 count(const Finisher<M>& f, ListKind kind, u32 room) {
    u32 total = 0;
    bool fit = true;
#pragma unroll 1
    for (u32 block = f.lane; block < M::kWorkers; block += 32) {
      fit = fit && listed(f, kind, block) <= kMost;
      total += listed(f, kind, block);
    }
    __syncwarp();
    total = __reduce_add_sync(kAllLanes, total);
    return __all_sync(kAllLanes, fit) && total <= room ? total : kTooMany;
  }
  // The same, and these tokens: use(i, order, candidate) of each by some lane. At `place` + i * `stride` is a word of shared memory for it until
  // then.
  // NOTE: what runs once a token comes from memory: little code is fast code.
  template <class Use>
  static FF_DEVICE u32 gather(const Finisher<M>& f, ListKind kind, u32 step, u32 room, u32 place, u32 stride, Use use) {
    constexpr int kAtOnce = 2;
    u32 count = 0;
    bool fit = true;
#pragma unroll 1
    for (u32 first = 0; first < M::kWorkers; first += 32) {  // where each token comes from
      const u32 block = first + f.lane, own = block < M::kWorkers ? listed(f, kind, block) : 0;
      fit = fit && own <= kMost;
      u32 end = own;
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const u32 before = __shfl_up_sync(kAllLanes, end, o);
        end += f.lane >= o ? before : 0;
      }
      const u32 at = count + end - own;
#pragma unroll 1
      for (u32 k = 0; k < own && at + k < room; k++) store_shared(place + (at + k) * stride, block * kMost + k);
      count += __shfl_sync(kAllLanes, end, 31);
    }
    if (!__all_sync(kAllLanes, fit) || count > room) return kTooMany;
    const u64* const entries = list(f, kind, 0);
    const u32 tag = epoch(f, step);
#pragma unroll 1
    for (u32 first = f.lane; first - f.lane < count; first += 32 * kAtOnce) {
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
            const u64* const entry = entries + load_shared(place + (first + k * 32) * stride) * kEntryWords;
            load_words(entry, w[k][0], w[k][1]);
            load_words(entry + 2, w[k][2], w[k][3]);
          }
#pragma unroll
        for (int i = 0; i < kAtOnce * 4; i++) here = here && split(w[i / 4][i % 4]).tag == tag;
      } while (!__all_sync(kAllLanes, here) && !__any_sync(kAllLanes, wait.expired(f.watch)));
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (first + k * 32 < count) use(first + k * 32, split(w[k][2]).value, join(split(w[k][0]).value, split(w[k][1]).value));
    }
    __syncwarp();
    return count;
  }

  static constexpr u32 kTooMany = ~0u;

 private:
  static constexpr u32 kMost = S::kShortlist, kEntryWords = 4;  // of a block; in memory: candidate, order, nothing
  static constexpr u32 kCountBits = 16, kCountMask = (1u << kCountBits) - 1;
  static_assert(kMost < kCountMask, "");

  static FF_DEVICE u32 epoch(const Finisher<M>& f, u32 step) { return f.p.epoch + Block<M>::fresh(step); }
  // NOTE: nothing else is there where blocks meet in rounds.
  static FF_DEVICE u32 counter(const Finisher<M>& f, ListKind kind) { return f.shared + Layout<M>::kBest + kind * 4; }
  static FF_DEVICE u64* list(const Finisher<M>& f, ListKind kind, u32 block) {
    return f.words(S::kShortlists) + (kind * M::kWorkers + block) * (kMost * kEntryWords);
  }
  // Of a block, as it told.
  static FF_DEVICE u32 listed(const Finisher<M>& f, ListKind kind, u32 block) {
    return load_shared(At::base(f) + At::kBest + block * 8) >> kind * kCountBits & kCountMask;
  }
};

// Top-k, top-p and min-p of the tokens that are listed.
template <class M, class S>
struct Shortlist {
  using At = Rounds<M, S>;
  using All = Lists<M, S>;

  // For all finishers. True: the choice is the candidate of `all`; false: there are too many tokens, or no lists.
  static FF_DEVICE bool choose(const Finisher<M>& f, const Sampling& s, u32 step, Selection<M> selection, Part& all) {
    if (kRoom <= 0 || f.worst_kept == ~0u) return false;
    const u32 result = f.shared + kResult;  // (found?, candidate)
    if (f.index == 0) {
      const u32 orders = f.shared + kOrders, masses = f.shared + kMasses, candidates = f.shared + kCandidates;
      Part best = Part::nothing(false);
      const u32 count = All::gather(f, kKept, step, kRoom, orders, 4, [&](u32 i, u32 order, u64 candidate) {
        store_shared(orders + i * 4, order);
        store_shared64(candidates + i * 8, candidate);
        store_shared64(masses + i * 8, s.flags & kTopP ? mass_of(s, logit_of(order), selection.cut.largest) : 0);
        if (order <= selection.limit && candidate < best.candidate) best.candidate = candidate, best.order = order;
      });
      bool found = count != All::kTooMany, settled = false;
      if (found) {  // the best that are not listed were dropped
        all.candidate = warp_min(best.candidate);
        all.order = __reduce_min_sync(kAllLanes, best.candidate == all.candidate ? best.order : ~0u);
        settled = selection.settled(s, all);
      }
#pragma unroll 1
      for (u32 round = 1; found && !settled; round++) {
        Part part = Part::nothing(false);
#pragma unroll 1
        for (u32 i = f.lane; i < count; i += 32) {
          const u32 order = load_shared(orders + i * 4);
          const u64 candidate = load_shared64(candidates + i * 8);
          if (order <= selection.reach && candidate < part.candidate) part.candidate = candidate, part.order = order;
          selection.count(part, order, load_shared64(masses + i * 8));
        }
        part.merge_lanes(false);
        settled = selection.learn(s, round, part, all) || selection.settled(s, all);
        found = round < kPatience;
      }
      if (f.lane == 0) {
        store_shared(result, found);
        store_shared64(result + 8, all.candidate);
      }
    }
    f.sync();
    if (!load_shared(result)) return false;
    all.candidate = load_shared64(result + 8);
    return true;
  }

 private:
  // In shared memory: the result; of the tokens of all blocks what decides.
  static constexpr int kResult = round_up(At::kEnd, 16), kOrders = kResult + 16;
  static constexpr int kFit = (Layout<M>::kResidual - kOrders) / 20 / 32 * 32, kRoom = kFit < 512 ? kFit : 512;
  static constexpr int kMasses = kOrders + kRoom * 4, kCandidates = kMasses + kRoom * 8;
  static constexpr u32 kPatience = 1000;  // rounds without other blocks: the longest search takes some 100
};
