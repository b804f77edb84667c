// One warp of a GPU in one thread of a CPU, for the code that packs codes and multiplies them: it stands in for prelude.cuh. Lanes are
// coroutines that take turns wherever they do something together.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define FF_DEVICE inline
#define __global__
#define __grid_constant__

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = unsigned long long;
struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
constexpr u32 kAllLanes = ~0u;
inline struct {
  u32 x;
} blockIdx, blockDim, threadIdx;

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
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline void atomicOr(u32* p, u32 v) { *p |= v; }

struct Bfloat16 {
  static constexpr bool kIsHalf = false;
  static u32 one(float v) { return (__float_as_uint(v) + 0x7fff + (__float_as_uint(v) >> 16 & 1)) >> 16; }  // of finite values
  static u32 pack(float low, float high) { return one(low) | one(high) << 16; }
  static float unpack(u16 v) { return __uint_as_float(u32(v) << 16); }
};
struct Float16 {
  static constexpr bool kIsHalf = true;
  static u32 pack(float low, float high) { return bits_as<u16>(_Float16(low)) | u32(bits_as<u16>(_Float16(high))) << 16; }
  static u32 pack_finite(float low, float high) { return pack(low, high); }
  static float unpack(u16 v) { return bits_as<_Float16>(v); }
};

// ---- shared memory ----

inline const u8* shared;
template <class T>
T load(u32 at) {
  if (at % sizeof(T)) std::abort();  // as a GPU would
  T value;
  std::memcpy(&value, shared + at, sizeof value);
  return value;
}
inline uint4 load_shared4(u32 at) { return load<uint4>(at); }
inline u32 load_shared(u32 at) { return load<u32>(at); }
inline u16 load_shared16(u32 at) { return load<u16>(at); }
inline u32 load_shared8(u32 at) { return load<u8>(at); }
inline float load_shared_float(u32 at) { return load<float>(at); }

// ---- lanes ----

struct Lane {
  ucontext_t context;
  std::vector<char> stack;
  u32 round;
  bool done;
};
inline Lane lanes[32];
inline ucontext_t scheduler;
inline u32 lane;  // whose turn it is
inline u32 given[2][32][6];  // in two versions by round
inline std::function<void()> work;

inline void run_warp(std::function<void()> of_lane) {
  work = of_lane;
  for (Lane& l : lanes) {
    getcontext(&l.context);
    l.stack.resize(1 << 16);
    l.context.uc_stack.ss_sp = l.stack.data();
    l.context.uc_stack.ss_size = l.stack.size();
    l.context.uc_link = &scheduler;
    l.round = 0, l.done = false;
    makecontext(&l.context, +[] { work(), lanes[lane].done = true; }, 0);
  }
  while (!lanes[31].done)
    for (lane = 0; lane < 32; lane++) swapcontext(&scheduler, &lanes[lane].context);
}

// What every lane gives to the others.
inline const u32 (&all_lanes(std::initializer_list<u32> mine))[32][6] {
  auto& values = given[lanes[lane].round++ % 2];
  std::copy(mine.begin(), mine.end(), values[lane]);
  swapcontext(&lanes[lane].context, &scheduler);
  return values;
}
inline u32 __shfl_xor_sync(u32, u32 v, u32 mask) {
  const auto& all = all_lanes({v});
  return all[lane ^ mask][0];
}
inline u32 __shfl_sync(u32, u32 v, u32 from) { return all_lanes({v})[from][0]; }
inline u32 largest_of_lanes(u32 v) {
  for (const auto& other : all_lanes({v})) v = max(v, other[0]);
  return v;
}

// ---- instructions ----

// d += a b, of `k` columns, each lane's registers holding `value(register, i)` for columns i of a run.
template <int kPerRegister, class Sum, class A, class B>
void multiply(Sum (&d)[4], const uint4& a, u32 b0, u32 b1, A value_a, B value_b) {
  const auto& all = all_lanes({a.x, a.y, a.z, a.w, b0, b1});
  const u32 row = lane >> 2, column = (lane & 3) * 2;
  for (u32 i = 0; i < 4; i++)
    for (u32 k = 0; k < 8 * kPerRegister; k++) {
      const u32 from = k % (4 * kPerRegister) / kPerRegister, half = k / (4 * kPerRegister), place = k % kPerRegister;
      d[i] += value_a(all[row * 4 + from][half * 2 + i / 2], place) * value_b(all[(column + i % 2) * 4 + from][4 + half], place);
    }
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
inline u32 prmt(u32 a, u32 b, u32 selector) {
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    const u32 s = selector >> 4 * i & 15, byte = (u64(b) << 32 | a) >> 8 * (s & 7) & 255;
    r |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return r;
}
inline u32 larger_of_halves(u32 a, u32 b) { return max(a & 0xffff0000u, b & 0xffff0000u) | max(a & 0xffff, b & 0xffff); }
inline u32 halves_of_e4m3(u16 pair) {
  const auto half = [](u32 v) { return Float16::unpack(u16((v & 0x80) << 8 | (v & 0x7f) << 7)) * 256; };
  return Float16::pack(half(pair & 255), half(pair >> 8));
}
