// Attention of several columns: how their parts of the KV cache are shared by the blocks, and how a block streams its own.
//
// What a column sees of a head's cache is cut into equal pieces: of M::kPieceBlocks blocks of 16 positions at most, or of more where
// there would be more than M::kKvPieces of them. There are multiples of M::kPieceStep, so that thread blocks have equally much to do where
// all columns are at work and equally long. A unit is a piece of a virtual head of a column. Units are numbered column by column,
// head by head, piece by piece, and thread blocks have equal runs of them. Which positions are summed together depends on the column's
// position alone; only who does it, and where the partial result lies meanwhile, depends on the other columns.
//
// The matrix instructions of a virtual head with four queries or fewer have room for another column's. Where columns of one sequence are
// next to each other, those whose positions are the same but for their last bits (`kNeighbours`) see the same pieces: they have units
// together, those of the first of them, and the cache is read once for all. A neighbour's queries are behind those of the columns before it.
#pragma once
#include "roles.cuh"

// The units of the present pass, for a whole warp.
template <class M>
struct Units {
  u32 position, pieces, begin, end;  // of column `lane`: position, pieces of a head, its units: none if it does not exist
  u32 neighbour, members;            // number of it among its neighbours, and of those behind it and itself
  u32 total;
  u32 next, behind;  // run of this thread block: units [next, behind)

  FF_DEVICE explicit Units(const Block<M>& b) {
    const uint4 v = b.lane < M::kColumns ? load_shared4(place(b, b.lane)) : make_uint4(0, 0, 0, 0);
    position = b.lane < M::kColumns ? b.column(b.lane).position : 0;
    pieces = v.x, begin = v.y, end = v.z, neighbour = v.w >> 16, members = v.w & 0xffff;
    total = load_shared(place(b, M::kColumns - 1) + 8);
    next = blockIdx.x * total / M::kWorkers;
    behind = (blockIdx.x + 1) * total / M::kWorkers;
  }

  // Number those of a pass that has been laid (columns.cuh), for whoever asks.
  static FF_DEVICE void lay(const Block<M>& b) {
    const bool exists = b.lane < b.columns();
    const u32 position = exists ? b.column(b.lane).position : 0;
    const u32 per_head = position / 16 + 1, most = per_head < M::kKvPieces ? per_head : M::kKvPieces;
    u32 pieces = ceil_div(per_head, M::kPieceBlocks * M::kPieceStep) * M::kPieceStep;
    pieces = !exists ? 0 : pieces < most ? pieces : most;
    u32 neighbour = 0, members = 1, own = pieces * M::kVirtualHeads;
    if constexpr (kMost > 1) {
      const u32 before = exists ? min(position % kMost, b.lane - b.column_more(b.lane).first) : 0;
      // NOTE: not where there would be no less for a thread block to do, only fewer of them at work.
      const u32 apart = __reduce_add_sync(kAllLanes, own), together = __reduce_add_sync(kAllLanes, before ? 0 : own);
      if (ceil_div(together, M::kWorkers) < ceil_div(apart, M::kWorkers)) neighbour = before;
      const u32 others = __ballot_sync(kAllLanes, exists && neighbour == 0) >> b.lane >> 1;  // columns behind this one that have units
      members = others ? __ffs(others) : b.columns() - b.lane;
      if (neighbour) own = 0;
    }
    u32 end = own;
#pragma unroll
    for (int o = 1; o < M::kColumns; o <<= 1) {
      const u32 before = __shfl_up_sync(kAllLanes, end, o);
      end += b.lane >= o ? before : 0;
    }
    const u32 begin = __shfl_sync(kAllLanes, end - own, b.lane - neighbour);
    if (b.lane < M::kColumns) store_shared4(place(b, b.lane), make_uint4(pieces, begin, end, neighbour << 16 | members));
    __syncwarp();
  }

  struct Unit {
    u32 column, members;  // the first of its columns, and how many there are
    u32 head, position;   // of that one; the others' follow
    u32 piece, pieces;    // of the head
    u32 first, end;       // blocks of the head
    FF_DEVICE bool newest() const { return piece + 1 == pieces; }  // whether the column's own position is in the last of them
  };
  FF_DEVICE Unit operator[](u32 number) const {
    Unit u;
    u.column = __popc(__ballot_sync(kAllLanes, end <= number) & ((1u << M::kColumns) - 1));
    u.members = kMost > 1 ? __shfl_sync(kAllLanes, members, u.column) : 1;
    u.position = __shfl_sync(kAllLanes, position, u.column);
    u.pieces = __shfl_sync(kAllLanes, pieces, u.column);
    const u32 per_head = u.position / 16 + 1, local = number - __shfl_sync(kAllLanes, begin, u.column);
    u.head = local / u.pieces;
    u.piece = local - u.head * u.pieces;
    u.first = u.piece * per_head / u.pieces;
    u.end = (u.piece + 1) * per_head / u.pieces;
    return u;
  }

 private:
  static constexpr u32 kMost = Layout<M>::kNeighbours;
  static FF_DEVICE u32 place(const Block<M>& b, u32 column) { return b.shared + Layout<M>::kUnits + column * 16; }
};

// Keys and values of this pass that are in the cache. Columns of one sequence see each other, so who copies a piece that reaches into
// the pass waits for those of the columns before: of each kv head a word for each column's key and for its value.
//
// NOTE: nobody waits for ever. What is waited for is written by consumers that have finished the layer's qkv stage, before they attend:
// to get there they need chunks that lie in front of all of the layer's pieces in their ring, so their producer has issued them before
// it could come to wait itself. They land and are consumed without it, and no block waits for another's pieces.
// NOTE: the words of a layer may be written anew in the next one: who waits for them does so for a unit of its own, and that unit's
// result is awaited by all before anybody's next qkv vector is there.
template <class M>
struct Appended {
  static FF_DEVICE u64* words(const Block<M>& b, u32 kv_head, u32 column) {
    return b.words(M::kAppended + (kv_head * M::kColumns + column) * 2);
  }
  // By one warp, which has appended the key (0) or the value (1).
  static FF_DEVICE void tell(const Block<M>& b, u32 kv_head, u32 column, u32 which, u32 tag) {
    __syncwarp();
    if (b.lane != 0) return;
    fence_device();
    store_word(words(b, kv_head, column) + which, 0, tag);
  }
};

// The producer's part.
template <class M>
struct UnitStream {
  // This block's units of a layer; there is room for the first copy, and the pass is laid. False: the launch is over.
  static FF_DEVICE bool run(Producer<M>& p, u32 step, u32 layer) {
    const Units<M> units(p);
#pragma unroll 1
    for (u32 number = units.next; number < units.behind; number++) {
      const auto unit = units[number];
      const u32 kv_head = unit.head / M::kVirtualSplits, first = p.column_more(unit.column).first, last = unit.column + unit.members - 1;
      const u64 head_at = ((u64)layer * M::kKvHeads + kv_head) * p.p.kv_blocks;
      const u8* head = p.p.kv + p.column(unit.column).slot * p.p.slot_bytes + head_at * M::kKvBlockBytes;
      const u32 in_pass = first < last ? p.column(first).position / 16 : unit.end;  // first block with a position of this pass
      bool complete = false;
#pragma unroll 1
      for (u32 block = unit.first; block < unit.end;) {
        u32 count = unit.end - block;
        if (count > M::kKvChunkBlocks) count = M::kKvChunkBlocks;
        if (!complete && block + count > in_pass) {
          if (!await(p, kv_head, first, last, p.tag(step, layer))) return false;
          complete = true;
        }
        if (!p.wait_room()) return false;
        p.copy(head + (u64)block * M::kKvBlockBytes, count * M::kKvBlockBytes);
        block += count;
      }
    }
    return true;
  }

 private:
  // Keys and values of columns [first, end) for this kv head.
  static FF_DEVICE bool await(Producer<M>& p, u32 kv_head, u32 first, u32 end, u32 tag) {
    const bool mine = p.lane < 2 * (end - first);
    const u64* word = Appended<M>::words(p, kv_head, first) + (mine ? p.lane : 0);
    for (u32 spins = 1;; spins++) {
      p.poll();
      // NOTE: nobody's are there much sooner than our own consumers are through with the stages before; polls would only slow them down.
      if ((int)(p.freed - p.begins) >= 0 && __all_sync(kAllLanes, !mine || split(load_word(word)).tag == tag)) break;
      if constexpr (M::kPrefetchChunks > 0) p.prefetch();
      if (spins % Producer<M>::kGlanceSpins == 0 && p.over(spins)) return false;
    }
    fence_device();
    __syncwarp();
    fence_copy_engine();
    return true;
  }
};
