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

// Story::token(worker) runs one token.
template <class M, class Story>
class Engine {
 public:
  // Throws std::bad_alloc, or std::system_error where there are no more threads.
  explicit Engine(const Params& params)
      : kv_(u64(M::kLayers) * M::kKvHeads * M::kKvBlocks * M::kKvBlockBytes),
        values_(M::kValues * sizeof(float)),
        scratch_(u64(M::kWorkers) * M::kScratch * sizeof(float)),
        candidates_(M::kWorkers * sizeof(Candidate)),
        shared_{params, kv_.as<u8>(), values_.as<float>(), scratch_.as<float>(), candidates_.as<Candidate>(), Barrier(crowded())},
        team_(M::kWorkers, [this](u32 index) { work(index); }) {}

  // Ends a launch that is still running after its present token.
  ~Engine() {
    cancel();
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !status_.running; });  // the workers' own waits have a bound
  }

  // Only while nothing runs. What `launch` points to must stay until it has ended.
  void start(const Launch& launch) {
    shared_.launch = launch;
    shared_.barrier.reset();
    shared_.cancel.store(0, std::memory_order_relaxed);
    shared_.given_up.store(0, std::memory_order_relaxed);
    status_ = {};
    status_.running = 1;
    busy_ = M::kWorkers;
    began_ = Clock::now();
    team_.start();
  }

  void cancel() { shared_.cancel.store(1, std::memory_order_relaxed); }

  // Waits until there are more than `seen` tokens, the launch has ended, or `seconds` are over.
  Status wait(u32 seen, double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return status_.made > seen || !status_.running; });
    return status_;
  }

 private:
  static bool crowded() {
    const u64 cpus = allowed_cpus().size();
    return cpus && M::kWorkers > cpus;
  }

  void work(u32 index) {
    Worker<M> worker(shared_, index);
    const Launch& l = shared_.launch;
    for (u32 step = 0; step < l.steps; step++) {
      worker.begin(step);
      Story::token(worker);
      if (index == 0 && step + 1 >= l.forced_count && !shared_.given_up.load(std::memory_order_relaxed)) publish(worker.token);
      if (worker.ends(step)) break;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (--busy_) return;
    status_.given_up = shared_.given_up.load(std::memory_order_relaxed);
    status_.running = 0;
    changed_.notify_one();
  }

  void publish(u32 token) {
    std::lock_guard<std::mutex> lock(mutex_);
    shared_.launch.tokens[status_.made] = token;
    status_.last = seconds_since(began_);
    if (status_.made++ == 0) status_.first = status_.last;
    changed_.notify_one();
  }

  Pages kv_, values_, scratch_, candidates_;
  Shared shared_;
  std::mutex mutex_;  // of all that follows
  std::condition_variable changed_;
  Status status_{};
  u32 busy_ = 0;
  Clock::time_point began_;
  Team team_;  // last: its threads use all of the above
};
