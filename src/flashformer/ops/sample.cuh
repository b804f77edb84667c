// The end of a token: every block's best candidate goes to every block, and so does the decision to go on. The next token is
// the prompt's, as long as there is one, else the best candidate of all (the lower id wins a tie).
//
// Greedily a candidate's score is its logit; with a temperature it is logit / temperature + Gumbel noise, and the best of all is a
// sample of the softmax, by the same exchange. Where there is more to know of the candidates (select.cuh, report.cuh), blocks tell
// each other more, in one round or a few.
#pragma once
#include "report.cuh"
#include "shortlist.cuh"

// A logit after bias and penalties, and what it counts in the choice of the token at `position`. What is to be looked at closer is kept in
// `raw` and `scores`, which stand for those of `s`. `seen`: see `adjusted`.
struct Weighed {
  float logit, score;
};
FF_DEVICE Weighed weigh(const Sampling& s, float* raw, float* scores, float logit, u32 token, u32 seen, u32 position) {
  if (s.flags & kReported) raw[token] = logit;
  const float x = adjusted(s, logit, token, seen), counted = score(s, x, position, token);
  if (s.flags & kSelected) {
    scores[2 * token] = x;
    scores[2 * token + 1] = counted;
  }
  return {x, counted};
}

// One logit of a finisher's lane. What is not used costs one branch that all lanes take alike.
template <class M>
FF_DEVICE void take_logit(Finisher<M>& f, u32 step, u32 token, float logit) {
  const Sampling& s = f.p.sampling;
  if (s.flags) {
    const Weighed w = weigh(s, s.raw, s.scores, logit, token, s.flags & kPenalised ? s.seen[token] : 0, f.position(step) + 1);
    f.likeliest = min(f.likeliest, order_of(logit));
    f.largest = min(f.largest, order_of(w.logit));
    logit = w.score;
  }
  f.propose(logit, token);
}

// The token of the best score, or why there is none.
struct Choice {
  bool found;
  u32 token;
};
template <class M>
FF_DEVICE Choice choice_of(float score, u32 token) {
  const bool found = score < INFINITY && token < M::kVocab;
  return {found, found ? token : score < INFINITY ? kNoneAllowed : kNotFinite};
}

template <class M>
FF_DEVICE bool owns(const Finisher<M>& f, u32 token) {
  const uint2 tiles = f.tiles(M::kHeadTiles);
  return token / 8 - tiles.x < tiles.y;
}

// The choice of a token that is selected or reported: what is learnt of it from round to round. See Rounds for `kTeam`.
// NOTE: this block's consumers must be at rest.
template <class M, class S, int kTeam = M::kFinishers>
struct Decision {
  using At = Rounds<M, S, kTeam>;
  Part all;  // its candidate is the best one that is not dropped
  Selection<M> selection;

  // This block's part of the first round; `candidate`: the lane's best one, as `ranked`. `also` gets (token, logit) as the model gives them, if
  // these are reported.
  template <class Also>
  static FF_DEVICE Part opening(const Finisher<M>& f, const Sampling& s, u64 candidate, u32 news, Also also) {
    Part part = Part::of(candidate, true);
    part.news = news;
    if constexpr (M::kColumns == 1) part.count[0] = f.largest;
    else if (s.flags & kSelected)
      each_row<At::kLanes, 2>(f, At::lane(f), s.scores, [&](u32, float x, float) { part.count[0] = min(part.count[0], order_of(x)); });
    if (s.flags & kReported)
      each_row<At::kLanes, 1>(f, At::lane(f), s.raw, [&](u32 row, float x) {
        part.add_logit(x);
        also(row, x);
      });
    return part;
  }

  // What comes of a round. True: the candidate is the choice; else there is another round.
  FF_DEVICE bool learn(const Finisher<M>& f, const Sampling& s, u32 round, const Part& part) {
    bool done = part.candidate == At::kGivenUp;
    if (round == 0) {
      all = part;
      done |= !(s.flags & kSelected) || !(all.score() < INFINITY) || all.token() >= M::kVocab;
      if (!done) {
        const u32 k = s.flags & kTopK ? min(s.top_k, M::kVocab) : M::kVocab;
        selection.begin(s, all, k, M::kColumns == 1 ? f.worst_kept : At::nth_best_of_blocks(f, 0, k));
      }
    } else {
      done |= selection.learn(s, round, part, all);
    }
    return done || selection.settled(s, all);
  }

  // What is kept between rounds, in shared memory.
  static constexpr int kStateBytes = 72;
  FF_DEVICE void store(u32 at) const {
    const Cut& c = selection.cut;
    const u32 words[] = {(u32)all.candidate, (u32)(all.candidate >> 32), all.order, c.k, c.largest,
                         c.low.order, c.low.count, (u32)c.low.mass, (u32)(c.low.mass >> 32),
                         c.high.order, c.high.count, (u32)c.high.mass, (u32)(c.high.mass >> 32),
                         selection.limit, selection.reach, selection.probe, selection.pending};
    static_assert(sizeof words <= kStateBytes, "");
#pragma unroll
    for (u32 i = 0; i < sizeof words / 4; i++) store_shared(at + i * 4, words[i]);
  }
  static FF_DEVICE Decision load(u32 at) {
    u32 w[kStateBytes / 4];
#pragma unroll
    for (u32 i = 0; i < kStateBytes / 4; i++) w[i] = load_shared(at + i * 4);
    Decision decision{Part::nothing(true)};
    decision.all.candidate = join(w[0], w[1]);
    decision.all.order = w[2];
    decision.selection = {{w[3], w[4], {w[5], w[6], join(w[7], w[8])}, {w[9], w[10], join(w[11], w[12])}}, w[13], w[14], w[15], w[16] != 0};
    return decision;
  }
};

template <class M, class S>
struct Sample {
  using L = Layout<M>;
  using All = Lists<M, S>;

  static FF_DEVICE void run(Producer<M>&, u32) {}
  static FF_DEVICE void run(Consumer<M>& c, u32) {
    // NOTE: what this token appended to the KV cache must be visible to all before the token ends: the next one reads it.
    fence_device();
    fence_copy_engine();
    __syncwarp();
    if (c.lane == 0) barrier_arrive(c.shared + L::kDone);
  }
  static FF_DEVICE void run(Finisher<M>& f, u32 step) {
    f.enter(S::kWhere, 0);
    const bool chosen = step + 1 >= f.p.forced_count;  // this token's choice goes to the user and is the next input
    const bool cancelled = chosen && f.p.sampling.flags & (kSelected | kReported) ? look_closer(f, step) : exchange(f, step);
    if (f.index == 0) {
      const auto [found, choice] = choice_of<M>(f.best, f.best_row);
      bool last = step + 1 == f.p.steps || cancelled || load_volatile(f.p.status) != 0;
      if (chosen) {
        last |= !found;
        for (u32 i = 0; i < f.p.stop_count; i++) last |= choice == f.p.stop[i];
      }
      fence_copy_engine();
      if (chosen && found && (f.p.sampling.flags & kReported))
        Report<M, S>::send(f, f.p.sampling, meeting(f), step + 1 - f.p.forced_count, choice, owns(f, choice));
      if (f.lane == 0) {
        // NOTE: a token's row belongs to one block, which alone reads and writes how often the token was seen.
        if (chosen && found && (f.p.sampling.flags & kPenalised) && owns(f, choice)) f.p.sampling.seen[choice]++;
        store_shared(f.shared + L::kToken, !chosen ? f.p.forced[step + 1] : found ? choice : 0);
        store_shared_release(f.shared + L::kStep, (step + 1) << 1 | (last ? 1 : 0));
        if (blockIdx.x == 0 && chosen) store_host(f.p.tokens + step + 1 - f.p.forced_count, join(choice, f.p.run));
      }
    }
    f.sync();
    f.token = load_shared(f.shared + L::kToken);
  }

 private:
  static constexpr u32 kCancel = 0x80000000u;

  // The best of all blocks' candidates, for the first finisher; whether the launch is cancelled.
  static FF_DEVICE bool exchange(Finisher<M>& f, u32 step) {
    best_of_lanes(f);
    const u32 mine = f.shared + L::kBest;
    if (f.lane == 0) {
      store_shared_float(mine + f.index * 8, f.best);
      store_shared(mine + f.index * 8 + 4, f.best_row);
    }
    f.sync();
    if (f.index != 0) return false;
#pragma unroll
    for (int i = 1; i < M::kFinishers; i++) f.merge(load_shared_float(mine + i * 8), load_shared(mine + i * 8 + 4));
    barrier_wait(f.shared + L::kDone, step & 1, f.watch);
    const u32 epoch = f.p.epoch + step;
    // NOTE: two copies by parity: a block without work in the head may already be one token ahead of a slow reader.
    u64* words = f.words(S::kOutput) + (epoch & 1) * 2 * M::kWorkers;
    const u32 cancel = blockIdx.x == 0 && load_volatile(f.p.cancel) ? kCancel : 0;
    if (f.lane == 0) store_words(words + 2 * blockIdx.x, __float_as_uint(f.best), f.best_row | cancel, epoch);
    Wait wait;
    bool cancelled = false;
    f.forget();
#pragma unroll 1
    for (u32 i = f.lane; i < M::kWorkers; i += 32) {
      u64 a, b;
      do load_words(words + 2 * i, a, b);
      while ((split(a).tag != epoch || split(b).tag != epoch) && !wait.expired(f.watch));
      f.merge(__uint_as_float(split(a).value), split(b).value & ~kCancel);
      cancelled |= (split(b).value & kCancel) != 0;
    }
    __syncwarp();
    fence_device();  // what others wrote before they published is visible from here on: the KV cache
    best_of_lanes(f);
    return __any_sync(kAllLanes, cancelled);
  }
  static FF_DEVICE void best_of_lanes(Finisher<M>& f) {
#pragma unroll
    for (int o = 16; o; o >>= 1) f.merge(__shfl_xor_sync(kAllLanes, f.best, o), __shfl_xor_sync(kAllLanes, f.best_row, o));
  }

  // The same where tokens are selected or reported, for all finishers.
  static FF_DEVICE bool look_closer(Finisher<M>& f, u32 step) {
    const u32 cancel = f.index == 0 && blockIdx.x == 0 && load_volatile(f.p.cancel);
    const Sampling& s = f.p.sampling;
    All::forget(f);
    f.sync();  // the scores of all finishers are there
    if (All::wanted(f, kKept))
      each_row<Rounds<M, S>::kLanes, 2>(f, Rounds<M, S>::lane(f), s.scores, [&](u32 row, float x, float score) {
        All::add(f, kKept, step, order_of(x), ranked(score, row));
      });
    Decision<M, S> decision;
    Part part = decision.opening(f, s, ranked(f.best, f.best_row), cancel, [&](u32 row, float x) {
      All::add(f, kLikely, step, order_of(x), ranked(x, row));
    });
    // NOTE: from here on this block's consumers are at rest, and the shared memory of the reductions is free.
    barrier_wait(f.shared + L::kDone, step & 1, f.watch);
    f.sync();
    part.mass[1] = All::counts(f);
    u32 listed = All::kTooMany;  // tokens, for the first finisher, which goes on with them alone
#pragma unroll 1
    for (u32 round = 0;; round++) {
      part = listed != All::kTooMany ? Shortlist<M, S>::tally(f, listed, s, decision.selection)
                                     : Rounds<M, S>::meet(f, s, meeting(f), step, round, part);
      bool done = decision.learn(f, s, round, part);
      if (round == 0) {
        listed = read_lists(f, s, step, part, done);
        if (!done && All::wanted(f, kKept)) {
          if (f.index == 0 && f.lane == 0) store_shared(f.shared + L::kBest, listed != All::kTooMany);
          f.sync();
          if (load_shared(f.shared + L::kBest)) done = f.index != 0 || Shortlist<M, S>::begin(f, listed, s, decision.selection, decision.all);
        }
      }
      if (done || (listed != All::kTooMany && round == Shortlist<M, S>::kPatience)) break;
      if (listed == All::kTooMany) part = decision.selection.template tally<Rounds<M, S>>(f, s);
    }
    const Part& all = decision.all;
    f.best = all.score();
    f.best_row = all.token();
    fence_device();  // each finisher has seen other blocks' words: what these wrote before is visible to all of this block
    f.sync();
    return all.news != 0;
  }
  // After the first round, which found `all`: the first finisher gathers what may be kept, if that is not `settled`, and gets how many there are;
  // the last one the tokens that may be reported, for the first block, which puts them in order.
  static FF_DEVICE u32 read_lists(const Finisher<M>& f, const Sampling& s, u32 step, const Part& all, bool settled) {
    using R = Report<M, S>;
    const bool reports = s.flags & kReported && f.index == M::kFinishers - 1;
    u32 kept = All::kTooMany, likely = All::kTooMany;
#pragma unroll 1
    for (u32 kind = kKept; kind <= kLikely; kind++) {
      const bool mine = kind == kKept ? f.index == 0 && !settled : reports;
      const u32 count = mine && All::wanted(f, kind) ? All::gather(f, kind, step, kind == kKept || blockIdx.x == 0) : All::kTooMany;
      kept = kind == kKept ? count : kept;
      likely = kind == kLikely ? count : likely;
    }
    if (reports) {
      R::note(f, meeting(f), all);
      if (likely == All::kTooMany) R::begin(f, s, meeting(f), step);
      if (blockIdx.x == 0) R::keep(f, s, likely == All::kTooMany ? R::gather(f, s, meeting(f), step) : likely);
    }
    return kept;
  }
  static FF_DEVICE Meeting meeting(const Finisher<M>& f) {
    return {f.words(S::kRounds), f.words(S::kLists), f.shared + Rounds<M, S>::kSoftmax};
  }
};
