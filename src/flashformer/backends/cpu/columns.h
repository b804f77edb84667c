// Columns: what one pass carries. A launch is a list of sequences; each has a slot of the KV cache, tokens to be fed, and room for
// those that it makes. Every pass takes a column of each sequence, then more of those that have more to feed, until it is full.
//
// A sequence is fed its `forced` tokens, then its own. The last `drafts` of the forced ones are guesses: every one is compared with
// the token that the model chooses in its place, and the first that differs ends the sequence, behind the model's own choice.
#pragma once
#include <condition_variable>
#include <mutex>
#include <vector>

#include "sampling.hpp"
#include "threads.h"

// One token position of a pass.
struct Column {
  u32 slot, position, token;
  u32 sequence;       // of the launch
  u32 index;          // among the tokens that the sequence is fed
  float* logits;      // [vocab] of this position, or null
  Sampling sampling;  // the sequence's, with room for the scores of this column
  const u32* drafts;  // those that this pass feeds up to this column: `Sampling::seen` does not count them yet
  u32 draft_count;

  // How often the drafts have a token.
  u32 unseen(u32 row) const {
    u32 count = 0;
    for (u32 i = 0; i < draft_count; i++) count += drafts[i] == row;
    return count;
  }
};

template <class M>
struct Pass {
  Column columns[M::kColumns];
  u32 count = 0;            // 0: the launch is over
  u32 scored[M::kColumns];  // columns that need the head
  u32 scored_count = 0;
  bool sampled = false;  // whether one of those has a temperature
  bool chained = false;  // whether columns of one sequence follow each other
};

// All sequences of the present launch: worker 0 alone asks for the next pass and says what the last one made. The host starts it,
// and waits for news.
template <class M>
class Schedule {
 public:
  // `scores`, `raw`: [columns][vocab].
  Schedule(float* scores, float* raw) : scores_(scores), raw_(raw) {}

  // NOTE: a worker may still look at a pass while the next one is laid, so there are two.
  const Pass<M>& pass(u32 parity) const { return passes_[parity]; }
  double limit() const { return launch_.limit; }

  // Only while nothing runs. What `launch` points to must stay until it has ended.
  void start(const Launch& launch) {
    launch_ = launch;
    cursors_.assign(launch.count, {});
    first_ = 0;
    parity_ = 0;
    passes_[0].count = 0;
    cancel_.store(0, std::memory_order_relaxed);
    status_ = {};
    status_.running = 1;
    began_ = Clock::now();
  }

  // What the last pass made: choose(number among the scored columns, column, where to report) is a token.
  template <class Choose>
  void take(Choose choose) {
    const double now = seconds_since(began_);
    const Pass<M>& pass = passes_[parity_];
    for (u32 i = 0, scored = 0; i < pass.count; i++) {
      const Column& c = pass.columns[i];
      const u32 number = scored;
      scored += scored < pass.scored_count && pass.scored[scored] == i;
      Cursor& cursor = cursors_[c.sequence];
      if (cursor.over) continue;  // behind a draft that was wrong
      cursor.fed = c.index + 1;
      if (!makes(launch_.sequences[c.sequence], c.index)) continue;
      make(c, cursor, choose(number, c, c.sampling.report + u64(cursor.made) * kReportWords), now);
    }
  }

  // Fills the next pass, and tells the host how far everybody is.
  void advance() {
    const u32 n = launch_.count;
    u32 live = 0;
    for (u32 i = 0; i < n; i++) {
      Cursor& cursor = cursors_[i];
      if (cancel_.load(std::memory_order_relaxed) || __atomic_load_n(launch_.sequences[i].cancel, __ATOMIC_RELAXED)) cursor.over = true;
      cursor.columns = 0;
      live += !cursor.over;
    }
    u32 room = M::kColumns, served = 0;
    // NOTE: where there are more sequences than columns they take turns.
    for (u32 k = 0; k < n && room && live; k++) {
      Cursor& cursor = cursors_[(first_ + k) % n];
      served = k + 1;
      if (cursor.over) continue;
      cursor.columns = 1;
      room--;
    }
    for (u32 k = 0; k < n && room; k++) {
      Cursor& cursor = cursors_[(first_ + k) % n];
      if (!cursor.columns) continue;
      const u32 forced = launch_.sequences[(first_ + k) % n].forced_count, left = cursor.fed < forced ? forced - cursor.fed : 1;
      const u32 more = std::min(left - 1, room);
      cursor.columns += more;
      room -= more;
    }
    if (n) first_ = (first_ + served) % n;
    parity_ ^= 1;
    lay();
    tell();
  }

  // Every sequence ends with its present token.
  void cancel() { cancel_.store(1, std::memory_order_relaxed); }

  // After all workers have left the last pass.
  void end(u32 given_up) {
    std::lock_guard<std::mutex> lock(mutex_);
    status_.given_up = given_up;
    status_.running = 0;
    changed_.notify_all();
  }

  // Waits until there is more news than `seen`, the launch has ended, or `seconds` are over; `progress`: [sequences], or null.
  Status wait(u32 seen, double seconds, Progress* progress) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return status_.news > seen || !status_.running; });
    for (u32 i = 0; progress && i < cursors_.size(); i++) progress[i] = cursors_[i].told;
    return status_;
  }

 private:
  struct Cursor {
    u32 fed = 0;  // tokens whose keys and values are in the cache for certain
    u32 made = 0;
    u32 last = 0;     // token made
    u32 columns = 0;  // of the pass that comes
    bool over = false;
    Progress told{};
  };

  // Whether the token behind the one that is fed as number `index` is the model's to choose.
  static bool makes(const Sequence& s, u32 index) { return index + 1 + s.drafts >= s.forced_count; }

  void make(const Column& c, Cursor& cursor, u32 token, double now) {
    const Sequence& s = launch_.sequences[c.sequence];
    s.tokens[cursor.made] = token;
    s.seconds[cursor.made++] = now;
    cursor.last = token;
    cursor.over = cursor.made == s.count || token >= M::kVocab;  // or none could be chosen
    for (u32 i = 0; i < s.stop_count; i++) cursor.over |= s.stop[i] == token;
    if (c.index + 1 < s.forced_count) cursor.over |= s.forced[c.index + 1] != token;
    if (token < M::kVocab && s.sampling.flags & kPenalised) s.sampling.seen[token]++;
  }

  void lay() {
    Pass<M>& p = passes_[parity_];
    p.count = p.scored_count = 0;
    p.sampled = p.chained = false;
    for (u32 i = 0; i < launch_.count; i++) {
      const Cursor& cursor = cursors_[i];
      const Sequence& s = launch_.sequences[i];
      p.chained |= cursor.columns > 1;
      const u32 first_draft = std::max(cursor.fed + 1, s.forced_count - s.drafts);
      for (u32 k = 0; k < cursor.columns; k++) {
        Column& c = p.columns[p.count];
        c.slot = s.slot;
        c.sequence = i;
        c.index = cursor.fed + k;
        c.position = s.start + c.index;
        c.token = c.index < s.forced_count ? s.forced[c.index] : cursor.last;
        c.logits = s.logits ? s.logits + u64(c.index) * M::kVocab : nullptr;
        c.sampling = s.sampling;
        c.sampling.scores = scores_ + u64(p.count) * M::kVocab;
        c.sampling.raw = raw_ + u64(p.count) * M::kVocab;
        c.drafts = s.forced + first_draft;
        c.draft_count = c.index < s.forced_count && c.index >= first_draft ? c.index + 1 - first_draft : 0;
        if (c.logits || makes(s, c.index)) {
          p.scored[p.scored_count++] = p.count;
          p.sampled |= (s.sampling.flags & kSampled) != 0;
        }
        p.count++;
      }
    }
  }

  void tell() {
    std::lock_guard<std::mutex> lock(mutex_);
    const u32 before = status_.news;
    for (Cursor& cursor : cursors_) {
      status_.news += cursor.made - cursor.told.made;
      cursor.told = {cursor.made, cursor.fed};
    }
    if (status_.news != before) changed_.notify_all();
  }

  float* const scores_;
  float* const raw_;
  Launch launch_{};
  std::vector<Cursor> cursors_;
  u32 first_ = 0;  // sequence to be served first
  Pass<M> passes_[2];
  u32 parity_ = 0;  // of the present one
  std::atomic<u32> cancel_{0};
  Clock::time_point began_;
  std::mutex mutex_;  // of the status, and of what the cursors tell
  std::condition_variable changed_;
  Status status_{};
};
