// A linear stage of many tokens: what is folded into it is as in linear.cuh, but it is bound by arithmetic.
//
// A block multiplies 128 tokens, the columns of B, with some tiles at a time. Each of two warpgroups has half of these as rows of A, in stacks
// of eight, of which a warp has two. Fragments come in the order in which a tile has them on the tape, and the octets of x (prefill.cuh) that
// belong to them, through a ring in shared memory that another warpgroup fills. A stage of few rows has its columns in splits, whose sums are
// added in their order. Of few tokens, blocks take one each, so that all have work, and meet in memory; else a block takes them one after the
// other. So every sum has the same order, whatever tokens there are and wherever they are cut.
#pragma once
#include "codes_prefill.cuh"
#include "linear.cuh"
#include "prefill.cuh"

// The units of a tile that are in a part of the tape, in their order there: see place_fragment (tools.cuh).
template <class S>
struct PartUnits {
  static constexpr u32 kWhole = S::kWarpsColumns - S::kShortWarps;  // warps that are not short
  u32 size, first, whole, count;  // a warp's units; in parts before; units of warps that are not short; of all

  FF_DEVICE explicit PartUnits(u32 part) {
    constexpr u32 kSmall = S::kFragments / S::kParts, kLarger = S::kFragments % S::kParts;
    size = kSmall + (part < kLarger);
    first = part * kSmall + (part < kLarger ? part : kLarger);
    whole = part + 1 == S::kParts ? kWhole * size : S::kWarpsColumns * size;
    count = part + 1 == S::kParts ? whole + S::kShortWarps * (size - 1) : whole;
  }
  // Number `at` of them: its number among a row's columns.
  FF_DEVICE u32 unit(u32 at) const {
    const bool of_short = S::kShortWarps > 0 && at >= whole;
    const u32 of = of_short ? at - whole : at, length = of_short ? size - 1 : size;
    const u32 warp = of / length + (of_short ? kWhole : 0), before = warp > kWhole ? warp - kWhole : 0;  // short warps, which lack a unit each
    return warp * S::kFragments - before + first + of % length;
  }
};

// In how many parts the sums of squares are of what a stage writes.
template <class S>
constexpr u32 PrefillParts = ceil_div(S::kTiles, 8u);

// A stage in which a warpgroup has so many stacks of eight tiles. No bit depends on it.
template <class M, class S, int kStacks>
struct StackedPrefill {
  using T = typename M::Value;
  using P = Prefill<M>;
  using Unit = PrefillUnit<M, S>;
  static constexpr u32 kSplits = S::kSplits;
  static_assert((!Unit::kGrouped && kSplits == 1) || kStacks == 1, "sums of groups, or splits, take as many registers as those of all columns");
  static constexpr int kGroupTiles = 8 * kStacks, kTiles = P::kLeastTiles * kStacks;  // of a warpgroup, of a block
  static constexpr int kBlocks = ceil_div((int)S::kTiles, kTiles);
  static constexpr int kOctets = S::kFragmentColumns / 8, kXBytes = kOctets * kHalfBytes;  // of x, a unit
  // A slot of the ring: x of a run of units, then the run of each tile, then its scales.
  static constexpr int kRun = S::kCoded ? 1 : 4, kCodes = kRun * kXBytes, kScales = kCodes + kTiles * kRun * Unit::kBytes;
  static constexpr int kSlotBytes = round_up(kScales + kTiles * kRun * Unit::kScaleBytes, 128);
  // Sums of splits are kept in shared memory where those of groups have the registers.
  static constexpr bool kKeeps = Unit::kGrouped && kSplits > 1;
  static constexpr int kKeptBytes = kKeeps ? P::kWarps * 32 * 64 * 4 : 0;
  static constexpr int kFit = (M::kSharedBytes - P::kRing - kKeptBytes) / kSlotBytes, kSlots = kFit < P::kMostSlots ? kFit : P::kMostSlots;
  static constexpr int kKept = P::kRing + kSlots * kSlotBytes;
  static_assert(kSlots >= 2, "a target with prefill has room for two slots of each stage");
  static_assert(Unit::kScaleBytes % 16 == 0 && kTiles % P::kCopyWarps == 0, "these have no prefill");

  using Sums = float[kStacks][64];

  template <class B>
  static FF_DEVICE void run(B& b, u32 layer, const u32* x, u32 octets, u32 moments) {
    b.enter();
    u32 slot = 0;
    Sums before = {};  // of the splits in front of this one
#pragma unroll 1
    for (u32 turn = 0;; turn++) {
      const Item of(b.p.count, turn);
      if (!of.exists) break;
      if constexpr (B::kCopies) {
        copy(b, layer, (const u8*)x + (u64)of.token / P::kTokens * octets * kHalfBytes, of.tile, of.split, slot);
      } else {
        if (of.begins) {
          b.sync();  // what the item before left in shared memory has been read
          if constexpr (S::kNorm) norm_scales(b, of.token, moments);
        }
        Sums sums = {};  // NOTE: not only for the first unit: what was never set would stay alive through all stages
        multiply(b, of.split, slot, sums);
        const Item again(b.p.count, turn);
        add_splits(b, again, before, sums);
        if (!again.ends) continue;
        if (again.shared && !gather(b, layer, again, sums)) return;
        b.sync();  // norm scales are there
        finish(b, layer, again, sums);
      }
    }
  }

 private:
  static constexpr u32 kUnits = S::kWarpsColumns * S::kFragments - S::kShortWarps;
  static constexpr u32 kTokenOctets = kWarpgroupColumns / 8;  // of a piece, at most

  // What a block does in a turn: a split of a piece, which is some tiles with some tokens. It takes all splits in turn, or shares the piece with
  // other blocks, which have one each.
  struct Item {
    bool exists, shared, begins, ends;  // the last two: whether it is the first, or last, split that the block has of the piece
    u32 piece, token, tile;             // its number, the first ones
    u32 split, octets, first, end;      // octets of tokens of the piece; and those that this block finishes

    // NOTE: computed where it is needed: kept, it would spill.
    FF_DEVICE Item(u32 tokens, u32 turn) {
      asm volatile("" : "+r"(tokens), "+r"(turn));
      const u32 groups = ceil_div(tokens, (u32)P::kTokens), pieces = groups * kBlocks;
      shared = kSplits > 1 && pieces * kSplits <= M::kMostShares && ceil_div(pieces * kSplits, gridDim.x) < kSplits;
      const u32 shares = shared ? kSplits : 1, own = kSplits / shares;
      const u32 item = blockIdx.x + turn / own * gridDim.x, share = item % shares;
      exists = item < pieces * shares;
      begins = turn % own == 0;
      ends = turn % own + 1 == own;
      piece = item / shares;
      split = share + turn % own;
      token = piece % groups * P::kTokens;
      tile = piece / groups * kTiles;
      const u32 left = ceil_div(tokens - token, 8u);
      octets = left < kTokenOctets ? left : kTokenOctets;
      first = share * octets / shares;
      end = (share + 1) * octets / shares;
    }
  };

  static FF_DEVICE u32 split_begin(u32 split) { return split * kUnits / kSplits; }  // in the order of the tape

  // run(units, first, count) for each few units of a split that follow each other on the tape; begin(part, first) in front of those of a part.
  template <class Begin, class Run>
  static FF_DEVICE void each_run(u32 split, Begin begin, Run run) {
    const u32 from = split_begin(split), to = split_begin(split + 1);
    u32 before = 0;
#pragma unroll 1
    for (u32 part = 0; part < S::kParts; part++) {
      const PartUnits<S> units(part);
      const u32 behind = before + units.count, end = (to < behind ? to : behind) - before;
      u32 first = from > before ? from - before : 0;
      if (to > before && from < behind) {
        begin(part, first);
#pragma unroll 1
        for (; first < end; first += kRun) run(units, first, end - first < kRun ? end - first : kRun);
      }
      before = behind;
    }
  }

  template <class B>
  static FF_DEVICE void advance(B& b, u32& slot) {
    b.phases ^= 1u << slot;
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }
  // Where a tile's fragments (0) or scales (1) of a part are on the tape, in bytes. NOTE: behind the last tile there is it again.
  template <class B>
  static FF_DEVICE u64 place(const B& b, u32 layer, u32 tile, u32 part, u32 which) {
    const u32 of = tile < S::kTiles ? tile : S::kTiles - 1;
    return b.p.places[layer * M::kLayerPlaces + S::kPlaces + (which * S::kTiles + of) * S::kParts + part];
  }

  // All units of some tiles into the ring: each warp those of a fourth of the tiles, a lane each. NOTE: a copy takes the copy engine 30 cycles
  // and more, however small: so a few units of a tile, which follow each other on the tape, come at once.
  static FF_DEVICE void copy(PrefillBlock<M, true>& b, u32 layer, const u8* x, u32 tile, u32 split, u32& slot) {
    constexpr u32 kOwn = kTiles / P::kCopyWarps, kKinds = Unit::kScaleBytes ? 2 : 1;  // tiles of a warp; of each, fragments and scales
    static_assert(kKinds * kOwn + kRun <= 32);
    const u32 warp = b.warp - P::kWarps, kind = b.lane / kOwn, own = warp * kOwn + b.lane % kOwn;
    const u32 nbytes = kind ? Unit::kScaleBytes : Unit::kBytes, to = (kind ? kScales : kCodes) + own * kRun * nbytes;
    const u32 x_unit = b.lane - kKinds * kOwn;  // of a run
    const u8* from = nullptr;
    each_run(
        split,
        [&](u32 part, u32 first) {
          if (kind < kKinds) from = b.p.model.tape + place(b, layer, tile + own, part, kind) + first * nbytes;
        },
        [&](const PartUnits<S>& units, u32 first, u32 run) {
          const u32 full = b.shared + P::kFull + slot * 8, at = b.shared + P::kRing + slot * kSlotBytes;
          barrier_wait(b.shared + P::kEmpty + slot * 8, b.phases >> slot & 1 ^ 1, b.watch());
          if (b.lane == 0) barrier_expect(full, run * (kOwn * (Unit::kBytes + Unit::kScaleBytes) + (warp == 0 ? kXBytes : 0)));
          __syncwarp();
          if (warp == 0 && x_unit < run)
            bulk_copy_expected(at + x_unit * kXBytes, x + (u64)units.unit(first + x_unit) * kXBytes, kXBytes, full);
          if (kind < kKinds) bulk_copy_expected(at + to, from, run * nbytes, full);
          from += run * nbytes;
          advance(b, slot);
        });
  }

  static FF_DEVICE void release(const PrefillBlock<M, false>& b, u32 slot) {
    __syncwarp();
    if (b.lane == 0) barrier_arrive(b.shared + P::kEmpty + slot * 8);
  }

  // What products under way read: operands of a step, of all terms and stacks.
  struct Operands {
    uint4 a[Unit::kTerms][kStacks] = {};
    // They are needed until here. NOTE: the compiler does not know that products read registers after they were issued.
    FF_DEVICE void keep() {
#pragma unroll
      for (int term = 0; term < Unit::kTerms; term++)
#pragma unroll
        for (int i = 0; i < kStacks; i++) {
          uint4& v = a[term][i];
          asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
        }
    }
  };

  // The sums of a split become those of it and all that the block had in front of it.
  static FF_DEVICE void add_splits(const PrefillBlock<M, false>& b, const Item& of, Sums& before, Sums& sums) {
    if constexpr (kKeeps) {
      const u32 kept = b.shared + kKept + b.thread() * 16;
#pragma unroll
      for (int n = 0; n < 16; n++) {
        const u32 at = kept + n * (P::kWarps * 512);
        float* sum = sums[0] + 4 * n;
        if (!of.begins) {
          const uint4 v = load_shared4(at);
          sum[0] += __uint_as_float(v.x);
          sum[1] += __uint_as_float(v.y);
          sum[2] += __uint_as_float(v.z);
          sum[3] += __uint_as_float(v.w);
        }
        const uint4 words = make_uint4(__float_as_uint(sum[0]), __float_as_uint(sum[1]), __float_as_uint(sum[2]), __float_as_uint(sum[3]));
        if (!of.ends) store_shared4(at, words);
      }
    } else if constexpr (kSplits > 1) {
#pragma unroll
      for (int k = 0; k < 64; k++) {
        sums[0][k] += before[0][k];
        before[0][k] = of.ends ? 0 : sums[0][k];
      }
    }
  }
  static FF_DEVICE void multiply(PrefillBlock<M, false>& b, u32 split, u32& slot, Sums& sums) {
    const u32 own = b.warp / 4 * kGroupTiles + b.warp % 4 * 2;  // of the block's tiles, this warp's first
    const auto add_run = [&](u32 run) {
      barrier_wait(b.shared + P::kFull + slot * 8, b.phases >> slot & 1, b.watch());
      const u32 at = b.shared + P::kRing + slot * kSlotBytes;
      u32 codes = at + kCodes + own * kRun * Unit::kBytes + b.lane * 16, scales = at + kScales + own * kRun * Unit::kScaleBytes + scale_row(b);
#pragma unroll 1
      for (u32 i = 0; i < run; i++) {
        add(sums, at + i * kXBytes, codes, scales);
        codes += Unit::kBytes;
        scales += Unit::kScaleBytes;
      }
      release(b, slot);
      advance(b, slot);
    };
    if constexpr (kRun > 1) {
      each_run(split, [](u32, u32) {}, [&](const PartUnits<S>&, u32, u32 run) { add_run(run); });
    } else {  // parts do not matter
#pragma unroll 1
      for (u32 left = split_begin(split + 1) - split_begin(split); left; left--) add_run(1);
    }
  }
  // Add the products of a unit. NOTE: they end in it. In the next turn of the loop around it operands might be moved to other registers, and those
  // that products still read be written. The other warpgroup's go on meanwhile.
  static FF_DEVICE void add(Sums& sums, u32 x, u32 codes, u32 scales) {
    float group[Unit::kGrouped ? 64 : 1];
    Unit units[kStacks];
#pragma unroll
    for (int i = 0; i < kStacks; i++) units[i].load(codes + i * 8 * kRun * Unit::kBytes, scales + i * 8 * kRun * Unit::kScaleBytes, kRun);
    Operands before;  // of the step before
#pragma unroll
    for (int step = 0; step < Unit::kSteps; step++) {
      const bool fresh = Unit::kGrouped && step % Unit::kGroupSteps == 0;
      Operands now;
#pragma unroll
      for (int i = 0; i < kStacks; i++) {
        if (fresh) units[i].begin(step / Unit::kGroupSteps);
#pragma unroll
        for (int term = 0; term < Unit::kTerms; term++) now.a[term][i] = units[i].operand(step, term);
      }
      warpgroup_fence();
#pragma unroll
      for (int term = 0; term < Unit::kTerms; term++)
#pragma unroll
        for (int i = 0; i < kStacks; i++) {
          float(&to)[64] = sum_of(sums[i], group);
          if (fresh && term == 0) warpgroup_mma<T, true>(to, now.a[term][i], x + step * 2 * kHalfBytes);
          else warpgroup_mma<T, false>(to, now.a[term][i], x + step * 2 * kHalfBytes);
        }
      warpgroup_commit();
      const bool ends = (step + 1) % Unit::kGroupSteps == 0;
      float scale[2];
#pragma unroll
      for (int h = 0; h < 2; h++) scale[h] = ends ? units[0].scale(h, step / Unit::kGroupSteps) : 0;
      if (ends) warpgroup_wait<0>();
      else warpgroup_wait<1>();
      before.keep();
      if (ends) now.keep();
      before = now;
      if constexpr (Unit::kGrouped) {
        if (ends) {
#pragma unroll
          for (int i = 0; i < 64; i++) sums[0][i] = fmaf(group[i], scale[i / 2 % 2], sums[0][i]);
        }
      }
    }
  }
  static FF_DEVICE float (&sum_of(float (&sum)[64], float (&group)[Unit::kGrouped ? 64 : 1]))[64] {
    if constexpr (Unit::kGrouped) return group;
    else return sum;
  }
  static FF_DEVICE u32 scale_row(const PrefillBlock<M, false>& b) {
    if constexpr (S::kCoded) return (b.lane >> 2) * S::Format::Scale::kBytes;
    else return 0;
  }

  // A piece's sums of all splits: blocks that share it write what they have, and each reads what it finishes. False: one has waited too long, and
  // all leave.
  static FF_DEVICE bool gather(PrefillBlock<M, false>& b, u32 layer, const Item& of, Sums& sums) {
    constexpr u32 kThreads = P::kWarps * 32;
    float4* const all = (float4*)b.p.splits + (u64)of.piece * kSplits * kTokenOctets * kThreads + b.thread();  // [split][octet][thread]
#pragma unroll
    for (u32 n = 0; n < kTokenOctets; n++) {
      const float* sum = sums[0] + 4 * n;
      if (n < of.octets && (n < of.first || n >= of.end)) all[(of.split * kTokenOctets + n) * kThreads] = four(sum);
    }
    if (!b.share(b.p.shared + layer * M::kLayerShares + S::kShares + of.piece, kSplits)) return false;
#pragma unroll
    for (u32 n = 0; n < kTokenOctets; n++) {
      if (n < of.first || n >= of.end) continue;
      float* sum = sums[0] + 4 * n;
      float4 part[kSplits], total = {};
#pragma unroll
      for (u32 i = 0; i < kSplits; i++) part[i] = i == of.split ? four(sum) : all[(i * kTokenOctets + n) * kThreads];
#pragma unroll
      for (u32 i = 0; i < kSplits; i++) {
        total.x += part[i].x;
        total.y += part[i].y;
        total.z += part[i].z;
        total.w += part[i].w;
      }
      sum[0] = total.x;
      sum[1] = total.y;
      sum[2] = total.z;
      sum[3] = total.w;
    }
    return true;
  }

  static FF_DEVICE float4 four(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }

  // 1 / root mean square of each token of the block's.
  static FF_DEVICE void norm_scales(const PrefillBlock<M, false>& b, u32 token, u32 moments) {
    if (b.thread() >= P::kTokens || token + b.thread() >= b.p.count) return;
    float total = 0;
#pragma unroll 16
    for (u32 part = 0; part < moments; part++) total += b.p.moments[part * b.p.room + token + b.thread()];
    store_shared_float(b.shared + P::kNormScales + b.thread() * 4, rsqrtf(total / M::kHidden + S::kEps));
  }

  // What becomes of the sums. Lane (g, t) has row g of its two tiles of a stack, of each eight tokens 2 t and 2 t + 1.
  static FF_DEVICE void finish(const PrefillBlock<M, false>& b, u32 layer, const Item& item, const Sums& sums) {
    const u32 g = b.lane >> 2, t = b.lane & 3, own = item.tile + b.warp / 4 * kGroupTiles + b.warp % 4 * 2;
    const float* vectors = b.p.model.vectors + (u64)layer * M::kLayerVectors;
    float factor[kStacks][2], bias[kStacks][2] = {}, gamma[kStacks][2] = {};
    u32 count[kStacks][2];  // of tokens: none of tiles that are not there
#pragma unroll
    for (int i = 0; i < kStacks; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 of = own + i * 8 + h, row = of * 8 + g;
        count[i][h] = of < S::kTiles ? b.p.count : 0;
        factor[i][h] = of < S::kTiles ? row_factor(b, layer, of, g) : 0;
        if constexpr (S::kBias >= 0) bias[i][h] = of < S::kTiles ? __ldg(vectors + S::kBias + row) : 0;
        if constexpr (S::kEpilogue == Epilogue::kResidual) gamma[i][h] = of < S::kTiles ? __ldg(vectors + S::kGamma + row) : 0;
      }
#pragma unroll
    for (u32 n = 0; n < kTokenOctets; n++) {
      if (n < item.first || n >= item.end) continue;
      u32 in_block = n * 8 + 2 * t;
      asm volatile("" : "+r"(in_block));  // or all places would be computed at once, and spill
      const u32 at = item.token + in_block;  // and the next token
      float2 scale = make_float2(1, 1);
      if constexpr (S::kNorm) {
        const uint2 both = load_shared2(b.shared + P::kNormScales + in_block * 4);
        scale = make_float2(__uint_as_float(both.x), __uint_as_float(both.y));
      }
#pragma unroll
      for (int i = 0; i < kStacks; i++) {
        float moment[2] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 of = own + i * 8 + h, row = of * 8 + g;
          const bool mine[2] = {at < count[i][h], at + 1 < count[i][h]};
          const float* sum = sums[i] + 4 * n + 2 * h;
          float y[2] = {fmaf(sum[0], factor[i][h] * scale.x, bias[i][h]), fmaf(sum[1], factor[i][h] * scale.y, bias[i][h])};
          if constexpr (S::kEpilogue == Epilogue::kStore) {
#pragma unroll
            for (int k = 0; k < 2; k++)
              if (mine[k]) b.p.qkv[(u64)(at + k) * M::kQkvWords + row] = y[k];
          } else if constexpr (S::kEpilogue == Epilogue::kSwiglu) {  // rows 0-3 are gates, 4-7 what they gate
#pragma unroll
            for (int k = 0; k < 2; k++) y[k] = __fdividef(y[k], 1.f + __expf(-y[k])) * __shfl_down_sync(kAllLanes, y[k], 16);
            put(b.p.inner, M::kInnerOctets, y, of * 4 + g, at, mine, g < 4);
          } else {
            static_assert(S::kEpilogue == Epilogue::kResidual, "there is no prefill of the head");
#pragma unroll
            for (int k = 0; k < 2; k++) {
              if (!mine[k]) continue;
              float& residual = b.p.residual[(u64)(at + k) * P::kResidualRow + row];
              residual = y[k] += residual;
              moment[k] = fmaf(y[k], y[k], moment[k]);
              y[k] *= gamma[i][h];
            }
            put(b.p.hidden, M::kHiddenOctets, y, row, at, mine, true);
          }
        }
        if constexpr (S::kEpilogue == Epilogue::kResidual) {
#pragma unroll
          for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int o = 16; o >= 4; o >>= 1) moment[k] += __shfl_xor_sync(kAllLanes, moment[k], o);
            if (g == 0) store_shared_float(moment_at(b, i, in_block + k, b.warp), moment[k]);
          }
        }
      }
    }
    if constexpr (S::kEpilogue == Epilogue::kResidual) {
      b.sync();
#pragma unroll
      for (int i = 0; i < kStacks; i++) {  // a thread's token of a stack of a warpgroup
        const u32 of = b.thread() % P::kTokens, group = b.thread() / P::kTokens, part = item.tile / 8 + group * kStacks + i;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < 4; w++) sum += load_shared_float(moment_at(b, i, of, group * 4 + w));
        const bool mine = of >= 8 * item.first && of < 8 * item.end && item.token + of < b.p.count;
        if (part < PrefillParts<S> && mine) b.p.moments[part * b.p.room + item.token + of] = sum;
      }
    }
  }
  static FF_DEVICE u32 moment_at(const PrefillBlock<M, false>& b, u32 stack, u32 token, u32 warp) {
    return b.shared + P::kMoments + ((stack * P::kTokens + token) * P::kWarps + warp) * 4;
  }
  // Two tokens' values of a row: lanes of neighbouring rows exchange one each, so that each has both rows' of a token.
  static FF_DEVICE void put(u32* to, u32 octets, const float (&y)[2], u32 row, u32 token, const bool (&mine)[2], bool valid) {
    const bool odd = row & 1;
    const float other = __shfl_xor_sync(kAllLanes, odd ? y[0] : y[1], 4);
    if (!valid || !(odd ? mine[1] : mine[0])) return;
    to[PrefillBlock<M, false>::pair(row & ~1u, token + odd, octets)] = odd ? T::pack(other, y[1]) : T::pack(y[0], other);
  }
  // What the sums of a row are multiplied by.
  static FF_DEVICE float row_factor(const PrefillBlock<M, false>& b, u32 layer, u32 tile, u32 row) {
    if constexpr (!Unit::kRowScaled) {
      return Unit::kFactor;
    } else {
      using Scale = typename S::Format::Scale;
      constexpr int kLastUnits = S::kWarpsColumns * part_size(S::kFragments, S::kParts, S::kParts - 1);
      // NOTE: divisors are behind all scales of the last part.
      const u8* at = b.p.model.tape + place(b, layer, tile, S::kParts - 1, 1) + kLastUnits * Unit::kScaleBytes;
      if constexpr (Scale::kDivided) {
        const float divisor = ((const float*)at)[row];
        return Unit::kFactor / (divisor == 0 ? 1.f : divisor);  // NOTE: rows of padding have none; theirs are zeros
      } else {
        typename Scale::Raw raw;
        if constexpr (Scale::kBytes == 1) raw = at[row];
        else if constexpr (Scale::kBytes == 2) raw = ((const u16*)at)[row];
        else raw = ((const u32*)at)[row];
        return Unit::kFactor * Scale::value(raw);
      }
    }
  }
};

template <class M, class S>
struct LinearPrefill {
  // x: vectors of all tokens, of so many octets. moments: in how many parts their sums of squares are.
  template <class B>
  static FF_DEVICE void run(B& b, u32 layer, const u32* x, u32 octets, u32 moments) {
    if constexpr (!PrefillUnit<M, S>::kGrouped && S::kSplits == 1) {
      // Two stacks take less than twice the time of one, if they leave nobody without work.
      const u32 one = turns<StackedPrefill<M, S, 1>>(b), two = turns<StackedPrefill<M, S, 2>>(b);
      if (two * 3 <= one * 2) {
        StackedPrefill<M, S, 2>::run(b, layer, x, octets, moments);
        return;
      }
    }
    StackedPrefill<M, S, 1>::run(b, layer, x, octets, moments);
  }

 private:
  // How often a block of threads multiplies.
  template <class Stacked, class B>
  static FF_DEVICE u32 turns(const B& b) {
    return ceil_div(ceil_div(b.p.count, (u32)Prefill<M>::kTokens) * Stacked::kBlocks, gridDim.x);
  }
};
