// A GPU in one thread of a CPU, for whole kernels: it stands in for prelude.cuh. Every CUDA thread of every block is a coroutine.
//
// The warps take turns in an order drawn from a seed. In its turn a warp runs until all of its lanes have looked at what others may
// change (`poll`) or it waits at a barrier; lanes run one after the other between the points where they meet. Some warps sleep for a while.
// What the hardware does later is done later: copies into shared memory, and words that are published to other blocks, land some
// turns after they were started, in any order. Places that a copy is on its way to hold NaN, and whoever touches them is caught, as is
// whoever accesses shared memory out of range or misaligned, arrives too often at a barrier, or meets lanes that do something else.
//
// Time passes with turns; all lanes of a warp see the same time. Where nothing has happened for long and nothing is on its way, one warp alone looks on, and
// its clock runs fast: so whoever waits for what never comes gives up soon, by the kernel's own rules.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __CUDACC__
#define __device__
#define __global__
#define __grid_constant__
#define __shared__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define FF_DEVICE inline

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = unsigned long long;
constexpr u32 kAllLanes = ~0u;

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
struct Index {
  u32 x;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class A, class B>
constexpr A ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
template <class A, class B>
constexpr A round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

__attribute__((aligned(128))) u8 memory[1];  // what kernels call their dynamic shared memory; its address stands for its beginning

namespace gpu {

// Where a thread goes on. NOTE: unlike swapcontext, a jump costs no system call, and unlike longjmp, this one costs next to nothing.
#if defined(__clang__)
using Place = jmp_buf;
#define GPU_REMEMBER(place) _setjmp(place)
#define GPU_JUMP(place) _longjmp(place, 1)
#else
using Place = void* [5];
#define GPU_REMEMBER(place) __builtin_setjmp(place)
#define GPU_JUMP(place) __builtin_longjmp(place, 1)
#endif

constexpr u32 kSharedBase = 1024;      // address of shared memory: 0 is none
constexpr u32 kStackBytes = 1 << 16;   // of a thread
constexpr u32 kGiven = 48;             // most bytes that a lane gives to its warp at once
constexpr u64 kMostAlone = 2'000'000;  // turns: more than the longest wait takes

struct Barrier {  // an mbarrier: a phase ends when all have arrived and all bytes have landed
  u32 expected, pending, phase;
  std::int64_t bytes;
  bool exists;
};
struct NamedBarrier {
  u32 arrived, round, threads;
};
struct Block {
  std::vector<u8> shared, on_its_way;  // the second: of each 4 bytes, how many copies will write there
  std::vector<Barrier> barriers;       // by place / 8
  NamedBarrier named[16];
  u32 warps, copies, stores;  // that run; by the copy engine, and of published words: that are on their way
};
struct Warp {
  Block* block;
  u32 first;                // thread
  u32 ready, met, exited;   // lanes: that may run in this turn, that wait for the others, that are done
  u32 rotation;             // the lane that comes first in this turn
  const char* doing;        // what the lanes meet for
  const u32* blocked_on;    // the warp waits until this is no longer `blocked_value`
  u32 blocked_value;
  u32 idle;    // turns since it changed something, or what it looks at has changed
  bool stale;  // it has looked at nothing since
  u64 watched[16];  // what it looked at since: a bit for each number of a place
  u64 sleeps;  // until this turn
  alignas(16) u8 given[32][kGiven], result[32][16];
};
struct Thread {
  Place here;
  bool started;
  Block* block;
  Warp* warp;
  u32 lane;
  Index block_index, thread_index;
  u32 copies;      // of its own that are on their way
  u64 copies_end;  // the turn in which the last one lands
  ucontext_t start;
  u32 groups, grouped[8];  // how many groups of them are complete; by number of a group modulo 8: its copies that are on their way
};
struct Event {  // what happens later
  enum Kind { kCopy, kArrive, kStore } kind;
  u64 due, order;
  Block* block;
  Thread* thread;     // whose copy it is, if threads wait for their own
  u32 to, bytes, bar;  // bar: 0 of copies that no barrier counts
  const u8* from;
  std::vector<u8> data;  // of a copy that has read its source at once
  u64* word;
  u64 value;
  u32 group = 0;  // of its thread's copies
  bool half = false;  // of a word, of which only 4 bytes are published
  bool operator<(const Event& o) const { return due != o.due ? due > o.due : order > o.order; }  // the next one is the largest
};

// All that a launch changes.
struct Machine {
  std::function<void()> kernel;
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::vector<Warp*> running;
  std::vector<Event> events;
  u64 turn, order, random, clock;
  u64 idle;  // turns of warps since something changed
  u64 last_due[512];  // by number of a published word's place: two to one place keep their order
  u32 cycles;          // of a turn
  bool stuck, failed;
  bool given_up;  // a wait took too long: what is read from then on is not ready
  Warp* alone;  // who runs while the machine is stuck
  char message[512];
  Place scheduler;
};
static Machine machine;
static Thread* current;
static Index grid, block_size;
static u8* stacks;
static u64 stack_count;

inline u32 draw(u32 below) {  // 0 to below - 1
  u64& x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return u32((x >> 32) * below >> 32);
}

[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) inline void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  int used = 0;
  if (current)
    used = std::snprintf(machine.message, sizeof machine.message, "block %u, warp %u, lane %u: ", current->block_index.x,
                         current->thread_index.x / 32, current->thread_index.x % 32);
  std::vsnprintf(machine.message + used, sizeof machine.message - used, format, values);
  va_end(values);
  machine.failed = true;
  GPU_JUMP(machine.scheduler);
}

inline void change() {  // something happened that others may wait for
  machine.idle = 0;
  machine.stuck = false;
  machine.alone = nullptr;
  if (current) current->warp->idle = 0, current->warp->stale = true;
}
// Places by number, less than 1024. NOTE: those of global memory by their place in a page, or the order would differ from process to process.
inline u32 number_of(const void* global) { return u32(u64(global) % 4096 / 8); }
inline u32 number_of(const Block& b, u32 shared) { return 512 + (u32(&b - machine.blocks.data()) * 37 + shared / 8) % 512; }
inline u32 number_of(const Thread& t) { return 512 + u32(&t - machine.threads.data()) % 512; }
inline void watch(u32 place) {
  Warp& w = *current->warp;
  if (w.stale) std::memset(w.watched, 0, sizeof w.watched);
  w.stale = false;
  w.watched[place / 64] |= 1ull << place % 64;
}
inline void wake(u32 place) {  // who looks at it, which has changed
  for (Warp* w : machine.running)
    if (!w->stale && w->watched[place / 64] >> place % 64 & 1) w->idle = 0, w->stale = true;
}

// ---- turns ----

[[noreturn]] __attribute__((noinline)) inline void go_on(Thread* to) {  // null: with the scheduler
  if (to == nullptr) GPU_JUMP(machine.scheduler);
  current = to;
  if (to->started) GPU_JUMP(to->here);
  to->started = true;
  setcontext(&to->start);
  __builtin_unreachable();
}
inline Thread* next_lane(const Warp& w) {
  if (w.ready == 0) return nullptr;
  const u32 r = w.rotation, turned = w.ready >> r | w.ready << (32 - r) % 32;
  return &machine.threads[w.first + (__builtin_ctz(turned) + r) % 32];
}
__attribute__((noinline)) inline void leave_to(Thread* to) {
  if (!GPU_REMEMBER(current->here)) go_on(to);
}
// Others come first: what follows may depend on them.
inline void poll() {
  Warp& w = *current->warp;
  w.ready &= ~(1u << current->lane);
  leave_to(next_lane(w));
}
// After what tells others to go on: at times they do so before the other lanes of this warp.
inline void pause() {
  if (!machine.stuck && draw(8) == 0) leave_to(nullptr);
}
inline void run_thread() {
  machine.kernel();
  Thread& t = *current;
  Warp& w = *t.warp;
  if (w.met) fail("the thread ends while lanes of its warp wait for it (%s)", w.doing);
  w.exited |= 1u << t.lane;
  w.ready &= ~(1u << t.lane);
  change();
  if (w.exited == ~0u && --w.block->warps == 0 && w.block->copies) fail("the block ends while the copy engine writes into its memory");
  go_on(next_lane(w));
}

// What all lanes of a warp do together: `all` makes the result of each from what each gives.
template <class Out, class In, class All>
Out together(const char* doing, const In& mine, All all) {
  static_assert(sizeof(In) <= kGiven && sizeof(Out) <= 16);
  Warp& w = *current->warp;
  const u32 lane = current->lane;
  if (w.met && w.doing != doing && std::strcmp(w.doing, doing)) fail("%s, while other lanes wait to %s", doing, w.doing);
  if (w.exited) fail("%s, but other lanes of the warp have ended", doing);
  w.doing = doing;
  std::memcpy(w.given[lane], &mine, sizeof mine);
  w.met |= 1u << lane;
  w.ready &= ~(1u << lane);
  if (w.met != ~0u) {
    leave_to(next_lane(w));
  } else {
    In in[32];
    Out out[32];
    for (u32 i = 0; i < 32; i++) std::memcpy(&in[i], w.given[i], sizeof in[i]);
    all(in, out);
    for (u32 i = 0; i < 32; i++) std::memcpy(w.result[i], &out[i], sizeof out[i]);
    w.met = 0;
    w.ready = ~(1u << lane);
    if (w.blocked_on || (!machine.stuck && draw(16) == 0)) leave_to(nullptr);
  }
  Out result;
  std::memcpy(&result, w.result[lane], sizeof result);
  return result;
}

// ---- shared memory ----

inline u32 offset_of(const Block& b, u32 at, u32 bytes, u32 alignment) {
  const u32 offset = at - kSharedBase;
  if (at % alignment) fail("shared address %u is not a multiple of %u", offset, alignment);
  if (at < kSharedBase || u64(offset) + bytes > b.shared.size()) fail("%u bytes at shared address %d are out of range", bytes, int(offset));
  return offset;
}
template <class T>
u8* place(u32 at) {
  Block& b = *current->block;
  const u32 offset = offset_of(b, at, sizeof(T), sizeof(T));
  for (u32 i = offset; i < offset + sizeof(T); i += 4)
    if (b.on_its_way[i / 4] && !machine.given_up) fail("an access to shared address %u, where a copy is about to land", offset);
  for (u32 i = offset; i < offset + sizeof(T); i += 8)
    if (b.barriers[i / 8].exists) fail("an ordinary access to a barrier at shared address %u", offset);
  return b.shared.data() + offset;
}
template <class T>
T load(u32 at) {
  T value;
  std::memcpy(&value, place<T>(at), sizeof value);
  return value;
}
template <class T>
void store(u32 at, T value) {
  std::memcpy(place<T>(at), &value, sizeof value);
  change();
}

inline Barrier& barrier(Block& b, u32 at) {
  Barrier& found = b.barriers[offset_of(b, at, 8, 8) / 8];
  if (!found.exists) fail("there is no barrier at shared address %u", at - kSharedBase);
  return found;
}
inline void arrive(Barrier& b) {
  if (b.pending == 0) fail("too many arrivals at a barrier of %u", b.expected);
  b.pending--;
}
inline void end_phase(const Block& of, Barrier& b, u32 at) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.expected;
    wake(number_of(of, at));
  }
  change();
}

// ---- what happens later ----

// NOTE: several things at a time, since each lets others look again.
inline u64 later() { return round_up(machine.turn + 1 + draw(draw(256) ? 1u << draw(7) : 1000), u64(16)); }
inline void put_off(Event event) {
  event.order = machine.order++;
  machine.events.push_back(std::move(event));
  std::push_heap(machine.events.begin(), machine.events.end());
}
inline void begin_copy(u32 to, const void* from, u32 bytes, u32 bar, u32 alignment, Thread* thread) {
  Block& b = *current->block;
  const u32 offset = offset_of(b, to, bytes, alignment);
  if (bytes % alignment || u64(from) % alignment) fail("a copy of %u bytes from %p: not a multiple of %u", bytes, from, alignment);
  for (u32 i = offset / 4; i < (offset + bytes) / 4; i++) {
    if (!thread && b.on_its_way[i]) fail("two copies on their way to shared address %u", i * 4);
    if (b.barriers[i / 2].exists) fail("a copy onto a barrier at shared address %u", i * 4);
    b.on_its_way[i]++;
  }
  std::memset(b.shared.data() + offset, 0xff, bytes);
  if (!thread) b.copies++;
  const u8* source = static_cast<const u8*>(from);
  Event event{Event::kCopy, later(), 0, &b, thread, offset, bytes, bar, source, {}, nullptr, 0};
  if (draw(2)) event.data.assign(source, source + bytes);
  if (thread) {
    thread->copies++;
    thread->grouped[event.group = thread->groups % 8]++;
    thread->copies_end = std::max(thread->copies_end, event.due);
  }
  put_off(std::move(event));
  change();
}
inline void publish(u64* to, u64 value, bool half = false) {
  u64& last = machine.last_due[number_of(to)];
  last = std::max(last, later());
  current->block->stores++;
  put_off({Event::kStore, last, 0, current->block, nullptr, 0, 0, 0, nullptr, {}, to, value, 0, half});
  change();
}
inline void publish_half(u32* to, u32 value) {
  publish(reinterpret_cast<u64*>(to), value, true);
}
inline void land(const Event& e) {
  if (e.kind == Event::kStore) {
    if (e.half) *reinterpret_cast<u32*>(e.word) = u32(e.value);
    else *e.word = e.value;
    wake(number_of(e.word));
    e.block->stores--;
  } else if (e.kind == Event::kArrive) {
    Barrier& b = barrier(*e.block, e.bar);
    arrive(b);
    end_phase(*e.block, b, e.bar);
  } else {
    std::memcpy(e.block->shared.data() + e.to, e.data.empty() ? e.from : e.data.data(), e.bytes);
    for (u32 i = e.to / 4; i < (e.to + e.bytes) / 4; i++) e.block->on_its_way[i]--;
    if (e.thread) e.thread->copies--, e.thread->grouped[e.group]--, wake(number_of(*e.thread));
    else e.block->copies--;
    if (e.bar) {
      Barrier& b = barrier(*e.block, e.bar);
      b.bytes -= e.bytes;
      end_phase(*e.block, b, e.bar);
    }
  }
  change();
}
inline void land_due() {
  while (!machine.events.empty() && machine.events.front().due <= machine.turn) {
    std::pop_heap(machine.events.begin(), machine.events.end());
    const Event event = std::move(machine.events.back());
    machine.events.pop_back();
    land(event);
  }
}
// What this block has published so far lands before anything that follows.
inline void fence() {
  if (current->block->stores == 0) return;
  auto& events = machine.events;
  const auto own = std::partition(events.begin(), events.end(),
                                  [](const Event& e) { return e.kind != Event::kStore || e.block != current->block; });
  std::sort(own, events.end(), [](const Event& a, const Event& b) { return a.order < b.order; });
  for (auto i = own; i != events.end(); i++) land(*i);
  events.erase(own, events.end());
  std::make_heap(events.begin(), events.end());
}

// ---- launches ----

// Whoever has looked several times at what has not changed since is mostly passed over, until nobody else can go on: an emulated look
// takes long.
inline Warp* choose() {
  constexpr u32 kIdle = 3;  // turns: as many as a look may take
  const auto& running = machine.running;
  if (machine.alone && !machine.alone->blocked_on && machine.alone->exited != ~0u && machine.idle % kMostAlone)
    return machine.alone;
  const u32 n = u32(running.size()), first = draw(n);
  Warp* waiting = nullptr;
  const bool any = draw(32) == 0;
  for (u32 i = 0; i < n; i++) {
    Warp* w = running[(first + i) % n];
    if (w->blocked_on && *w->blocked_on == w->blocked_value) continue;
    if (w->sleeps > machine.turn) continue;
    if (w->idle > kIdle && !w->stale && !any) {
      waiting = w;
      continue;
    }
    return w;
  }
  return machine.events.empty() ? waiting : nullptr;
}
inline void run_turns() {
  constexpr u32 kLongestSleep = 1024;
  while (!machine.running.empty()) {
    machine.turn++;
    current = nullptr;
    if (GPU_REMEMBER(machine.scheduler) == 0) {
      land_due();
      // NOTE: each warp has had many turns by then.
      const u64 each = machine.running.size();
      if (machine.idle > 128 * each && machine.events.empty()) machine.stuck = true;
      Warp* w = choose();
      if (w) {
        if (machine.stuck) machine.alone = w;
        machine.clock += machine.idle++ > 8 * each ? 1 << 15 : machine.cycles;
        if (draw(64) == 0) w->sleeps = machine.turn + draw(1u << draw(11));
        w->idle++;
        w->blocked_on = nullptr;
        w->ready = ~w->met & ~w->exited;
        w->rotation = draw(32);
        go_on(next_lane(*w));
      }
      u64 next = ~0ull;
      if (!machine.events.empty()) next = machine.events.front().due;
      for (const Warp* other : machine.running)
        if (other->sleeps > machine.turn) next = std::min(next, other->sleeps);
      if (next == ~0ull) fail("all warps wait at barriers of their blocks");
      machine.turn = std::max(machine.turn, next - 1);
    }
    if (machine.failed) return;
    auto& running = machine.running;
    running.erase(std::remove_if(running.begin(), running.end(), [](const Warp* w) { return w->exited == ~0u; }), running.end());
  }
}
inline void free_stacks() {
  if (stacks) munmap(stacks, stack_count * kStackBytes);
  stacks = nullptr;
  stack_count = 0;
}
inline void make_stacks(u64 count) {
  if (count <= stack_count) return;
  free_stacks();
  stacks = static_cast<u8*>(mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (u64 i = 0; i < count; i++) mprotect(stacks + i * kStackBytes, 4096, PROT_NONE);  // whoever needs more is caught
  stack_count = count;
}

// All blocks at once; what was wrong, or null.
inline const char* launch_together(std::function<void()> kernel, u32 blocks, u32 threads, u32 shared_bytes, u64 seed, u32 cycles) {
  Machine& m = machine;
  if (threads % 32) return "blocks of whole warps only";
  m.kernel = std::move(kernel);
  m.random = seed * 0x9E3779B97F4A7C15ull + 0x2545F4914F6CDD1Dull;
  m.turn = m.order = m.idle = 0;
  m.clock = m.random >> 32;
  m.cycles = cycles;
  m.stuck = m.failed = m.given_up = false;
  m.alone = nullptr;
  m.events.clear();
  m.running.clear();
  std::memset(m.last_due, 0, sizeof m.last_due);
  grid = {blocks};
  block_size = {threads};
  m.blocks.assign(blocks, Block{});
  m.warps.assign(u64(blocks) * threads / 32, Warp{});
  m.threads.resize(u64(blocks) * threads);
  make_stacks(m.threads.size());
  for (Block& b : m.blocks) {
    b.shared.assign(shared_bytes, 0xff);
    b.on_its_way.assign(shared_bytes / 4 + 1, 0);
    b.barriers.assign(shared_bytes / 8 + 1, Barrier{});
    b.warps = threads / 32;
  }
  for (u32 i = 0; i < m.warps.size(); i++) {
    m.warps[i].block = &m.blocks[i * 32 / threads];
    m.warps[i].first = i * 32;
    m.running.push_back(&m.warps[i]);
  }
  for (u32 i = 0; i < m.threads.size(); i++) {
    Thread& t = m.threads[i];
    t.started = false;
    t.warp = &m.warps[i / 32];
    t.block = t.warp->block;
    t.lane = i % 32;
    t.block_index = {i / threads};
    t.thread_index = {i % threads};
    t.copies = 0;
    t.copies_end = 0;
    t.groups = 0;
    std::fill(t.grouped, t.grouped + 8, 0);
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = stacks + u64(i) * kStackBytes;
    t.start.uc_stack.ss_size = kStackBytes - i % 64 * 320;  // or all would share a few lines of the cache
    t.start.uc_link = nullptr;
    makecontext(&t.start, run_thread, 0);
  }
  run_turns();
  if (m.failed) return m.message;
  m.turn = ~0ull;
  land_due();
  return nullptr;
}
// Threads that have nothing to do with each other, one after the other.
inline const char* launch_apart(std::function<void()> kernel, u32 blocks, u32 threads) {
  static Thread one;
  current = &one;
  grid = {blocks};
  block_size = {threads};
  for (u32 b = 0; b < blocks; b++)
    for (u32 t = 0; t < threads; t++) {
      one.block_index = {b};
      one.thread_index = {t};
      kernel();
    }
  return nullptr;
}
template <class... A, std::size_t... i>
const char* launch(void (*kernel)(A...), u32 blocks, u32 threads, u32 shared_bytes, u64 seed, u32 cycles, void** a, std::index_sequence<i...>) {
  const auto thread = [=] { kernel(*static_cast<std::remove_const_t<A>*>(a[i])...); };
  return shared_bytes ? launch_together(thread, blocks, threads, shared_bytes, seed, cycles) : launch_apart(thread, blocks, threads);
}
// A kernel with its arguments, as the driver takes them; what was wrong, or null. `cycles`: that pass in a turn.
template <class... A>
const char* launch(void (*kernel)(A...), u32 blocks, u32 threads, u32 shared_bytes, u64 seed, u32 cycles, void** a) {
  return launch(kernel, blocks, threads, shared_bytes, seed, cycles, a, std::index_sequence_for<A...>());
}

}  // namespace gpu

// NOTE: each has a guard, a mapping of its own, of which a process may not have many: whoever has done with a library calls this.
extern "C" __attribute__((visibility("default"))) void free_stacks() { gpu::free_stacks(); }

#define blockIdx (gpu::current->block_index)
#define threadIdx (gpu::current->thread_index)
#define blockDim gpu::block_size
#define gridDim gpu::grid

// ---- arithmetic ----

template <class To, class From>
To bits_as(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(u32 v) { return bits_as<float>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline u32 __float_as_uint(float v) { return bits_as<u32>(v); }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline u64 min(u64 a, u64 b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float max_nan(float a, float b) { return a != a || b != b ? bits_as<float>(0x7fffffffu) : a > b ? a : b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline u32 __float2uint_rn(float x) { return u32(std::nearbyint(x)); }
inline u32 __umulhi(u32 a, u32 b) { return u32(u64(a) * b >> 32); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    const u32 s = selector >> 4 * i & 15, byte = (u64(b) << 32 | a) >> 8 * (s & 7) & 255;
    r |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return r;
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) { return permute_bytes(a, b, selector & 0x7777); }

struct Bfloat16 {
  static constexpr bool kIsHalf = false;
  static u32 one(float v) {
    return v != v ? 0x7fff : (__float_as_uint(v) + 0x7fff + (__float_as_uint(v) >> 16 & 1)) >> 16;
  }
  static u32 pack(float low, float high) { return one(low) | one(high) << 16; }
  static float unpack(u16 v) { return __uint_as_float(u32(v) << 16); }
};
struct Float16 {
  static constexpr bool kIsHalf = true;
  static u32 pack(float low, float high) {
    return pack_finite(fminf(fmaxf(low, -65504.f), 65504.f), fminf(fmaxf(high, -65504.f), 65504.f));
  }
  static u32 pack_finite(float low, float high) { return bits_as<u16>(_Float16(low)) | u32(bits_as<u16>(_Float16(high))) << 16; }
  static float unpack(u16 v) { return bits_as<_Float16>(v); }
};
inline u32 larger_of_halves(u32 a, u32 b) { return max(a & 0xffff0000u, b & 0xffff0000u) | max(a & 0xffff, b & 0xffff); }
inline u32 halves_of_e4m3(u16 pair) {
  const auto half = [](u32 v) { return Float16::unpack(u16((v & 0x80) << 8 | (v & 0x7f) << 7)) * 256; };
  return Float16::pack(half(pair & 255), half(pair >> 8));
}
template <class T>
u32 fma_of_pairs(u32 a, u32 b, u32 c) {
  const auto one = [&](u32 shift) { return fmaf(T::unpack(u16(a >> shift)), T::unpack(u16(b >> shift)), T::unpack(u16(c >> shift))); };
  return T::pack(one(0), one(16));
}
inline u32 subtract_halves(u32 a, u32 b) {
  return Float16::pack_finite(Float16::unpack(u16(a)) - Float16::unpack(u16(b)), Float16::unpack(a >> 16) - Float16::unpack(b >> 16));
}

inline int __clz(u32 v) { return v ? __builtin_clz(v) : 32; }
inline int __ffs(u32 v) { return __builtin_ffs(int(v)); }

// ---- what the lanes of a warp do together ----

inline void check_mask(u32 mask) {
  if (mask != kAllLanes) gpu::fail("lanes %08x of a warp: only whole warps are emulated", mask);
}
template <class T, class From>
T shuffle(const char* name, u32 mask, T mine, u32 by, From from) {
  struct Given {
    T value;
    u32 by;
  };
  check_mask(mask);
  return gpu::together<T>(name, Given{mine, by}, [&](const Given* in, T* out) {
    for (u32 i = 0; i < 32; i++) out[i] = in[from(i, in[i].by)].value;
  });
}
template <class T>
T __shfl_sync(u32 mask, T v, u32 lane) {
  return shuffle("shfl", mask, v, lane, [](u32, u32 lane) { return lane % 32; });
}
template <class T>
T __shfl_xor_sync(u32 mask, T v, u32 with) {
  return shuffle("shfl.xor", mask, v, with, [](u32 i, u32 with) { return (i ^ with) % 32; });
}
template <class T>
T __shfl_up_sync(u32 mask, T v, u32 by) {
  return shuffle("shfl.up", mask, v, by, [](u32 i, u32 by) { return i < by ? i : i - by; });
}
template <class T>
T __shfl_down_sync(u32 mask, T v, u32 by) {
  return shuffle("shfl.down", mask, v, by, [](u32 i, u32 by) { return i + by < 32 ? i + by : i; });
}
template <class F>
u32 reduce(const char* name, u32 mask, u32 mine, F both) {
  check_mask(mask);
  return gpu::together<u32>(name, mine, [&](const u32* in, u32* out) {
    u32 all = in[0];
    for (u32 i = 1; i < 32; i++) all = both(all, in[i]);
    std::fill(out, out + 32, all);
  });
}
inline u32 __ballot_sync(u32 mask, bool vote) {
  return reduce("vote", mask, vote ? 1u << gpu::current->lane : 0, [](u32 a, u32 b) { return a | b; });
}
inline bool __all_sync(u32 mask, bool vote) { return __ballot_sync(mask, vote) == kAllLanes; }
inline bool __any_sync(u32 mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline u32 __reduce_min_sync(u32 mask, u32 v) { return reduce("redux.min", mask, v, [](u32 a, u32 b) { return min(a, b); }); }
inline u32 __reduce_max_sync(u32 mask, u32 v) { return reduce("redux.max", mask, v, [](u32 a, u32 b) { return max(a, b); }); }
inline u32 __reduce_or_sync(u32 mask, u32 v) { return reduce("redux.or", mask, v, [](u32 a, u32 b) { return a | b; }); }
inline u32 __reduce_add_sync(u32 mask, u32 v) { return reduce("redux.add", mask, v, [](u32 a, u32 b) { return a + b; }); }
inline void __syncwarp() { reduce("syncwarp", kAllLanes, 0, [](u32, u32) { return 0u; }); }
inline float warp_sum(float x) {
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(kAllLanes, x, o);
  return x;
}
inline float warp_max(float x) {
  for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, o));
  return x;
}

// A barrier among `threads` threads of the block.
inline void sync_some(u32 id, u32 threads) {
  struct Given {
    u32 id, threads;
  };
  gpu::together<u32>("bar.sync", Given{id, threads}, [](const Given* in, u32* out) {
    for (u32 i = 0; i < 32; i++) {
      if (in[i].id != in[0].id) gpu::fail("lanes of a warp at barriers %u and %u", in[0].id, in[i].id);
      out[i] = 0;
    }
    gpu::Warp& w = *gpu::current->warp;
    gpu::NamedBarrier& b = w.block->named[in[0].id];
    if (b.arrived && b.threads != in[0].threads) gpu::fail("barrier %u of %u threads and of %u", in[0].id, b.threads, in[0].threads);
    b.threads = in[0].threads;
    b.arrived += 32;
    if (b.arrived == b.threads) {
      b.arrived = 0;
      b.round++;
    } else {
      w.blocked_on = &b.round;
      w.blocked_value = b.round;
    }
    gpu::change();
  });
}
template <int id, int threads>
void sync_threads() {
  sync_some(id, threads);
}
inline void __syncthreads() { sync_some(0, blockDim.x); }

// d += a b, of `kPerRegister` values in a register: `value_a(register, i)` and `value_b` take them out.
template <int kPerRegister, class Sum, class A, class B>
void multiply(Sum (&d)[4], const uint4& a, u32 b0, u32 b1, A value_a, B value_b) {
  struct Given {
    Sum d[4];
    u32 a[4], b[2];
  };
  struct Result {
    Sum d[4];
  };
  const Given mine{{d[0], d[1], d[2], d[3]}, {a.x, a.y, a.z, a.w}, {b0, b1}};
  const Result result = gpu::together<Result>("mma", mine, [&](const Given* in, Result* out) {
    constexpr u32 kDepth = 8 * kPerRegister;
    Sum left[16][kDepth], right[kDepth][8], sum[16][8];
    for (u32 lane = 0; lane < 32; lane++)
      for (u32 i = 0; i < kPerRegister; i++) {
        const u32 g = lane >> 2, at = (lane & 3) * kPerRegister + i;
        for (u32 r = 0; r < 4; r++) left[g + r % 2 * 8][at + r / 2 * 4 * kPerRegister] = value_a(in[lane].a[r], i);
        for (u32 r = 0; r < 2; r++) right[at + r * 4 * kPerRegister][g] = value_b(in[lane].b[r], i);
        for (u32 r = 0; r < 4; r++) sum[g + r / 2 * 8][(lane & 3) * 2 + r % 2] = in[lane].d[r];
      }
    for (u32 m = 0; m < 16; m++)
      for (u32 k = 0; k < kDepth; k++)
        for (u32 n = 0; n < 8; n++) sum[m][n] += left[m][k] * right[k][n];
    for (u32 lane = 0; lane < 32; lane++)
      for (u32 r = 0; r < 4; r++) out[lane].d[r] = sum[(lane >> 2) + r / 2 * 8][(lane & 3) * 2 + r % 2];
  });
  std::copy(result.d, result.d + 4, d);
}
template <class T>
void mma(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
  const auto value = [](u32 pair, u32 i) { return T::unpack(u16(pair >> 16 * i)); };
  multiply<2>(d, a, b0, b1, value, value);
}
template <bool kSigned>
void multiply_bytes(int (&d)[4], const uint4& a, u32 b0, u32 b1) {
  const auto with_sign = [](u32 word, u32 i) { return int(std::int8_t(word >> 8 * i)); };
  multiply<4>(d, a, b0, b1, [=](u32 word, u32 i) { return kSigned ? with_sign(word, i) : int(u8(word >> 8 * i)); }, with_sign);
}
// NOTE: done at once, and the registers are not watched until the wait for them.
constexpr u32 kWarpgroupColumns = 128, kHalfBytes = kWarpgroupColumns * 16;
inline u32 load_shared(u32 a);
template <class T, bool kFresh>
void warpgroup_mma(float (&d)[64], const uint4& a, u32 b) {
  if (b % 16) gpu::fail("columns at shared address %u", b);
  const u32 lane = gpu::current->lane;
  for (u32 n = 0; n < 16; n++) {
    float part[4];
    for (u32 i = 0; i < 4; i++) part[i] = kFresh ? 0 : d[4 * n + i];
    const u32 at = b + (8 * n + lane / 4) * 16 + lane % 4 * 4;
    mma<T>(part, a, load_shared(at), load_shared(at + kHalfBytes));
    std::copy(part, part + 4, d + 4 * n);
  }
}
template <int n>
void fewer_registers() {}
template <int n>
void more_registers() {}
inline void warpgroup_fence() {}
inline void warpgroup_commit() {}
template <int n>
void warpgroup_wait() {}
inline u32 transpose8x8(u32 v) {
  return gpu::together<u32>("movmatrix", v, [](const u32* in, u32* out) {
    const auto value = [&](u32 row, u32 column) { return in[row * 4 + column / 2] >> column % 2 * 16 & 0xffff; };
    for (u32 i = 0; i < 32; i++) out[i] = value(i % 4 * 2, i / 4) | value(i % 4 * 2 + 1, i / 4) << 16;
  });
}

// ---- shared memory ----

inline u32 shared_address(const void* p) { return gpu::kSharedBase + u32(static_cast<const u8*>(p) - memory); }
inline uint4 load_shared4(u32 a) { return gpu::load<uint4>(a); }
inline float4 load_shared_float4(u32 a) { return gpu::load<float4>(a); }
inline uint2 load_shared2(u32 a) { return gpu::load<uint2>(a); }
inline u32 load_shared(u32 a) { return gpu::load<u32>(a); }
inline u16 load_shared16(u32 a) { return gpu::load<u16>(a); }
inline u32 load_shared8(u32 a) { return gpu::load<u8>(a); }
inline float load_shared_float(u32 a) { return gpu::load<float>(a); }
inline void store_shared(u32 a, u32 v) { gpu::store(a, v); }
inline u64 load_shared64(u32 a) { return gpu::load<u64>(a); }
inline void store_shared64(u32 a, u64 v) { gpu::store(a, v); }
inline u32 add_shared(u32 a, u32 v) {
  const u32 before = gpu::load<u32>(a);
  gpu::store(a, before + v);
  return before;
}
inline void store_shared_float(u32 a, float v) { gpu::store(a, v); }
inline void store_shared4(u32 a, const uint4& v) { gpu::store(a, v); }
inline void store_shared16(u32 a, u16 v) { gpu::store(a, v); }
inline u32 load_shared_acquire(u32 a) {
  gpu::poll();
  gpu::watch(gpu::number_of(*gpu::current->block, a));
  return gpu::load<u32>(a);
}
inline void store_shared_release(u32 a, u32 v) {
  gpu::store(a, v);
  gpu::wake(gpu::number_of(*gpu::current->block, a));
  gpu::pause();
}

inline void barrier_init(u32 bar, u32 arrivals) {
  gpu::Block& b = *gpu::current->block;
  b.barriers[gpu::offset_of(b, bar, 8, 8) / 8] = {arrivals, arrivals, 0, 0, true};
}
inline void barrier_arrive(u32 bar) {
  gpu::Block& block = *gpu::current->block;
  gpu::Barrier& b = gpu::barrier(block, bar);
  gpu::arrive(b);
  gpu::end_phase(block, b, bar);
  gpu::pause();
}
inline bool barrier_test(u32 bar, u32 parity) {
  gpu::poll();
  if (parity > 1) gpu::fail("parity %u", parity);
  gpu::Block& b = *gpu::current->block;
  gpu::watch(gpu::number_of(b, bar));
  return gpu::barrier(b, bar).phase != parity;
}
inline bool barrier_try(u32 bar, u32 parity) { return barrier_test(bar, parity); }

// ---- copies into shared memory ----

inline void barrier_expect(u32 bar, u32 bytes) {
  gpu::Barrier& b = gpu::barrier(*gpu::current->block, bar);
  b.bytes += bytes;
  gpu::arrive(b);
  gpu::change();
}
inline void bulk_copy_expected(u32 to, const void* from, u32 bytes, u32 bar) {
  if (bytes == 0) gpu::fail("a copy of nothing");
  gpu::barrier(*gpu::current->block, bar);
  gpu::begin_copy(to, from, bytes, bar, 16, nullptr);
}
inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar) {
  barrier_expect(bar, bytes);
  bulk_copy_expected(to, from, bytes, bar);
}
inline void bulk_prefetch(const void* from, u32 bytes) {
  if (u64(from) % 16 || bytes % 16) gpu::fail("a prefetch of %u bytes from %p: not a multiple of 16", bytes, from);
}
inline void async_copy16(u32 to, const void* from) { gpu::begin_copy(to, from, 16, 0, 16, gpu::current); }
inline void async_copy4(u32 to, const void* from) { gpu::begin_copy(to, from, 4, 0, 4, gpu::current); }
inline void async_wait() {
  while (gpu::current->copies) {
    gpu::watch(gpu::number_of(*gpu::current));
    gpu::poll();
  }
}
inline void async_commit() {
  gpu::Thread* t = gpu::current;
  if (t->grouped[++t->groups % 8]) gpu::fail("more than 8 groups of copies on their way");
}
template <int n>
void async_wait_groups() {
  static_assert(n < 8);
  const gpu::Thread* t = gpu::current;
  const auto landed = [&] {
    for (u32 i = n + 1; i < 8; i++)  // those before the last n
      if (t->grouped[(t->groups - i) % 8]) return false;
    return true;
  };
  while (!landed()) {
    gpu::watch(gpu::number_of(*t));
    gpu::poll();
  }
}
inline void async_arrive(u32 bar) {
  gpu::Thread* t = gpu::current;
  const u64 due = std::max(t->copies_end, gpu::machine.turn) + 1;
  gpu::put_off({gpu::Event::kArrive, due, 0, t->block, t, 0, 0, bar, nullptr, {}, nullptr, 0});
  gpu::change();
}
inline void fence_copy_engine() {}

// ---- time ----

inline u32 clock32() {
  gpu::poll();
  return u32(gpu::machine.clock);
}
inline u64 nanoseconds() { return gpu::machine.clock; }

// ---- global memory ----

inline void fence_device() { gpu::fence(); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T load_early(const T* p) {
  return *p;
}
template <class T>
T look(const T* p) {
  gpu::poll();
  gpu::watch(gpu::number_of(p));
  return *p;
}
inline u32 load_volatile(const u32* p) { return look(p); }
inline u32 atomicCAS(u32* p, u32 expected, u32 value) {
  gpu::change();
  const u32 found = *p;
  if (found == expected) *p = value;
  gpu::machine.given_up = true;
  gpu::wake(gpu::number_of(p));
  return found;
}
inline u32 atomicAdd(u32* p, u32 v) {
  gpu::change();
  const u32 found = *p;
  *p += v;
  gpu::wake(gpu::number_of(p));
  return found;
}
inline void atomicOr(u32* p, u32 v) { *p |= v; }
inline void store_host(u64* p, u64 v) { gpu::publish(p, v); }
// NOTE: whoever waits for a word looks at the clock, too, which lets others come first; this is so that words change between two reads.
inline u64 read_word(const u64* p) {
  if (gpu::draw(16) == 0) gpu::poll();
  gpu::watch(gpu::number_of(p));
  return *p;
}
inline void read_words(const u64* p, u64& a, u64& b) {
  if (u64(p) % 16) gpu::fail("two words at %p: not a multiple of 16", static_cast<const void*>(p));
  a = read_word(p);
  b = read_word(p + 1);
}
inline void read_two_pairs(const u32* p, u32& a, u32& b) {
  if (u64(p) % 8) gpu::fail("two pairs at %p: not a multiple of 8", static_cast<const void*>(p));
  const u64 w = read_word(reinterpret_cast<const u64*>(p));
  a = u32(w);
  b = u32(w >> 32);
}
inline uint4 read_pairs(const void* p) {
  if (u64(p) % 16) gpu::fail("four pairs at %p: not a multiple of 16", p);
  u64 w[2];
  read_words(static_cast<const u64*>(p), w[0], w[1]);
  return make_uint4(u32(w[0]), u32(w[0] >> 32), u32(w[1]), u32(w[1] >> 32));
}
inline void write_words(u64* p, u64 a, u64 b) {
  if (u64(p) % 16) gpu::fail("two words at %p: not a multiple of 16", static_cast<const void*>(p));
  gpu::publish(p, a);
  gpu::publish(p + 1, b);
}
