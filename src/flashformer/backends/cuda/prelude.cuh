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

// Arrive on `bar`, whose phase ends when so many bytes have landed, too.
FF_DEVICE void barrier_expect(u32 bar, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
#endif
}
FF_DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar) {
#if __CUDA_ARCH__ >= 900
  constexpr u64 kEvictFirst = 0x12F0000000000000ull;  // L2 policy: a weight is used once a token
  barrier_expect(bar, bytes);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(kEvictFirst)
      : "memory");
#endif
}
// The same, but its bytes are expected already, and others will read them, too.
FF_DEVICE void bulk_copy_expected(u32 to, const void* from, u32 bytes, u32 bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar)
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

// ---- a warpgroup's products: four warps, 64 rows of A in their registers, 128 columns of B in shared memory ----
//
// d += a (64 x 16) * b (16 x 128), asynchronously: registers of a and d must be left alone until `warpgroup_wait`. Of warp w lane (g, t) holds a
// as in `mma`, of rows 16 w to 16 w + 15, and d[4 n..] as in `mma`, of columns 8 n to 8 n + 7. b, in shared memory: of each column k 0 to 7, which
// are 16 bytes, and kHalfBytes further k 8 to 15. kFresh: d = a * b.

constexpr u32 kWarpgroupColumns = 128, kHalfBytes = kWarpgroupColumns * 16;

#if __CUDA_ARCH_FEAT_SM90_ALL
#define FF_WARPGROUP_MMA(type, sums, add) \
  asm volatile( \
      "{.reg .pred p;\nsetp.ne.u32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63" \
      "}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}" \
      : sums(d[0]), sums(d[1]), sums(d[2]), sums(d[3]), sums(d[4]), sums(d[5]), sums(d[6]), sums(d[7]), \
    sums(d[8]), sums(d[9]), sums(d[10]), sums(d[11]), sums(d[12]), sums(d[13]), sums(d[14]), sums(d[15]), \
    sums(d[16]), sums(d[17]), sums(d[18]), sums(d[19]), sums(d[20]), sums(d[21]), sums(d[22]), sums(d[23]), \
    sums(d[24]), sums(d[25]), sums(d[26]), sums(d[27]), sums(d[28]), sums(d[29]), sums(d[30]), sums(d[31]), \
    sums(d[32]), sums(d[33]), sums(d[34]), sums(d[35]), sums(d[36]), sums(d[37]), sums(d[38]), sums(d[39]), \
    sums(d[40]), sums(d[41]), sums(d[42]), sums(d[43]), sums(d[44]), sums(d[45]), sums(d[46]), sums(d[47]), \
    sums(d[48]), sums(d[49]), sums(d[50]), sums(d[51]), sums(d[52]), sums(d[53]), sums(d[54]), sums(d[55]), \
    sums(d[56]), sums(d[57]), sums(d[58]), sums(d[59]), sums(d[60]), sums(d[61]), sums(d[62]), sums(d[63]) \
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(where))
#endif

template <class T, bool kFresh>
FF_DEVICE void warpgroup_mma(float (&d)[64], const uint4& a, u32 b) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  // A descriptor without swizzle: from one row of 8 x 8 values to the next 128 bytes, from one half of k to the other kHalfBytes.
  const u64 where = (u64)(128 >> 4) << 32 | (u64)(kHalfBytes >> 4) << 16 | (b & 0x3ffff) >> 4;
  // NOTE: fresh sums are no input, or what was in their place would be kept until here.
  if constexpr (T::kIsHalf && kFresh) FF_WARPGROUP_MMA("f16", "=f", "0");
  else if constexpr (T::kIsHalf) FF_WARPGROUP_MMA("f16", "+f", "1");
  else if constexpr (kFresh) FF_WARPGROUP_MMA("bf16", "=f", "0");
  else FF_WARPGROUP_MMA("bf16", "+f", "1");
#endif
}
// A warpgroup's threads give registers back, or take what others have given back.
template <int n>
FF_DEVICE void fewer_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
#endif
}
template <int n>
FF_DEVICE void more_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
#endif
}
// Before the first `warpgroup_mma` after registers that it uses were written.
FF_DEVICE void warpgroup_fence() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
FF_DEVICE void warpgroup_commit() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int n>
FF_DEVICE void warpgroup_wait() {  // until no more than the last n groups are under way
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
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
