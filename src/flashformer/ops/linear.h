// A linear stage: y = W x, and what is folded into it (RMSNorm before; bias, SwiGLU, residual, logits and the best of them after).
//
// S::Format says what a tile holds (formats.h). The worker reads its tiles straight ahead, once for all columns.
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
  static constexpr int kColumns = S::kLines * kLine;  // of the matrix
  static constexpr bool kHead = S::kEpilogue == Epilogue::kLogits;

  static void run(Worker<M>& w, u32 layer) {
    const float *x[M::kColumns], *x_sums[M::kColumns];
    const float* vectors = w.layer_vectors(layer);
    const u32 count = kHead ? w.pass().scored_count : w.pass().count;
    for (u32 i = 0; i < count; i++) {
      x[i] = w.values(column(w, i), S::kInput);
      if (S::kNorm) {
        rmsnorm(w.scratch(i), x[i], vectors + S::kGamma, S::kColumns, S::kLines, S::kEps);
        x[i] = w.scratch(i);
      }
      F::sum_x(w.scratch(i) + kColumns, x[i], kColumns);
      x_sums[i] = w.scratch(i) + kColumns;
    }
    const Range own = w.range(S::kRange + layer * M::kLayerRanges);
    for (u32 tile = own.first; tile < own.first + own.count; tile++) {
      const u8* from = w.next_tile(F::tile_bytes(kColumns));
      u32 i = 0;
      if constexpr (kTogether >= 4 && M::kColumns >= 4)
        for (; i + 4 <= count; i += 4) multiply<4>(w, vectors, tile, from, i, x, x_sums);
      if constexpr (M::kColumns >= 2)
        for (; i + 2 <= count; i += 2) multiply<2>(w, vectors, tile, from, i, x, x_sums);
      for (; i < count; i++) multiply<1>(w, vectors, tile, from, i, x, x_sums);
    }
    if (kHead)
      for (u32 i = 0; i < count; i++) w.publish_candidate(i);
  }

 private:
  static u32 column(const Worker<M>& w, u32 i) { return kHead ? w.pass().scored[i] : i; }

  // A tile times kCount columns from number i on.
  template <int kCount>
  static inline void multiply(
      Worker<M>& w, const float* vectors, u32 tile, const u8* from, u32 i, const float* const* x, const float* const* x_sums) {
    float sums[kCount][kTileRows];
    F::template multiply<kCount>(sums, from, x + i, x_sums + i, kColumns);
    for (int k = 0; k < kCount; k++) {
      if (S::kBias >= 0)
        for (int r = 0; r < kTileRows; r++) sums[k][r] += vectors[S::kBias + tile * kTileRows + r];
      finish(w, i + k, tile, sums[k]);
    }
  }

  static void finish(Worker<M>& w, u32 i, u32 tile, const float* sums) {
    if constexpr (kHead) {
      const Column& column = w.scored(i);
      for (u32 r = 0, row = tile * kTileRows; r < kTileRows && row < M::kVocab; r++, row++) w.logit(i, column, row, sums[r]);
    } else {
      constexpr int kOut = S::kEpilogue == Epilogue::kSwiglu ? kTileRows / 2 : kTileRows;  // half the rows are gates
      float* to = w.values(i, S::kOutput) + tile * kOut;
      for (int r = 0; r < kOut; r++) {
        if (S::kEpilogue == Epilogue::kStore) to[r] = sums[r];
        if (S::kEpilogue == Epilogue::kSwiglu) to[r] = swiglu(sums[r], sums[r + kTileRows / 2]);
        if (S::kEpilogue == Epilogue::kResidual) to[r] += sums[r];
      }
    }
  }
};
