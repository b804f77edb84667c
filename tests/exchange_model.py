"""Who waits for whom, event by event: the exchanges of a plan on a GPU as the kernel's headers order them, with nothing assumed.

A worker's consumers and each of its finishers are on their own; an event comes after the events of the same warps before it and
after whatever it polls for. The plan's proof of one copy a buffer (validate.py) is compared with this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from flashformer.backends.cuda.codegen import newcomers
from flashformer.plan import Plan, Stage


class ExchangeModel:
    """All events of some tokens. `late` lists writes that may overtake a read of what they overwrite.

    blocks: of the KV cache, per head. Two variants that are known to be wrong: every worker publishes sums of squares, with
    or without a part of the residual; the token's words have one copy.

    versions: places of vectors, which have no tags (vectors.cuh); 0: words have tags. `stale` lists looks that may find what a place held
    before. resumed: the first token begins with the last layer (`Block::first_layer`).
    """

    def __init__(
        self, plan: Plan, blocks: int, tokens: int = 2, all_publish_moments: bool = False, token_copies: int = 2, versions: int = 0,
        resumed: bool = False,
    ) -> None:  # fmt: skip
        self.plan, self.blocks, self.all_publish_moments, self.versions = plan, blocks, all_publish_moments, versions
        self.plain = {b.name for b in plan.buffers if b.kind == "half"} if versions else set()
        self.cleared: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)  # (buffer, version): by whom, event
        self.looks: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)  # (buffer, version): whose, newest event before it
        self.past: list[int] = []  # of each event: the set of events before it, as bits
        workers, finishers = plan.target.workers, plan.target.finisher_warps
        self.consumer = [self.event() for _ in range(workers)]  # latest event
        self.finisher = [[self.event() for _ in range(finishers)] for _ in range(workers)]
        self.reads: dict[str, list[list[tuple[str, int]]]] = defaultdict(lambda: [[]])  # buffer -> version -> (who, event)
        self.writes: dict[str, list[list[tuple[str, int]]]] = defaultdict(lambda: [[]])
        self.tile_events: dict[str, dict[int, int]] = defaultdict(dict)  # stage -> tile (or worker with a piece) -> newest event
        self.heads: list[list[int]] = []  # of each worker: the virtual heads of which it has a piece
        total = plan.kv.virtual_heads * blocks
        for w in range(workers):
            first, end = w * total // workers, (w + 1) * total // workers
            self.heads.append(sorted({unit // blocks for unit in range(first, end)}))
        for token in range(tokens):
            for stage in plan.stages:
                if not (resumed and token == 0 and 0 <= stage.layer < plan.config.num_layers - 1):
                    self.walk(stage)
        self.late = [
            f"{writer} overtakes {reader}"
            for name, versions in self.reads.items()
            for n, readers in enumerate(versions)
            for copies in [token_copies if name == "token" else 1]
            if n + copies < len(self.writes[name])
            for reader, read in readers
            for writer, write in self.writes[name][n + copies]
            if not self.past[write] >> read & 1
        ]

        self.stale = [
            f"{reader} may find what was there before {writer}"
            for (name, n), looks in self.looks.items()
            for writer, cleared in self.cleared[name, n - versions]
            for reader, look in looks
            if not (self.past[look] | 1 << look) >> cleared & 1
        ]
        self.late += [
            f"{writer} forgets before {reader}"
            for (name, n), clears in self.cleared.items()
            for writer, cleared in clears
            for reader, read in self.reads[name][n]
            if not (self.past[cleared] | 1 << cleared) >> read & 1
        ]

    def event(self, *after: int) -> int:
        """A new event."""
        past = 0
        for e in after:
            past |= self.past[e] | 1 << e
        self.past.append(past)
        return len(self.past) - 1

    def written(self, name: str) -> list[int]:
        """All writes of the version of a buffer that the present stage reads."""
        return [e for _, e in self.writes[name][self.version[name]]]

    def walk(self, s: Stage) -> None:
        """Every worker goes through a stage. A new version of its output begins."""
        output = "logits" if s.name == "head" else s.writes  # which stay with their workers
        self.version = {name: len(self.writes[name]) - 1 for name in (s.reads[0], f"{s.reads[0]}.moments")}
        if s.kind == "token":
            output, self.version = "token", {"token": len(self.writes["token"])}
        for name in (output, f"{output}.moments"):
            self.reads[name].append([])
            self.writes[name].append([])
        if self.plain and s.name == "attention_output":
            self.forget([other for other in self.plan.layer_stages(s.layer) if other.writes in self.plain], s)
        elif self.plain and s.name == "head":
            self.forget([other for other in self.plan.stages if other.name == "down"][-1:], s)
        for w in range(self.plan.target.workers):
            getattr(self, f"walk_{s.kind}")(s, w, output)
        if s.kind == "token":
            self.choose(s)

    def forget(self, writers: list[Stage], following: Stage) -> None:
        """A finisher, whichever it is, makes those versions of some vectors absent that are two older than the next ones.

        Finishers without a part of the residual meet before and after that.
        """
        for w, owned in enumerate(self.plan.stages[0].count):
            if not owned:
                self.meet(w)
            self.finisher[w] = [self.event(e) for e in self.finisher[w]]
            for s in writers:
                before = len(self.writes[s.writes]) - (s is following) - 2  # which has begun a version
                if s.count[w] and before >= 0:
                    self.cleared[s.writes, before] += [(f"{s.name} {s.layer} of {w}", e) for e in self.finisher[w]]
            if not owned:
                self.meet(w)

    def meet(self, w: int) -> None:
        """All finishers of a worker wait for each other."""
        self.finisher[w] = [self.event(*self.finisher[w])] * len(self.finisher[w])

    def publish(self, s: Stage, w: int, finisher: int, tile: int, name: str, *after: int) -> None:
        """A finisher writes a tile's part of a buffer's newest version."""
        self.finisher[w][finisher] = e = self.event(self.finisher[w][finisher], *after)
        self.writes[name][-1].append((f"{s.name} {s.layer} of {w}", e))
        self.tile_events[s.name][tile] = e

    def read(self, s: Stage, w: int, who: str, name: str, *after: int) -> int:
        """A worker's warps read the version of a buffer that the present stage reads."""
        e = self.event(*after)
        self.reads[name][self.version[name]].append((f"{s.name} {s.layer} of {w}, {who}", e))
        return e

    def moments(self, s: Stage, w: int, output: str) -> None:
        """The finishers of an owner meet and publish their sum of squares."""
        if s.count[w]:
            self.meet(w)
        if s.count[w] or self.all_publish_moments:
            self.writes[f"{output}.moments"][-1].append((f"{s.name} {s.layer} of {w}", self.event(self.finisher[w][0])))

    def walk_embed(self, s: Stage, w: int, output: str) -> None:
        for local in range(s.count[w]):
            self.publish(s, w, local // 4 % len(self.finisher[w]), s.first[w] + local, output)
        self.moments(s, w, output)

    def walk_linear(self, s: Stage, w: int, output: str) -> None:
        assert s.linear is not None and s.geometry is not None
        if s.count[w]:
            (name,) = s.reads
            if name in self.plain:
                if s.name == "head" and newcomers(self.plan):
                    self.consumer[w] = self.read(s, w, "consumers", f"{name}.moments", self.consumer[w], *self.written(f"{name}.moments"))
                self.looks[name, self.version[name]].append((f"{s.name} {s.layer} of {w}", self.consumer[w]))
            self.consumer[w] = x = self.read(s, w, "consumers", name, self.consumer[w], *self.written(name))
            for f in range(len(self.finisher[w])):
                tiles = [t for t in range(s.count[w]) if t // s.geometry.warps_rows % len(self.finisher[w]) == f]
                if tiles and s.linear.eps:
                    sums = f"{name}.moments"
                    self.finisher[w][f] = self.read(s, w, f"finisher {f}", sums, self.finisher[w][f], *self.written(sums))
                for t in tiles:
                    self.publish(s, w, f, s.first[w] + t, output, x)
        if s.publish_gamma:
            self.moments(s, w, output)

    def rows(self, heads: Iterable[int], offset: int) -> list[int]:
        """Events of the qkv tiles that hold these heads' rows; padding is not read."""
        kv, rows = self.plan.kv, self.plan.target.tile_rows
        at = (np.array(list(heads))[:, None] + offset) * kv.head_pad + np.arange(kv.head_dim)[None]
        return [self.tile_events["qkv"][t] for t in np.unique(at // rows).tolist()]

    def walk_attention(self, s: Stage, w: int, output: str) -> None:
        kv, total = self.plan.kv, self.plan.kv.virtual_heads * self.blocks
        splits = kv.virtual_heads // kv.heads
        for head in self.heads[w]:
            kv_head, split = divmod(head, splits)
            first = kv_head * kv.group + split * kv.virtual_group
            needed = self.rows(range(first, min(first + kv.virtual_group, (kv_head + 1) * kv.group)), 0)
            if (w + 1) * total // self.plan.target.workers >= (head + 1) * self.blocks:  # this token's own key and value
                needed += self.rows([kv_head], kv.heads * kv.group) + self.rows([kv_head], kv.heads * (kv.group + 1))
            self.consumer[w] = e = self.event(self.read(s, w, "consumers", s.reads[0], self.consumer[w], *needed))
            self.writes[output][-1].append((f"attention {s.layer} of {w}", e))
            self.tile_events[f"piece of {head}"][w] = e

    def walk_combine(self, s: Stage, w: int, output: str) -> None:
        kv = self.plan.kv
        for local in range(s.count[w]):
            query = (s.first[w] + local) * self.plan.target.tile_rows // kv.head_pad
            head = query // kv.group * (kv.virtual_heads // kv.heads) + query % kv.group // kv.virtual_group
            pieces = [self.tile_events[f"piece of {head}"][v] for v in range(len(self.heads)) if head in self.heads[v]]
            f = local % len(self.finisher[w])
            self.finisher[w][f] = self.read(s, w, f"finisher {f}", s.reads[0], self.finisher[w][f], *pieces)
            self.publish(s, w, f, s.first[w] + local, output)

    def walk_token(self, s: Stage, w: int, output: str) -> None:
        self.consumer[w] = e = self.event(self.consumer[w], *self.finisher[w])
        self.writes["token"][-1].append((f"token of {w}", e))

    def choose(self, s: Stage) -> None:
        """Everybody waits for everybody's candidate."""
        for w in range(self.plan.target.workers):
            self.consumer[w] = e = self.read(s, w, "finisher 0", "token", self.consumer[w], *self.written("token"))
            self.finisher[w] = [e] * len(self.finisher[w])
