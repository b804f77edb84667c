// A GPU in one thread of a CPU, for the code of the token stage: it stands in for the header of the same name. Every CUDA thread is
// a coroutine that runs until it must wait: for its warp, for its block's finishers, or for what another block writes.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __CUDACC__
#define __device__
#define __forceinline__ inline
#define FF_DEVICE inline
#undef INFINITY
#define INFINITY __builtin_inff()

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = unsigned long long;
struct uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
constexpr u32 kAllLanes = ~0u;
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr u32 round_up(u32 a, u32 b) { return (a + b - 1) / b * b; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline u64 min(u64 a, u64 b) { return a < b ? a : b; }

// ---- coroutines ----

struct Rendezvous {  // of `arrived` so far; a new round begins when all have
  u32 arrived = 0, round = 0;
};
struct BlockMemory {
  std::vector<u8> shared;
  Rendezvous warp[4], finishers;
  u64 lanes[4][2][32];  // what the lanes of a warp give each other, in two versions by round
};
struct Thread {
  ucontext_t context;  // where it starts
  jmp_buf here;        // where it goes on: unlike swapcontext, a jump costs no system call
  std::vector<char> stack;
  std::function<void()> run;
  BlockMemory* memory;
  u32 block, warp, lane;
  bool started = false, done = false;
};
inline Thread* thread;
inline jmp_buf scheduler;

inline void yield() {
  if (!_setjmp(thread->here)) _longjmp(scheduler, 1);
}
inline void go_on(Thread& t) {  // until it yields
  thread = &t;
  if (_setjmp(scheduler)) return;
  if (t.started) _longjmp(t.here, 1);
  t.started = true;
  setcontext(&t.context);
}
inline void meet(Rendezvous& r, u32 members) {
  const u32 round = r.round;
  if (++r.arrived == members) {
    r.arrived = 0;
    r.round++;
  } else {
    while (r.round == round) yield();
  }
}
inline void prepare(Thread& t) {
  getcontext(&t.context);
  t.stack.resize(1 << 16);
  t.context.uc_stack.ss_sp = t.stack.data();
  t.context.uc_stack.ss_size = t.stack.size();
  makecontext(&t.context, +[] { thread->run(), thread->done = true, yield(); }, 0);
}

inline struct {
  struct {
    operator u32() const { return thread->block; }
  } x;
} blockIdx;

// ---- what the lanes of a warp do together ----

inline const u64* all_lanes(u64 mine) {
  Rendezvous& r = thread->memory->warp[thread->warp];
  u64* values = thread->memory->lanes[thread->warp][r.round % 2];
  values[thread->lane] = mine;
  meet(r, 32);
  return values;
}
template <class T>
T of_lane(T mine, u32 lane) {
  u64 bits = 0;
  std::memcpy(&bits, &mine, sizeof mine);
  bits = all_lanes(bits)[lane % 32];
  std::memcpy(&mine, &bits, sizeof mine);
  return mine;
}
template <class T>
T __shfl_sync(u32, T v, u32 lane) { return of_lane(v, lane); }
template <class T>
T __shfl_xor_sync(u32, T v, u32 mask) { return of_lane(v, thread->lane ^ mask); }
template <class T>
T __shfl_up_sync(u32, T v, u32 by) { return of_lane(v, thread->lane < by ? thread->lane : thread->lane - by); }
inline u32 __ballot_sync(u32, bool vote) {
  const u64* votes = all_lanes(vote);
  u32 all = 0;
  for (u32 i = 0; i < 32; i++) all |= u32(votes[i]) << i;
  return all;
}
inline bool __all_sync(u32 lanes, bool vote) { return __ballot_sync(lanes, vote) == kAllLanes; }
inline bool __any_sync(u32 lanes, bool vote) { return __ballot_sync(lanes, vote) != 0; }
inline u32 __reduce_min_sync(u32, u32 v) {
  const u64* values = all_lanes(v);
  for (u32 i = 0; i < 32; i++) v = min(v, u32(values[i]));
  return v;
}
inline u32 __reduce_add_sync(u32, u32 v) {
  const u64* values = all_lanes(v);
  v = 0;
  for (u32 i = 0; i < 32; i++) v += u32(values[i]);
  return v;
}
inline u32 __reduce_or_sync(u32, u32 v) {
  const u64* values = all_lanes(v);
  for (u32 i = 0; i < 32; i++) v |= u32(values[i]);
  return v;
}
inline u32 __reduce_max_sync(u32, u32 v) {
  const u64* values = all_lanes(v);
  for (u32 i = 0; i < 32; i++) v = v > u32(values[i]) ? v : u32(values[i]);
  return v;
}
inline float warp_sum(float x) {
  for (u32 o = 16; o; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
  return x;
}
inline void __syncwarp() { all_lanes(0); }

// ---- the prelude ----

template <class To, class From>
To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline u32 __float_as_uint(float x) { return bits<u32>(x); }
inline float __uint_as_float(u32 x) { return bits<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline u32 __umulhi(u32 a, u32 b) { return u32(u64(a) * b >> 32); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs(int(x)); }
inline int __clz(u32 x) { return x ? __builtin_clz(x) : 32; }
inline float exp2_approx(float x) { return __builtin_exp2f(x); }
inline float max_nan(float a, float b) { return a != a || b != b ? bits<float>(0x7fffffffu) : a > b ? a : b; }

inline u8* shared_memory(u32 at, u32 size) {
  if (at % size || at + size > thread->memory->shared.size()) __builtin_trap();
  return thread->memory->shared.data() + at;
}
inline u32 load_shared(u32 at) {
  u32 v;
  std::memcpy(&v, shared_memory(at, 4), 4);
  return v;
}
inline uint2 load_shared2(u32 at) {
  uint2 v;
  std::memcpy(&v, shared_memory(at, 8), 8);
  return v;
}
inline uint4 load_shared4(u32 at) {
  uint4 v;
  std::memcpy(&v, shared_memory(at, 16), 16);
  return v;
}
inline float load_shared_float(u32 at) { return bits<float>(load_shared(at)); }
inline void store_shared(u32 at, u32 v) { std::memcpy(shared_memory(at, 4), &v, 4); }
inline u64 load_shared64(u32 at) {
  u64 v;
  std::memcpy(&v, shared_memory(at, 8), 8);
  return v;
}
inline void store_shared64(u32 at, u64 v) { std::memcpy(shared_memory(at, 8), &v, 8); }
inline u32 add_shared(u32 at, u32 v) {
  const u32 before = load_shared(at);
  store_shared(at, before + v);
  return before;
}
inline void store_shared_float(u32 at, float v) { store_shared(at, bits<u32>(v)); }
inline void store_shared_release(u32 at, u32 v) { store_shared(at, v); }
inline u32 load_volatile(const u32* p) { return yield(), *p; }
inline void store_host(u64* p, u64 v) { *p = v; }
inline void fence_device() {}
inline void fence_copy_engine() {}

// ---- exchanges and roles ----

#include "parameters.h"

struct Word {
  u32 value, tag;
};
inline Word split(u64 w) { return {u32(w), u32(w >> 32)}; }
inline u64 join(u32 value, u32 tag) { return u64(tag) << 32 | value; }
inline u64 load_word(const u64* p) { return yield(), *p; }
inline void store_word(u64* p, u32 value, u32 tag) { yield(), *p = join(value, tag); }
inline u64 load_word_acquire(const u64* p) { return load_word(p); }
inline void load_words(const u64* p, u64& a, u64& b) { yield(), a = p[0], b = p[1]; }
inline void store_words(u64* p, u32 a, u32 b, u32 tag) { yield(), p[0] = join(a, tag), p[1] = join(b, tag); }

inline u32 rounds;  // in which all blocks met: looks of the first block's first warp

struct Watch {};
struct Wait {
  bool expired(Watch) { return false; }
};
template <class M>
struct Looks {
  explicit Looks(u32) { rounds += thread->block + thread->warp + thread->lane == 0; }
  bool again(Watch) { return true; }
  bool found(bool here, u32) { return __ballot_sync(kAllLanes, here) == kAllLanes; }
};
inline void barrier_wait(u32, u32, Watch) {}
inline void barrier_arrive(u32) {}

#include "columns.h"
constexpr int kMostSequences = 32;

template <class M>
struct Layout {
  static constexpr int kResidual = M::kFreeBytes, kTiles = kResidual, kStep = kTiles + 4, kToken = kStep + 4, kDone = kToken + 4;
  static constexpr int kBest = round_up(kDone + 8, 32), kPass = kBest + 32 * M::kColumns, kColumn = kPass + 32;
  static constexpr int kCursors = kColumn + 32 * M::kColumns, kChosen = kCursors + 32 * kMostSequences;
  static constexpr int kBytes = kChosen + 8 * M::kColumns;
};
template <class M>
struct Block {
  const Params& p;
  u32 shared, lane;
  Watch watch;

  void enter(u32, u32) {}
  static u32 fresh(u32 step) { return step; }
  u64* words(int offset) const { return p.exchange + offset; }
  u32 position(u32 step) const { return p.start + step; }
  u32 looks_place(u32) const { return 0; }
#include "pass.h"
  uint2 tiles(int) const {
    const u32 v = load_shared(Layout<M>::kTiles);
    return {v >> 12, v & 4095};
  }
};
template <class M>
struct Producer {};
template <class M>
struct Consumer : Block<M> {};
template <class M>
struct Finisher : Block<M> {
  u32 index;
#include "candidates.h"
  void sync() const { meet(thread->memory->finishers, M::kFinishers * 32); }
};
