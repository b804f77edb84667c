// RMSNorm: x / sqrt(mean(x^2) + eps) * gamma. Every worker norms the whole vector for itself, which costs less than a barrier.
#pragma once
#include <cmath>

#include "prelude.h"

// 1 / rms of x[0, n); x is zero up to a whole line.
inline float rms_scale(const float* x, int n, float eps) {
  Vec squares{};
  for (int i = 0; i < n; i += kLanes) squares += load(x + i) * load(x + i);
  return 1.0f / std::sqrt(sum(squares) / float(n) + eps);
}

// to = rmsnorm(x) in `lines` whole lines: zero from n on, as x and gamma are.
inline void rmsnorm(float* to, const float* x, const float* gamma, int n, int lines, float eps) {
  const Vec scale = splat(rms_scale(x, n, eps));
  for (int i = 0; i < lines * kLine; i += kLanes) store(to + i, load(x + i) * scale * load(gamma + i));
}
