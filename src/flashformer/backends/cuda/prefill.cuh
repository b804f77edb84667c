// The frame of the kernel that feeds long prompts: it fills the KV cache for many tokens at a time.
//
// Hundreds of tokens are bound by arithmetic, not by memory: so blocks of threads take stage after stage together, and meet in between. Weights
// are read from the same tapes as by the other kernels. What a stage hands on is in memory, for all tokens: the residual and the qkv vectors as
// floats, vectors that are multiplied as 16-bit values. A token's values depend on the tokens before it alone, and not on how many there are.
#pragma once
#include "exchange.cuh"

// Vectors of 128 tokens are kept as B operands of warpgroups: octet after octet of columns, of each token 16 bytes. Of every 16 columns the
// first octet has 4 t and 4 t + 1, the second 4 t + 2 and 4 t + 3, which is where fragments have them.

template <class M>
struct Prefill {
  static constexpr int kTokens = kWarpgroupColumns;  // that a block multiplies at a time
  static constexpr int kGroups = 2, kWarps = 4 * kGroups, kCopyWarps = 4;  // warpgroups, and one that copies for them
  static constexpr int kThreads = 32 * (kWarps + kCopyWarps);
  static constexpr int kLeastTiles = 8 * kGroups;  // that a block multiplies at a time: one stack a warpgroup
  static constexpr int kLaunchRegisters = 168, kRegisters = 232, kCopyRegisters = 40;  // of a thread
  // NOTE: who asks for more than others have given back waits for ever.
  static_assert(32 * (kWarps * kRegisters + kCopyWarps * kCopyRegisters) <= kThreads * kLaunchRegisters);
  static constexpr int kResidualRow = round_up(M::kHidden, 8);
  // Shared memory.
  static constexpr int kMostSlots = 8;
  static constexpr int kFull = 0, kEmpty = kFull + kMostSlots * 8;  // barriers of the ring
  static constexpr int kNormScales = kEmpty + kMostSlots * 8;       // [tokens] of the vectors that are multiplied
  static constexpr int kMoments = kNormScales + kTokens * 4;        // [2 stacks][tokens][warps]
  static constexpr int kMeetings = kMoments + 2 * kTokens * kWarps * 4;  // how many there were
  static constexpr int kWhere = kMeetings + 4, kGoesOn = kWhere + 4;     // where the latest one was; whether nobody has waited too long there
  static constexpr int kRing = round_up(kGoesOn + 4, 128);
};

// A thread of a warpgroup that computes, or of the one that copies.
template <class M, bool copies>
struct PrefillBlock {
  static constexpr bool kCopies = copies;
  const PrefillParams& p;
  u32 shared, warp, lane;
  u32 phases = 0;  // of the ring's barriers, for the role of this warp: a bit each

  FF_DEVICE u32 thread() const { return warp * 32 + lane; }
  // A stage begins. NOTE: what follows from these is computed anew: kept through all stages, it would spill.
  FF_DEVICE void enter() { asm volatile("" : "+r"(warp), "+r"(lane)); }
  FF_DEVICE Watch watch() const { return {p.model, load_shared(shared + Prefill<M>::kWhere)}; }
  // Warps that compute meet.
  FF_DEVICE void sync() const { sync_threads<1, Prefill<M>::kWarps * 32>(); }
  // Word of the pair of columns `column` and the next of a token, in vectors of so many octets.
  static FF_DEVICE u32 pair(u32 column, u32 token, u32 octets) {
    const u32 octet = token / kWarpgroupColumns * octets + column / 16 * 2 + column / 2 % 2;
    return octet * (kHalfBytes / 4) + token % kWarpgroupColumns * 4 + column % 16 / 4;
  }
  // All blocks meet: what they have written until now is there for all. False: one has waited too long, and all leave.
  FF_DEVICE bool meet(u32 stage, u32 layer) {
    fence_copy_engine();  // which will read it
    __syncthreads();
    if (thread() == 0) {
      store_shared(shared + Prefill<M>::kWhere, stage << 16 | layer);
      const u32 meetings = load_shared(shared + Prefill<M>::kMeetings) + 1;
      store_shared(shared + Prefill<M>::kMeetings, meetings);
      arrive(p.arrived, meetings * gridDim.x);
    }
    __syncthreads();
    fence_copy_engine();
    return goes_on();
  }
  // The same for the warps that compute of the blocks that share something.
  FF_DEVICE bool share(u64* arrived, u32 sharers) {
    sync();
    if (thread() == 0) arrive(arrived, sharers);
    sync();
    return goes_on();
  }

 private:
  FF_DEVICE void arrive(u64* arrived, u32 expected) const {
    fence_device();
    atomicAdd((u32*)arrived, 1u);
    Wait wait;
    while ((u32)load_word_acquire(arrived) < expected && !wait.expired(watch())) {
    }
    store_shared(shared + Prefill<M>::kGoesOn, load_volatile(p.model.status) == 0);
  }
  FF_DEVICE bool goes_on() const { return load_shared(shared + Prefill<M>::kGoesOn); }  // NOTE: all threads must agree
};

// The embedding rows of all tokens: residuals, and vectors for the first stage, whose sums of squares are in one part.
template <class M, class S>
struct EmbedPrefill {
  static FF_DEVICE void run(const PrefillBlock<M, true>&) {}
  static FF_DEVICE void run(const PrefillBlock<M, false>& b) {
    using T = typename M::Value;
    using P = Prefill<M>;
    for (u32 at = blockIdx.x * P::kWarps + b.warp; at < b.p.count; at += gridDim.x * P::kWarps) {
      const u16* row = b.p.model.embedding + (u64)b.p.model.forced[at] * M::kHidden;
      float sum = 0;
      for (u32 i = 2 * b.lane; i < M::kHidden; i += 64) {
        const bool both = i + 1 < M::kHidden;
        const float y0 = T::unpack(__ldg(row + i)), y1 = both ? T::unpack(__ldg(row + i + 1)) : 0;
        const float* gamma = b.p.model.vectors + S::kGamma + i;
        *(float2*)(b.p.residual + (u64)at * P::kResidualRow + i) = make_float2(y0, y1);
        b.p.hidden[b.pair(i, at, M::kHiddenOctets)] = T::pack(y0 * __ldg(gamma), both ? y1 * __ldg(gamma + 1) : 0);
        sum = fmaf(y0, y0, fmaf(y1, y1, sum));
      }
      sum = warp_sum(sum);
      if (b.lane == 0) b.p.moments[at] = sum;
    }
  }
};

// Story::run(block) computes all tokens.
template <class M, class Story>
FF_DEVICE void prefill(const PrefillParams& p) {
  extern __shared__ __align__(128) u8 memory[];
  using P = Prefill<M>;
  const u32 shared = shared_address(memory), warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    store_shared(shared + P::kMeetings, 0);
    store_shared(shared + P::kWhere, 0);
    for (int slot = 0; slot < P::kMostSlots; slot++) {
      barrier_init(shared + P::kFull + slot * 8, P::kCopyWarps);
      barrier_init(shared + P::kEmpty + slot * 8, P::kWarps);
    }
    fence_copy_engine();
  }
  __syncthreads();
  if (warp >= P::kWarps) {
    fewer_registers<P::kCopyRegisters>();
    PrefillBlock<M, true> block{p, shared, warp, lane};
    Story::run(block);
  } else {
    more_registers<P::kRegisters>();
    PrefillBlock<M, false> block{p, shared, warp, lane};
    Story::run(block);
  }
}
