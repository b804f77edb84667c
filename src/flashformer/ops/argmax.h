// The greedy token: the largest logit, the lowest id among equals. Every worker compares all workers' candidates for itself.
#pragma once
#include "worker.h"

template <class M>
struct Argmax {
  static u32 run(const Worker<M>& w) {
    Candidate best = w.candidate(0);
    for (u32 other = 1; other < M::kWorkers; other++) {
      const Candidate c = w.candidate(other);
      if (c.logit > best.logit) best = c;  // workers own ascending rows
    }
    return best.token;
  }
};
