// A model with its workers: memory is claimed once, then the host starts one launch after another and waits for its tokens.
#pragma once
#include <sys/mman.h>

#include <new>

#include "attention.h"
#include "embed.h"
#include "linear.h"
#include "sample.h"
#include "worker.h"

// Zeroed memory. NOTE: no large pages: most of a KV cache is never touched, and so it is never claimed.
class Pages {
 public:
  explicit Pages(u64 bytes) : bytes_(bytes), start_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (start_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Pages() { munmap(start_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(start_);
  }

 private:
  u64 bytes_;
  void* start_;
};

// Between two passes: worker 0 takes the tokens of the last one and lays the next one; the others wait.
template <class M, class S>
struct NextPass {
  using Stage = S;

  static void run(Worker<M>& w, u32) {
    if (w.index || w.given_up()) return;
    w.schedule().take([&w](u32 scored, const Column& column, u64* report) { return Sample<M>::run(w, scored, column, report); });
    w.schedule().advance();
  }
};

// Story::run(worker) runs one pass; Story::Next is its NextPass.
template <class M, class Story>
class Engine {
 public:
  // Throws std::bad_alloc, or std::system_error where there are no more threads.
  explicit Engine(const Params& params)
      : kv_(M::kSlots * kSlotBytes),
        values_(u64(M::kColumns) * M::kValues * sizeof(float)),
        scratch_(u64(M::kWorkers) * M::kColumns * M::kScratch * sizeof(float)),
        candidates_(u64(M::kWorkers) * M::kColumns * sizeof(Candidate)),
        scores_(u64(M::kColumns) * M::kVocab * sizeof(float)),
        raw_(u64(M::kColumns) * M::kVocab * sizeof(float)),
        shared_{params, kv_.as<u8>(), values_.as<float>(), scratch_.as<float>(), candidates_.as<Candidate>(), Barrier(crowded()),
                Schedule<M>(scores_.as<float>(), raw_.as<float>())},
        team_(M::kWorkers, [this](u32 index) { work(index); }) {}

  // Ends a launch that is still running after its present pass.
  ~Engine() {
    cancel();
    while (wait(~0u, 1.0, nullptr).running) continue;  // the workers' own waits have a bound
  }

  // Only while nothing runs. What `launch` points to must stay until it has ended.
  void start(const Launch& launch) {
    shared_.barrier.reset();
    shared_.given_up.store(0, std::memory_order_relaxed);
    shared_.schedule.start(launch);
    busy_.store(M::kWorkers);
    team_.start();
  }

  void cancel() { shared_.schedule.cancel(); }

  Status wait(u32 seen, double seconds, Progress* progress) { return shared_.schedule.wait(seen, seconds, progress); }

  // The first `positions` of a slot become those of another. Only while nothing runs.
  void copy(u32 from, u32 to, u32 positions) {
    const u64 head_bytes = u64(M::kKvBlocks) * M::kKvBlockBytes;
    const u64 bytes = u64((positions + kBlockPositions - 1) / kBlockPositions) * M::kKvBlockBytes;
    const u8* source = kv_.as<u8>() + from * kSlotBytes;
    u8* target = kv_.as<u8>() + to * kSlotBytes;
    for (u64 at = 0; at < kSlotBytes; at += head_bytes) std::memcpy(target + at, source + at, bytes);
  }

 private:
  static constexpr u64 kSlotBytes = u64(M::kLayers) * M::kKvHeads * M::kKvBlocks * M::kKvBlockBytes;

  static bool crowded() {
    const u64 cpus = allowed_cpus().size();
    return cpus && M::kWorkers > cpus;
  }

  void work(u32 index) {
    Worker<M> worker(shared_, index);
    for (;;) {
      worker.template run<typename Story::Next>();
      worker.begin();
      if (worker.given_up() || !worker.pass().count) break;
      Story::run(worker);
    }
    if (busy_.fetch_sub(1) == 1) shared_.schedule.end(shared_.given_up.load(std::memory_order_relaxed));
  }

  Pages kv_, values_, scratch_, candidates_, scores_, raw_;
  Shared<M> shared_;
  std::atomic<u32> busy_{0};
  Team team_;  // last: its threads use all of the above
};
