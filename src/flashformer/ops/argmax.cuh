// The end of a token: every block's best candidate goes to every block, and so does the decision to go on. The next token is
// the prompt's, as long as there is one, else the greedy choice (the lower index wins a tie).
#pragma once
#include "roles.cuh"

template <class M, class S>
struct Argmax {
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
#pragma unroll
    for (int o = 16; o; o >>= 1) take(f, __shfl_xor_sync(kAllLanes, f.best, o), __shfl_xor_sync(kAllLanes, f.best_row, o));
    const u32 mine = f.shared + L::kBest;
    if (f.lane == 0) {
      store_shared_float(mine + f.index * 8, f.best);
      store_shared(mine + f.index * 8 + 4, f.best_row);
    }
    f.sync();
    if (f.index == 0) {
#pragma unroll
      for (int i = 1; i < M::kFinishers; i++) take(f, load_shared_float(mine + i * 8), load_shared(mine + i * 8 + 4));
      barrier_wait(f.shared + L::kDone, step & 1, f.watch);
      // NOTE: two copies by parity: a block without work in the head may already be one token ahead of a slow reader.
      u64* words = f.words(S::kOutput) + (epoch & 1) * 2 * M::kWorkers;
      const u32 cancel = blockIdx.x == 0 && load_volatile(f.p.cancel) ? kCancel : 0;
      if (f.lane == 0) store_words(words + 2 * blockIdx.x, __float_as_uint(f.best), f.best_row | cancel, epoch);
      Wait wait;
      bool cancelled = false;
      f.best = -INFINITY;
      f.best_row = kNone;
#pragma unroll 1
      for (u32 i = f.lane; i < M::kWorkers; i += 32) {
        u64 a, b;
        do load_words(words + 2 * i, a, b);
        while ((split(a).tag != epoch || split(b).tag != epoch) && !wait.expired(f.watch));
        take(f, __uint_as_float(split(a).value), split(b).value & ~kCancel);
        cancelled |= (split(b).value & kCancel) != 0;
      }
      __syncwarp();
#pragma unroll
      for (int o = 16; o; o >>= 1) take(f, __shfl_xor_sync(kAllLanes, f.best, o), __shfl_xor_sync(kAllLanes, f.best_row, o));
      cancelled = __any_sync(kAllLanes, cancelled);
      const u32 choice = f.best_row < M::kVocab ? f.best_row : 0;  // no candidate: all logits are NaN, or there was no head
      bool last = step + 1 == f.p.steps || cancelled || load_volatile(f.p.status) != 0;
      if (chosen)
        for (u32 i = 0; i < f.p.stop_count; i++) last |= choice == f.p.stop[i];
      fence_device();  // what others wrote before they published is visible from here on: the KV cache
      fence_copy_engine();
      if (f.lane == 0) {
        store_shared(f.shared + L::kToken, chosen ? choice : f.p.forced[step + 1]);
        store_shared_release(f.shared + L::kStep, (step + 1) << 1 | (last ? 1 : 0));
        if (blockIdx.x == 0 && chosen) store_host(f.p.tokens + step + 1 - f.p.forced_count, join(choice, f.p.run));
      }
    }
    f.sync();
    f.token = load_shared(f.shared + L::kToken);
  }

 private:
  static constexpr u32 kCancel = 0x80000000u, kNone = 0x7fffffffu;

  static FF_DEVICE void take(Finisher<M>& f, float value, u32 row) {
    if (value > f.best || (value == f.best && row < f.best_row)) {
      f.best = value;
      f.best_row = row;
    }
  }
};
