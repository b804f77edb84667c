// x of several columns in shared memory.
//
// A vector that its readers have room for is without flags (vectors.cuh). One that they have no room for is read piece by piece, many times.
// It has one copy, and flags, tagged: a word of each block that writes a part. Who has seen all of them may read everything.
//
// A warp of the consumers copies its values into shared memory, its panel, [cell][column][32 values]: 64 bytes of a column are two steps of
// 16 values. Those of four columns are what an instruction multiplies, 8 bytes a lane: column n of the operand is column
// n / 2 at step n % 2. As with one column, rows 0-7 of A are a tile at the first step and rows 8-15 the same tile at the second, so
// that of the result only (row g, step 0) and (row g + 8, step 1) mean anything: their sum, in lane (g, t), is row g of column t.
//
// 16 columns (kWide) are the rows of A, and a tile at one step is B, which its registers of that step are as they are: half as many
// instructions, of whose results all mean something. Lane (g, t) has rows 2 t and 2 t + 1 of columns g and g + 8. Their vectors and panels
// lie as A is in registers: see `pair_word`. Codes are multiplied by pairs of tiles, which share what they read of x.
#pragma once
#include "operand.cuh"
#include "vectors.cuh"

// For the consumers, stages differ in no more than this if their matrices have the same shape and form.
struct Inputs {
  u32 where;  // the stage's number
  int tile_word;
  int words, version, flags;  // of x: places in the exchange memory, and the words of a version (0: it has flags)
  u32 writes;                 // of x in a pass
};
template <class S>
struct InputsOf {
  static FF_DEVICE Inputs at(u32 layer, u32) {
    Inputs in{S::kWhere, S::tile_word(layer), S::kInput, S::kInVersion, 0, S::kInWrites};
    if constexpr (S::kInVersion == 0) in.flags = S::kFlagsIn;
    return in;
  }
};
// Two such stages, one after the other: consumers have one copy of their code. NOTE: the code of a layer hardly fits into the
// instruction cache: with two copies, a pass of 16 columns of 8B takes 2 % longer.
template <class A, class B>
struct Twins : A {
  static_assert((A::kInVersion == 0) == (B::kInVersion == 0), "one's x has flags, the other's has not");
};
template <class A, class B>
struct InputsOf<Twins<A, B>> {
  static FF_DEVICE Inputs at(u32 layer, u32 which) { return which ? InputsOf<B>::at(layer, 0) : InputsOf<A>::at(layer, 0); }
};

// Until all blocks that write what stage S reads have published a word, at `words`: for all consumers, before they meet.
// NOTE: each word is read by a lane of its own: such loads wait for one another.
template <class M, class S>
FF_DEVICE void await_words(const Consumer<M>& c, u32 where, const u64* words, u32 stride, u32 tag) {
  constexpr u32 kAtOnce = kConsumers * 32;
  const u32 first = c.warp * 32;
  if (first >= S::kInBlocks) return;
  Looks<M> looks(c.looks_place(where));
  bool here;
#pragma unroll 1
  do {
    if (!looks.again(c.watch)) break;
    here = true;
#pragma unroll
    for (u32 i = 0; i < ceil_div((int)S::kInBlocks, kAtOnce); i++) {
      const u32 block = first + i * kAtOnce + c.lane;
      here = here && (block >= S::kInBlocks || split(load_word_acquire(words + block * stride)).tag == tag);
    }
  } while (!looks.found(here, c.lane));
}
// For all consumers: what there is to wait for before x may be looked at.
template <class M, class S>
FF_DEVICE void await_x(const Consumer<M>& c, const Inputs& in, u32 tag) {
  if constexpr (S::kInVersion == 0)
    await_words<M, S>(c, in.where, c.words(in.flags) + blockIdx.x % M::kFlagCopies * M::kFlagStride, 1, tag);
  else if constexpr (S::kNewcomers)
    await_words<M, S>(c, in.where, c.words(S::kMomentIn), M::kColumns, tag);
  c.sync();  // also for what lay in the panel's place
}

// The scales of an RMSNorm of columns t + 4 j in lane (g, t), from the blocks' sums of squares; for all finishers together.
template <class M, class S>
FF_DEVICE void norm_scales(const Finisher<M>& f, u32 tag, float (&scale)[M::kColumnGroups]) {
  constexpr u32 kPairs = M::kColumns / 2, kBlocks = 32 / kPairs;  // a lane takes two columns; blocks that a warp has at once
  constexpr int kLoads = ceil_div(S::kInBlocks, kBlocks * M::kFinishers), kAtOnce = kLoads < 4 ? kLoads : 4;
  float low = 0, high = 0;
  Looks<M> looks(f.looks_place(S::kWhere));
#pragma unroll 1
  for (u32 first = f.index * kBlocks + f.lane / kPairs; first - f.lane / kPairs < S::kInBlocks; first += kAtOnce * kBlocks * M::kFinishers) {
    const u64* pairs = f.words(S::kMomentIn) + (first * kPairs + f.lane % kPairs) * 2;
    u64 w[kAtOnce][2] = {};
    bool here;
#pragma unroll 1
    do {
      if (!looks.again(f.watch)) break;
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        w[i][0] = w[i][1] = join(0, tag);
        if (first + i * kBlocks * M::kFinishers < S::kInBlocks) load_words(pairs + i * kBlocks * M::kFinishers * M::kColumns, w[i][0], w[i][1]);
      }
      here = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) here = here && split(w[i][0]).tag == tag && split(w[i][1]).tag == tag;
    } while (!looks.found(here, f.lane));
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      low += __uint_as_float(split(w[i][0]).value);
      high += __uint_as_float(split(w[i][1]).value);
    }
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

// Piece `number` of a vector, 16 bytes: 8 rows of a column, or 4 of two columns (kWide).
// NOTE: where a vector lies as the panel does, there is nothing to compute: it would be in the loop that streams.
template <class M>
struct PanelPiece {
  static constexpr bool kSame = M::kWide || M::kRun == 32;
  static constexpr u32 kPieces = M::kRun / 8;  // of a run
  u32 number;

  FF_DEVICE u32 row() const {
    if constexpr (M::kWide) return number / 32 * 16 + number % 4 * 4;
    else return number / (kPieces * M::kColumns) * M::kRun + number % kPieces * 8;
  }
  FF_DEVICE bool exists(u32 columns) const {
    if constexpr (M::kWide) return number / 4 % 8 < columns;
    else return number % (kPieces * M::kColumns) < kPieces * columns;
  }
  // What of it exists, zeros for the rest. rows: of the vector, from the one on that pieces are counted from.
  FF_DEVICE void clip(uint4& v, u32 columns, u32 rows) const {
    if constexpr (M::kWide) {
      if (number / 4 % 8 + 8 >= columns) v.y = v.w = 0;
    } else if (row() + 4 >= rows) {
      v.z = v.w = 0;
    }
  }
  // In the panel.
  FF_DEVICE u32 place() const {
    if constexpr (kSame) return number * 16;
    else return (row() / 32 * M::kColumns + number % M::kColumns) * 64 + row() % 32 * 2;
  }
};

// A warp's cells of x in shared memory: all of them, if there is room.
// NOTE: the warps of a block must have met since they used what lies in its place.
template <class M, class S, bool all = S::kBuffers == 0>
struct Panel {
  static constexpr bool kHeld = true;
  static constexpr u32 kCellBytes = M::kColumns * 64;  // of all columns
  u32 lane, columns;
  u32 first;    // where it is
  u32 factors;  // where those of its columns are, if it holds integers

  // Waits for them, as does `Operand` for those of one column.
  FF_DEVICE Panel(const Consumer<M>& c, const Inputs& in, u32, u32 step, u32 layer)
      : lane(c.lane), columns(c.columns()), first(c.shared + Layout<M>::kPanel + c.warp * kBytes),
        factors(c.shared + Layout<M>::kFactors + c.warp * (M::kColumns * 4)), place(first) {
    constexpr u32 kPieces = M::kColumns * 4, kAll = S::kCells * kPieces;  // of 16 bytes
    constexpr int kLanes = ceil_div((int)kAll, 32), kMost = M::kColumns < 8 ? 16 : 8, kAtOnce = kLanes < kMost ? kLanes : kMost;
    const u32 cell = first_fragment<S>(c.warp) * (S::kFragmentColumns / 32), version = c.version_of(step, layer, in.writes);
    const u8* from = reinterpret_cast<const u8*>(c.words(in.words) + version * in.version) + cell * kCellBytes;
    // NOTE: what is behind the last row that anybody writes is padding, and never there.
    const auto row = [&](u32 i) { return cell * 32 + PanelPiece<M>{i}.row(); };
    const auto exists = [&](u32 i) {
      return i < kAll && PanelPiece<M>{i}.exists(columns) && (S::kInRows == S::kCells * S::kWarpsColumns * 32 || row(i) < S::kInRows);
    };
    Looks<M> looks(c.looks_place(in.where));
    if constexpr (S::kNewcomers) looks.first = false;  // it has been waited for
#pragma unroll 1
    for (u32 base = 0; base < kAll; base += 32 * kAtOnce) {
      uint4 v[kAtOnce] = {};  // set, or they would stay alive through the whole kernel
      bool here;
#pragma unroll 1
      do {
        if (!looks.again(c.watch)) break;
        here = true;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          const u32 at = base + i * 32 + lane;
          v[i] = exists(at) ? load_pairs(from + at * 16) : make_uint4(0, 0, 0, 0);
          static_assert(S::kInRows % 4 == 0, "half a piece may be padding");
          if (M::kWide || S::kInRows % 8 != 0) PanelPiece<M>{at}.clip(v[i], columns, S::kInRows - cell * 32);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) here = here && present(v[i]);
      } while (!looks.found(here, lane));
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (base + i * 32 + lane < kAll) store_shared4(first + PanelPiece<M>{base + i * 32 + lane}.place(), v[i]);
    }
    __syncwarp();
  }

  // Where the next so many cells are, part by part, and again for the next tile.
  FF_DEVICE u32 next(u32 cells) {
    const u32 at = place, after = at + cells * kCellBytes;
    place = after == first + kBytes ? first : after;
    return at;
  }
  // Where a lane's 16-bit values of a cell are, from its place.
  FF_DEVICE u32 own() const { return M::kWide ? lane * 16 : lane * 8 % kCellBytes; }

 private:
  static constexpr u32 kBytes = S::kCells * kCellBytes;
  u32 place;
};

// Else they come in steps, a few steps ahead of what is multiplied: a slice of codes, or a part of a tile; anew for each batch of groups of
// tiles, but for the first ones, which stay.
template <class M, class S>
struct Panel<M, S, false> {
  static constexpr bool kHeld = false;
  static constexpr int kSteps = S::kSlices ? S::kFragments : S::kParts;
  static constexpr u32 kCellBytes = M::kColumns * 64;
  u32 lane, columns;

  FF_DEVICE Panel(const Consumer<M>& c, const Inputs& in, u32 batches, u32, u32)
      : lane(c.lane), columns(c.columns()), missing(kSteps * batches) {
    from = reinterpret_cast<const u8*>(c.words(in.words)) + (first_fragment<S>(c.warp) * kFragmentCells) * kCellBytes + lane * 16;
    const u32 first = c.shared + Layout<M>::kPanel + c.warp * kBytes;
    end = first + kBytes;
    fetched.at = used.at = first;
    fetched.buffer = used.buffer = first + S::kHeldCells * kCellBytes;
#pragma unroll 1
    for (int i = 0; i < kAhead; i++) fetch();
  }

  // Where the next step is, which has so many cells, all of which have landed. renew: whether the step before is not needed any more.
  FF_DEVICE u32 next(u32 cells, bool renew = true) {
    __syncwarp();  // all lanes have read the step before, whose place is taken now
    if (renew) fetch();
    else async_commit();
    async_wait_groups<kAhead>();
    __syncwarp();
    return advance(used, cells);
  }
  // The steps since `mark` again. NOTE: as many as there are buffers, at most, and none that stay.
  FF_DEVICE u32 mark() const { return used.step << 24 | used.buffer; }
  FF_DEVICE void again_from(u32 mark) {
    used.step = mark >> 24;
    used.buffer = mark & 0xffffff;
  }
  FF_DEVICE u32 own() const { return M::kWide ? lane * 16 : lane * 8 % kCellBytes; }

 private:
  static constexpr int kAhead = S::kBuffers - 1;
  static constexpr u32 kFragmentCells = S::kFragmentColumns / 32;
  static constexpr u32 kLarger = S::kSlices ? 0 : S::kFragments % S::kParts;  // steps with one fragment more: the first ones
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
      if (again && step < S::kHeldSteps) {
        // it is there
      } else if constexpr (M::kWide) {
        if (PanelPiece<M>{lane}.exists(columns))
#pragma unroll 4
          for (u32 i = 0; i < cells * kPieces; i += 32) async_copy16(to + (i + lane) * 16, source + i * 16);
      } else {
#pragma unroll 2  // it is there many times, and seldom in the way
        for (u32 i = 0; i < S::kStepCells * kPieces; i += 32)
          if (const PanelPiece<M> piece{i + lane}; i + lane < cells * kPieces && piece.exists(columns)) async_copy16(to + piece.place(), source + i * 16);
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
