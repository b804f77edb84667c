// A team of threads that stay alive between launches, and the barrier at which they meet between stages.
#pragma once
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "prelude.h"

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// CPUs that this process may run on; empty where the system does not say.
inline std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
      if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
#endif
  return cpus;
}

// Counts arrivals; a worker that has passed n barriers of `members` goes on when n * members have arrived.
class Barrier {
 public:
  // `crowded`: more members than CPUs, so that spinning only keeps from running whom one waits for.
  explicit Barrier(bool crowded) : spins_(crowded ? 0 : kSpins) {}

  void reset() { arrived_.store(0, std::memory_order_relaxed); }

  // True when all have arrived, false when `limit` seconds were not enough or `given_up` says so. `meanwhile()` is called again
  // and again while this worker spins.
  template <class Meanwhile>
  bool meet(u64& goal, u32 members, double limit, const std::atomic<u32>& given_up, Meanwhile meanwhile) {
    goal += members;
    if (arrived_.fetch_add(1) + 1 == goal) {
      if (sleepers_.load()) wake();
      return true;
    }
    for (u32 i = 0; i < spins_; i++) {
      if (arrived_.load(std::memory_order_acquire) >= goal) return true;
      meanwhile();
      pause_cpu();
    }
    return sleep(goal, limit, given_up);
  }

 private:
  void wake() {
    { std::lock_guard<std::mutex> lock(mutex_); }  // whoever is counted now sleeps, or sees the last arrival before it does
    changed_.notify_all();
  }

  // NOTE: not sched_yield: where other programs run, it gives away a whole slice of time for what may be over in a microsecond.
  bool sleep(u64 goal, double limit, const std::atomic<u32>& given_up) {
    const std::chrono::duration<double> turn(kTurn);
    bool all = false;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_++;
    // A turn counts for what it should take: a process that was stopped for a while has not waited all that time.
    for (double waited = 0; !all && waited < limit && !given_up.load(std::memory_order_relaxed); waited += kTurn)
      all = changed_.wait_for(lock, turn, [&] { return arrived_.load() >= goal; });
    sleepers_--;
    return all;
  }

  static constexpr u32 kSpins = 4000;    // some 50 to 200 us: longer than any stage's imbalance
  static constexpr double kTurn = 0.01;  // seconds
  const u32 spins_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<u32> sleepers_{0};
  alignas(64) std::atomic<u64> arrived_{0};  // alone in its cache line
};

// `size` threads that run job(worker) once for each `start`, and sleep between.
class Team {
 public:
  // Throws std::system_error where the system gives no more threads.
  Team(u32 size, std::function<void(u32)> job) : job_(std::move(job)), cpus_(allowed_cpus()) {
    try {
      for (u32 i = 0; i < size; i++) threads_.emplace_back([this, i, size] { serve(i, size); });
    } catch (...) {
      dismiss();
      throw;
    }
  }

  ~Team() { dismiss(); }

  // Only after the job before has ended on all threads, which the job itself must tell.
  void start() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_++;
    }
    wake_.notify_all();
  }

 private:
  void dismiss() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      quit_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }

  // NOTE: a worker is tied to a CPU only where each CPU has exactly one, else several processes could crowd onto the same.
  void pin(u32 index, u32 size) const {
#if defined(__linux__)
    if (cpus_.size() != size) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpus_[index], &one);
    sched_setaffinity(0, sizeof one, &one);  // a refusal costs speed only
#else
    (void)index, (void)size;
#endif
  }

  void serve(u32 index, u32 size) {
    pin(index, size);
    u64 seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return quit_ || round_ != seen; });
      if (quit_) return;
      seen = round_;
      lock.unlock();
      job_(index);
      lock.lock();
    }
  }

  const std::function<void(u32)> job_;
  const std::vector<int> cpus_;
  std::mutex mutex_;
  std::condition_variable wake_;
  u64 round_ = 0;
  bool quit_ = false;
  std::vector<std::thread> threads_;  // last: they use all of the above
};
