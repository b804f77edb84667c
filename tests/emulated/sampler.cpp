// Some tokens of all blocks' finishers, from given logits to the choices: the token stage of the CUDA kernel as it stands.
#include "sample.cuh"

struct Model {
  static constexpr u32 kWorkers = WORKERS, kVocab = VOCAB;
  static constexpr int kFinishers = FINISHERS, kFreeBytes = FREE_BYTES, kHeadTiles = 0;
};
struct Stage {
  static constexpr u32 kWhere = 0, kRoundTags = ROUND_TAGS;
  static constexpr int kPartWords = PART_WORDS;
  static constexpr int kOutput = 0, kRounds = 4 * WORKERS, kLists = 4 * (1 + PART_WORDS) * WORKERS, kWords = kLists + LIST_WORDS;
};

static void finish(const Params& p, const float* logits) {
  Finisher<Model> f{{p, 0, thread->lane, {}}};
  f.index = thread->warp;
  const uint2 tiles = f.tiles(0);
  for (u32 step = 0; step < p.steps; step++) {
    f.forget();
    if (step + 1 >= p.forced_count)
      for (u32 tile = f.index; tile < tiles.y; tile += FINISHERS) {
        const u32 row = (tiles.x + tile) * 8 + f.lane;
        if (f.lane < 8 && row < VOCAB) take_logit(f, step, row, logits[(step + 1 - p.forced_count) * VOCAB + row]);
      }
    __syncwarp();
    Sample<Model, Stage>::run(f, step);
    if (load_shared(Layout<Model>::kStep) & 1) return;
  }
}

// logits [steps - forced_count + 1][VOCAB]; `tokens` get (token, run). Blocks take turns in an order drawn from `order`.
// The number of rounds of all tokens; -1: it did not end.
extern "C" int emulate(const Sampling* sampling, const float* logits, u32 steps, u32 forced_count, u32 position, u64* tokens, u32 order) {
  std::vector<u64> exchange(Stage::kWords, 0);
  std::vector<u32> forced(forced_count, 0);
  u32 cancel = 0, status[2] = {0, 0};
  Params p{};
  p.sampling = *sampling;
  p.exchange = exchange.data();
  p.forced = forced.data();
  p.tokens = tokens;
  p.cancel = &cancel;
  p.status = status;
  p.start = position;
  p.forced_count = forced_count;
  p.steps = steps;
  p.epoch = p.run = 1;

  constexpr u32 kTiles = (VOCAB + 7) / 8, kThreads = FINISHERS * 32;
  std::vector<BlockMemory> blocks(WORKERS);
  std::vector<Thread> threads(WORKERS * kThreads);
  for (u32 i = 0; i < threads.size(); i++) {
    Thread& t = threads[i];
    t.block = i / kThreads, t.warp = i % kThreads / 32, t.lane = i % 32;
    t.memory = &blocks[t.block];
    t.run = [&] { finish(p, logits); };
    if (i % kThreads == 0) {
      const u32 first = kTiles * t.block / WORKERS, tiles = first << 12 | (kTiles * (t.block + 1) / WORKERS - first);
      t.memory->shared.resize(Layout<Model>::kBytes);
      std::memcpy(t.memory->shared.data() + Layout<Model>::kTiles, &tiles, 4);
    }
    prepare(t);
  }
  u32 running = threads.size();
  rounds = 0;
  for (u32 turn = 0; running && turn < 50'000'000; turn++) {
    order = order * 1664525 + 1013904223;
    const u32 block = (order >> 16) % WORKERS;
    for (u32 i = block * kThreads; i < (block + 1) * kThreads; i++) {
      if (threads[i].done) continue;
      go_on(threads[i]);
      running -= threads[i].done;
    }
  }
  return running == 0 ? int(rounds) : -1;
}
