"""Numbers of a target that are best found by trying: searched on the present GPU, kept in the cache folder, used by whoever loads.

They decide how far the stream runs ahead, when readers look, and how attention is shared out; weights and buffers stay where they
are. The defaults in targets/ are good: this looks for what one model on one GPU has left.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, env
from .backends import Progress, no_progress
from .backends.cuda.codegen import generate
from .build import digest
from .errors import BuildError
from .plan import Plan, retarget
from .targets import Target

if TYPE_CHECKING:
    from .backends.cuda import CudaRunner

MARGIN = 0.002  # of the time: less is noise
TOKENS, ROUNDS = 128, 5  # of each timing
Measure = Callable[[Sequence[Target]], list[list[float]]]  # seconds of each target, round by round; no rounds: it cannot run


def choices(target: Target) -> dict[str, tuple[Any, ...]]:
    """The values that are tried for each number, in the order of the search."""

    def times(number: int, *factors: float) -> tuple[int, ...]:
        return tuple(round(number * factor) for factor in factors)

    windows = [tuple((waiting, nbytes * eighths // 8) for waiting, nbytes in target.window) for eighths in (6, 7, 8, 10, 12)]
    found: dict[str, tuple[Any, ...]] = {
        "exchange_copies": (1, 2, 4, 8),
        "first_look_cycles": times(target.first_look_cycles, 0, 0.7, 0.85, 1, 1.15, 1.3),
        "window": tuple(windows),
        "kv_min_blocks": (1, 2, 4, 8),
        "finisher_warps": (2, 3, 4),
    }
    if target.calm_window:
        found["calm_window"] = times(target.calm_window, 0, 0.75, 1, 1.25)
    if target.prefetch_chunks:
        found["prefetch_chunks"] = times(target.prefetch_chunks, 0, 0.5, 1, 2)
        found["prefetch_cycles"] = times(target.prefetch_cycles, 0.9, 1, 1.1, 1.25)
    return found


# --- What is kept ----------------------------------------------------------------------------------------------------------


def place(plan: Plan, gpu: str) -> Path:
    """Where the numbers for a plan with its target's defaults are kept: one file for a GPU and a kernel's source, in this version."""
    return env.cache_dir() / "tuned" / f"{digest({'version': __version__, 'gpu': gpu, 'source': generate(plan).text})}.json"


def tuned(plan: Plan, gpu: str) -> Plan:
    """The plan with the numbers that were found for it on this GPU, or as it is where there are none (or none that can be read)."""
    path = place(plan, gpu)
    try:
        kept: dict[str, Any] = json.loads(path.read_bytes())["target"]
        known = choices(plan.target)
        values = {name: next(v for v in known[name] if json.loads(json.dumps(v)) == value) for name, value in kept.items()}
    except FileNotFoundError:
        return plan
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        env.debug(1, f"tuned numbers: {path} is passed over ({type(error).__name__})")
        return plan
    env.debug(1, lambda: f"tuned numbers: {', '.join(f'{name} {value}' for name, value in values.items())}")
    return retarget(plan, **values)


def differences(usual: Target, target: Target) -> dict[str, Any]:
    """The searched numbers in which a target is not as usual."""
    return {name: getattr(target, name) for name in choices(usual) if getattr(target, name) != getattr(usual, name)}


def keep(plan: Plan, gpu: str, target: Target, facts: dict[str, Any]) -> Path:
    """Remember a target for a plan, with `facts` for whoever reads the file. Raises BuildError where the cache cannot be written."""
    path = place(plan, gpu)
    beside = path.with_suffix(f".{os.getpid()}")
    content = {"gpu": gpu, "version": __version__, **facts, "target": differences(plan.target, target)}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(path)
    except OSError as error:
        raise BuildError(
            f"The cache folder {env.cache_dir()} cannot be used ({error.strerror}); make it writable, or set FF_CACHE_DIR to another folder"
        ) from error
    return path


def forget(plan: Plan, gpu: str) -> bool:
    """Remove what is kept for a plan; whether there was anything."""
    path = place(plan, gpu)
    was = path.exists()
    path.unlink(missing_ok=True)
    return was


# --- The search ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    target: Target  # the winner; the one that was given, where no other is faster beyond doubt
    before: float  # seconds a token
    after: float
    complete: bool  # there was time for every number


def search(
    start: Target, measure: Measure, seconds: float, progress: Progress = no_progress, tell: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:  # fmt: skip
    """Number by number, take the value that is faster than the best so far by MARGIN; at the end the winner must also beat the start.

    Ends within `seconds`, as far as no step takes longer than those before it. tell: a line for each step that brought something.
    """
    began, best, longest = clock(), start, 0.0
    before = after = math.nan
    steps = choices(start)
    done = 0
    for name, values in steps.items():
        if done and clock() - began + 2 * longest > seconds:  # this step, and the last comparison
            break
        progress("tuning", done, len(steps))
        at = clock()
        others = [replace(best, **{name: value}) for value in values if value != getattr(best, name)]
        own, *timed = measure([best, *others])
        if done == 0:
            before = after = statistics.median(own)
        ratio, winner = min(((_ratio(t, own), i) for i, t in enumerate(timed)), default=(1.0, 0))
        if ratio < 1 - MARGIN:
            tell(f"{name} {getattr(best, name)} -> {getattr(others[winner], name)}: {1 - ratio:.2%} less time")
            best = others[winner]
        longest = max(longest, clock() - at)
        done += 1
    if best != start:
        first, last = measure([start, best])
        before, after = statistics.median(first), statistics.median(last)
        if _ratio(last, first) >= 1 - MARGIN:
            best, after = start, before
    progress("tuning", len(steps), len(steps))
    return Found(best, before, after, done == len(steps))


def _ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """Median over the rounds of a time against another of the same round; infinite where there are none."""
    return statistics.median(a / b for a, b in zip(times, to, strict=True)) if times else math.inf


class Timer:
    """Times targets on a model in memory, in turns, so that what changes on the GPU meanwhile meets all of them alike."""

    def __init__(self, runner: CudaRunner, context: int) -> None:
        """`runner` was loaded with the most copies of vectors that any target has."""
        self.runner, self.context = runner, context

    def __call__(self, targets: Sequence[Target]) -> list[list[float]]:
        """See `Measure`. Kernels are built side by side; one that spills is not run."""
        from .backends.cuda.compile import compile_source

        runner = self.runner
        plans = [replace(runner.plan, target=target) for target in targets]
        with ThreadPoolExecutor() as pool:
            kernels = [*pool.map(lambda plan: compile_source(generate(plan).text, plan.target), plans)]
        ready = [(i, runner.ready(k, p), p) for i, (k, p) in enumerate(zip(kernels, plans, strict=True)) if k.spills == 0]
        times: list[list[float]] = [[] for _ in targets]
        for round in range(ROUNDS + 1):
            for i, function, plan in ready:
                with runner.instead(function, plan):
                    seconds = runner.time_generate(self.context, TOKENS) / TOKENS
                if round:  # the first warms up
                    times[i].append(seconds)
        return times


def tune(model: str, context: int, seconds: float, progress: Progress, tell: Callable[[str], None]) -> None:
    """Search on this GPU, keep what is better than the defaults, and tell what came out.

    model: a named shape, or a checkpoint. Raises DeviceError without a GPU, InputError for a context that the model does not have.
    """
    from .backends.cuda import load
    from .bench import gpu, open_subject, plan_for_gpu, starts

    name = gpu().name
    with open_subject(model) as subject:
        (start,) = starts(subject.config, [context], TOKENS)
        plan = plan_for_gpu(subject.config, start + TOKENS, subject.formats)
        most = max(choices(plan.target)["exchange_copies"])
        runner = load(retarget(plan, exchange_copies=most), subject.weights, progress)
        try:
            runner.fill_kv()
            found = search(plan.target, Timer(runner, start), seconds, progress, tell)
        finally:
            runner.close()
    if not found.complete:
        tell(f"not all numbers were tried within {seconds:g} s")
    if found.target == plan.target:
        forget(plan, name)
        tell(f"{found.before * 1e3:.4f} ms/token: nothing is faster than the defaults by {MARGIN:.1%}")
        return
    facts = {"model": subject.name, "context": start, "ms": found.after * 1e3, "ms_before": found.before * 1e3}
    path = keep(plan, name, found.target, {**facts, "date": date.today().isoformat()})
    tell(f"{found.after * 1e3:.4f} ms/token in place of {found.before * 1e3:.4f}, from now on; kept in {path}")


def reset(model: str) -> bool:
    """Forget what was found for a model on this GPU; whether there was anything. Raises as `tune`."""
    from .bench import gpu, open_subject, plan_for_gpu

    name = gpu().name
    with open_subject(model) as subject:
        return forget(plan_for_gpu(subject.config, formats=subject.formats), name)
