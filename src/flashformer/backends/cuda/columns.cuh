// Columns: what one pass carries. A launch is a list of sequences; each has a slot of the KV cache, tokens to be fed, and room for those
// that it makes. Every pass takes a column of each sequence, then more of those that have more to feed, until it is full.
//
// A sequence is fed its `forced` tokens, then its own. The last `drafts` of the forced ones are guesses: every one is compared with the
// token that the model chooses in its place, and the first that differs ends the sequence, behind the model's own choice.
// Every block lays the same passes for itself, from what all know: the choices, and which sequences are cancelled.
#pragma once
#include "units.cuh"

// For one warp of a block: its first finisher.
template <class M>
struct Schedule {
  using L = Layout<M>;

  // Before the first pass: nobody has been fed anything.
  static FF_DEVICE void begin(const Block<M>& b) {
    store(b, b.lane, {});
    if (b.lane == 0) store_shared(first_place(b), 0);
    __syncwarp();
    advance(b, 0, 0);
  }

  // What the pass has made: of each column that makes one, its token is the first word at `chosen`, and the second becomes its number
  // among those of its sequence, or kNotMade behind a draft that was wrong.
  static FF_DEVICE void take(const Block<M>& b) {
    Cursor cursor = load(b, b.lane);
    const Sequence& s = b.p.sequences[b.lane < b.p.sequence_count ? b.lane : 0];
#pragma unroll 1
    for (u32 k = 0; k < cursor.columns; k++) {
      const u32 c = cursor.base + k, chosen = chosen_place(b, c);
      const ColumnMore more = b.column_more(c);
      const bool makes = !cursor.over && more.flags & kMakes;
      store_shared(chosen + 4, makes ? cursor.made : kNotMade);
      if (cursor.over) continue;
      cursor.fed = more.index + 1;
      if (!makes) continue;
      const u32 token = load_shared(chosen);
      if (blockIdx.x == 0) store_host(s.tokens + cursor.made, join(token, b.p.run));
      cursor.last = token;
      cursor.made++;
      cursor.over = cursor.made == s.count || token >= M::kVocab;  // or none could be chosen
#pragma unroll 1
      for (u32 i = 0; i < s.stop_count; i++) cursor.over |= s.stop[i] == token;
      if (more.index + 1 < s.forced_count) cursor.over |= s.forced[more.index + 1] != token;
    }
    store(b, b.lane, cursor);
    __syncwarp();
  }

  // Lays pass number `step`. `cancelled`: a bit for each sequence that ends here. False: there is none.
  static FF_DEVICE bool advance(const Block<M>& b, u32 step, u32 cancelled) {
    // NOTE: where there are more sequences than columns they take turns: lane k looks after the k-th to be served.
    const u32 n = b.p.sequence_count, first = load_shared(first_place(b)), k = b.lane;
    const u32 mine = k < n ? (first + k < n ? first + k : first + k - n) : 0;
    Cursor cursor = load(b, mine);
    cursor.over |= cancelled >> mine & 1;
    const u32 live = __ballot_sync(kAllLanes, k < n && !cursor.over);
    const bool served = live >> k & 1 && rank(live, k) < M::kColumns;
    const u32 all_served = __ballot_sync(kAllLanes, served), room = M::kColumns - __popc(all_served);
    u32 columns = 0;
    if (served) {
      const u32 forced = b.p.sequences[mine].forced_count;
      columns = cursor.fed < forced ? forced - cursor.fed : 1;
      columns = columns < M::kColumns ? columns : M::kColumns;
    }
    const u32 more = columns ? columns - 1 : 0, before = sum_before(more, k);
    if (columns) columns = 1 + (before >= room ? 0 : more < room - before ? more : room - before);
    const u32 base = sum_before(columns, k), count = __shfl_sync(kAllLanes, base + columns, 31);
    cursor.base = base;
    cursor.columns = columns;
    if (k < n) store(b, mine, cursor);
    const u32 bases = __reduce_or_sync(kAllLanes, columns ? 1u << base : 0);
    if (columns) store_shared(chosen_place(b, base), mine);
    __syncwarp();
    u32 flags = 0;
    if (k < count) flags = lay(b, k, 31 - __clz(bases & ((2u << k) - 1)));
    flags = __reduce_or_sync(kAllLanes, flags);
    if (k == 0) {
      const u32 next = first + (room ? n : 32 - __clz(all_served));
      store_shared(b.shared + L::kPass, count);
      store_shared(b.shared + L::kPass + 4, flags);
      store_shared(first_place(b), next < n ? next : next - n);
      store_shared(b.shared + L::kPass + 16 + (step & 1) * 4, flags);
    }
    __syncwarp();
    Units<M>::lay(b);
    return count != 0;
  }

  static constexpr u32 kNotMade = ~0u;

 private:
  struct Cursor {
    u32 fed;   // tokens whose keys and values are in the cache for certain
    u32 made;
    u32 last;  // token made
    u32 over;
    u32 base, columns;  // of the pass
  };

  static FF_DEVICE u32 first_place(const Block<M>& b) { return b.shared + L::kPass + 8; }  // which sequence is served first
  static FF_DEVICE u32 chosen_place(const Block<M>& b, u32 c) { return b.shared + L::kChosen + c * 8; }
  static FF_DEVICE Cursor load(const Block<M>& b, u32 sequence) {
    const u32 at = b.shared + L::kCursors + sequence * 32;
    const uint4 v = load_shared4(at);
    const uint2 w = load_shared2(at + 16);
    return {v.x, v.y, v.z, v.w, w.x, w.y};
  }
  static FF_DEVICE void store(const Block<M>& b, u32 sequence, const Cursor& c) {
    const u32 at = b.shared + L::kCursors + sequence * 32, words[6] = {c.fed, c.made, c.last, c.over, c.base, c.columns};
#pragma unroll
    for (int i = 0; i < 6; i++) store_shared(at + i * 4, words[i]);
  }

  static FF_DEVICE u32 rank(u32 lanes, u32 lane) { return __popc(lanes & ((1u << lane) - 1)); }
  // Of all lanes before this one.
  static FF_DEVICE u32 sum_before(u32 value, u32 lane) {
    u32 sum = value;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const u32 other = __shfl_up_sync(kAllLanes, sum, o);
      sum += lane >= o ? other : 0;
    }
    return sum - value;
  }

  // Column c, of the sequence whose first column of this pass is `base`. Returns what of PassFlag follows from it.
  static FF_DEVICE u32 lay(const Block<M>& b, u32 c, u32 base) {
    const u32 sequence = load_shared(chosen_place(b, base));
    const Sequence& s = b.p.sequences[sequence];
    const Cursor cursor = load(b, sequence);
    const u32 index = cursor.fed + c - base, forced = s.forced_count, drafts = s.drafts;
    const u32 token = index < forced ? s.forced[index] : cursor.last;
    const u32 first_draft = cursor.fed + 1 > forced - drafts ? cursor.fed + 1 : forced - drafts;
    const u32 before = index < forced && index >= first_draft ? index + 1 - first_draft : 0;
    const bool makes = index + 1 + drafts >= forced, scored = makes || s.logits;
    const u32 at = b.shared + L::kColumn + c * 32;
    const u32 words[8] = {s.slot, s.start + index, token, sequence, base, index, (scored ? kScored : 0) | (makes ? kMakes : 0), before};
#pragma unroll
    for (int i = 0; i < 8; i++) store_shared(at + i * 4, words[i]);
    return (scored ? kAnyScored : 0) | (scored && s.sampling.flags ? kAnySampling : 0);
  }
};
