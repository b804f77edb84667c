// The end of attention of several columns: the partial results of a head's pieces become its output.
#pragma once
#include "attention_columns.cuh"
#include "vectors.cuh"

// A finisher takes 8 values of up to 8 columns: lane = (slot, column, pair of values). Where there are fewer columns there are more
// slots: each sums every kSlots-th piece in order, and then the slots are joined. The four lanes of a column weigh every fourth piece each.
template <class M, class S>
struct CombineColumns {
  using T = typename M::Value;
  static constexpr u32 kAtOnce = M::kColumns < 8 ? M::kColumns : 8, kSlots = 8 / kAtOnce;
  static constexpr int kBatch = kSlots == 1 ? 8 : 4, kWeighed = kBatch / 4;  // pieces whose values a lane has in flight, and whose weights
  static constexpr u32 kStride = kSlots * M::kPieceWords;  // from a slot's piece to its next

  static FF_DEVICE void run(Consumer<M>&, u32, u32) {}
  static FF_DEVICE void run(Producer<M>&, u32, u32) {}

  static FF_DEVICE void run(Finisher<M>& f, u32 step, u32 layer) {
    f.enter(S::kWhere, layer);
    const uint2 tiles = f.tiles(S::tile_word(layer));
    if (f.index == 0) f.mark(1, step, layer, S::kWhere, 0);
    const u32 tag = f.tag(step, layer), groups = ceil_div(f.columns(), kAtOnce), turns = tiles.y * groups;
    const VectorOut<M, S> out(f, step, layer);
    const Units<M> units(f);
    if (units.next < units.behind) {
      // Others publish their parts when our consumers do; who polls before that only slows them down.
      // NOTE: a block without a part could not wait here: its consumers may be several layers ahead.
      if (f.index < turns) barrier_wait(f.shared + Layout<M>::kAttended, f.attended & 1, f.watch);
      f.attended++;
    }
    const u32 column_lane = f.lane >> 2, slot = column_lane / kAtOnce, pair = f.lane & 3;
#pragma unroll 1
    for (u32 turn = f.index; turn < turns; turn += M::kFinishers) {
      const u32 row = (tiles.x + turn / groups) * 8 + pair * 2, column = turn % groups * kAtOnce + column_lane % kAtOnce;
      const u32 pieces = __shfl_sync(kAllLanes, units.pieces, column), first = __shfl_sync(kAllLanes, units.begin, column);
      const u32 query = row / M::kHeadPad, in_group = query % M::kGroup;
      const u32 head = query / M::kGroup * M::kVirtualSplits + in_group / M::kVirtualGroup;
      const u64* const results = f.words(S::kInput) + (u64)(first + head * pieces) * M::kPieceWords;
      const u32 in_head = __shfl_sync(kAllLanes, units.neighbour, column) * M::kVirtualGroup + in_group % M::kVirtualGroup;
      const u32 value_at = in_head * M::kHeadPad + row % M::kHeadPad, softmax_at = 8 * M::kHeadPad + in_head * 2;
      float top = HeadPiece<M>::kNever, sum = 0, y0 = 0, y1 = 0;
#pragma unroll 1
      for (u32 base = slot; __any_sync(kAllLanes, base < pieces); base += kBatch * kSlots) {
        const auto exists = [&](u32 i) { return base + i * kSlots < pieces; };
        float weight[kWeighed] = {}, part[kWeighed] = {}, z[kBatch][2] = {};  // set, or they would stay alive through the whole kernel
        Wait wait;
        bool here;
#pragma unroll 1
        do {
          u64 softmax[kWeighed][2] = {}, w[kBatch][2] = {};
          const u64* const from = results + (u64)base * M::kPieceWords;
#pragma unroll
          for (int i = 0; i < kWeighed; i++)
            if (exists(4 * i + pair)) load_words(from + (4 * i + pair) * kStride + softmax_at, softmax[i][0], softmax[i][1]);
#pragma unroll
          for (int i = 0; i < kBatch; i++)
            if (exists(i)) load_words(from + i * kStride + value_at, w[i][0], w[i][1]);
          here = true;
#pragma unroll
          for (int i = 0; i < kWeighed; i++) {
            here = here && (!exists(4 * i + pair) || (split(softmax[i][0]).tag == tag && split(softmax[i][1]).tag == tag));
            weight[i] = value(softmax[i][0]);
            part[i] = value(softmax[i][1]);
          }
#pragma unroll
          for (int i = 0; i < kBatch; i++) {
            here = here && (!exists(i) || (split(w[i][0]).tag == tag && split(w[i][1]).tag == tag));
            z[i][0] = value(w[i][0]);
            z[i][1] = value(w[i][1]);
          }
        } while (!__all_sync(kAllLanes, here) && !__any_sync(kAllLanes, wait.expired(f.watch)));
        float most = top;
#pragma unroll
        for (int i = 0; i < kWeighed; i++)
          if (exists(4 * i + pair)) most = fmaxf(most, weight[i]);
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        const float shrink = exp2_approx(top - most);
        sum *= shrink;
        y0 *= shrink;
        y1 *= shrink;
        top = most;
#pragma unroll
        for (int i = 0; i < kWeighed; i++) {
          weight[i] = exists(4 * i + pair) ? exp2_approx(weight[i] - most) : 0;
          sum += weight[i] * part[i];
        }
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const float share = __shfl_sync(kAllLanes, weight[i / 4], (f.lane & ~3u) + i % 4);
          y0 += share * z[i][0];
          y1 += share * z[i][1];
        }
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
#pragma unroll
      for (u32 o = 4 * kAtOnce; o < 32; o <<= 1) {
        const float other = __shfl_xor_sync(kAllLanes, top, o), most = fmaxf(top, other);
        const float shrink = exp2_approx(top - most), share = exp2_approx(other - most);
        sum = sum * shrink + __shfl_xor_sync(kAllLanes, sum, o) * share;
        y0 = y0 * shrink + __shfl_xor_sync(kAllLanes, y0, o) * share;
        y1 = y1 * shrink + __shfl_xor_sync(kAllLanes, y1, o) * share;
        top = most;
      }
      if (slot == 0 && pieces) out.put(f, row, column, T::pack(__fdividef(y0, sum), __fdividef(y1, sum)));
    }
    if (f.index == 0) f.mark(1, step, layer, S::kWhere, 1);
    out.done(f, tag, tiles);
  }

 private:
  static FF_DEVICE float value(u64 w) { return __uint_as_float(split(w).value); }
};
