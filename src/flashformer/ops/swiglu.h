// silu(gate) * up, the gated activation of the MLP.
#pragma once
#include "prelude.h"

inline float swiglu(float gate, float up) {
  // NOTE: the division comes last, so that a NaN or an infinity of the gate is handed on.
  return gate * up / (1.0f + exp2_fast(-kLog2E * gate));
}
