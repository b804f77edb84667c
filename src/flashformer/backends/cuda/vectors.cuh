// Vectors that all blocks read, as their parts are handed on: values in pairs of 16 bits, without tags.
//
// A vector says itself whether it is there: in the place of a pair that is not yet is kAbsent. Each has M::kVersions places, for versions in
// turn. Before a block writes its part of a version, it makes its part of the one before the last absent (`Forget`), which all have read by
// then (validate.py), a fence in between. Who looks for what will be in that place, two versions later, has read of one of these two, or what
// came of it, so what it finds is new. Only the head may be read by blocks that have read nothing of the layers (S::kNewcomers): they wait for
// the sums of squares first, which have tags.
// So that not all blocks poll the same lines, there are M::kCopies of all that; a block looks at the one of its number.
//
// A vector is [run][columns that there is room for][M::kRun values]; of 16 columns see `pair_word`. NOTE: of one column or two what a block writes
// of a tile is alone in its sector of the L2 cache: where two blocks shared them, a token of 1B in bf16 took 1.5 % more.
// One that its readers have no room for (panel.cuh) has one place, and flags.
#pragma once
#include "roles.cuh"

// Where a pair of values of one of 16 columns is in a vector: [step of 16 values][column % 8][4 values][pair][column / 8], as matrix instructions
// want them: 16 bytes are a lane's registers.
FF_DEVICE u32 pair_word(u32 pair, u32 column) { return pair / 8 * 128 + column % 8 * 16 + pair % 8 / 2 * 4 + pair % 2 * 2 + column / 8; }

template <class M, class S>
struct VectorOut {
  static constexpr bool kFlags = S::kOutVersion == 0;
  u32 version;  // its place

  FF_DEVICE VectorOut(const Finisher<M>& f, u32 step, u32 layer)
      : version(f.version_of(step, S::kNextLayer ? layer + 1 : layer, S::kOutWrites)) {}

  // Rows `row`, an even number, and row + 1 of a column that exists.
  FF_DEVICE void put(const Finisher<M>& f, u32 row, u32 column, u32 pair) const {
    if constexpr (kFlags) *place(f, version, row / 2, column) = pair;
    else store(place(f, version, row / 2, column), pair);
  }

  // For all finishers, when they have put what they have of this block's tiles.
  FF_DEVICE void done(const Finisher<M>& f, u32 tag, uint2 tiles) const {
    if constexpr (kFlags) {
      if (tiles.y == 0) return;
      f.sync();
      if (f.index == 0) raise(f, tag, tiles);
    }
  }
  // The same of the residual, with the sum of squares of each column, always summed in the same order. It also makes what a finisher stored
  // in the residual visible to the others: a row's next finisher may be another one.
  // NOTE: only owners of hidden tiles do. A block without work would run ahead and overwrite what others still wait for.
  FF_DEVICE void done_with_moments(const Finisher<M>& f, u32 tag, uint2 owned) const {
    if (owned.y == 0) return;
    f.sync();
    if (f.index == 0) {
      constexpr u32 kRows = 32 / M::kColumns;  // at once
      const u32 column = f.lane % M::kColumns;
      float sum = 0;
#pragma unroll 1
      for (u32 row = f.lane / M::kColumns; row < owned.y * 8; row += kRows) {
        const float y = load_shared_float(f.residual(0, row, column));
        sum += y * y;
      }
#pragma unroll
      for (int o = M::kColumns; o < 32; o <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
      if (f.lane < M::kColumns)
#pragma unroll
        for (int i = 0; i < M::kCopies; i++)
          store_word(f.words(S::kMomentOut) + i * M::kMomentStride + number(owned) * M::kColumns + f.lane, __float_as_uint(sum), tag);
      __syncwarp();
      if constexpr (kFlags) raise(f, tag, owned);
    }
  }

  // Makes these tiles absent in the version before the last, as the next one will be number `next` of the pass.
  static FF_DEVICE void forget(const Finisher<M>& f, u32 step, u32 next, uint2 tiles) {
    const u32 version = f.version_of(step, next + M::kVersions - 2, S::kOutWrites), end = (tiles.x + tiles.y) * S::kTilePairs;
#pragma unroll 1
    for (u32 pair = tiles.x * S::kTilePairs + f.lane; pair < end; pair += 32)
#pragma unroll
      for (int column = 0; column < M::kColumns; column++)  // NOTE: all of them, for other passes may have more
        store(place(f, version, pair, column), kAbsent);
  }

 private:
  // Of this block, among those that write: where there are fewer tiles than blocks, none has two.
  static FF_DEVICE u32 number(uint2 tiles) { return S::kOutBlocks < M::kWorkers ? tiles.x : blockIdx.x; }

  static FF_DEVICE u32* place(const Finisher<M>& f, u32 version, u32 pair, u32 column) {
    constexpr u32 kPairs = M::kRun / 2;
    const u32 at = M::kWide ? pair_word(pair, column) : (pair / kPairs * S::kOutRoom + column) * kPairs + pair % kPairs;
    return reinterpret_cast<u32*>(f.words(S::kOutput)) + (version * (2 * S::kOutVersion) + at);
  }
  static FF_DEVICE void store(u32* at, u32 pair) {
#pragma unroll
    for (int i = 0; i < M::kCopies; i++) store_pair(at + i * (2 * M::kVersions * S::kOutVersion), pair);
  }
  FF_DEVICE void raise(const Finisher<M>& f, u32 tag, uint2 tiles) const {
    fence_device();
    if (f.lane < M::kFlagCopies) store_word(f.words(S::kFlagsOut) + f.lane * M::kFlagStride + number(tiles), 0, tag);
  }
};

// Once a layer, and once in front of the head: a finisher makes absent what is in the places that later versions will take. The vectors are
// named by the stages that write them, Next is the stage that follows.
//
// NOTE: a fence takes 1 us or more, so only the finisher has it that will be the last to have something to finish. The others meet it as the
// residual is handed on, which is soon enough, as it is that they met before. A block without a part of the residual has its own meetings.
template <class M, class Next, class... Writers>
struct Forget {
  static FF_DEVICE void run(Producer<M>&, u32, u32) {}
  static FF_DEVICE void run(Consumer<M>&, u32, u32) {}
  static FF_DEVICE void run(Finisher<M>& f, u32 step, u32 layer) {
    if constexpr (((Writers::kOutVersion != 0) || ...)) {
      const bool owner = f.tiles(0).y != 0;
      if (!owner) f.sync();
      if (f.turn == M::kFinishers - 1) {
        (forget<Writers>(f, step, layer), ...);
        fence_device();
      }
      if (!owner) f.sync();
    }
  }

 private:
  template <class S>
  static FF_DEVICE void forget(const Finisher<M>& f, u32 step, u32 layer) {
    if constexpr (S::kOutVersion != 0)
      VectorOut<M, S>::forget(f, step, S::kNextLayer || S::kWhere < Next::kWhere ? layer + 1 : layer, f.tiles(S::tile_word(layer)));
  }
};
