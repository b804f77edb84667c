// Weights as A operands of warpgroups: a fragment of plain values, or a slice of codes, of two tiles.
//
// Codes become values of the model's type, as for several columns (codes_columns.cuh); what scales groups of columns is applied to their sums.
#pragma once
#include "codes_columns.cuh"

// What a lane makes operands of: a row of each of its two tiles.
template <class M, class S, bool kCoded = S::kCoded>
struct PrefillUnit {  // plain weights: a fragment
  static constexpr bool kGrouped = false, kRowScaled = false;  // whether groups of columns have scales; whole rows, or divisors
  static constexpr int kBytes = 512, kScaleBytes = 0, kTerms = 1, kSteps = 2, kGroupSteps = kSteps;
  static constexpr float kFactor = 1;
  uint4 w[2];

  // Of the second tile codes and scales are `apart` units further.
  FF_DEVICE void load(u32 codes, u32, u32 apart) {
    w[0] = load_shared4(codes);
    w[1] = load_shared4(codes + apart * kBytes);
  }
  FF_DEVICE void begin(int) {}
  FF_DEVICE float scale(int, int) const { return 1; }
  // A operand of a step of 16 columns.
  FF_DEVICE uint4 operand(int step, int) const {
    return step ? make_uint4(w[0].y, w[1].y, w[0].w, w[1].w) : make_uint4(w[0].x, w[1].x, w[0].z, w[1].z);
  }
};
template <class M, class S>
struct PrefillUnit<M, S, true> {  // codes: a slice
  using T = typename M::Value;
  using F = typename S::Format;
  using Scale = typename F::Scale;
  using Values = CodeValues<T, F>;
  using Place = ScalePlace<S, 1, false>;
  static constexpr bool kGrouped = F::kGroup != 0, kRowScaled = !kGrouped || Scale::kDivided, kZeros = F::kOffset == Offset::kZero;
  static_assert(F::kOffset == Offset::kNone || (kZeros && kGrouped), "these have no prefill");
  static constexpr int kBytes = Place::kSliceBytes, kScaleBytes = Place::kSliceStep, kTerms = Values::kTerms, kSteps = 8;
  static constexpr int kGroupSteps = kGrouped ? F::kGroup / 16 : kSteps;
  static constexpr float kFactor = Values::kFactor;
  static constexpr int kLoads = F::Code::kBits / 4;
  uint4 raw[2][kLoads];
  u32 scales, next_scales;  // of the rows
  u32 zero[2] = {};  // minus that, twice, of the rows in the present group

  FF_DEVICE void load(u32 codes, u32 at, u32 apart) {
    scales = at;
    next_scales = at + apart * kScaleBytes;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int k = 0; k < kLoads; k++) raw[h][k] = load_shared4(codes + h * apart * kBytes + k * 512);
  }
  FF_DEVICE u32 scale_at(int h, int group) const { return (h ? next_scales : scales) + group * Place::kGroupBytes; }
  FF_DEVICE float scale(int h, int group) const {
    if constexpr (kGrouped) return Scale::value(Scale::load(scale_at(h, group)));
    else return 1;
  }
  // Before the operands of a group of columns. NOTE: zeros are integers, and so small that T holds every difference.
  FF_DEVICE void begin(int group) {
    if constexpr (kZeros) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float value = -Scale::value(Scale::load(scale_at(h, group) + Place::kRowsBytes));
        zero[h] = T::pack(value, value);
      }
    }
  }
  FF_DEVICE uint4 operand(int step, int term) const {
    uint4 v[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint4 all = Values::operand(raw[h], step / 2, term);
      v[h].x = less_zero(step % 2 ? all.y : all.x, h);
      v[h].z = less_zero(step % 2 ? all.w : all.z, h);
    }
    return make_uint4(v[0].x, v[1].x, v[0].z, v[1].z);
  }

 private:
  FF_DEVICE u32 less_zero(u32 pair, int h) const {
    if constexpr (kZeros) return fma_pairs<T>(pair, power_pair<T>(0), zero[h]);
    else return pair;
  }
};

