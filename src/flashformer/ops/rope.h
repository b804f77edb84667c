// Rotary embedding of one head: the pair (x[i], x[i + half]) is turned by the angle of its frequency and position.
#pragma once
#include "prelude.h"

// `turns` is (cos, sin) for each i < head_dim / 2.
inline void rope(float* head, const float* turns, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i++) {
    const float c = turns[2 * i], s = turns[2 * i + 1], a = head[i], b = head[i + half];
    head[i] = a * c - b * s;
    head[i + half] = b * c + a * s;
  }
}
