// A linear stage for several columns: y = W x of each, and what is folded into it. The weights are read once for all.
//
// No bit of a column depends on the others: a column of the instructions' results is made of that column of x alone, in the same order
// however many there are. What lies in the place of columns that do not exist is never looked at.
#pragma once
#include "integers_columns.cuh"
#include "linear.cuh"
#include "panel.cuh"
#include "sample_columns.cuh"

// Whether a part is the last one of a tile, if that matters. NOTE: a member that is not used would change the machine code, too.
template <bool matters>
struct MayEnd {
  bool ends;
};
template <>
struct MayEnd<false> {
  static constexpr bool ends = false;
};

// One lane's part of the product of a tile of plain values with all columns: row g, columns t + 4 j; of 16 columns see panel.cuh.
template <class M, class S>
struct PlainColumns {
  static constexpr int kGroups = M::kColumnGroups;
  static constexpr bool kLastDiffers = false;
  template <int size, bool>
  struct Part : MayEnd<(S::kShortWarps > 0)> {
    uint4 value[size];
    FF_DEVICE void load(u32 at, u32, u32 warp, u32 lane, u32) {
      const bool lacks = this->ends && is_short<S>(warp);  // a fragment
      if (this->ends) at -= short_before<S>(warp) * 512;
#pragma unroll
      for (int i = 0; i < size; i++)
        value[i] = lacks && i + 1 == size ? make_uint4(0, 0, 0, 0) : load_shared4(at + warp * (size * 512) + lane * 16 + i * 512);
    }
  };
  float total[kGroups] = {};

  static FF_DEVICE void prepare(Panel<M, S>&) {}

  // Add a part. place(cell, cells): where so many cells of x are.
  template <int size, bool kLast, class Place>
  FF_DEVICE void add(const Part<size, kLast>& part, const Panel<M, S>& panel, Place place) {
    const u32 x = place(0, size) + panel.own();
    if constexpr (M::kWide) return add_wide(part, x);
    with_groups<kGroups, 2>(panel.columns, [&](auto first, auto n) {
      constexpr int kChains = n.value > 1 ? 1 : size < 4 ? size : 4;  // of instructions that wait for each other
      float d[n.value][kChains][4] = {};
#pragma unroll
      for (int i = 0; i < size; i++)
#pragma unroll
        for (int j = 0; j < n.value; j++) {
          const uint2 b = load_shared2(x + i * Panel<M, S>::kCellBytes + (first.value + j) * 256);
          mma<typename M::Value>(d[j][i % kChains], part.value[i], b.x, b.y);
        }
#pragma unroll
      for (int j = 0; j < n.value; j++) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kChains; i++) sum += d[j][i][0] + d[j][i][3];
        total[first.value + j] += sum;
      }
    });
  }
  template <int size, bool kLast>
  FF_DEVICE void result(float (&sums)[kGroups], const Part<size, kLast>&, const Panel<M, S>&) const {
#pragma unroll
    for (int j = 0; j < kGroups; j++) sums[j] = total[j];
  }

 private:
  template <int size, bool kLast>
  FF_DEVICE void add_wide(const Part<size, kLast>& part, u32 x) {
    constexpr int kChains = size < 4 ? size : 4;  // of instructions that wait for each other
    float d[kChains][4] = {};
#pragma unroll
    for (int i = 0; i < 2 * size; i++) {  // steps
      const uint4& w = part.value[i / 2];
      mma<typename M::Value>(d[i % kChains], load_shared4(x + i * (Panel<M, S>::kCellBytes / 2)), i % 2 ? w.y : w.x, i % 2 ? w.w : w.z);
    }
#pragma unroll
    for (int i = 0; i < kChains; i++)
#pragma unroll
      for (int j = 0; j < kGroups; j++) total[j] += d[i][j];
  }
};

template <class M, class S, bool kCoded = S::kCoded, bool kInteger = integer_columns<M, S>()>
struct ColumnSums {
  using Type = PlainColumns<M, S>;
};
template <class M, class S>
struct ColumnSums<M, S, true, false> {
  using Type = CodedColumns<M, S>;
};
template <class M, class S>
struct ColumnSums<M, S, true, true> {
  using Type = IntegerColumns<M, S>;
};

template <class M, class S>
struct LinearColumns {
  using T = typename M::Value;
  using L = Layout<M>;
  static constexpr int kGroups = M::kColumnGroups;

  static FF_DEVICE void run(Producer<M>&, u32, u32) {}  // the tape already says it all

  // which: of twins.
  static FF_DEVICE void run(Consumer<M>& c, u32 step, u32 layer, u32 which = 0) {
    const Inputs in = InputsOf<S>::at(layer, which);
    c.enter(in.where, layer);
    const u32 tiles = c.tiles(in.tile_word).y;
    if (tiles == 0) return;
    if (c.warp == 0) c.mark(0, step, layer, in.where, 0);
    await_x<M, S>(c, in, c.tag(step, layer));
    const u32 groups = (tiles + S::kWarpsRows - 1) / S::kWarpsRows;
    Panel<M, S> panel(c, in, (groups + kBatch - 1) / kBatch, step, layer);
    if (c.warp == 0) c.mark(0, step, layer, in.where, 1);
    Sums::prepare(panel);
#pragma unroll 1
    for (Batch batch{tiles, groups, 0}; batch.first < groups; batch.first += kBatch) {
      Sums sums[kBatch];
      if constexpr (kLarger > 0) add_parts<kSize + 1, false>(c, panel, sums, batch, kLarger, false);
      if constexpr (S::kParts - kLarger > kLastParts)
        add_parts<kSize, false>(c, panel, sums, batch, S::kParts - kLarger - kLastParts, kLastParts == 0);
      if constexpr (kLastParts > 0) add_parts<kSize, true>(c, panel, sums, batch, 1, true);
    }
  }

  // Lane (g, t) finishes row g of a tile, columns t + 4 j.
  static FF_DEVICE void run(Finisher<M>& f, u32 step, u32 layer) {
    f.enter(S::kWhere, layer);
    if (f.index == 0) f.mark(1, step, layer, S::kWhere, 0);
    const uint2 tiles = f.tiles(S::tile_word(layer));
    const u32 groups = (tiles.y + S::kWarpsRows - 1) / S::kWarpsRows, columns = f.columns();
    const u32 tag = f.tag(step, layer);
    const u32 out_tag = S::kNextLayer ? tag + 1 : tag;
    const u32 row = f.lane >> 2;
    const float* vectors = f.p.vectors + (u64)layer * M::kLayerVectors;
    float scale[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; j++) scale[j] = 1;
    if constexpr (S::kEpilogue == Epilogue::kResidual) f.await_gamma();
    if constexpr (S::kNorm)
      if (groups) norm_scales<M, S>(f, tag, scale);
    float* wanted[kGroups];  // where the host wants the logits of a lane's columns, or null
    if constexpr (S::kEpilogue == Epilogue::kLogits) {
#pragma unroll
      for (int j = 0; j < kGroups; j++) wanted[j] = logits_of(f, (f.lane & 3) + 4 * j, columns);
    }
    const auto out = out_of<M, S>(f, step, layer);
    u32 turn = f.turn;
#pragma unroll 1
    for (; turn < groups; turn += M::kFinishers) {
      const u32 first = turn * S::kWarpsRows;  // tile of this block
      // NOTE: biases come from memory, so they are asked for before the wait: lane l has that of row l of the group, and of l + 32.
      float bias[kBiases];
      if constexpr (S::kBias >= 0) {
#pragma unroll
        for (int i = 0; i < kBiases; i++) {
          const u32 of = first * 8 + f.lane + i * 32;
          bias[i] = f.lane + i * 32 < S::kWarpsRows * 8 && of < tiles.y * 8 ? load_early(vectors + S::kBias + tiles.x * 8 + of) : 0;
        }
      }
      const u32 from = f.shared + L::kReduction + f.buffer() * L::kReductionBytes + f.lane * 4;
      f.acquire();
#pragma unroll 1
      for (u32 pass = 0; pass < S::kWarpsRows && first + pass < tiles.y; pass++) {
        const u32 local = first + pass, tile = tiles.x + local;
        float added = 0;
        if constexpr (S::kBias >= 0) {
          const float lower = bias[0], upper = bias[kBiases - 1];
          added = __shfl_sync(kAllLanes, pass < 4 ? lower : upper, pass % 4 * 8 + row);
        }
        float gamma = 0;
        if constexpr (S::kEpilogue == Epilogue::kResidual) gamma = f.gamma(local, row);
        float y[kGroups] = {};
#pragma unroll
        for (int j = 0; j < kGroups; j++) {
          const u32 column = (f.lane & 3) + 4 * j;
          const bool mine = column < columns;
          if (j > 0 && 4 * j >= columns) break;
          const float sum = sum_columns(from + (j * kConsumers + pass * S::kWarpsColumns) * 128);
          y[j] = S::kBias >= 0 ? fmaf(sum, scale[j], added) : sum * scale[j];
          if constexpr (S::kEpilogue == Epilogue::kStore) {
            if (mine) store_word(f.words(S::kOutput) + column * M::kQkvWords + tile * 8 + row, __float_as_uint(y[j]), out_tag);
          } else if constexpr (S::kEpilogue == Epilogue::kSwiglu) {
            const float up = __shfl_down_sync(kAllLanes, y[j], 16);
            const float h = __fdividef(y[j], 1.f + __expf(-y[j])) * up;
            put_pairs<4>(f, out, h, tile * 4 + row, column, mine && row < 4);
          } else if constexpr (S::kEpilogue == Epilogue::kResidual) {
            const u32 place = f.residual(local, row, column);
            if (mine) y[j] += load_shared_float(place);
            put_pairs<4>(f, out, y[j] * gamma, tile * 8 + row, column, mine);
            if (mine) store_shared_float(place, y[j]);
          }
        }
        if constexpr (S::kEpilogue == Epilogue::kLogits) {
          const u32 token = tile * 8 + row;
          if (token < M::kVocab) {
#pragma unroll
            for (int j = 0; j < kGroups; j++)
              if (wanted[j]) wanted[j][token] = y[j];
            take_column_logits(f, token, y);
          }
        }
      }
      f.release();
    }
    f.turn = turn - groups;  // what is handed over in all stages goes round the finishers
    if (f.index == 0) f.mark(1, step, layer, S::kWhere, 1);
    if constexpr (S::kEpilogue == Epilogue::kResidual) {
      out.done_with_moments(f, out_tag, tiles);
      const u32 next = S::kNextLayer ? (layer + 1) % M::kLayers : layer;
      f.fetch_gamma(f.p.vectors + (u64)next * M::kLayerVectors + S::kNextGamma, tiles);
    } else if constexpr (S::kEpilogue == Epilogue::kSwiglu) {
      out.done(f, out_tag, tiles);
    }
  }

 private:
  static constexpr int kBiases = ceil_div(S::kWarpsRows * 8, 32);

  static FF_DEVICE float* logits_of(const Finisher<M>& f, u32 column, u32 columns) {
    if (column >= columns) return nullptr;
    float* all = f.p.sequences[f.column(column).sequence].logits;
    return all ? all + (u64)f.column_more(column).index * M::kVocab : nullptr;
  }

  using Sums = typename ColumnSums<M, S>::Type;
  static constexpr int kSize = S::kFragments / S::kParts, kLarger = S::kFragments % S::kParts;  // the first parts have one fragment more
  static constexpr int kLastParts = Sums::kLastDiffers ? 1 : 0;
  static constexpr int kPairs = !M::kWide || !S::kCoded ? 0 : ceil_div(S::kTogether, 2);  // of groups, which share what they read of x
  static constexpr int kBatch = kPairs ? 2 * kPairs : S::kTogether;
  static constexpr bool kUnrolled = M::kWide;  // the groups of a batch, whose sums do not move then; with fewer columns they may be eight

  struct Batch {
    u32 tiles, groups, first;  // of this block; of the batch
  };

  // Add so many parts of the batch, of `size` fragments of a warp. ends: the last one ends it.
  // NOTE: where the last group has fewer tiles than warps, a warp without one multiplies what is left in the slot; nobody looks.
  template <int size, bool kLast>
  static FF_DEVICE void add_parts(
      Consumer<M>& c, Panel<M, S>& panel, Sums (&sums)[kBatch], const Batch& batch, u32 parts, bool ends) {
    constexpr u32 kCells = S::kFragmentColumns / 32;
#pragma unroll 1
    for (u32 part = 0; part < parts; part++) {
      constexpr bool kWhole = !S::kSlices;  // x comes part by part
      u32 x = 0;
      if constexpr (kWhole) x = panel.next(size * kCells);
      const bool end = ends && part + 1 == parts;
      if constexpr (kPairs > 0) {
        add_pairs<size, kLast>(c, panel, sums, batch, x, end);
        continue;
      }
      const auto place = [&](u32 cell, u32 cells) { return kWhole ? x + cell * panel.kCellBytes : panel.next(cells); };
#pragma unroll (kUnrolled ? S::kTogether : 1)
      for (u32 i = 0; i < S::kTogether; i++) {
        Sums& sum = sums[kUnrolled ? i : 0];
        const u32 group = batch.first + i;
        if (group < batch.groups) {
          typename Sums::template Part<size, kLast> now;
          if constexpr (S::kShortWarps > 0) now.ends = end;
          load_part<S>(c, now, batch.tiles, batch.groups, group);
          sum.add(now, panel, place);
          if (end) {
            float all[kGroups];
            sum.result(all, now, panel);
            c.hand_over(all);
          }
        }
        if constexpr (!kUnrolled) move_on<1>(sums);
      }
    }
  }

  // A part of a batch, pair by pair. x: where it is, if it came part by part.
  template <int size, bool kLast>
  static FF_DEVICE void add_pairs(Consumer<M>& c, Panel<M, S>& panel, Sums (&sums)[kBatch], const Batch& batch, u32 x, bool end) {
    u32 mark = 0;
    if constexpr (S::kSlices) mark = panel.mark();
#pragma unroll 1
    for (u32 pair = 0; pair < kPairs; pair++) {
      const u32 first = batch.first + 2 * pair;
      if (first < batch.groups) {
        const bool last = pair + 1 == kPairs || first + 2 >= batch.groups;
        if constexpr (S::kSlices && kPairs > 1)
          if (pair > 0) panel.again_from(mark);
        Sums two[2] = {sums[0], sums[1]};
        add_two<size, kLast>(c, two, batch, first, end, [&](u32 slice) {
          if constexpr (S::kSlices) return panel.next(4, slice == 0 ? pair == 0 : last) + panel.own();
          else return x + slice * (4 * panel.kCellBytes) + panel.own();
        });
        sums[0] = two[0], sums[1] = two[1];
      }
      move_on<2>(sums);
    }
  }
  // The first n sums of a batch become the last. NOTE: which of them are meant must be known when this is compiled, so they move.
  template <int n>
  static FF_DEVICE void move_on(Sums (&sums)[kBatch]) {
    Sums first[n];
#pragma unroll
    for (int k = 0; k < n; k++) first[k] = sums[k];
#pragma unroll
    for (int k = n; k < kBatch; k++) sums[k - n] = sums[k];
#pragma unroll
    for (int k = 0; k < n; k++) sums[kBatch - n + k] = first[k];
  }
  // A part of two groups, slice by slice. place(slice): where a lane's x of it is. NOTE: the last group of an odd number is multiplied twice.
  template <int size, bool kLast, class Place>
  static FF_DEVICE void add_two(Consumer<M>& c, Sums (&sums)[2], const Batch& batch, u32 group, bool end, Place place) {
    const bool both = group + 1 < batch.groups;
    const GroupChunk<S> first(batch.tiles, batch.groups, group), second(batch.tiles, batch.groups, group + both);
    const bool apart = both && second.begins;
    if (first.begins) c.acquire();
    if (apart) c.acquire_next();
    const u32 places[2] = {c.chunk_address(), apart ? c.next_address() : c.chunk_address()};
    WideSlice<S, size, kLast> now[2];
#pragma unroll 1
    for (u32 slice = 0; slice < size; slice++) {
      now[0].load(places[0], first.tiles, first.warp + c.warp, c.lane, slice);
      now[1].load(places[1], second.tiles, second.warp + c.warp, c.lane, slice);
      Sums::add_two(sums, now, place(slice));
    }
    if (first.ends) c.release();
    if (both && second.ends) c.release();
    if (!end) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (i && !both) break;
      float all[kGroups];
      sums[i].result(all, now[i]);
      c.hand_over(all);
    }
  }

  // One lane's value of a tile, over the warps that share it.
  static FF_DEVICE float sum_columns(u32 from) {
    float part[S::kWarpsColumns];
#pragma unroll
    for (int i = 0; i < S::kWarpsColumns; i++) part[i] = load_shared_float(from + i * 128);
#pragma unroll
    for (int n = S::kWarpsColumns / 2; n; n /= 2)
#pragma unroll
      for (int i = 0; i < n; i++) part[i] += part[i + n];
    return part[0];
  }
};

// Two stages, one after the other, that differ for the consumers in nothing but `Inputs`.
template <class M, class A, class B>
struct TwinColumns {
  static FF_DEVICE void run(Producer<M>&, u32, u32) {}
  static FF_DEVICE void run(Consumer<M>& c, u32 step, u32 layer) {
#pragma unroll 1
    for (u32 which = 0; which < 2; which++) LinearColumns<M, Twins<A, B>>::run(c, step, layer, which);
  }
  static FF_DEVICE void run(Finisher<M>& f, u32 step, u32 layer) {
    LinearColumns<M, A>::run(f, step, layer);
    LinearColumns<M, B>::run(f, step, layer);
  }
};
