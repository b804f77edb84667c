// Attention of several columns over their KV caches: unit by unit (units.cuh), each as a block's piece of one column, or of neighbours.
//
// A column's own key and value never come from the cache, as if it were alone. Those of the columns before it do, so a block appends
// all of its units' keys and values before it attends to the first.
#pragma once
#include "attention.cuh"
#include "units.cuh"

template <class M, class S>
struct AttentionColumns {
  using Piece = HeadPiece<M>;

  static FF_DEVICE void run(Finisher<M>&, u32, u32) {}
  static FF_DEVICE void run(Producer<M>&, u32, u32) {}

  // NOTE: everybody who reads the layer's qkv vector has done so before the next one is written: a warp that appends meets the others
  // of its block before they publish the unit's result, for which all wait. So have all who read what lies in the panel's place.
  static FF_DEVICE void run(Consumer<M>& c, u32 step, u32 layer) {
    u32 done = 0;
#pragma unroll 1
    for (;; done++) {
      c.enter(S::kWhere, layer);
      // NOTE: computed anew for each unit: kept through the loop, it would cost registers that the largest heads do not leave.
      const Units<M> units(c);
      const u32 number = units.next + done;
      if (number >= units.behind) break;
      const auto unit = units[number];
      c.sync();  // the panel of the stage before, or the unit before this one, may still be read
      if (c.warp == 0) c.mark(0, step, layer, S::kWhere, 0);
      if (done == 0) append(c, units, step, layer);
      if (done == 0 || unit.piece == 0) {  // else the head's last piece has left it all there
        Piece::prepare(c, query(c, unit, step, layer), unit.members, number + unit.pieces - unit.piece <= units.behind);
        c.sync();
      }
      if (c.warp == 0) c.mark(0, step, layer, S::kWhere, 1);
      float out[Piece::kSteps][4];
      const u32 count = unit.end - unit.first, warps = count < kConsumers ? count : kConsumers;  // that have seen any positions
      Piece::attend(c, out, unit.first, count, unit.position, unit.members);
      u64* const to = c.words(S::kOutput) + (u64)number * M::kPieceWords;
      Piece::publish(c, out, Piece::all_queries(unit.head, unit.members), unit.newest(), warps, c.tag(step, layer), to);
      if (c.warp == 0) c.mark(1, step, layer, S::kWhere, 1);
    }
    if (done == 0) return;
    __syncwarp();
    if (c.lane == 0) barrier_arrive(c.shared + Layout<M>::kAttended);
  }

 private:
  using Unit = typename Units<M>::Unit;

  static FF_DEVICE typename Piece::Query query(const Consumer<M>& c, const Unit& unit, u32 step, u32 layer) {
    const u64* vectors = c.words(S::kInput) + unit.column * M::kQkvWords;
    return {layer, unit.head, unit.position, c.tag(step, layer), vectors, c.p.kv + c.column(unit.column).slot * c.p.slot_bytes};
  }

  // Keys and values of this block's units, each by one warp: the last ones first, for the others have queries to prepare.
  static FF_DEVICE void append(Consumer<M>& c, const Units<M>& units, u32 step, u32 layer) {
    u32 turn = kConsumers - 1 - c.warp;  // pairs of key and value until this warp's next
#pragma unroll 1
    for (u32 number = units.next; number < units.behind; number++) {
      const auto unit = units[number];
      if (!unit.newest() || unit.head % M::kVirtualSplits != 0) continue;
#pragma unroll 1
      for (u32 member = 0; member < unit.members; member++) {
        if (turn < 2) append(c, query(c, unit, step, layer).of(member), unit.column + member, turn);
        turn = (turn - 2) % kConsumers;
      }
    }
  }
  static FF_DEVICE void append(Consumer<M>& c, const typename Piece::Query& q, u32 column, u32 which) {
    if (which == 0) Piece::append_key(c, q);
    else Piece::append_value(c, q);
    // The columns behind it in its sequence wait for it.
    if (column + 1 < c.columns() && c.column_more(column + 1).first <= column)
      Appended<M>::tell(c, Heads<M>::kv_head(q.head), column, which, q.tag);
  }
};
