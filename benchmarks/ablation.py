"""What each technique is worth: the decode kernel with one of them switched off, beside the kernel as it is, on the same weights.

usage: python benchmarks/ablation.py [--models llama-3.2-1b,llama-3.1-8b] [--context 1024] [--tokens 128] [--repeats 5]

Writes benchmarks/results/ablation-<gpu>.json. Each timing has one of the base right before it, and ratios are of such pairs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from variants import build

from flashformer.backends.cuda import CudaRunner, RandomWeights, load
from flashformer.backends.cuda.compile import Kernel
from flashformer.backends.cuda.launcher import chunk_table
from flashformer.backends.cuda.runner import owners
from flashformer.bench import plan_for_gpu
from flashformer.errors import DeviceError, FlashFormerError
from flashformer.plan import Plan, Stage, prefix, retarget, spread
from flashformer.records import Kept, results_file, save, whence
from flashformer.shapes import shape
from flashformer.tape import Tape, lay_tapes
from flashformer.targets import Target
from flashformer.validate import validate

MODELS = "qwen3-0.6b,llama-3.2-1b,llama-3.2-3b,llama-3.1-8b"
RESULTS = Path(__file__).parent / "results"
SLOT = 16384  # bytes of the ring


# --- What is switched off --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Technique:
    """One thing that the kernel does, and what it does instead here."""

    name: str
    instead: str
    target: Callable[[Target], Mapping[str, Any]] = lambda target: {}  # numbers of the target that change
    patches: tuple[tuple[str, str, str], ...] = ()  # (header, old text, new text)
    plan: Callable[[Plan], Plan] = lambda plan: plan  # other owners of the same tiles
    table: Callable[[Plan, Tape], np.ndarray] | None = None  # another table of chunks over the same memory
    launches: bool = False  # one for each token
    same_tokens: bool = True  # as the base; not where weights are read from places where others were packed, or sums are cut otherwise


def contiguous(plan: Plan, tape: Tape) -> np.ndarray:
    """Each block's chunks one after another, where usually chunk i of all blocks lie side by side."""
    table = chunk_table(plan, tape)
    units = tape.size.T.astype(np.int64) // tape.unit  # [workers, chunks]
    ends = np.cumsum(units.reshape(-1)).reshape(units.shape)
    table[:, :, 0] = np.where(units > 0, ends - units, table[:, :, 0])  # markers of attention stay
    return table


def spread_evenly(plan: Plan) -> Plan:
    """Every stage's tiles over all blocks alike, whatever the others gave them."""

    def alike(stage: Stage) -> Stage:
        count = spread(stage.tiles, plan.target.workers)
        return replace(stage, count=tuple(count), first=prefix(count)) if stage.geometry else stage

    return replace(plan, stages=tuple(map(alike, plan.stages)))


# The consumers count the chunks that they ask for; the producer does not begin a stage before all have asked for its first chunk.
ASKED = """static constexpr int kAsked = kReductionEmpty + kReductionBuffers * 8;
  static constexpr int kDone = 8 + """
ACQUIRE = """FF_DEVICE void acquire() const {
    if (this->lane == 0) asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(this->shared + L::kAsked) : "memory");
    barrier_wait(this->shared + L::kFull"""
WAIT_ASKED = """FF_DEVICE bool wait_asked() {
    const u32 wanted = kConsumers * (issued + 1);
    for (u32 spins = 1; (int)(load_shared_acquire(this->shared + L::kAsked) - wanted) < 0; spins++) {
      poll();
      if (spins % kGlanceSpins == 0 && over(spins)) return false;
    }
    return true;
  }
  FF_DEVICE void poll() {"""
BEGIN = """if (!wait_room()) break;
      if ((current.y & M::kBegins) && !wait_asked()) break;"""
ON_DEMAND = (
    ("roles.cuh", "static constexpr int kDone = ", ASKED),
    ("roles.cuh", "FF_DEVICE void acquire() const { barrier_wait(this->shared + L::kFull", ACQUIRE),
    ("stream.cuh", "FF_DEVICE void poll() {", WAIT_ASKED),
    ("stream.cuh", "if (!wait_room()) break;", BEGIN),
)


def in_flight(chunks: int) -> Callable[[Target], Mapping[str, Any]]:
    """So many bytes, whatever waits in the ring."""
    return lambda target: {"window": ((99, chunks * SLOT),), "calm_window": 0}


TECHNIQUES = (
    Technique(
        "the stream runs ahead of the stages", "weights and KV cache are fetched once a stage's input is there, prefetch off",
        lambda t: {"prefetch_chunks": 0}, ON_DEMAND,
    ),
    Technique("one launch for many tokens", "a launch for each token, which the host reads and passes on", launches=True),
    Technique("bulk copies", "cp.async, prefetch off", lambda t: {"bulk_copy": False, "prefetch_chunks": 0}),
    Technique("few bytes in flight, by what waits in the ring", "always 2 chunks", in_flight(2)),
    Technique("few bytes in flight, by what waits in the ring", "always 3 chunks", in_flight(3)),
    Technique("few bytes in flight, by what waits in the ring", "the whole ring", in_flight(99)),
    Technique("more in flight where no exchange is near", "as few there", lambda t: {"calm_window": 0}),
    Technique("L2 prefetch behind a full ring", "none", lambda t: {"prefetch_chunks": 0}),
    Technique("depth of the ring", "6 slots fewer", lambda t: {"shared_bytes": t.shared_bytes - 6 * SLOT}),
    Technique("depth of the ring", "9 slots fewer", lambda t: {"shared_bytes": t.shared_bytes - 9 * SLOT}),
    Technique(
        "weights are the first that the L2 evicts", "as all else",
        patches=(("prelude.cuh", "kEvictFirst = 0x12F0000000000000ull", "kEvictFirst = 0x1000000000000000ull"),),
    ),
    Technique("chunks of all blocks side by side", "each block's one after another", table=contiguous, same_tokens=False),
    Technique("tiles even out the bytes of a token", "each stage for itself", plan=spread_evenly, same_tokens=False),
    Technique("copies of exchanged vectors", "1", lambda t: {"exchange_copies": 1}),
    Technique(
        "readers look late", "they look at once", patches=(("exchange.cuh", "if (first) wait.at_least(delay);", ""),),
    ),
    Technique("no look before an exchange can be over", "learnt delays without a floor", lambda t: {"first_look_cycles": 0}),
    Technique(
        "delays are learnt", "all look after the floor",
        patches=(("exchange.cuh", "if (first && lane == 0) {", "if (false) {"),),
    ),
    Technique(
        "one head of the KV cache a block", "cut evenly",
        patches=(("stream.cuh", "if (kMost == 0 || ", "if (true || "),), same_tokens=False,
    ),
    Technique("least piece of the KV cache", "8 blocks", lambda t: {"kv_min_blocks": 8}, same_tokens=False),
    Technique("finishers", "2", lambda t: {"finisher_warps": 2}),
    Technique("finishers", "4 where there are 3, 3 where there are 4", lambda t: {"finisher_warps": 7 - t.finisher_warps}),
)  # fmt: skip


def without(plan: Plan, technique: Technique) -> Plan:
    """The plan with the technique switched off, as far as it is one of the plan's. Raises PlanError where that cannot go well."""
    changed = technique.plan(retarget(plan, **technique.target(plan.target)))
    validate(changed)
    return changed


# --- Measuring -------------------------------------------------------------------------------------------------------------


@dataclass
class Ablation(Kept):
    """One technique switched off on one model."""

    model: str
    technique: str
    instead: str
    context: int
    tokens_timed: int
    repeats: int
    ms: float  # per token, median
    base_ms: float  # of the kernel as it is, median of those timed right before
    ratio: float  # median of the pairs' ratios; above 1: the technique makes the kernel faster
    registers: int
    same_tokens: bool | None  # as the base; None: not expected

    @property
    def key(self) -> tuple[object, ...]:
        """See `Kept`."""
        return self.gpu, self.model, self.context, self.technique, self.instead


def place(runner: CudaRunner, plan: Plan, table: Callable[[Plan, Tape], np.ndarray] | None = None) -> dict[str, int]:
    """Upload what tells the blocks which tiles they own and where their chunks are, as far as it differs: the kernel's parameters.

    table: makes another table of chunks than the usual one.
    """
    if table is None and plan.stages == runner.plan.stages:
        return {}
    tape = lay_tapes(plan)
    assert tape.nbytes <= runner.arena_bytes
    return owners(runner.context, plan, tape, (table or chunk_table)(plan, tape))


@contextmanager
def parameters(runner: CudaRunner, given: Mapping[str, int]) -> Iterator[None]:
    """Launch with these parameters for a while."""
    usual = {name: getattr(runner.params, name) for name in given}
    for name, value in given.items():
        setattr(runner.params, name, value)
    try:
        yield
    finally:
        for name, value in usual.items():
            setattr(runner.params, name, value)


def time_launches(runner: CudaRunner, start: int, count: int) -> tuple[float, list[int]]:
    """Seconds on the device for `count` greedy tokens, a launch for each, and the tokens."""
    made = [1]
    runner.context.use()
    first = runner.context.event()
    for i in range(count):
        runner.launch(made[-1:], start + i, 1)
        runner.finish()
        made.append(int(runner.tokens[0]) & 0xFFFFFFFF)
    return runner.context.elapsed(first, runner.context.event()), made[1:]


def time_tokens(runner: CudaRunner, start: int, count: int) -> tuple[float, list[int]]:
    """Seconds on the device for one launch of `count` greedy tokens, and the tokens."""
    seconds = runner.time_generate(start, count)
    return seconds, [int(word) & 0xFFFFFFFF for word in runner.tokens[:count]]


Built = tuple[Technique, Plan, Kernel]


def in_pairs(runner: CudaRunner, built: Built, options: argparse.Namespace) -> tuple[list[tuple[float, float]], list[int]]:
    """Milliseconds a token of a variant and of the base, time after time, and the variant's tokens. Raises DeviceError if it fails."""
    technique, plan, kernel = built
    timer = time_launches if technique.launches else time_tokens
    function, given = runner.ready(kernel, plan), place(runner, plan, technique.table)
    made: list[int] = []
    pairs = []
    for _ in range(options.repeats + 1):
        base, _ = time_tokens(runner, options.context, options.tokens)
        with runner.instead(function, plan), parameters(runner, given):
            seconds, made = timer(runner, options.context, options.tokens)
        pairs.append((seconds / options.tokens * 1e3, base / options.tokens * 1e3))
    return pairs[1:], made  # the first warms up


def ablate(runner: CudaRunner, model: str, built: Sequence[Built], options: argparse.Namespace) -> Iterator[Ablation]:
    """A record for each variant, as it is measured; told of and passed over are those whose kernel spills or fails."""
    where = whence(runner.info.name, options.commit)
    _, expected = time_tokens(runner, options.context, options.tokens)
    for variant in built:
        technique, _, kernel = variant
        try:
            if kernel.spills:
                raise DeviceError(f"its kernel spills {kernel.spills} bytes")
            pairs, made = in_pairs(runner, variant, options)
        except DeviceError as error:
            print(f"  {technique.name}: {technique.instead}: passed over, {error}", flush=True)
            continue
        times, bases = zip(*pairs, strict=True)
        yield Ablation(
            model, technique.name, technique.instead, options.context, options.tokens, options.repeats, statistics.median(times),
            statistics.median(bases), statistics.median(a / b for a, b in pairs), kernel.registers,
            made == expected if technique.same_tokens else None, **where,
        )  # fmt: skip


def build_all(plan: Plan, pool: ThreadPoolExecutor, techniques: Sequence[Technique]) -> list[Future[Built]]:
    """Begin to build the kernels of all variants."""

    def one(technique: Technique) -> Built:
        changed = without(plan, technique)
        return technique, changed, build(changed, [[*patch] for patch in technique.patches])

    return [pool.submit(one, technique) for technique in techniques]


def main() -> None:
    """Model by model; each record is merged into the results of this GPU as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="named shapes (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="techniques whose name holds this text")
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = [t for t in TECHNIQUES if options.only in t.name]
    try:
        with ThreadPoolExecutor() as pool:
            plans = {name: plan_for_gpu(shape(name), options.context + options.tokens) for name in options.models.split(",")}
            building = {name: build_all(plan, pool, chosen) for name, plan in plans.items()}
            for name, plan in plans.items():
                runner = load(plan, RandomWeights(plan.config))
                try:
                    runner.fill_kv()
                    built = [future.result() for future in building[name]]
                    print(f"{name} at {options.context}, {runner.info.name}", flush=True)
                    for record in ablate(runner, name, built, options):
                        save([record], results_file(options.results, record.gpu, "ablation"))
                        tokens = {True: "same tokens", False: "OTHER TOKENS", None: ""}[record.same_tokens]
                        print(f"  {record.technique}: {record.instead}: {record.ms:.4f} ms, {record.ratio - 1:+.2%}  {tokens}", flush=True)
                finally:
                    runner.close()
    except (FlashFormerError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
