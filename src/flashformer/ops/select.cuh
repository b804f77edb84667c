// Top-k, top-p and min-p over all blocks' logits, exactly, without a search for where they cut.
//
// A token is kept if fewer than k tokens have a larger logit (top-k), if those have less probability mass than top-p asks for, and if
// its own is enough (min-p). The best score of all tokens is the answer if its token is kept, which the counts and masses of larger
// logits tell in one round of all blocks. If it is not, nothing smaller is, and the best of what is larger, which came with the same
// round, is next. A sample of the softmax is kept as often as its mass says, so that one or two rounds do as a rule.
// Masses are integers: their sums do not depend on who comes first.
#pragma once
#include "rounds.cuh"

// The mass of a logit relative to the one of order `largest`.
FF_DEVICE u64 mass_of(const Sampling& s, float logit, u32 largest) { return mass((logit_of(largest) - logit) * s.mass_scale); }

// What is known of the last token that top-k keeps: its order is above that of `low` and at most that of `high`.
struct Cut {
  enum Verdict { kKept, kDropped, kOpen };
  struct Bound {
    u32 order, count;  // tokens of at most that order,
    u64 mass;          // and their mass
  };

  u32 k, largest;
  Bound low, high;

  FF_DEVICE void learn(const Bound& b) {
    if (b.count < k ? b.order >= low.order : b.order <= high.order) (b.count < k ? low : high) = b;
  }
  // Is what `high` has what top-k keeps?
  FF_DEVICE bool exact() const { return high.count <= k || high.order - low.order == 1; }

  // Is a token kept that has `count` tokens of this mass before it? Open, while top-k's share may be more or less than is known.
  FF_DEVICE Verdict judge(const Sampling& s, u32 count, u64 mass_before) const {
    if (count >= k) return kDropped;
    if (!(s.flags & kTopP)) return kKept;
    const u64 least = exact() ? high.mass : low.mass + (k - low.count) * mass_of(s, logit_of(high.order), largest);
    if (mass_before < top_p_mass(s, least)) return kKept;
    return mass_before < top_p_mass(s, high.mass) ? kOpen : kDropped;
  }
  // An order between the two, to be asked for next, in turn: where top-k may cut, the last one (many tokens may have that of `high`),
  // and the middle.
  FF_DEVICE u32 between(u32 round) const {
    if (exact()) return high.order;
    const u32 gap = high.order - low.order;
    u32 part = gap / 2;
    if (round % 3 == 1) part = (u32)((float)gap * ((float)(k - low.count) / (float)(high.count - low.count)));
    if (round % 3 == 2) part = gap - 1;
    return low.order + min(part > 1 ? part : 1, gap - 1);
  }
};

// Of one token, the same for all finishers of all blocks.
template <class M>
struct Selection {
  Cut cut;
  u32 limit;         // no token of a larger order is kept
  u32 reach, probe;  // two orders, of whose tokens the next round is to tell the count and the mass
  bool pending;      // is it the candidate that the next round decides on?

  // After the first round, which found `all`. `k_best`: an order that the best of at least k blocks reach.
  FF_DEVICE void begin(const Sampling& s, const Part& all, u32 k, u32 k_best) {
    const u32 largest = all.count[0];
    cut = {k, largest, {largest - 1, 0, 0}, {k_best, 0, 0}};
    limit = probe = k_best;
    if (s.flags & kMinP) limit = min(limit, order_of(logit_of(largest) + s.min_p_margin));
  }

  // Is the candidate of `all` known to be kept? If not, the next round is wanted.
  FF_DEVICE bool settled(const Sampling& s, const Part& all) {
    const u32 order = all.order;
    pending = order <= limit;
    reach = pending ? order - 1 : limit;
    return pending && (order == cut.largest || !(s.flags & (kTopK | kTopP)));
  }

  // Learn what a round found. True: the candidate of `all` is kept; else it is dropped where it must be.
  FF_DEVICE bool learn(const Sampling& s, u32 round, const Part& part, Part& all) {
    cut.learn({reach, part.count[0], part.mass[0]});
    cut.learn({part.count[1] < cut.k ? probe : part.news, part.count[1], part.mass[1]});
    limit = min(limit, cut.high.order);
    probe = cut.between(round);
    const Cut::Verdict verdict = pending ? cut.judge(s, part.count[0], part.mass[0]) : Cut::kDropped;
    if (verdict == Cut::kDropped) {
      limit = min(limit, reach);
      all.candidate = part.candidate;
      all.order = part.order;
    }
    return verdict == Cut::kKept;
  }

  // A token's share of what a round tells, but for the candidate.
  FF_DEVICE void count(Part& part, u32 order, u64 mass) const {
    if (order <= probe && order > part.news) part.news = order;
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (order <= (i ? probe : reach)) {
        part.count[i]++;
        part.mass[i] += mass;
      }
  }
  // This block's part of a round: the tokens of at most the two orders, and the best candidate of those within reach.
  template <class At>
  FF_DEVICE Part tally(Finisher<M>& f, const Sampling& s) const {
    Part part = Part::nothing(false);
    f.forget();
    each_row<At::kLanes, 2>(f, At::lane(f), s.scores, [&](u32 row, float x, float score) {
      const u32 order = order_of(x);
      if (order <= reach) f.propose(score, row);
      if (order <= reach || order <= probe) count(part, order, s.flags & kTopP ? mass_of(s, x, cut.largest) : 0);
    });
    part.candidate = ranked(f.best, f.best_row);
    return part;
  }
};
