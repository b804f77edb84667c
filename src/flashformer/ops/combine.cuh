// The end of attention: the partial results of all blocks that share a head become its output.
#pragma once
#include "attention.cuh"
#include "vectors.cuh"

// Joins the partials of all blocks that share a head. A finisher takes 8 values: lane l weighs the l-th piece, then four pairs of
// values x eight pieces are summed at a time.
template <class M, class S>
struct Combine {
  using T = typename M::Value;
  using L = Layout<M>;
  static constexpr int kBatch = 3;  // pieces a lane sums in a pass
  static constexpr u32 kPass = 8 * kBatch;

  static FF_DEVICE void run(Consumer<M>&, u32, u32) {}
  static FF_DEVICE void run(Producer<M>&, u32, u32) {}

  static FF_DEVICE void run(Finisher<M>& f, u32 step, u32 layer) {
    f.enter(S::kWhere, layer);
    const uint2 tiles = f.tiles(S::tile_word(layer));
    if (f.index == 0) f.mark(1, step, layer, S::kWhere, 0);
    const u32 tag = f.tag(step, layer), pair = f.lane & 3;
    const VectorOut<M, S> out(f, step, layer);
    const KvShare<M> share(f.position(step), blockIdx.x);
    if (share.next < share.end) {
      // Others publish their parts when our consumers do; who polls before that only slows them down.
      // NOTE: a block without a part could not wait here: its consumers may be several layers ahead.
      if (f.index < tiles.y) barrier_wait(f.shared + L::kAttended, f.attended & 1, f.watch);
      f.attended++;
    }
#pragma unroll 1
    for (u32 local = f.index; local < tiles.y; local += M::kFinishers) {
      const u32 at = (tiles.x + local) * 8, query = at / M::kHeadPad, dim = at % M::kHeadPad + pair * 2;
      const u32 in_group = query % M::kGroup;
      const u32 head = query / M::kGroup * M::kVirtualSplits + in_group / M::kVirtualGroup, column = in_group % M::kVirtualGroup;
      const u32 first = share.first_owner(head), last = share.last_owner(head);
      float top = HeadPiece<M>::kNever, sum = 0, y0 = 0, y1 = 0;
#pragma unroll 1
      for (u32 base = first; base <= last; base += kPass) {
        const bool mine = f.lane < kPass && base + f.lane <= last;
        const u32 block = mine ? base + f.lane : last;
        const u32 piece = (block * M::kPieces + share.piece(block, head)) * M::kPieceWords;
        float weight, part, z[kBatch][2];
        Wait wait;
        bool here;
#pragma unroll 1
        do {
          u64 softmax[2], w[kBatch][2] = {};
          load_words(f.words(S::kInput) + piece + 8 * M::kHeadPad + column * 2, softmax[0], softmax[1]);
#pragma unroll
          for (int i = 0; i < kBatch; i++) {
            const u32 from = __shfl_sync(kAllLanes, piece, (f.lane >> 2) + 8 * i);
            if (base + 8 * i <= last) load_words(f.words(S::kInput) + from + column * M::kHeadPad + dim, w[i][0], w[i][1]);
          }
          here = split(softmax[0]).tag == tag && split(softmax[1]).tag == tag;
#pragma unroll
          for (int i = 0; i < kBatch; i++) {
            if (base + 8 * i <= last) here = here && split(w[i][0]).tag == tag && split(w[i][1]).tag == tag;
            z[i][0] = base + 8 * i <= last ? value(w[i][0]) : 0;
            z[i][1] = base + 8 * i <= last ? value(w[i][1]) : 0;
          }
          weight = value(softmax[0]);
          part = value(softmax[1]);
        } while (!__all_sync(kAllLanes, here) && !__any_sync(kAllLanes, wait.expired(f.watch)));
        const float most = fmaxf(top, warp_max(weight)), shrink = exp2_approx(top - most);
        weight = mine ? exp2_approx(weight - most) : 0;
        sum = sum * shrink + warp_sum(weight * part);
        y0 *= shrink;
        y1 *= shrink;
        top = most;
#pragma unroll
        for (int i = 0; i < kBatch; i++) {
          const float share_of = __shfl_sync(kAllLanes, weight, (f.lane >> 2) + 8 * i);
          y0 += share_of * z[i][0];
          y1 += share_of * z[i][1];
        }
      }
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) {
        y0 += __shfl_xor_sync(kAllLanes, y0, o);
        y1 += __shfl_xor_sync(kAllLanes, y1, o);
      }
      if (f.index == 0) f.mark(1, step, layer, S::kWhere, 1);
      if (f.lane < 4) out.put(f, at + 2 * pair, 0, T::pack(__fdividef(y0, sum), __fdividef(y1, sum)));
    }
  }

 private:
  static FF_DEVICE float value(u64 w) { return __uint_as_float(split(w).value); }
};
