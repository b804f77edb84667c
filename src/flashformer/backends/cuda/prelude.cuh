// The instructions that the kernel is made of: thin wrappers around PTX, so that no header but ours is needed.
// Shared memory is addressed by 32-bit addresses throughout: a generic pointer costs two instructions at each access.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define INFINITY __int_as_float(0x7f800000)
#define FF_DEVICE __device__ __forceinline__

constexpr u32 kAllLanes = 0xffffffffu;

template <class A, class B>
FF_DEVICE constexpr A ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
template <class A, class B>
FF_DEVICE constexpr A round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

// ---- 16-bit values: half the kernel knows a value only as two of them in a register ----

struct Bfloat16 {
  static constexpr bool kIsHalf = false;
  static FF_DEVICE u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static FF_DEVICE float unpack(u16 v) { return __uint_as_float((u32)v << 16); }
};

struct Float16 {
  static constexpr bool kIsHalf = true;
  // NOTE: values beyond the range of fp16 are clamped: an infinity would poison every later token through the KV cache.
  static FF_DEVICE u32 pack(float low, float high) {
    return pack_finite(fminf(fmaxf(low, -65504.f), 65504.f), fminf(fmaxf(high, -65504.f), 65504.f));
  }
  static FF_DEVICE u32 pack_finite(float low, float high) {  // of values that are known to fit
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static FF_DEVICE float unpack(u16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
  }
};

// d += a (16 x 16) * b (16 x 8); a row-major, b column-major; lane (g = lane / 4, t = lane % 4) holds
// a.x = (row g, k 2t..), a.y = (row g + 8, k 2t..), a.z = (row g, k 2t + 8..), a.w = (row g + 8, k 2t + 8..),
// b0 = (k 2t.., column g), b1 = (k 2t + 8.., column g), d = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
FF_DEVICE void mma(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
  if constexpr (T::kIsHalf)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Transpose of an 8 x 8 matrix of 16-bit values: lane (g, t) holds row g, columns 2t and 2t + 1.
FF_DEVICE u32 transpose8x8(u32 v) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

FF_DEVICE float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

FF_DEVICE float log2_approx(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

FF_DEVICE float max_nan(float a, float b) {  // NaN where one of them is
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// Over all lanes of a warp, in the same order for each.
FF_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(kAllLanes, x, o);
  return x;
}
FF_DEVICE float warp_max(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, o));
  return x;
}

// ---- shared memory ----

FF_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

FF_DEVICE uint4 load_shared4(u32 a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a) : "memory");
  return v;
}
FF_DEVICE float4 load_shared_float4(u32 a) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(a) : "memory");
  return v;
}
FF_DEVICE uint2 load_shared2(u32 a) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a) : "memory");
  return v;
}
FF_DEVICE u32 load_shared(u32 a) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
FF_DEVICE u16 load_shared16(u32 a) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(a) : "memory");
  return v;
}
FF_DEVICE u32 load_shared8(u32 a) {
  u32 v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
FF_DEVICE float load_shared_float(u32 a) { return __uint_as_float(load_shared(a)); }
FF_DEVICE void store_shared(u32 a, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(v) : "memory"); }
FF_DEVICE u64 load_shared64(u32 a) {
  const uint2 v = load_shared2(a);
  return (u64)v.y << 32 | v.x;
}
FF_DEVICE u32 add_shared(u32 a, u32 v) {  // what was there before
  u32 before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(a), "r"(v) : "memory");
  return before;
}
FF_DEVICE void store_shared4(u32 a, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
FF_DEVICE void store_shared64(u32 a, u64 v) {
  store_shared(a, (u32)v);
  store_shared(a + 4, (u32)(v >> 32));
}
FF_DEVICE void store_shared_float(u32 a, float v) { store_shared(a, __float_as_uint(v)); }
FF_DEVICE void store_shared16(u32 a, u16 v) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(v) : "memory"); }
FF_DEVICE u32 load_shared_acquire(u32 a) {
  u32 v;
  asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
FF_DEVICE void store_shared_release(u32 a, u32 v) {
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(a), "r"(v) : "memory");
}

// ---- barriers ----

FF_DEVICE void barrier_init(u32 bar, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
FF_DEVICE void barrier_arrive(u32 bar) {
  asm volatile("{.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];}" ::"r"(bar) : "memory");
}
FF_DEVICE bool barrier_test(u32 bar, u32 parity) {
  u32 done;
  asm volatile(
      "{.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done;
}
// As barrier_test, but the hardware may put the warp to sleep for a moment first.
FF_DEVICE bool barrier_try(u32 bar, u32 parity) {
#if __CUDA_ARCH__ >= 900
  u32 done;
  asm volatile(
      "{.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done;
#else
  return barrier_test(bar, parity);
#endif
}
// A barrier among `threads` threads of the block; id 0 is __syncthreads.
template <int id, int threads>
FF_DEVICE void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

// ---- copies into shared memory ----

FF_DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar) {
#if __CUDA_ARCH__ >= 900
  constexpr u64 kEvictFirst = 0x12F0000000000000ull;  // L2 policy: a weight is used once a token
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(kEvictFirst)
      : "memory");
#endif
}
FF_DEVICE void bulk_prefetch(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
FF_DEVICE void async_copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
FF_DEVICE void async_copy4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
FF_DEVICE void async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }  // for this thread's async_copy*
// A group: this thread's async_copy* since the one before. Groups land in order, as far as a wait can tell.
FF_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
FF_DEVICE void async_wait_groups() {  // until no more than the last n are on their way
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
// Arrive on `bar` when all earlier async_copy16 of this thread have landed.
FF_DEVICE void async_arrive(u32 bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
}
// Order ordinary accesses before or after those of the copy engine.
FF_DEVICE void fence_copy_engine() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

// ---- time ----

FF_DEVICE u32 clock32() {
  u32 t;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(t));
  return t;
}
FF_DEVICE u64 nanoseconds() {  // the same for all blocks
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// ---- global memory shared by all blocks ----

FF_DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Constants of the model. NOTE: volatile, so that the load stays where it is written: in front of the wait that hides it. The
// weights that stream by have long evicted these from the cache.
FF_DEVICE float load_early(const float* p) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
FF_DEVICE float2 load_early(const float2* p) {
  float2 v;
  asm volatile("ld.global.nc.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
  return v;
}

FF_DEVICE u32 load_volatile(const u32* p) {
  u32 v;
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FF_DEVICE void store_host(u64* p, u64 v) { asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }
