// The end of a token: every block's best candidate goes to every block, and so does the decision to go on. The next token is
// the prompt's, as long as there is one, else the best candidate of all (the lower id wins a tie).
//
// Greedily a candidate's score is its logit; with a temperature it is logit / temperature + Gumbel noise, and the best of all is a
// sample of the softmax, by the same exchange. What top-k, top-p and min-p leave is found before: see select.cuh.
#pragma once
#include "report.cuh"

// One logit of a finisher's lane. What is not used costs one branch that all lanes take alike.
template <class M>
FF_DEVICE void take_logit(Finisher<M>& f, u32 step, u32 token, float logit) {
  const Sampling& s = f.p.sampling;
  if (s.flags) {
    if (s.flags & kReported) raw_logits<M>(s, step)[token] = logit;
    logit = adjusted(s, logit, token);
    if (s.flags & kSelected) s.scores[token] = logit;
    else logit = score(s, logit, f.position(step) + 1, token);
  }
  f.propose(logit, token);
}

template <class M, class S>
struct Sample {
  using L = Layout<M>;

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
    const u32 epoch = f.p.epoch + step;
    const bool chosen = step + 1 >= f.p.forced_count;  // this token's choice goes to the user and is the next input
    if (f.p.sampling.flags & (kSelected | kReported))
      if (chosen) look_closer(f, step);
#pragma unroll
    for (int o = 16; o; o >>= 1) f.merge(__shfl_xor_sync(kAllLanes, f.best, o), __shfl_xor_sync(kAllLanes, f.best_row, o));
    const u32 mine = f.shared + L::kBest;
    if (f.lane == 0) {
      store_shared_float(mine + f.index * 8, f.best);
      store_shared(mine + f.index * 8 + 4, f.best_row);
    }
    f.sync();
    if (f.index == 0) {
#pragma unroll
      for (int i = 1; i < M::kFinishers; i++) f.merge(load_shared_float(mine + i * 8), load_shared(mine + i * 8 + 4));
      barrier_wait(f.shared + L::kDone, step & 1, f.watch);
      // NOTE: two copies by parity: a block without work in the head may already be one token ahead of a slow reader.
      u64* words = f.words(S::kOutput) + (epoch & 1) * 2 * M::kWorkers;
      if (f.p.sampling.flags & kReported) fence_device();  // this block's summary
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
#pragma unroll
      for (int o = 16; o; o >>= 1) f.merge(__shfl_xor_sync(kAllLanes, f.best, o), __shfl_xor_sync(kAllLanes, f.best_row, o));
      cancelled = __any_sync(kAllLanes, cancelled);
      const bool found = f.best < INFINITY && f.best_row < M::kVocab;
      const u32 choice = found ? f.best_row : f.best < INFINITY ? kNoneAllowed : kNotFinite;
      bool last = step + 1 == f.p.steps || cancelled || load_volatile(f.p.status) != 0;
      if (chosen) {
        last |= !found;
        for (u32 i = 0; i < f.p.stop_count; i++) last |= choice == f.p.stop[i];
      }
      fence_device();  // what others wrote before they published is visible from here on: the KV cache
      fence_copy_engine();
      if (blockIdx.x == 0 && chosen && found && (f.p.sampling.flags & kReported)) Report<M, S>::send(f, step, choice);
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

  static FF_DEVICE bool owns(const Finisher<M>& f, u32 token) {
    const uint2 tiles = f.tiles(M::kHeadTiles);
    return token / 8 - tiles.x < tiles.y;
  }

  // Before the candidates are compared: a report of this token's log probabilities, and the selection of the allowed ones.
  static FF_DEVICE void look_closer(Finisher<M>& f, u32 step) {
    const Sampling& s = f.p.sampling;
    // NOTE: from here on this block's consumers and attention are at rest, and their shared memory is ours.
    barrier_wait(f.shared + L::kDone, step & 1, f.watch);
    f.sync();
    const u32 largest = Report<M, S>::begin(f, step);
    if (!(s.flags & kSelected)) return;
    f.forget();
    if (largest <= order_of(INFINITY)) {  // not finite, as all will see
      f.best = logit_of(largest);
      return;
    }
    const u32 limit = Selection<M, S>::limit(f, step, largest);
    shared_rows(f).each(s.scores, [&](u32 row, float x) {
      if (order_of(x) <= limit) f.propose(score(s, x, f.position(step) + 1, row), row);
    });
  }
};
