// Who does what in a block, and what the roles share.
//
//   consumers  8 warps  multiply the chunks that land in the ring; attention over the KV cache
//   finishers  3-4      sum what the consumers found for a tile, apply norm scale, bias, activation, residual, and publish
//   producer   1        streams the block's tape and KV blocks into the ring; never waits for an activation
//
// Every role walks the same story (the generated `token` function): an operator is a struct with one member per role.
#pragma once
#include "exchange.cuh"

constexpr int kConsumers = 8;
constexpr int kMergeBytes = 17 * 1024;  // of shared memory in which attention's warps meet, at most

// Shared memory, in bytes from its beginning. M is the generated `Model`.
template <class M>
struct Layout {
  static constexpr int kReductionBuffers = 2 * M::kFinishers;
  static constexpr int kReductionBytes = kConsumers * 32 * 4;
  static constexpr int kMergeStride = M::kHeadPad + 4;  // floats a head: no two lanes of a store meet in a bank
  static constexpr int kMergeFit = kMergeBytes / (kConsumers * kMergeStride * 4);
  static constexpr int kMergeHeads = kMergeFit < M::kVirtualGroup ? kMergeFit : M::kVirtualGroup;
  static constexpr int kQueryStride = (M::kHeadPad + 8) * 2;  // bytes a head

  static constexpr int kReduction = 0;
  static constexpr int kMerge = kReduction + kReductionBuffers * kReductionBytes;
  static constexpr int kQuery = kMerge + kConsumers * kMergeHeads * kMergeStride * 4;
  static constexpr int kNewValue = round_up(kQuery + 8 * kQueryStride, 16);  // this token's value vector
  static constexpr int kNewScore = kNewValue + M::kHeadPad * 4;              // this token's score, per query head
  static constexpr int kSoftmax = kNewScore + 8 * 4;                         // (maximum, sum) per warp and query head
  static constexpr int kResidual = kSoftmax + kConsumers * 8 * 8;
  static constexpr int kTiles = kResidual + M::kOwnedTiles * 8 * 4;
  static constexpr int kMoment = kTiles + M::kTileWords * 4;  // [2][finishers]: sums of squares
  static constexpr int kBest = kMoment + 2 * 4 * 4;           // (logit, index) per finisher
  static constexpr int kStep = kBest + 4 * 8;                 // tokens done << 1 | last one
  static constexpr int kToken = kStep + 4;
  static constexpr int kReductionFull = round_up(kToken + 4, 8);
  static constexpr int kReductionEmpty = kReductionFull + kReductionBuffers * 8;
  static constexpr int kDone = kReductionEmpty + kReductionBuffers * 8;  // consumers are through with a token
  static constexpr int kFull = kDone + 8;
  static constexpr int kMaxSlots = 16;
  static constexpr int kEmpty = kFull + kMaxSlots * 8;
  static constexpr int kRing = round_up(kEmpty + kMaxSlots * 8, 128);
  static constexpr int kFit = (M::kSharedBytes - kRing) / M::kSlotBytes;
  static constexpr int kSlots = kFit < kMaxSlots ? kFit : kMaxSlots;
  static_assert(kSlots >= 3, "this model's buffers leave too little shared memory for the ring");
};

// What a launch is told; `Params` is generated from one list that the host packs, too.
template <class M>
struct Block {
  const Params& p;
  u32 shared;  // address of the dynamic shared memory
  u32 warp, lane;
  Watch watch;

  // Called as a stage begins. What is computed from these must not be kept from stage to stage: the compiler would, and spill.
  FF_DEVICE void enter(u32 stage, u32 layer) {
    asm volatile("" : "+r"(lane), "+r"(shared));
    watch.where = stage << 16 | layer;
  }
  // Timestamps of the launch's last token, for whoever asked for a trace: [roles][blocks][layers + 1][stages][2].
  FF_DEVICE void mark(u32 role, u32 step, u32 layer, u32 stage, u32 event) const {
    if constexpr (M::kTrace)
      if (lane == 0 && step + 1 == p.steps)
        p.trace[(((role * M::kWorkers + blockIdx.x) * (M::kLayers + 1) + layer) * M::kStages + stage) * 2 + event] = nanoseconds();
  }
  FF_DEVICE u64* words(int offset) const { return p.exchange + offset; }
  // Version tag of what is handed over in front of `layer` of the token that is being made.
  FF_DEVICE u32 tag(u32 step, u32 layer) const { return (p.epoch + step) * (M::kLayers + 1) + layer; }
  FF_DEVICE u32 position(u32 step) const { return p.start + step; }
  // The prompt's tokens need no head unless their logits are wanted.
  FF_DEVICE bool wants_head(u32 step) const { return step + 1 >= p.forced_count || p.logits != nullptr; }
  // Tiles of this block: (first, count). Word 0: residual owners, 1: combine, 2 + 2 l: qkv, 3 + 2 l: gate_up, last: head.
  FF_DEVICE uint2 tiles(int word) const {
    const u32 v = load_shared(shared + Layout<M>::kTiles + word * 4);
    return make_uint2(v >> 12, v & 4095);
  }
  // Wait until `step` tokens of this launch are done; false: the launch ends there.
  FF_DEVICE bool wait_step(u32 step) {
    watch.where = M::kTokenWhere << 16;
    Wait wait;
    u32 v;
    while (((v = load_shared_acquire(shared + Layout<M>::kStep)) >> 1) < step)
      if (wait.expired(watch)) return false;
    __syncwarp();
    return !((v & 1) && (v >> 1) == step);
  }
};

template <class M>
struct Producer;  // stream.cuh

template <class M>
struct Consumer : Block<M> {
  using L = Layout<M>;
  static constexpr int kRepoll = M::kRepollCycles;
  u32 slot = 0, phase = 0;  // of the ring
  u32 handed = 0;           // groups handed to each finisher, modulo 4, one byte each

  FF_DEVICE u32 chunk_address() const { return this->shared + L::kRing + slot * M::kSlotBytes; }
  FF_DEVICE void acquire() const { barrier_wait(this->shared + L::kFull + slot * 8, phase, this->watch); }
  FF_DEVICE void release() {
    __syncwarp();
    if (this->lane == 0) barrier_arrive(this->shared + L::kEmpty + slot * 8);
    if (++slot == L::kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
  // Hand one value a lane to the finisher of `group`. Each finisher has two buffers of its own: a buffer shared by two
  // finishers would let one of them mistake the phase of its barrier.
  FF_DEVICE void hand_over(u32 group, float value) {
    const u32 finisher = group % M::kFinishers;
    const u32 turn = handed >> (8 * finisher) & 3;
    const u32 buffer = 2 * finisher + (turn & 1);
    barrier_wait(this->shared + L::kReductionEmpty + buffer * 8, (turn >> 1) ^ 1, this->watch);
    store_shared_float(this->shared + L::kReduction + (buffer * kConsumers + this->warp) * 128 + this->lane * 4, value);
    __syncwarp();
    if (this->lane == 0) barrier_arrive(this->shared + L::kReductionFull + buffer * 8);
    handed = (handed + (1u << (8 * finisher))) & 0x03030303u;
  }
  FF_DEVICE void sync() const { sync_threads<1, kConsumers * 32>(); }
};

template <class M>
struct Finisher : Block<M> {
  using L = Layout<M>;
  u32 index;        // of this finisher
  u32 taken = 0;    // groups taken so far
  u32 moments = 0;  // how many times `moment` was published
  float best;       // greedy candidate of this lane
  u32 best_row;
  u32 token;

  FF_DEVICE u32 buffer() const { return 2 * index + (taken & 1); }
  FF_DEVICE void acquire() const {
    barrier_wait(this->shared + L::kReductionFull + buffer() * 8, (taken >> 1) & 1, this->watch);
  }
  FF_DEVICE void release() {
    __syncwarp();
    if (this->lane == 0) barrier_arrive(this->shared + L::kReductionEmpty + buffer() * 8);
    taken++;
  }
  FF_DEVICE u32 residual(u32 local_tile, u32 row) const { return this->shared + L::kResidual + (local_tile * 8 + row) * 4; }
  FF_DEVICE void sync() const { sync_threads<2, M::kFinishers * 32>(); }

  // Publish this block's sum of squares: lanes, then finishers, in fixed order.
  // NOTE: only owners of hidden tiles do. A block without work would run ahead and overwrite what others still wait for.
  FF_DEVICE void publish_moment(float sum, int offset, u32 tag, uint2 owned) {
    if (owned.y == 0) return;
    sum = warp_sum(sum);
    const u32 at = this->shared + L::kMoment + (moments++ & 1) * 16;
    if (this->lane == 0) store_shared_float(at + index * 4, sum);
    sync();
    if (index == 0 && this->lane == 0) {
      float total = 0;
#pragma unroll
      for (int f = 0; f < M::kFinishers; f++) total += load_shared_float(at + f * 4);
      store_word(this->words(offset) + (M::kOwners < M::kWorkers ? owned.x : blockIdx.x), __float_as_uint(total), tag);
    }
  }
};
