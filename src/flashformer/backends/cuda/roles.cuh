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
constexpr int kMostSequences = 32;      // of a launch: a lane each
constexpr int kIntegerColumns = 8;      // most columns that meet codes in integer instructions, times the operands that a code has

// Shared memory, in bytes from its beginning. M is the generated `Model`.
template <class M>
struct Layout {
  static constexpr bool kMany = M::kColumns > 1;
  static constexpr int kReductionHalves = M::kColumns > 4 ? 1 : 2;  // buffers of a finisher
  static constexpr int kReductionBuffers = kReductionHalves * M::kFinishers;
  static constexpr int kReductionBytes = kConsumers * 32 * 4 * M::kColumnGroups;
  static constexpr int kMergeStride = M::kHeadPad + 4;  // floats a head: no two lanes of a store meet in a bank
  static constexpr int kMergeFit = kMergeBytes / (kConsumers * kMergeStride * 4);
  static constexpr int kMergeHeads = kMergeFit < M::kVirtualGroup ? kMergeFit : M::kVirtualGroup;
  static constexpr int kQueryStride = (M::kHeadPad + 8) * 2;  // bytes a head
  // Columns of a sequence, next to each other, that share what they read of its cache, at most: a power of two. See units.cuh.
  static constexpr int neighbours() {
    int n = 1;
    while (2 * n * M::kVirtualGroup <= 8 && 2 * n <= M::kColumns) n *= 2;
    return n;
  }
  static constexpr int kNeighbours = neighbours();

  static constexpr int kReduction = 0;
  static constexpr int kPanel = kReduction + kReductionBuffers * kReductionBytes;  // x of several columns
  // Attention's. NOTE: with several columns it is inside the panel: consumers never use both.
  static constexpr int kMerge = kPanel;
  static constexpr int kQuery = kMerge + kConsumers * kMergeHeads * kMergeStride * 4;
  static constexpr int kNewValue = round_up(kQuery + 8 * kQueryStride, 16);    // [neighbours] this token's value vector
  static constexpr int kNewScore = kNewValue + kNeighbours * M::kHeadPad * 4;  // this token's score, per query head
  static constexpr int kSoftmax = kNewScore + 8 * 4;                           // (maximum, sum) per warp and query head
  static constexpr int kScratchEnd = kSoftmax + kConsumers * 8 * 8;
  static constexpr int kFactors = kPanel + M::kPanelBytes;  // [consumers][columns] of integers in the panel
  static constexpr int kPanelEnd = kFactors + (kMany && M::kColumns <= kIntegerColumns ? kConsumers * M::kColumns * 4 : 0);
  // NOTE: where finishers meet other blocks in rounds, each for columns of its own, they need at least so much (rounds.cuh).
  static constexpr int kRoundsEnd = kMany ? 12 * 1024 : 0, kUsedEnd = kScratchEnd < kPanelEnd ? kPanelEnd : kScratchEnd;
  static constexpr int kResidual = kUsedEnd < kRoundsEnd ? kRoundsEnd : kUsedEnd;
  static constexpr int kGamma = kResidual + M::kOwnedTiles * 8 * 4 * M::kColumns;  // [finishers]: norm weights of the owned rows
  static constexpr int kTiles = kGamma + M::kFinishers * M::kOwnedTiles * 8 * 4;
  static constexpr int kLooks = kTiles + M::kTileWords * 4;  // [warps][stages]: see `Looks`
  static constexpr int kBest = round_up(kLooks + (kConsumers + M::kFinishers) * M::kStages * 4, 8);  // (logit, index) per finisher, column
  static constexpr int kStep = kBest + 4 * 8 * M::kColumns;  // tokens done << 1 | last one
  static constexpr int kToken = kStep + 4;
  // Of several columns; see columns.cuh.
  static constexpr int kPass = round_up(kToken + 4, 16);
  static constexpr int kColumn = kPass + kMany * 32;                        // [columns] Column, ColumnMore
  static constexpr int kUnits = kColumn + kMany * M::kColumns * 32;         // [columns] see units.cuh
  static constexpr int kChosen = kUnits + kMany * M::kColumns * 16;         // [columns] (token, its number among those of its sequence)
  static constexpr int kCursors = kChosen + kMany * M::kColumns * 8;        // [sequences] Cursor
  static constexpr int kMoments = kCursors + kMany * kMostSequences * 32;   // [finishers][columns] sums of squares
  static constexpr int kMomentsEnd = kMoments + kMany * M::kFinishers * M::kColumns * 4;

  static constexpr int kReductionFull = kMany ? round_up(kMomentsEnd, 8) : round_up(kToken + 4, 8);
  static constexpr int kReductionEmpty = kReductionFull + kReductionBuffers * 8;
  static constexpr int kDone = kReductionEmpty + kReductionBuffers * 8;  // consumers are through with a token
  static constexpr int kAttended = kDone + 8;  // consumers have published their part of attention
  static constexpr int kFull = kAttended + 8;
  static constexpr int kMaxSlots = M::kMostSlots;
  static constexpr int kEmpty = kFull + kMaxSlots * 8;
  static constexpr int kRing = round_up(kEmpty + kMaxSlots * 8, 128);
  static constexpr int kFit = (M::kSharedBytes - kRing) / M::kSlotBytes;
  static constexpr int kSlots = kFit < kMaxSlots ? kFit : kMaxSlots;
  static_assert(kSlots >= 3, "this model's buffers leave too little shared memory for the ring");
};

// One token position of a pass, and what else there is to know of it.
struct Column {
  u32 slot, position, token, sequence;
};
struct ColumnMore {
  u32 first;   // column of this pass with which its sequence begins: the two follow each other without a gap
  u32 index;   // among the tokens that the sequence is fed
  u32 flags;   // of ColumnFlag
  u32 drafts;  // how many of the tokens up to this one are guesses that this pass feeds: `Sampling::seen` does not count them yet
};
enum ColumnFlag : u32 {
  kScored = 1,  // its logits are wanted, by the host or for a choice
  kMakes = 2,   // the token behind it is the model's to choose
};
enum PassFlag : u32 {
  kAnyScored = 1,
  kAnySampling = 2,  // one of those is not chosen greedily, or reported
};

// What a launch is told; `Params` is generated from one list that the host packs, too.
template <class M>
struct Block {
  using Model = M;
  const Params& p;
  u32 shared;  // address of the dynamic shared memory
  u32 warp, lane;
  Watch watch;

  // Called as a stage begins. What is computed from these must not be kept from stage to stage: the compiler would, and spill.
  FF_DEVICE void enter(u32 stage, u32 layer) {
    asm volatile("" : "+r"(lane), "+r"(warp), "+r"(shared));
    watch.where = stage << 16 | layer;
  }
  // Timestamps of the launch's last token, for whoever asked for a trace: [roles][blocks][layers + 1][stages][2].
  FF_DEVICE void mark(u32 role, u32 step, u32 layer, u32 stage, u32 event) const {
    if constexpr (M::kTrace)
      if (lane == 0 && step + 1 == p.steps)
        p.trace[(((role * M::kWorkers + blockIdx.x) * (M::kLayers + 1) + layer) * M::kStages + stage) * 2 + event] = nanoseconds();
  }
  FF_DEVICE u64* words(int offset) const { return p.exchange + offset; }
  // What every block reads exists in several copies, so that not all poll the same lines: this block's.
  FF_DEVICE u32 copy() const { return blockIdx.x % M::kCopies; }
  // Opaque, so that what follows from a step is computed where it is used and not kept through all layers.
  static FF_DEVICE u32 fresh(u32 step) {
    asm volatile("" : "+r"(step));
    return step;
  }
  // Version tag of what is handed over in front of `layer` of the token that is being made.
  FF_DEVICE u32 tag(u32 step, u32 layer) const { return (p.epoch + fresh(step)) * (M::kLayers + 1) + layer; }
  // Of a vector that is written so often in a pass: the place that one version goes to. See vectors.cuh.
  static FF_DEVICE u32 version_of(u32 step, u32 number, u32 writes) { return (fresh(step) * writes + number) % M::kVersions; }
  FF_DEVICE u32 position(u32 step) const { return p.start + fresh(step); }
  // The layer that a token begins with: the last token of a long prompt has been through all but the last one (prefill.cuh).
  FF_DEVICE u32 first_layer(u32 step) const { return fresh(step) == 0 && p.resumed ? M::kLayers - 1 : 0; }
  // The prompt's tokens need no head unless their logits are wanted.
  FF_DEVICE bool wants_head(u32 step) const {
    // NOTE: of several columns the producer asks when the next pass may have been laid already.
    if constexpr (M::kColumns > 1) return load_shared(shared + Layout<M>::kPass + 16 + (step & 1) * 4) & kAnyScored;
    return step + 1 >= p.forced_count || p.logits != nullptr;
  }
  // Tiles of this block: (first, count). Word 0: residual owners, 1: combine, 2 + 2 l: qkv, 3 + 2 l: gate_up, last: head.
  FF_DEVICE uint2 tiles(int word) const {
    const u32 v = load_shared(shared + Layout<M>::kTiles + word * 4);
    return make_uint2(v >> 12, v & 4095);
  }
  FF_DEVICE u32 looks_place(u32 stage) const { return shared + Layout<M>::kLooks + (warp * M::kStages + stage) * 4; }
  // Of several columns: the pass that is on its way. A column's number is below `columns`.
  FF_DEVICE u32 columns() const { return load_shared(shared + Layout<M>::kPass); }
  FF_DEVICE u32 pass_flags() const { return load_shared(shared + Layout<M>::kPass + 4); }
  FF_DEVICE Column column(u32 c) const {
    const uint4 v = load_shared4(shared + Layout<M>::kColumn + c * 32);
    return {v.x, v.y, v.z, v.w};
  }
  FF_DEVICE ColumnMore column_more(u32 c) const {
    const uint4 v = load_shared4(shared + Layout<M>::kColumn + c * 32 + 16);
    return {v.x, v.y, v.z, v.w};
  }
  // Wait until `step` tokens of this launch are done; false: the launch ends there.
  FF_DEVICE bool wait_step(u32 step) {
    watch.where = M::kTokenWhere << 16;
    Wait wait;
    u32 v;
    // NOTE: also where somebody has given up: the first finisher comes to say so, and all warps of a block must leave at the same token, or
    // some would wait for the others where they meet.
    while (((v = load_shared_acquire(shared + Layout<M>::kStep)) >> 1) < step)
      if (wait.exhausted(watch)) return false;
    __syncwarp();
    return !((v & 1) && (v >> 1) == step);
  }
};

template <class M>
struct Producer;  // stream.cuh

template <class M>
struct Consumer : Block<M> {
  using L = Layout<M>;
  u32 slot = 0, phase = 0;  // of the ring
  u32 turn = 0;             // groups handed over, modulo two rounds of the reduction buffers; buffer b is finisher b % finishers'

  FF_DEVICE u32 chunk_address() const { return this->shared + L::kRing + slot * M::kSlotBytes; }
  FF_DEVICE void acquire() const { barrier_wait(this->shared + L::kFull + slot * 8, phase, this->watch); }
  // The same of the chunk behind it.
  FF_DEVICE u32 next_address() const { return this->shared + L::kRing + next_slot() * M::kSlotBytes; }
  FF_DEVICE void acquire_next() const { barrier_wait(this->shared + L::kFull + next_slot() * 8, phase ^ (next_slot() == 0), this->watch); }
  FF_DEVICE void release() {
    __syncwarp();
    if (this->lane == 0) barrier_arrive(this->shared + L::kEmpty + slot * 8);
    if (++slot == L::kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
  // Hand one value a lane to the next finisher. NOTE: a buffer always goes to the same finisher; if two shared one, one of them
  // could mistake the phase of its barrier.
  FF_DEVICE void hand_over(float value) {
    const u32 phase = turn >= L::kReductionBuffers, buffer = phase ? turn - L::kReductionBuffers : turn;
    barrier_wait(this->shared + L::kReductionEmpty + buffer * 8, phase ^ 1, this->watch);
    store_shared_float(this->shared + L::kReduction + (buffer * kConsumers + this->warp) * 128 + this->lane * 4, value);
    __syncwarp();
    if (this->lane == 0) barrier_arrive(this->shared + L::kReductionFull + buffer * 8);
    turn = turn + 1 == 2 * L::kReductionBuffers ? 0 : turn + 1;
  }
  // The same of several columns: a value a lane for every four of them. Where finishers find row r of column c: [c / 4][warp][r][c % 4].
  FF_DEVICE void hand_over(const float (&values)[M::kColumnGroups]) {
    const u32 phase = turn >= L::kReductionBuffers, buffer = phase ? turn - L::kReductionBuffers : turn;
    barrier_wait(this->shared + L::kReductionEmpty + buffer * 8, phase ^ 1, this->watch);
    constexpr u32 kFour = kConsumers * 128;  // bytes of four columns
    const u32 to = this->shared + L::kReduction + buffer * L::kReductionBytes + this->warp * 128, g = this->lane >> 2, t = this->lane & 3;
#pragma unroll
    for (int j = 0; j < M::kColumnGroups; j++) {
      if constexpr (M::kWide) store_shared_float(to + (g / 4 + j / 2 * 2) * kFour + (2 * t + j % 2) * 16 + g % 4 * 4, values[j]);
      else store_shared_float(to + j * kFour + this->lane * 4, values[j]);
    }
    __syncwarp();
    if (this->lane == 0) barrier_arrive(this->shared + L::kReductionFull + buffer * 8);
    turn = turn + 1 == 2 * L::kReductionBuffers ? 0 : turn + 1;
  }
  FF_DEVICE void sync() const { sync_threads<1, kConsumers * 32>(); }

 private:
  FF_DEVICE u32 next_slot() const { return slot + 1 == L::kSlots ? 0 : slot + 1; }
};

template <class M>
struct Finisher : Block<M> {
  using L = Layout<M>;
  u32 index;             // of this finisher
  u32 turn;              // groups of other finishers before this one's next
  u32 half = 0, phase = 0;  // which of its two reduction buffers is next, and its phase
  u32 attended = 0;  // how many times this block had a part of attention
  float best;       // this lane's candidate for the next token: its score; NaN once a score was
  u32 best_row;
  // Of a token that is selected or reported: orders of this lane's largest logit after bias and penalties, and of the likeliest one; orders that
  // all tokens have or surpass that top-k may keep, and that may be reported (~0: none is known). See shortlist.cuh.
  u32 largest, likeliest, worst_kept, worst_likely;
  u32 token;
  float column_best[M::kColumnGroups];  // the same of this lane's columns
  u32 column_row[M::kColumnGroups];

  static constexpr u32 kNobody = 0x7fffffffu;  // in the place of a candidate's row
  FF_DEVICE void forget() {
    best = -INFINITY;
    best_row = kNobody;
  }
  FF_DEVICE void forget_columns() {
#pragma unroll
    for (int j = 0; j < M::kColumnGroups; j++) column_best[j] = -INFINITY, column_row[j] = kNobody;
  }
  FF_DEVICE void propose(float score, u32 row) {  // rows come ascending
    if (score > best) best_row = row;
    best = max_nan(best, score);
  }
  FF_DEVICE void merge(float score, u32 row) {  // another's candidate
    if (score > best || (score == best && row < best_row)) best_row = row;
    best = max_nan(best, score);
  }

  FF_DEVICE u32 buffer() const { return index + half * M::kFinishers; }
  FF_DEVICE void acquire() const { barrier_wait(this->shared + L::kReductionFull + buffer() * 8, phase, this->watch); }
  FF_DEVICE void release() {
    __syncwarp();
    if (this->lane == 0) barrier_arrive(this->shared + L::kReductionEmpty + buffer() * 8);
    if constexpr (L::kReductionHalves == 2) {
      phase ^= half;
      half ^= 1;
    } else {
      phase ^= 1;
    }
  }
  FF_DEVICE u32 residual(u32 local_tile, u32 row, u32 column = 0) const {
    return this->shared + L::kResidual + ((local_tile * 8 + row) * M::kColumns + column) * 4;
  }
  FF_DEVICE void sync() const { sync_threads<2, M::kFinishers * 32>(); }

  // Norm weights of the owned rows, a residual stage ahead: the weights that stream by evict them from every cache, and a trip to
  // memory would be waited for. Each finisher keeps a copy of its own.
  FF_DEVICE void fetch_gamma(const float* from, uint2 owned) const {
#pragma unroll 1
    for (u32 i = this->lane; i < owned.y * 8; i += 32) async_copy4(gamma_place(i), from + owned.x * 8 + i);
  }
  FF_DEVICE void await_gamma() const {
    async_wait();
    __syncwarp();
  }
  FF_DEVICE float gamma(u32 local_tile, u32 row) const { return load_shared_float(gamma_place(local_tile * 8 + row)); }
  FF_DEVICE u32 gamma_place(u32 i) const { return this->shared + L::kGamma + (index * M::kOwnedTiles * 8 + i) * 4; }
};
