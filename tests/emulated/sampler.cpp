// Some tokens of all blocks' finishers, from given logits to the choices: the token stage of the CUDA kernel as it stands.
#include "sample_columns.cuh"

struct Model {
  static constexpr u32 kWorkers = WORKERS, kVocab = VOCAB;
  static constexpr int kFinishers = FINISHERS, kFreeBytes = FREE_BYTES, kHeadTiles = 0;
  static constexpr int kColumns = COLUMNS, kColumnGroups = (COLUMNS + 3) / 4;
};
struct Stage {
  static constexpr u32 kWhere = 0, kRoundTags = ROUND_TAGS;
  static constexpr int kPartWords = PART_WORDS, kRoundsStride = 4 * PART_WORDS * WORKERS, kListsStride = LIST_WORDS;
  static constexpr int kOutput = 0, kRounds = 4 * WORKERS * COLUMNS + 4, kLists = kRounds + COLUMNS * kRoundsStride;
  static constexpr int kShortlists = kLists + COLUMNS * kListsStride;
  static constexpr u32 kShortlist = SHORTLIST;
  static constexpr int kEarly = kShortlists + WORKERS * 2 * 4 * SHORTLIST, kWords = kEarly + WORKERS * 2 * FINISHERS;
};
constexpr float kNan = __builtin_nanf("");
constexpr u32 kNap = 400 * WORKERS;  // turns
constexpr u32 kTileCount = (VOCAB + 7) / 8, kThreads = FINISHERS * 32;

static Finisher<Model> finisher(const Params& p) {
  Finisher<Model> f{{p, 0, thread->lane, {}}};
  f.index = thread->warp;
  return f;
}

// finish() of every thread. Blocks take turns in an order drawn from `order`, and often one sleeps while the others go as far as they can;
// between turns, meanwhile(). The number of rounds of all tokens; -1: it did not end.
template <class Finish, class Meanwhile>
static int play(u32 order, Finish finish, Meanwhile meanwhile) {
  std::vector<BlockMemory> blocks(WORKERS);
  std::vector<Thread> threads(WORKERS * kThreads);
  for (u32 i = 0; i < threads.size(); i++) {
    Thread& t = threads[i];
    t.block = i / kThreads, t.warp = i % kThreads / 32, t.lane = i % 32;
    t.memory = &blocks[t.block];
    t.run = finish;
    if (i % kThreads == 0) {
      const u32 first = kTileCount * t.block / WORKERS, tiles = first << 12 | (kTileCount * (t.block + 1) / WORKERS - first);
      t.memory->shared.resize(Layout<Model>::kBytes);
      std::memcpy(t.memory->shared.data() + Layout<Model>::kTiles, &tiles, 4);
    }
    prepare(t);
  }
  u32 running = threads.size(), asleep = WORKERS;
  rounds = 0;
  for (u32 turn = 0; running && turn < 10'000'000; turn++) {
    order = order * 1664525 + 1013904223;
    const u32 block = (order >> 16) % WORKERS;
    if (turn % kNap == 0) asleep = (order >> 8) % (2 * WORKERS);
    if (block == asleep) continue;
    for (u32 i = block * kThreads; i < (block + 1) * kThreads; i++) {
      if (threads[i].done) continue;
      go_on(threads[i]);
      running -= threads[i].done;
    }
    meanwhile();
  }
  return running == 0 ? int(rounds) : -1;
}

static Params params(std::vector<u64>& exchange, u32 steps) {
  static u32 status[2];
  Params p{};
  exchange.assign(Stage::kWords, 0);
  p.exchange = exchange.data();
  p.status = status;
  p.steps = steps;
  p.epoch = p.run = 1;
  return p;
}

#if COLUMNS == 1

// logits [steps - forced_count + 1][VOCAB]; `tokens` get (token, run).
extern "C" int emulate(const Sampling* sampling, const float* logits, u32 steps, u32 forced_count, u32 position, u64* tokens, u32 order) {
  std::vector<u64> exchange;
  std::vector<u32> forced(forced_count, 0);
  u32 cancel = 0;
  Params p = params(exchange, steps);
  p.sampling = *sampling;
  p.forced = forced.data();
  p.tokens = tokens;
  p.cancel = &cancel;
  p.start = position;
  p.forced_count = forced_count;
  const auto finish = [&] {
    Finisher<Model> f = finisher(p);
    const uint2 tiles = f.tiles(0);
    for (u32 step = 0; step < steps; step++) {
      f.forget();
      if (step + 1 >= forced_count)
        for (u32 tile = f.index;; tile += FINISHERS) {
          Early<Model, Stage>::turn(f, step, tile, tiles.y);
          if (tile >= tiles.y) break;
          const u32 row = (tiles.x + tile) * 8 + f.lane;
          if (f.lane < 8 && row < VOCAB) take_logit(f, step, row, logits[(step + 1 - forced_count) * VOCAB + row]);
        }
      __syncwarp();
      Sample<Model, Stage>::run(f, step);
      if (load_shared(Layout<Model>::kStep) & 1) return;
    }
  };
  return play(order, finish, [] {});
}

#else

// logits: of each sequence [tokens that it may be fed][VOCAB]. The host cancels sequence i when it has seen `cancel_after[i]` tokens of it.
extern "C" int emulate(const Sequence* sequences, u32 count, const float* const* logits, u32 steps, const u32* cancel_after, u32 order) {
  constexpr u64 kRows = kTileCount * 8;
  std::vector<u64> exchange;
  std::vector<float4> raw(COLUMNS * kRows / 4, float4{kNan, kNan, kNan, kNan}), scores(COLUMNS * kRows / 2, raw[0]);
  std::vector<Sequence> given(sequences, sequences + count);
  std::vector<u32> cancel(count, 0);
  for (u32 i = 0; i < count; i++) given[i].cancel = &cancel[i];
  Params p = params(exchange, steps);
  p.sequences = given.data();
  p.sequence_count = count;
  p.column_raw = &raw[0].x;
  p.column_scores = &scores[0].x;
  const auto finish = [&] {
    Finisher<Model> f = finisher(p);
    const uint2 tiles = f.tiles(0);
    if (f.index == 0) Schedule<Model>::begin(f);
    f.sync();
    for (u32 step = 0; step < steps; step++) {
      f.forget_columns();
      if (f.pass_flags() & kAnyScored)
        for (u32 tile = f.index; tile < tiles.y; tile += FINISHERS) {
          const u32 row = (tiles.x + tile) * 8 + f.lane / 4;
          float values[Model::kColumnGroups];
          for (u32 j = 0; j < Model::kColumnGroups; j++) {
            const u32 c = f.lane % 4 + 4 * j;
            values[j] = c < f.columns() && row < VOCAB ? logits[f.column(c).sequence][f.column_more(c).index * u64(VOCAB) + row] : kNan;
          }
          if (row < VOCAB) take_column_logits(f, row, values);
        }
      __syncwarp();
      SampleColumns<Model, Stage>::run(f, step);
      if (load_shared(Layout<Model>::kStep) & 1) return;
    }
  };
  return play(order, finish, [&] {
    for (u32 i = 0; i < count; i++) cancel[i] |= given[i].tokens[cancel_after[i] - 1] != 0;
  });
}

#endif
