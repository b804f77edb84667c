// Vectors of several columns, on their way from all blocks to all blocks.
//
// Between C columns a vector would be too many tagged words to poll. So its values are plain data, [cell][column][32 values of 16 bits],
// and what is tagged are flags: one word of each block that writes a part. Who has seen all of them may read everything.
//
// A warp of the consumers copies its cells into shared memory, its panel, where they lie as they do in global memory: 64 bytes of a column
// are two steps of 16 values. Those of four columns are what an instruction multiplies, 8 bytes a lane: column n of the operand is column
// n / 2 at step n % 2. As with one column, rows 0-7 of A are a tile at the first step and rows 8-15 the same tile at the second, so
// that of the result only (row g, step 0) and (row g + 8, step 1) mean anything: their sum, in lane (g, t), is row g of column t.
#pragma once
#include "roles.cuh"

// ---- who writes ----

template <class M, class S>
struct ColumnsOut {
  // Rows `row`, an even number, and row + 1 of a column that exists.
  static FF_DEVICE void put(const Finisher<M>& f, u32 row, u32 column, u32 pair) {
    const u32 at = (row / 32 * M::kColumns + column) * 16 + row % 32 / 2;
    reinterpret_cast<u32*>(f.words(S::kOutput))[at] = pair;
  }

  // For all finishers, when they have put what they have of this block's tiles.
  static FF_DEVICE void done(const Finisher<M>& f, u32 tag, uint2 tiles) {
    if (tiles.y == 0) return;
    f.sync();
    if (f.index == 0) raise(f, tag, tiles);
  }
  // The same of the residual, with the sum of squares of each column, always summed in the same order. It also makes what a finisher stored
  // in the residual visible to the others: a row's next finisher may be another one.
  static FF_DEVICE void done_with_moments(const Finisher<M>& f, u32 tag, uint2 owned) {
    if (owned.y == 0) return;
    f.sync();
    if (f.index != 0) return;
    constexpr u32 kRows = 32 / M::kColumns;  // at once
    const u32 column = f.lane % M::kColumns;
    float sum = 0;
    for (u32 row = f.lane / M::kColumns; row < owned.y * 8; row += kRows) {
      const float y = load_shared_float(f.residual(0, row, column));
      sum += y * y;
    }
#pragma unroll
    for (int o = M::kColumns; o < 32; o <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
    float* to = reinterpret_cast<float*>(f.words(S::kMomentOut)) + number(owned) * M::kColumns;
    if (f.lane < M::kColumns) to[f.lane] = sum;
    __syncwarp();
    raise(f, tag, owned);
  }

 private:
  // Of this block, among those that write: where there are fewer tiles than blocks, none has two.
  static FF_DEVICE u32 number(uint2 tiles) { return S::kOutBlocks < M::kWorkers ? tiles.x : blockIdx.x; }
  static FF_DEVICE void raise(const Finisher<M>& f, u32 tag, uint2 tiles) {
    fence_device();
    if (f.lane < M::kFlagCopies) store_word(f.words(S::kFlagsOut) + f.lane * M::kFlagStride + number(tiles), 0, tag);
  }
};

// ---- who reads ----

// Until all blocks have written their part of what stage S reads: for `warps` warps, of which this is number `index`, before they meet.
// NOTE: each word is read by a lane of its own, as far as there are warps: such loads wait for one another.
template <class S, u32 warps, class R>
FF_DEVICE void await_columns(const R& r, u32 index, u32 tag) {
  using M = typename R::Model;
  const u64* words = r.words(S::kFlagsIn) + blockIdx.x % M::kFlagCopies * M::kFlagStride;
  const u32 first = index * 32;
  if (first >= S::kInBlocks) return;
  Looks<M> looks(r.looks_place(S::kWhere));
  bool here;
#pragma unroll 1
  do {
    if (!looks.again(r.watch)) break;
    here = true;
#pragma unroll
    for (u32 i = 0; i < ceil_div((int)S::kInBlocks, 32 * warps); i++) {
      const u32 block = first + i * warps * 32 + r.lane;
      here = here && (block >= S::kInBlocks || split(load_word_acquire(words + block)).tag == tag);
    }
  } while (!looks.found(here, r.lane));
}

// The scales of an RMSNorm of columns t + 4 j in lane (g, t), from the blocks' sums of squares; for all finishers together.
template <class M, class S>
FF_DEVICE void norm_scales(const Finisher<M>& f, u32 tag, float (&scale)[M::kColumnGroups]) {
  constexpr u32 kPairs = M::kColumns / 2, kBlocks = 32 / kPairs;  // a lane takes two columns; blocks that a warp has at once
  constexpr int kLoads = ceil_div(S::kInBlocks, kBlocks * M::kFinishers);
  await_columns<S, M::kFinishers>(f, f.index, tag);
  f.sync();
  const u32 first = f.index * kBlocks + f.lane / kPairs;
  const u64* pairs = f.words(S::kMomentIn) + first * kPairs + f.lane % kPairs;
  u64 w[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; i++)
    w[i] = first + i * kBlocks * M::kFinishers < S::kInBlocks ? load_word(pairs + i * kBlocks * M::kFinishers * kPairs) : 0;
  float low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < kLoads; i++) {
    low += __uint_as_float((u32)w[i]);
    high += __uint_as_float((u32)(w[i] >> 32));
  }
#pragma unroll
  for (int o = kPairs; o < 32; o <<= 1) {
    low += __shfl_xor_sync(kAllLanes, low, o);
    high += __shfl_xor_sync(kAllLanes, high, o);
  }
  const u32 sums = f.shared + Layout<M>::kMoments;  // [finishers][columns]
  if (f.lane < kPairs) {
    store_shared_float(sums + (f.index * M::kColumns + f.lane * 2) * 4, low);
    store_shared_float(sums + (f.index * M::kColumns + f.lane * 2 + 1) * 4, high);
  }
  f.sync();
#pragma unroll
  for (int j = 0; j < M::kColumnGroups; j++) {
    const u32 column = ((f.lane & 3) + 4 * j) % M::kColumns;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < M::kFinishers; i++) sum += load_shared_float(sums + (i * M::kColumns + column) * 4);
    scale[j] = rsqrtf(sum / M::kHidden + S::kEps);
  }
}

// A warp's cells of x in shared memory: all of them, if there is room.
template <class M, class S, bool all = S::kBuffers == 0>
struct Panel {
  static constexpr bool kHeld = true;
  static constexpr u32 kCellBytes = M::kColumns * 64;  // of all columns
  u32 lane, columns;
  u32 first;    // where it is
  u32 factors;  // where those of its columns are, if it holds integers

  FF_DEVICE Panel(const Consumer<M>& c, u32)
      : lane(c.lane), columns(c.columns()), first(c.shared + Layout<M>::kPanel + c.warp * kBytes),
        factors(c.shared + Layout<M>::kFactors + c.warp * (M::kColumns * 4)), place(first) {
    constexpr u32 kPieces = M::kColumns * 4;  // of 16 bytes, in a cell
    const u8* from = reinterpret_cast<const u8*>(c.words(S::kInput)) + c.warp % S::kWarpsColumns * kBytes;
#pragma unroll 4
    for (u32 i = lane; i < S::kCells * kPieces; i += 32)
      if (i % kPieces < columns * 4) async_copy16(first + i * 16, from + i * 16);
    async_wait();
    __syncwarp();
  }

  // Where the next so many cells are, part by part, and again for the next tile.
  FF_DEVICE u32 next(u32 cells) {
    const u32 at = place, after = at + cells * kCellBytes;
    place = after == first + kBytes ? first : after;
    return at;
  }
  // Where a lane's 16-bit values of a cell are, from its place.
  FF_DEVICE u32 own() const { return lane * 8 % kCellBytes; }

 private:
  static constexpr u32 kBytes = S::kCells * kCellBytes;
  u32 place;
};

// Else they come in steps, a few steps ahead of what is multiplied: a slice of codes, or a part of a tile; anew for each batch of groups of
// tiles, but for the first ones, which stay.
template <class M, class S>
struct Panel<M, S, false> {
  static constexpr bool kHeld = false;
  static constexpr bool kSlices = S::kCoded && S::kTogether == 1;
  static constexpr int kSteps = kSlices ? S::kFragments : S::kParts;
  static constexpr u32 kCellBytes = M::kColumns * 64;
  u32 lane, columns;

  FF_DEVICE Panel(const Consumer<M>& c, u32 batches) : lane(c.lane), columns(c.columns()), missing(kSteps * batches) {
    from = reinterpret_cast<const u8*>(c.words(S::kInput)) + (c.warp % S::kWarpsColumns * S::kCells) * kCellBytes + lane * 16;
    const u32 first = c.shared + Layout<M>::kPanel + c.warp * kBytes;
    end = first + kBytes;
    fetched.at = used.at = first;
    fetched.buffer = used.buffer = first + S::kHeldCells * kCellBytes;
#pragma unroll 1
    for (int i = 0; i < kAhead; i++) fetch();
  }

  // Where the next step is, which has so many cells, all of which have landed.
  FF_DEVICE u32 next(u32 cells) {
    __syncwarp();  // all lanes have read the step before, whose place is taken now
    fetch();
    async_wait_groups<kAhead>();
    __syncwarp();
    return advance(used, cells);
  }
  FF_DEVICE u32 own() const { return lane * 8 % kCellBytes; }

 private:
  static constexpr int kAhead = S::kBuffers - 1;
  static constexpr u32 kFragmentCells = S::kFragmentColumns / 32;
  static constexpr u32 kLarger = kSlices ? 0 : S::kFragments % S::kParts;  // steps with one fragment more: the first ones
  struct Cursor {
    u32 step = 0;
    u32 at, buffer;  // place of a step that stays, and of one that does not
  };
  static constexpr u32 kStepBytes = S::kStepCells * kCellBytes;
  static constexpr u32 kBytes = S::kHeldCells * kCellBytes + S::kBuffers * kStepBytes;  // of a warp
  const u8* from;  // this warp's first cell
  u32 end;         // of this warp's memory
  Cursor fetched, used;
  u32 cell = 0;        // at `fetched`
  u32 missing;         // steps that are still to be fetched
  bool again = false;  // not for the first batch

  // Its place; then it is at the next step.
  FF_DEVICE u32 advance(Cursor& cursor, u32 cells) const {
    const bool held = cursor.step < S::kHeldSteps;
    const u32 place = held ? cursor.at : cursor.buffer;
    if (held) cursor.at += cells * kCellBytes;
    else cursor.buffer = (place + kStepBytes == end ? place - S::kBuffers * kStepBytes : place) + kStepBytes;
    if (++cursor.step == kSteps) {
      cursor.step = 0;
      cursor.at = end - kBytes;
    }
    return place;
  }
  // A group of copies for each step; an empty one of a step that is there.
  FF_DEVICE void fetch() {
    constexpr u32 kPieces = M::kColumns * 4;  // of 16 bytes, in a cell
    if (missing) {
      const u32 step = fetched.step, cells = kLarger && step >= kLarger ? S::kStepCells - kFragmentCells : S::kStepCells;
      const u8* source = from + cell * kCellBytes;
      const u32 to = advance(fetched, cells);
      if (!again || step >= S::kHeldSteps) {
#pragma unroll 2  // it is there many times, and seldom in the way
        for (u32 i = 0; i < S::kStepCells * kPieces; i += 32)
          if (i + lane < cells * kPieces && (i + lane) % kPieces < columns * 4) async_copy16(to + (i + lane) * 16, source + i * 16);
      }
      missing--;
      cell += cells;
      if (fetched.step == 0) {
        cell = 0;
        again = true;
      }
    }
    async_commit();
  }
};

template <int n>
struct Constant {
  static constexpr int value = n;
};
// multiply(first, n), both constants, until all groups of four columns that exist are multiplied, `stretch` at once.
// NOTE: two groups are one stretch of code: the instructions of one alone would wait for each other. More would take too many registers.
template <int groups, int stretch, int first = 0, class F>
FF_DEVICE void with_groups(u32 columns, F multiply) {
  multiply(Constant<first>{}, Constant<(stretch < groups ? stretch : groups)>{});
  if constexpr (first + stretch < groups)
    if (columns > 4 * (first + stretch)) with_groups<groups, stretch, first + stretch>(columns, multiply);
}
