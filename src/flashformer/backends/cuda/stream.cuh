// The producer: one warp that keeps the memory busy.
//
// It reads the block's table of chunks (one tape for the whole model) and copies chunk after chunk into the ring, through all
// stages, layers and tokens. Two limits shape the stream: few bytes are in flight (enough to saturate the memory; more would
// only lengthen its queue, in which the exchanges wait, too), and while the ring is full it goes on with paced L2 prefetches.
// A table entry of zero bytes marks a layer's attention: there the block's share of the KV cache goes through the same ring.
#pragma once
#include "roles.cuh"

// A block's share of one layer's KV cache: blocks [next, end) of all heads' blocks laid end to end, cut evenly by bytes.
// Depends on nothing but the length, so the same position gives the same bits.
template <class M>
struct KvShare {
  u32 per_head, total, active, next, end;

  FF_DEVICE KvShare(u32 position, u32 block) {
    per_head = position / 16 + 1;  // blocks of a head, this token's own included
    total = per_head * M::kVirtualHeads;
    const u32 most = ceil_div(total, M::kKvMinBlocks);
    active = most < M::kWorkers ? most : M::kWorkers;
    next = first(block);
    end = first(block + 1);
  }
  FF_DEVICE u32 first(u32 block) const { return block < active ? block * total / active : total; }
  FF_DEVICE u32 owner(u32 flat) const { return ((flat + 1) * active - 1) / total; }
};

template <class M>
struct Producer : Block<M> {
  using L = Layout<M>;
  const uint2* table;
  u32 length, head_start;          // table entries: of a token, and before the head's
  u32 step = 0, index = 0;         // load cursor: token of this launch, entry of the table
  u32 window_step, window_index;   // where `window` begins
  u32 offset = 0;                  // of the load cursor in the window
  uint2 window[2];                 // 64 entries, one a lane in each half
  u32 issued = 0, landed = 0, freed = 0;
  u32 issue_slot = 0, land_slot = 0, land_phase = 0, free_slot = 0, free_phase = 0;
  u32 slot_bytes = 0;  // lane s: bytes of the copy into slot s
  u32 in_flight = 0;
  u32 ahead = 0;  // entries that were prefetched beyond the load cursor
  u32 last_prefetch = 0;

  FF_DEVICE u32 entries(u32 s) const { return this->wants_head(s) ? length : head_start; }

  FF_DEVICE uint2 fetch(u32 s, u32 i) const {
    while (s < this->p.steps && i >= entries(s)) i -= entries(s++);
    return s < this->p.steps ? __ldg(table + i) : make_uint2(0, kEnd);
  }
  static constexpr u32 kEnd = 0xffffffffu;

  FF_DEVICE uint2 entry(u32 at) const {  // at: 0..63 from the window's beginning
    const uint2 mine = at < 32 ? window[0] : window[1];
    return make_uint2(__shfl_sync(kAllLanes, mine.x, at & 31), __shfl_sync(kAllLanes, mine.y, at & 31));
  }
  FF_DEVICE void advance() {
    if (ahead) ahead--;
    if (++index == entries(step)) {
      index = 0;
      step++;
    }
    if (++offset == 32) {
      offset = 0;
      window[0] = window[1];
      window_index += 32;
      window[1] = fetch(window_step, window_index + 32 + this->lane);
      while (window_step < this->p.steps && window_index >= entries(window_step)) window_index -= entries(window_step++);
    }
  }
  FF_DEVICE void copy(const u8* from, u32 bytes) {
    const u32 to = this->shared + L::kRing + issue_slot * M::kSlotBytes, bar = this->shared + L::kFull + issue_slot * 8;
    if constexpr (M::kBulkCopy) {
      if (this->lane == 0) bulk_copy(to, from, bytes, bar);
    } else {
      for (u32 i = this->lane * 16; i < bytes; i += 512) async_copy16(to + i, from + i);
      async_arrive(bar);
    }
    if (this->lane == issue_slot) slot_bytes = bytes;
    in_flight += bytes;
    issued++;
    if (++issue_slot == L::kSlots) issue_slot = 0;
  }
  FF_DEVICE void poll() {
    // NOTE: only slots that have landed are asked whether they are free: an older phase of the barrier would alias.
    if (landed < issued && barrier_test(this->shared + L::kFull + land_slot * 8, land_phase)) {
      in_flight -= __shfl_sync(kAllLanes, slot_bytes, land_slot);
      landed++;
      if (++land_slot == L::kSlots) {
        land_slot = 0;
        land_phase ^= 1;
      }
    }
    if (freed < landed && barrier_test(this->shared + L::kEmpty + free_slot * 8, free_phase)) {
      freed++;
      if (++free_slot == L::kSlots) {
        free_slot = 0;
        free_phase ^= 1;
      }
    }
  }
  FF_DEVICE bool may_issue() const {
    if (issued - freed >= L::kSlots) return false;
    return in_flight < (landed - freed < M::kWindowThreshold ? M::kWindowHigh : M::kWindowLow);
  }
  FF_DEVICE void prefetch() {
    const u32 now = clock32();
    if (ahead >= M::kPrefetchChunks || now - last_prefetch < M::kPrefetchCycles) return;
    const uint2 e = entry(offset + ahead);
    if (e.y == kEnd) return;
    if (e.y) {
      if (this->lane == 0) bulk_prefetch(this->p.tape + (u64)e.x * 512, e.y);
      last_prefetch = now;
    }
    ahead++;
  }
  // True when the token loop has ended early; looked at now and then.
  FF_DEVICE bool stopped() const { return load_shared_acquire(this->shared + L::kStep) & 1; }

  FF_DEVICE void run() {
    window_step = 0;
    window_index = 0;
    window[0] = fetch(0, this->lane);
    window[1] = fetch(0, 32 + this->lane);
    Wait progress;
    bool in_kv = false;
    u32 kv_next = 0, kv_end = 0, kv_layer = 0, per_head = 0;
    while (step < this->p.steps) {
      const u32 before = issued + landed + freed;
      poll();
      if (issued + landed + freed != before) progress = Wait();
      if (!in_kv) {
        const uint2 e = entry(offset);
        if (e.y == 0) {
          const KvShare<M> share(this->position(step), blockIdx.x);
          kv_next = share.next;
          kv_end = share.end;
          per_head = share.per_head;
          kv_layer = e.x;
          in_kv = true;
        } else if (may_issue()) {
          copy(this->p.tape + (u64)e.x * 512, e.y);
          advance();
          continue;
        }
      }
      if (in_kv) {
        if (kv_next == kv_end) {
          in_kv = false;
          advance();
          continue;
        }
        if (may_issue()) {
          const u32 head = kv_next / per_head, block = kv_next - head * per_head;
          u32 count = kv_end - kv_next;
          if (count > per_head - block) count = per_head - block;
          if (count > M::kKvChunkBlocks) count = M::kKvChunkBlocks;
          // The newest positions were written in the token before by another block: it must be done.
          const bool fresh = step > 0 && block + count + 1 >= per_head;
          if (!fresh || (load_shared_acquire(this->shared + L::kStep) >> 1) >= step) {
            if (fresh) fence_copy_engine();
            const u64 at = ((u64)kv_layer * M::kKvHeads + head / M::kVirtualSplits) * this->p.kv_blocks + block;
            copy(this->p.kv + at * M::kKvBlockBytes, count * M::kKvBlockBytes);
            kv_next += count;
            continue;
          }
        }
      }
      if constexpr (M::kPrefetchChunks > 0)
        if (issued - freed == L::kSlots) prefetch();
      if (progress.waited() > Wait::kGlance && (stopped() || progress.expired(this->watch))) break;
    }
    // NOTE: a copy in flight must not outlive the block, whose shared memory may be given away.
    Wait drain;
    while (landed < issued && !drain.expired(this->watch)) poll();
  }
};
