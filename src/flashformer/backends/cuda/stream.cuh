// The producer: one warp that keeps the memory busy.
//
// It reads the block's table of chunks (one tape for the whole model) and copies chunk after chunk into the ring, through all
// stages, layers and tokens. Two limits shape the stream: where an exchange may be near few bytes are in flight (enough to saturate
// the memory; more would only lengthen its queue, in which the exchanges wait, too), and while the ring is full it goes on with paced
// L2 prefetches. A table entry of zero bytes marks a layer's attention: there the block's share of the KV cache goes through the same
// ring. The entry with which a stage begins has kBegins in its bytes, too.
#pragma once
#include "roles.cuh"

// A thread block's share of one layer's KV cache: cache blocks [next, end) of all heads' blocks laid end to end. Each takes an
// equal part of one head, as long as that leaves them nearly even; where it does not (long contexts), the blocks of all heads are
// cut evenly by bytes, and a share may hold the end of one head and the beginning of the next.
// Depends on nothing but the length, so the same position gives the same bits.
template <class M>
struct KvShare {
  u32 per_head, total, active;
  u32 pieces;  // of a head; 0: cut evenly
  u32 next, end;

  FF_DEVICE KvShare(u32 position, u32 block) {
    per_head = position / 16 + 1;  // blocks of a head, this token's own included
    total = per_head * M::kVirtualHeads;
    constexpr u32 kMost = M::kWorkers / M::kVirtualHeads;
    pieces = ceil_div(per_head, M::kKvMinBlocks);
    if (pieces > kMost) pieces = kMost;
    if (kMost == 0 || ceil_div(per_head, pieces) > total / M::kWorkers + M::kKvSlackBlocks) pieces = 0;
    const u32 most = ceil_div(total, M::kKvMinBlocks);
    active = pieces ? pieces * M::kVirtualHeads : most < M::kWorkers ? most : M::kWorkers;
    next = first(block);
    end = first(block + 1);
  }
  FF_DEVICE u32 first(u32 block) const {
    if (block >= active) return total;
    if (pieces) return block / pieces * per_head + block % pieces * per_head / pieces;
    return block * total / active;
  }
  // Thread blocks with the first and the last piece of a head.
  FF_DEVICE u32 first_owner(u32 head) const { return pieces ? head * pieces : owner(head * per_head); }
  FF_DEVICE u32 last_owner(u32 head) const { return pieces ? (head + 1) * pieces - 1 : owner((head + 1) * per_head - 1); }
  // Which piece of a thread block belongs to a head.
  FF_DEVICE u32 piece(u32 block, u32 head) const { return pieces ? 0 : head - first(block) / per_head; }

 private:
  FF_DEVICE u32 owner(u32 flat) const { return ((flat + 1) * active - 1) / total; }
};

template <class M>
struct UnitStream;  // units.cuh

// NOTE: the loop that issues is short on purpose: it shares the instruction cache with eleven warps that do other things.
template <class M>
struct Producer : Block<M> {
  using L = Layout<M>;
  static constexpr u32 kEnd = 0xffffffffu;
  const uint2* table;
  u32 length, head_start;         // table entries: of a token, and before the head's
  u32 step = 0, left = 0;         // load cursor: token of this launch, entries left of it (with several columns: of its layers, or its head)
  u32 window_step = 0, window_index = 0;  // where `window` begins; before `run`: the first token
  u32 offset = 0;                 // of the load cursor in the window
  uint2 current;                  // entry at the load cursor: (offset in units, bytes)
  uint2 window[2];                // 64 entries, one a lane in each half; the cursor is in the first, the second is loading
  u32 issued = 0, landed = 0, freed = 0;
  u32 begins = 0;  // what was `issued` where the newest chunk's stage begins
  u32 issue_slot = 0, land_slot = 0, land_phase = 0, free_slot = 0, free_phase = 0;
  u32 slot_bytes = 0;  // lane s: bytes of the copy into slot s
  u32 in_flight = 0;
  u32 ahead = 0;  // entries that were prefetched beyond the load cursor
  u32 last_prefetch = 0, prefetch_pause = 0;  // clocks
  bool at_head = false;  // with several columns: where the cursor is

  FF_DEVICE void run() {
    window[0] = fetch(0, window_index + this->lane);
    window[1] = fetch(0, window_index + 32 + this->lane);
    current = pick(window[0], 0);
    left = (kMany ? head_start : entries(0)) - window_index;
    while (step < this->p.steps) {
      if (!wait_room()) break;
      if (current.y & M::kBegins) begins = issued;
      if (const u32 bytes = bytes_of(current)) copy(this->p.tape + (u64)current.x * M::kChunkUnit, bytes);
      else if (!stream_kv(current.x)) break;
      advance();
    }
    // NOTE: a copy in flight must not outlive the block, whose shared memory may be given away.
    for (u32 spins = 0; landed < issued && spins < kMostSpins; spins++) poll();
  }

  static constexpr bool kMany = M::kColumns > 1;
  static constexpr u32 kGlanceSpins = 1024, kMostSpins = 1u << 26;  // of `poll`: at least 50 cycles each

  // NOTE: whether a pass of several columns needs the head is known when it has been laid: until then it does.
  FF_DEVICE u32 entries(u32 s) const { return kMany || this->wants_head(s) ? length : head_start; }

  FF_DEVICE uint2 fetch(u32 s, u32 i) const {
    while (s < this->p.steps && i >= entries(s)) i -= entries(s++);
    return s < this->p.steps ? __ldg(table + i) : make_uint2(0, kEnd);
  }
  FF_DEVICE static u32 bytes_of(const uint2& entry) { return entry.y & ~M::kBegins; }
  FF_DEVICE static uint2 pick(const uint2& mine, u32 lane) {
    return make_uint2(__shfl_sync(kAllLanes, mine.x, lane & 31), __shfl_sync(kAllLanes, mine.y, lane & 31));
  }
  FF_DEVICE void advance() {
    if (ahead) ahead--;
    if (--left == 0) {
      if constexpr (kMany) {
        const bool has_head = !at_head && length > head_start;
        at_head = has_head && this->wants_head(step);
        left = at_head ? length - head_start : head_start;
        if (!at_head) step++;
        if (has_head && !at_head) return skip_head();
      } else {
        left = entries(++step);
      }
    }
    if (++offset == 32) {
      offset = 0;
      window[0] = window[1];
      window_index += 32;
      while (window_step < this->p.steps && window_index >= entries(window_step)) window_index -= entries(window_step++);
      window[1] = fetch(window_step, window_index + 32 + this->lane);
    }
    current = pick(window[0], offset);
  }
  // The table goes on with the next pass, not with this one's head.
  FF_DEVICE void skip_head() {
    window_step = step;
    window_index = offset = ahead = 0;
    window[0] = fetch(step, this->lane);
    window[1] = fetch(step, 32 + this->lane);
    current = pick(window[0], 0);
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
    return in_flight < (calm() ? M::kCalmWindow : M::window(landed - freed));
  }
  // No exchange is near: the consumers have begun with the newest chunk's stage, so they have what they waited for, and much of it is left.
  FF_DEVICE bool calm() const { return M::kCalmWindow > 0 && (int)(freed - begins) > 0; }
  // Until another copy may be issued; false: the launch is over.
  FF_DEVICE bool wait_room() {
    u32 spins = 0;
    while (true) {
      poll();
      if (may_issue()) return true;
      if constexpr (M::kPrefetchChunks > 0)
        if (issued - freed == L::kSlots) prefetch();
      if (++spins % kGlanceSpins == 0 && over(spins)) return false;
    }
  }
  // Has the token loop ended early, or has somebody (we, now?) given up?
  FF_DEVICE bool over(u32 spins) const {
    if ((load_shared_acquire(this->shared + L::kStep) & 1) || load_volatile(this->p.status) != 0) return true;
    if (spins < kMostSpins) return false;
    this->watch.give_up();
    return true;
  }
  FF_DEVICE void prefetch() {
    const u32 now = clock32();
    if (ahead >= M::kPrefetchChunks || now - last_prefetch < prefetch_pause) return;
    // NOTE: a branch, not a selection: the second half may still be on its way, and the stream must not wait for it.
    uint2 e;
    if (offset + ahead < 32) e = pick(window[0], offset + ahead);
    else e = pick(window[1], offset + ahead);
    if (e.y == kEnd) return;
    if (const u32 bytes = bytes_of(e)) {
      if (this->lane == 0) bulk_prefetch(this->p.tape + (u64)e.x * M::kChunkUnit, bytes);
      last_prefetch = now;
      prefetch_pause = bytes / 128 * M::kPrefetchCycles / 128;  // of 16 KB
    }
    ahead++;
  }
  // Until the present pass is laid, and all before it are done; false: the launch is over.
  FF_DEVICE bool await_pass() {
    for (u32 spins = 1; load_shared_acquire(this->shared + L::kStep) >> 1 < step; spins++) {
      poll();
      if constexpr (kMany && M::kPrefetchChunks > 0) prefetch();
      if (spins % kGlanceSpins == 0 && over(spins)) return false;
    }
    fence_copy_engine();
    return true;
  }
  // This block's share of a layer's KV cache; there is room for the first copy. False: the launch is over.
  FF_DEVICE bool stream_kv(u32 layer) {
    if constexpr (kMany) return await_pass() && UnitStream<M>::run(*this, step, layer);
    const KvShare<M> share(this->position(step), blockIdx.x);
    for (u32 next = share.next; next < share.end;) {
      const u32 head = next / share.per_head, block = next - head * share.per_head;
      u32 count = share.end - next;
      if (count > share.per_head - block) count = share.per_head - block;
      if (count > M::kKvChunkBlocks) count = M::kKvChunkBlocks;
      // The newest positions were written in the token before by another block: it must be done.
      if (step > 0 && block + count + 1 >= share.per_head && !await_pass()) return false;
      if (!wait_room()) return false;
      const u64 at = ((u64)layer * M::kKvHeads + head / M::kVirtualSplits) * this->p.kv_blocks + block;
      copy(this->p.kv + at * M::kKvBlockBytes, count * M::kKvBlockBytes);
      next += count;
    }
    return true;
  }
};
