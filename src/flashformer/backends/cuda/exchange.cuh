// Exchanges: how values get from block to block without a barrier.
//
// A word is 8 bytes: 4 of payload and a 4-byte tag that says which version it is; it is written and read as one access, so a
// word whose tag is right is complete. A reader polls exactly the words that it needs. Tags never repeat, so nothing is reset.
// What all blocks read in full, vectors, comes without tags, which are half of the bytes.
//
// NOTE: early polls slow everybody down, most of all those who are about to publish: see `Looks`.
#pragma once
#include "prelude.cuh"

struct Word {
  u32 value, tag;
};

FF_DEVICE Word split(u64 w) { return {(u32)w, (u32)(w >> 32)}; }
FF_DEVICE u64 join(u32 value, u32 tag) { return (u64)tag << 32 | value; }

FF_DEVICE u64 load_word(const u64* p) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
// What was written before the word was, by who fenced in between, is visible to who has read it. NOTE: a fence behind `load_word` would
// do the same, but wait for the memory.
FF_DEVICE u64 load_word_acquire(const u64* p) {
  u64 v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
FF_DEVICE void load_words(const u64* p, u64& a, u64& b) {  // each of the two is atomic for itself
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1}, [%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
}
FF_DEVICE void store_word(u64* p, u32 value, u32 tag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(join(value, tag)) : "memory");
}
FF_DEVICE void store_words(u64* p, u32 a, u32 b, u32 tag) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1,%2};" ::"l"(p), "l"(join(a, tag)), "l"(join(b, tag)) : "memory");
}

// Vectors (vectors.cuh) have no tags. Where a pair of values is not there yet is kAbsent: two NaNs that no instruction makes.
constexpr u32 kAbsent = 0xffffffffu;
FF_DEVICE uint4 load_pairs(const void* p) {  // each of the four is atomic for itself
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
FF_DEVICE void load_pairs(const u32* p, u32& a, u32& b) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "l"(p) : "memory");
}
FF_DEVICE bool present(const uint4& v) { return v.x != kAbsent && v.y != kAbsent && v.z != kAbsent && v.w != kAbsent; }
FF_DEVICE void store_pair(u32* p, u32 pair) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(pair) : "memory"); }

// Every wait in the kernel is bounded. Whoever waits too long writes where it stood, once, and raises `stopped` for all; from
// then on every wait gives up at once and the kernel unwinds through its ordinary control flow.
struct Watch {
  const Params& p;
  u32 where;  // stage << 16 | layer, of the stage that this warp is in

  FF_DEVICE void give_up() const {
    if (atomicCAS(p.status, 0u, where + 1) == 0) p.status[1] = blockIdx.x;
  }
};

// One wait: begins when it is made. 32-bit clocks: registers are dear in every role.
struct Wait {
  static constexpr u32 kGlance = 20000;     // cycles before a wait looks at `status`, and between looks
  static constexpr u32 kPatience = 300000;  // glances: some three seconds
  u32 start = clock32(), glances = 0;

  FF_DEVICE u32 waited() const { return clock32() - start; }
  // Called from a wait loop; true: give up.
  FF_DEVICE bool expired(const Watch& watch) {
    if (waited() < kGlance) return false;
    return load_volatile(watch.p.status) != 0 || exhausted(watch);
  }
  // The same, whether or not somebody has given up.
  FF_DEVICE bool exhausted(const Watch& watch) {
    if (waited() < kGlance) return false;
    start = clock32();
    if (++glances < kPatience) return false;
    watch.give_up();
    return true;
  }
  FF_DEVICE void at_least(u32 cycles) const {
    while (waited() < cycles) {
    }
  }
};

// When a warp looks for a vector that others publish. A look that comes too early costs them time, so each reader learns for each
// stage how long its data takes: it looks for the first time about when the data came in the layers before, and never sooner than
// an exchange can be. What is missing then is about to come: it looks again at once.
// NOTE: this decides when, never what: a result does not depend on it.
template <class M>
struct Looks {
  static constexpr u32 kStep = 64;  // cycles, sooner or later. NOTE: equal, or late readers would delay all, who then come later
  static constexpr u32 kLatest = 40000;
  Wait wait;
  u32 delay;
  u32 place;  // shared memory where this warp keeps what it learnt for this stage
  bool first = true;

  FF_DEVICE explicit Looks(u32 place) : delay(load_shared(place)), place(place) {}

  // Before each look; false: give up.
  FF_DEVICE bool again(const Watch& watch) {
    if (first) wait.at_least(delay);
    return first || !__any_sync(kAllLanes, wait.expired(watch));
  }
  // After each look of all lanes, each with its part; true: all of it is here.
  FF_DEVICE bool found(bool here, u32 lane) {
    here = __all_sync(kAllLanes, here);
    if (first && lane == 0) {
      const u32 sooner = delay > M::kFirstLook + kStep ? delay - kStep : M::kFirstLook, later = delay < kLatest ? delay + kStep : delay;
      store_shared(place, here ? sooner : later);
    }
    first = false;
    return here;
  }
};

// All lanes of a warp wait for a phase of a barrier.
FF_DEVICE void barrier_wait(u32 bar, u32 parity, const Watch& watch) {
#if __CUDA_ARCH__ >= 900
  if (__builtin_expect(barrier_try(bar, parity), 1)) return;
  Wait wait;
#pragma unroll 1
  while (!barrier_try(bar, parity))
    if (wait.expired(watch)) return;
#else
  // NOTE: lanes leave together. Could they leave one by one, the compiler would guard what follows by calls, and spill for them.
  Wait wait;
#pragma unroll 1
  while (!__all_sync(kAllLanes, barrier_test(bar, parity)))
    if (__any_sync(kAllLanes, wait.expired(watch))) return;
#endif
}
