// A linear stage: y = W x, and what is folded into it (RMSNorm before; bias, SwiGLU, residual, logits and argmax after).
//
// A tile is kTileRows rows: a line (32 columns) of each of them, then the next line of each. The worker reads its tiles
// straight ahead.
#pragma once
#include "rmsnorm.h"
#include "swiglu.h"
#include "worker.h"

enum class Epilogue { kStore, kSwiglu, kResidual, kLogits };

// sums = tile * x, for rows of `lines` lines.
template <class V>
inline void multiply_tile(float* sums, const u16* tile, const float* x, int lines) {
  Vec rows[kTileRows] = {};
  for (int line = 0; line < lines; line++) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; r++) prefetch(tile + r * kLine + kPrefetchBytes / 2);
#pragma GCC unroll 4
    for (int i = 0; i < kHalf; i += kLanes) {
      const Vec x0 = load(x + i), x1 = load(x + kHalf + i);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; r++) {
        Vec first, second;
        V::load(tile + r * kLine, i, first, second);
        rows[r] += first * x0;
        rows[r] += second * x1;
      }
    }
    tile += kTileRows * kLine;
    x += kLine;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; r++) sums[r] = sum(rows[r]);
}

template <class M, class S>
struct Linear {
  using Stage = S;

  static void run(Worker<M>& w, u32 layer) {
    const float* x = w.values(S::kInput);
    const float* vectors = w.layer_vectors(layer);
    if (S::kNorm) {
      rmsnorm(w.scratch(), x, vectors + S::kGamma, S::kColumns, S::kLines, S::kEps);
      x = w.scratch();
    }
    const Range own = w.range(S::kRange + layer * M::kLayerRanges);
    for (u32 tile = own.first; tile < own.first + own.count; tile++) {
      float sums[kTileRows];
      multiply_tile<typename M::Value>(sums, w.next_tile(S::kLines), x, S::kLines);
      if (S::kBias >= 0)
        for (int r = 0; r < kTileRows; r++) sums[r] += vectors[S::kBias + tile * kTileRows + r];
      finish(w, tile, sums);
    }
    if (S::kEpilogue == Epilogue::kLogits) w.publish_candidate();
  }

 private:
  static void finish(Worker<M>& w, u32 tile, const float* sums) {
    if constexpr (S::kEpilogue == Epilogue::kLogits) {
      for (u32 r = 0, row = tile * kTileRows; r < kTileRows && row < M::kVocab; r++, row++) w.logit(row, sums[r]);
    } else {
      constexpr int kOut = S::kEpilogue == Epilogue::kSwiglu ? kTileRows / 2 : kTileRows;  // half the rows are gates
      float* to = w.values(S::kOutput) + tile * kOut;
      for (int r = 0; r < kOut; r++) {
        if (S::kEpilogue == Epilogue::kStore) to[r] = sums[r];
        if (S::kEpilogue == Epilogue::kSwiglu) to[r] = swiglu(sums[r], sums[r + kTileRows / 2]);
        if (S::kEpilogue == Epilogue::kResidual) to[r] += sums[r];
      }
    }
  }
};
