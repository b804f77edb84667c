// The end of a pass of several columns: what sample.cuh does for one token, for each column. Each finisher looks after some columns, from
// the candidates of all blocks to the choice; where tokens are selected or reported, the rounds of all columns go on at the same time.
//
// No column's token depends on another column, but for drafts: they count as seen for the columns behind them, and what is behind a wrong
// one does not count.
#pragma once
#include "columns.cuh"
#include "sample.cuh"

// Where a column keeps what is to be looked at closer, in the place of `Sampling::raw` and `scores`.
template <class M>
struct ColumnLogits {
  static constexpr u64 kRows = round_up(M::kVocab, 8u);  // several are read at once

  static FF_DEVICE float* raw(const Params& p, u32 c) { return p.column_raw + c * kRows; }
  static FF_DEVICE float* scores(const Params& p, u32 c) { return p.column_scores + c * kRows * 2; }
};

// What a token's logits count in the columns that are not chosen greedily.
// NOTE: a loop, so that the code is there once.
template <class M>
FF_DEVICE void weigh_columns(const Finisher<M>& f, u32 token, float (&logits)[M::kColumnGroups]) {
#pragma unroll 1
  for (u32 j = 0; j < M::kColumnGroups; j++) {
    const u32 c = (f.lane & 3) + 4 * j;
    if (c >= f.columns()) return;
    const Column column = f.column(c);
    const ColumnMore more = f.column_more(c);
    const Sampling& s = f.p.sequences[column.sequence].sampling;
    if (!(more.flags & kMakes) || !s.flags) continue;
    u32 seen = 0;
    if (s.flags & kPenalised) {
      seen = s.seen[token];
      for (u32 k = 0; k < more.drafts; k++) seen += f.column(c - k).token == token;
    }
    float x = logits[0];
#pragma unroll
    for (u32 i = 1; i < M::kColumnGroups; i++) x = i == j ? logits[i] : x;
    x = weigh(s, ColumnLogits<M>::raw(f.p, c), ColumnLogits<M>::scores(f.p, c), x, token, seen, column.position + 1).score;
#pragma unroll
    for (u32 i = 0; i < M::kColumnGroups; i++) logits[i] = i == j ? x : logits[i];
  }
}

// One token's logits in a lane's columns; a lane's tokens come ascending.
template <class M>
FF_DEVICE void take_column_logits(Finisher<M>& f, u32 token, const float (&logits)[M::kColumnGroups]) {
  float counted[M::kColumnGroups];
#pragma unroll
  for (int j = 0; j < M::kColumnGroups; j++) counted[j] = logits[j];
  if (f.pass_flags() & kAnySampling) weigh_columns(f, token, counted);
#pragma unroll
  for (int j = 0; j < M::kColumnGroups; j++) {
    if (counted[j] > f.column_best[j]) f.column_row[j] = token;
    f.column_best[j] = max_nan(f.column_best[j], counted[j]);
  }
}

template <class M, class S>
struct SampleColumns {
  using L = Layout<M>;
  using At = Rounds<M, S, 1>;

  static FF_DEVICE void run(Producer<M>&, u32) {}
  static FF_DEVICE void run(Consumer<M>& c, u32 step) { Sample<M, S>::run(c, step); }
  static FF_DEVICE void run(Finisher<M>& f, u32 step) {
    f.enter(S::kWhere, 0);
    // What the host says takes a while to come.
    const bool cancel = blockIdx.x == 0 && f.index == 0 && f.lane < f.p.sequence_count && load_volatile(f.p.sequences[f.lane].cancel);
    const bool sampling = f.pass_flags() & kAnySampling;
    const u32 choosing = columns_with(f, 0), closer = sampling ? columns_with(f, kSelected | kReported) : 0;
    best_of_columns(f);
    // NOTE: from here on this block's consumers are at rest, and the shared memory of the reductions is free.
    barrier_wait(f.shared + L::kDone, step & 1, f.watch);
    f.sync();
    // NOTE: the first column is exchanged in any case: all blocks must be done with this pass before it ends.
    const u32 mine = columns_of(f), by_score = choosing & ~closer & mine, exchanged = by_score | (1 & mine);
    publish(f, step, exchanged, __ballot_sync(kAllLanes, cancel));
    Looks<M> looks(f.looks_place(S::kWhere));
    if (closer & mine) look_closer(f, step, closer & mine);
    const u32 cancelled = exchanged ? choose(f, looks, step, exchanged, by_score) : 0;
    fence_device();  // what others wrote before they published is visible from here on: the KV cache
    fence_copy_engine();
    f.sync();
    if (f.index == 0) Schedule<M>::take(f);
    if (sampling) {
      if (f.index == 0) count_seen(f);
      f.sync();
      report(f, step);
      f.sync();
    }
    if (f.index == 0) {
      const bool more = Schedule<M>::advance(f, step + 1, cancelled);
      const bool last = !more || step + 1 == f.p.steps || load_volatile(f.p.status) != 0;
      if (f.lane == 0) store_shared_release(f.shared + L::kStep, (step + 1) << 1 | (last ? 1 : 0));
    }
    f.sync();
  }

 private:
  static constexpr u32 kColumns = M::kColumns;

  // Columns as bits: those that a finisher looks after,
  static FF_DEVICE u32 columns_of(const Finisher<M>& f) {
    return __ballot_sync(kAllLanes, f.lane < kColumns && f.lane % M::kFinishers == f.index);
  }
  // and those that make tokens by a sampling with one of these flags, or any.
  static FF_DEVICE u32 columns_with(const Finisher<M>& f, u32 flags) {
    bool makes = f.lane < f.columns() && f.column_more(f.lane).flags & kMakes;
    if (makes && flags) makes = f.p.sequences[f.column(f.lane).sequence].sampling.flags & flags;
    return __ballot_sync(kAllLanes, makes);
  }
  static FF_DEVICE u32 chosen_place(const Finisher<M>& f, u32 c) { return f.shared + L::kChosen + c * 8; }
  static FF_DEVICE Meeting meeting(const Finisher<M>& f, u32 c) {
    return {f.words(S::kRounds) + c * S::kRoundsStride, f.words(S::kLists) + c * S::kListsStride,
            f.shared + At::kSoftmax + (int)c * 8};
  }
  static FF_DEVICE Sampling sampling(const Finisher<M>& f, u32 c) {
    Sampling s = f.p.sequences[f.column(c).sequence].sampling;
    s.raw = ColumnLogits<M>::raw(f.p, c);
    s.scores = ColumnLogits<M>::scores(f.p, c);
    return s;
  }

  static FF_DEVICE u32 choice_of(u64 candidate) { return ::choice_of<M>(logit_of((u32)(candidate >> 32)), (u32)candidate).token; }

  // Candidates as `ranked`: of each finisher, in shared memory.
  static FF_DEVICE u32 best_place(const Finisher<M>& f, u32 finisher, u32 c) { return f.shared + L::kBest + (finisher * kColumns + c) * 8; }
  static FF_DEVICE u64 best_of_block(const Finisher<M>& f, u32 c) {
    u64 best = kNothing;
#pragma unroll
    for (int i = 0; i < M::kFinishers; i++) {
      const uint2 v = load_shared2(best_place(f, i, c));
      best = min(best, join(v.x, v.y));
    }
    return best;
  }
  static FF_DEVICE void best_of_columns(const Finisher<M>& f) {
#pragma unroll
    for (int j = 0; j < M::kColumnGroups; j++) {
      u64 candidate = ranked(f.column_best[j], f.column_row[j]);
#pragma unroll
      for (int o = 16; o >= 4; o >>= 1) candidate = min(candidate, __shfl_xor_sync(kAllLanes, candidate, o));
      const u32 c = f.lane + 4 * j;
      if (f.lane < 4 && c < kColumns) {
        store_shared(best_place(f, f.index, c), (u32)candidate);
        store_shared(best_place(f, f.index, c) + 4, (u32)(candidate >> 32));
      }
    }
  }

  // Where blocks tell each other their candidates, [columns][blocks] pairs of words, and the first block what it knows: one pair more.
  // NOTE: two copies by parity: a block without work in the head may already be one pass ahead of a slow reader.
  static FF_DEVICE u64* words(const Finisher<M>& f, u32 epoch) {
    return f.words(S::kOutput) + (epoch & 1) * 2 * (kColumns * M::kWorkers + 1);
  }
  static constexpr u32 kNews = 2 * kColumns * M::kWorkers;

  // This block's candidates for some columns, and which sequences are cancelled, which the first block's first finisher was told.
  static FF_DEVICE void publish(const Finisher<M>& f, u32 step, u32 columns, u32 cancelled) {
    const u32 epoch = epoch_of(f, step);
    u64* to = words(f, epoch);
    if (columns >> f.lane & 1) {
      const u64 best = best_of_block(f, f.lane);
      store_words(to + 2 * (f.lane * M::kWorkers + blockIdx.x), (u32)best, (u32)(best >> 32), epoch);
    }
    if (blockIdx.x == 0 && f.index == 0 && f.lane == 0) store_words(to + kNews, cancelled, 0, epoch);
    __syncwarp();
  }

  // Wait for all blocks' candidates for some of this finisher's columns, and choose the best where the score decides (`by_score`). For the
  // first finisher: the cancelled sequences.
  static FF_DEVICE u32 choose(const Finisher<M>& f, Looks<M>& looks, u32 step, u32 columns, u32 by_score) {
    constexpr int kEach = ceil_div((int)M::kWorkers, 32), kTogether = 2;  // words a lane has of a column, and columns at once
    const u32 epoch = epoch_of(f, step);
    const u64* const all_words = words(f, epoch);
#pragma unroll 1
    for (u32 first = f.index; first < kColumns; first += kTogether * M::kFinishers) {
      u64 w[kTogether][kEach][2];
#pragma unroll
      for (int i = 0; i < kTogether * kEach; i++) w[i / kEach][i % kEach][0] = w[i / kEach][i % kEach][1] = join(~0u, epoch);
      bool here;
      do {
        if (!looks.again(f.watch)) return 0;
        here = true;
#pragma unroll
        for (int k = 0; k < kTogether; k++)
#pragma unroll
          for (int i = 0; i < kEach; i++) {
            const u32 c = first + k * M::kFinishers;
            const u64* from = all_words + 2 * (first * M::kWorkers + f.lane) + 2 * (k * M::kFinishers * (int)M::kWorkers + i * 32);
            if (c < kColumns && columns >> c & 1 && f.lane + i * 32 < M::kWorkers) load_words(from, w[k][i][0], w[k][i][1]);
          }
#pragma unroll
        for (int k = 0; k < kTogether; k++)
#pragma unroll
          for (int i = 0; i < kEach; i++) here = here && split(w[k][i][0]).tag == epoch && split(w[k][i][1]).tag == epoch;
      } while (!looks.found(here, f.lane));
#pragma unroll
      for (int k = 0; k < kTogether; k++) {
        u64 all = kNothing;
#pragma unroll
        for (int i = 0; i < kEach; i++) all = min(all, join(split(w[k][i][0]).value, split(w[k][i][1]).value));
        all = warp_min(all);
        const u32 c = first + k * M::kFinishers;
        if (f.lane == 0 && c < kColumns && by_score >> c & 1) store_shared(chosen_place(f, c), choice_of(all));
      }
    }
    if (f.index != 0) return 0;
    u64 a, b;
    do {
      if (!looks.again(f.watch)) return 0;
      load_words(all_words + kNews, a, b);
    } while (!looks.found(split(a).tag == epoch && split(b).tag == epoch, f.lane));
    return split(a).value;
  }

  // The choices of those of this finisher's columns whose tokens are selected or reported.
  static FF_DEVICE void look_closer(Finisher<M>& f, u32 step, u32 columns) {
#pragma unroll 1
    for (u32 round = 0; columns; round++) {
      Looks<M> looks(f.looks_place(S::kWhere));
#pragma unroll 1
      for (u32 left = columns; left; left &= left - 1) {
        const u32 c = __ffs(left) - 1;
        f.enter(S::kWhere, 0);  // or addresses would be kept from column to column, in registers
        const Meeting at = meeting(f, c);
        Part part = Part::nothing(true);
        if (round > 0) part = At::hear(f, looks, at, step, round - 1);
        const Sampling s = sampling(f, c);
        if (round == 0) {
          part = Decision<M, S, 1>::opening(f, s, best_of_block(f, c), 0, [](u32, float) {});
        } else {
          // NOTE: at first it has nothing to load, but what is set on some ways only takes registers on all.
          Decision<M, S, 1> decision = Decision<M, S, 1>::load(state_place(f, c));
          if (round == 1 && s.flags & kReported) {
            Report<M, S, 1>::note(f, at, part);
            Report<M, S, 1>::begin(f, s, at, step);
          }
          if (decision.learn(f, s, round - 1, part)) {
            if (f.lane == 0) store_shared(chosen_place(f, c), choice_of(decision.all.candidate));
            columns &= ~(1u << c);
            continue;
          }
          __syncwarp();  // all have loaded it
          if (f.lane == 0) decision.store(state_place(f, c));
          part = decision.selection.template tally<At>(f, s);
        }
        At::tell(f, s, at, step, round, part);
      }
    }
  }
  static FF_DEVICE u32 state_place(const Finisher<M>& f, u32 c) { return f.shared + At::kEnd + c * Decision<M, S, 1>::kStateBytes; }

  // What there is to do with the tokens that were made: use(column, sampling, token, its number).
  template <class Use>
  static FF_DEVICE void each_made(const Finisher<M>& f, u32 columns, Use use) {
#pragma unroll 1
    for (u32 left = columns; left; left &= left - 1) {
      const u32 c = __ffs(left) - 1;
      const uint2 chosen = load_shared2(chosen_place(f, c));
      if (chosen.y != Schedule<M>::kNotMade && chosen.x < M::kVocab) use(c, sampling(f, c), chosen.x, chosen.y);
    }
  }
  // NOTE: a token's row belongs to one block, which alone reads and writes how often the token was seen.
  static FF_DEVICE void count_seen(const Finisher<M>& f) {
    each_made(f, columns_with(f, kPenalised), [&](u32, const Sampling& s, u32 token, u32) {
      if (f.lane == 0 && owns(f, token)) s.seen[token]++;
    });
  }
  static FF_DEVICE void report(const Finisher<M>& f, u32 step) {
    each_made(f, columns_with(f, kReported) & columns_of(f), [&](u32 c, const Sampling& s, u32 token, u32 number) {
      using R = Report<M, S, 1>;
      R::send(f, s, meeting(f, c), number, token, owns(f, token));
      if (blockIdx.x != 0) return;
      u64* const alternatives = s.report + (u64)number * kReportWords + 2;
      R::sort(f, s, R::gather(f, s, meeting(f, c), step), [&](u32 at, u64 entry) { store_host(alternatives + at, entry); });
    });
  }
  static_assert(At::kEnd + M::kColumns * Decision<M, S, 1>::kStateBytes <= L::kResidual, "too little shared memory");
};
