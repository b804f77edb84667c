// The frame of the kernel: shared memory is set up, warps take their roles, each walks the generated story token by token.
#pragma once
#include "attention.cuh"
#include "attention_columns.cuh"
#include "columns.cuh"
#include "combine.cuh"
#include "combine_columns.cuh"
#include "embed.cuh"
#include "embed_columns.cuh"
#include "linear.cuh"
#include "linear_columns.cuh"
#include "sample.cuh"
#include "sample_columns.cuh"

// Story::token(role, step, wants_head) runs one token.
template <class M, class Story>
FF_DEVICE void decode(const Params& p) {
  extern __shared__ __align__(128) u8 memory[];
  using L = Layout<M>;
  u32 shared = shared_address(memory);
  asm volatile("" : "+r"(shared));  // keep it in a register: the compiler would build it anew at each use
  const u32 thread = threadIdx.x, warp = thread >> 5;
  const Watch watch{p, 0};

  for (u32 i = thread * 4; i < L::kRing; i += M::kThreads * 4) store_shared(shared + i, 0);
  __syncthreads();
  for (u32 i = thread; i < M::kTileWords; i += M::kThreads)
    store_shared(shared + L::kTiles + i * 4, p.tiles[i * M::kWorkers + blockIdx.x]);
  for (u32 i = thread; i < (kConsumers + M::kFinishers) * M::kStages; i += M::kThreads)
    store_shared(shared + L::kLooks + i * 4, M::kFirstLook);
  if (thread == 0) {
    for (int s = 0; s < L::kSlots; s++) {
      barrier_init(shared + L::kFull + s * 8, M::kBulkCopy ? 1 : 32);
      barrier_init(shared + L::kEmpty + s * 8, kConsumers);
    }
    for (int b = 0; b < L::kReductionBuffers; b++) {
      barrier_init(shared + L::kReductionFull + b * 8, kConsumers);
      barrier_init(shared + L::kReductionEmpty + b * 8, 1);
    }
    barrier_init(shared + L::kDone, kConsumers);
    barrier_init(shared + L::kAttended, kConsumers);
    fence_copy_engine();
  }
  __syncthreads();

  const Block<M> block{p, shared, warp, thread & 31, watch};
  if constexpr (M::kColumns > 1) {
    if (warp == 0) Schedule<M>::begin(block);
    __syncthreads();
  }
  if (warp < kConsumers) {
    Consumer<M> role{block};
    for (u32 step = 0; step < p.steps && role.wait_step(step); step++) Story::token(role, step);
  } else if (warp < kConsumers + M::kFinishers) {
    Finisher<M> role{block};
    role.index = role.turn = warp - kConsumers;
    if constexpr (M::kColumns == 1) role.token = p.forced[0];
    for (u32 step = 0; step < p.steps && role.wait_step(step); step++) {
      if constexpr (M::kColumns > 1) role.forget_columns();
      else role.forget();
      Story::token(role, step);
    }
  } else {
    Producer<M> role{block};
    role.table = p.table + (u64)blockIdx.x * p.table_stride;
    role.length = p.table_length[blockIdx.x];
    role.head_start = p.head_start[blockIdx.x];
    if (M::kColumns == 1 && p.resumed) role.window_index = p.last_start[blockIdx.x];
    role.watch.where = M::kStreamWhere << 16;
    role.run();
  }
}
