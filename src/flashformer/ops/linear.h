// A linear stage: y = W x, and what is folded into it (RMSNorm before; bias, SwiGLU, residual, logits and the best of them after).
//
// S::Format says what a tile holds (formats.h). The worker reads its tiles straight ahead.
#pragma once
#include "formats.h"
#include "rmsnorm.h"
#include "swiglu.h"
#include "worker.h"

enum class Epilogue { kStore, kSwiglu, kResidual, kLogits };

template <class M, class S>
struct Linear {
  using Stage = S;
  using F = typename S::Format;

  static void run(Worker<M>& w, u32 layer) {
    constexpr int kColumns = S::kLines * kLine;
    const float* x = w.values(S::kInput);
    const float* vectors = w.layer_vectors(layer);
    if (S::kNorm) {
      rmsnorm(w.scratch(), x, vectors + S::kGamma, S::kColumns, S::kLines, S::kEps);
      x = w.scratch();
    }
    float* x_sums = w.scratch() + kColumns;
    F::sum_x(x_sums, x, kColumns);
    const Range own = w.range(S::kRange + layer * M::kLayerRanges);
    for (u32 tile = own.first; tile < own.first + own.count; tile++) {
      float sums[kTileRows];
      F::multiply(sums, w.next_tile(F::tile_bytes(kColumns)), x, x_sums, kColumns);
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
