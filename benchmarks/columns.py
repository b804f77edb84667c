"""Measure what a pass of several columns costs on this GPU: writes benchmarks/results/columns-<gpu>.json.

usage: python benchmarks/columns.py [--models llama-3.1-8b] [--weights bf16,int4] [--columns 1,2,4,8,16] [--context 1024] [--repeats 5]
                                    [--prompt-columns 16] [--baseline 8] [--no-check]

Each kernel runs passes of one sequence up to as many as it has columns, and prompts, which fill all columns. The time of a pass is the
difference between long and short launches by their difference in passes. The kernel of one column is measured in the same process, before
and after the others. --baseline measures torch.compile with so many sequences, on weights of bf16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashformer import FlashFormerError
from flashformer.backends import Turn
from flashformer.backends.cuda import RandomWeights, load
from flashformer.backends.cuda.prompts import PromptKernel
from flashformer.backends.cuda.runner import CudaRunner
from flashformer.bench import check_kernel, plan_for_gpu
from flashformer.formats import NAMED
from flashformer.records import Kept, results_file, save, whence
from flashformer.shapes import shape

RESULTS = Path(__file__).parent / "results"
SHORT, LONG = 16, 80  # passes of a launch


@dataclass
class Pass(Kept):
    """A kernel's pass with one load of its columns."""

    model: str
    weights: str
    columns: int  # of the kernel; 0: it is not ours
    context: int
    load: str  # what the columns carry, or whose the kernel is
    repeats: int
    ms: dict[str, float]  # min, median, max
    ratio: float  # of the medians: to a pass of the kernel that was measured first in the same process
    host_us: float | None  # processor time of the host for each token, where one sequence makes them
    checked: dict[str, float] | None  # the kernel against the reference; None: not checked
    sleep_us: float | None = None  # processor time of a bare sleep as long as a pass: what waking once costs this host

    @property
    def key(self) -> tuple[object, ...]:
        """See `Kept`."""
        return self.gpu, self.model, self.weights, self.columns, self.context, self.load


@dataclass
class Times:
    """What one kernel took: milliseconds of a pass, by load."""

    columns: int
    by_load: dict[str, list[float]]
    host_us: float | None = None
    sleep_us: float | None = None
    checked: dict[str, float] | None = None


def turns(sequences: int, context: int, count: int) -> list[Turn]:
    """Tokens of some sequences, each in a slot of its own."""
    return [Turn(slot, [1], context, count) for slot in range(sequences)]


def launch_seconds(runner: CudaRunner, sequences: int, context: int, count: int) -> float:
    """Seconds on the device for one launch of `count` passes with a token of each sequence."""
    return runner.time_generate(context, count) if runner.columns == 1 else runner.time_turns(turns(sequences, context, count))


def pass_ms(runner: CudaRunner, sequences: int, context: int) -> float:
    """Milliseconds of a pass with a token of each sequence."""
    short, long = (launch_seconds(runner, sequences, context, count) for count in (SHORT, LONG))
    return (long - short) / (LONG - SHORT) * 1e3


def prompt_ms(runner: CudaRunner | PromptKernel, context: int) -> float:
    """Milliseconds of a pass that feeds as many tokens of a prompt as there are columns."""
    short, long = (runner.time_turns([Turn(0, [1] * (passes * runner.columns), context, 1)]) for passes in (SHORT, LONG))
    return (long - short) / (LONG - SHORT) * 1e3


def host_us(runner: CudaRunner, context: int) -> float:
    """Microseconds of the host's processor for each token of a launch, as a user gets them."""
    for _ in runner.run([Turn(0, [1], context, 2)]):
        pass  # with what is done once
    began, count = time.process_time(), 4 * LONG
    made = sum(1 for _ in runner.run([Turn(0, [1], context, count)]))
    return (time.process_time() - began) / made * 1e6


def sleep_us(seconds: float) -> float:
    """Microseconds of the host's processor for a bare sleep of so long."""
    began, count = time.process_time(), 2 * LONG
    for _ in range(count):
        time.sleep(seconds)
    return (time.process_time() - began) / count * 1e6


def measure(
    model: str, weights: str, columns: int, context: int, repeats: int, checked: bool, prompt_columns: int = 0
) -> tuple[Times, str]:
    """One kernel with each number of sequences, and with prompts, or with a kernel for prompts beside it; the GPU's name."""
    config = shape(model)
    drawn = RandomWeights(config, format=NAMED[weights])
    positions = context + LONG * max(columns, prompt_columns, 4) + 1
    plan = plan_for_gpu(config, positions, drawn.formats, columns=columns, slots=columns, prompt_columns=prompt_columns)
    runner = load(plan, drawn)
    try:
        quality = check_kernel(runner, drawn) if checked else None
        runner.fill_kv()
        found = Times(columns, {}, checked=quality)
        for _ in range(repeats + 1):
            for n in (n for n in (1, 2, 4, 8, 16) if n <= columns):
                found.by_load.setdefault(f"{n} sequences", []).append(pass_ms(runner, n, context))
            if columns > 1:
                found.by_load.setdefault("prompt", []).append(prompt_ms(runner, context))
            elif runner.prompts:
                found.by_load.setdefault(f"prompt, {prompt_columns} columns beside it", []).append(prompt_ms(runner.prompts, context))
        found.by_load = {load: times[1:] for load, times in found.by_load.items()}  # the first warms up
        found.host_us = host_us(runner, context)
        found.sleep_us = sleep_us(statistics.median(found.by_load["1 sequences"]) / 1e3)
        return found, runner.info.name
    finally:
        runner.close()


def baseline(model: str, sequences: int, context: int, repeats: int) -> tuple[Times, str]:
    """torch.compile with so many sequences."""
    import torch
    from baselines import torch_compile

    ((_, ms),) = torch_compile.measure(shape(model), [context], LONG, repeats, sequences=sequences)
    return Times(0, {f"torch.compile {torch.__version__}, {sequences} sequences": [ms]}), torch.cuda.get_device_name()


def measured(model: str, weights: str, options: argparse.Namespace) -> Iterator[tuple[Times, str]]:
    """Each kernel's times, as they are there."""
    for columns in map(int, options.columns.split(",")):
        beside = options.prompt_columns if columns == 1 else 0
        yield measure(model, weights, columns, options.context, options.repeats, not options.no_check, beside)
    if options.baseline and weights == "bf16":
        yield baseline(model, options.baseline, options.context, options.repeats)


def records(found: Times, base: float, about: Sequence[object], where: dict[str, str]) -> list[Pass]:
    """What is kept of one kernel; `base`: milliseconds that others are compared with; `about`: model, weights, context, repeats."""
    model, weights, context, repeats = about
    return [
        Pass(
            model, weights, found.columns, context, load, repeats,  # type: ignore[arg-type]
            {"min": min(ms), "median": statistics.median(ms), "max": max(ms)}, statistics.median(ms) / base,
            found.host_us if load == "1 sequences" else None, found.checked, found.sleep_us if load == "1 sequences" else None, **where,
        )
        for load, ms in found.by_load.items()
    ]  # fmt: skip


def main() -> None:
    """Measure, print, and merge into the file of this GPU as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-3.1-8b")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--columns", default="1,2,4,8,16,1")
    parser.add_argument("--prompt-columns", type=int, default=0, help="of a kernel for prompts beside that of one column")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--baseline", type=int, metavar="SEQUENCES", help="measure torch.compile, too")
    parser.add_argument("--no-check", action="store_true", help="do not compare with the reference first")
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        for model in options.models.split(","):
            for weights in options.weights.split(","):
                base = 0.0
                for found, gpu in measured(model, weights, options):
                    base = base or statistics.median(next(iter(found.by_load.values())))
                    kept = records(found, base, (model, weights, options.context, options.repeats), whence(gpu, options.commit))
                    save(kept, results_file(options.results, gpu, "columns"))
                    for r in kept:
                        host = f", {r.host_us:.1f} us of the host a token, {r.sleep_us:.1f} a sleep" if r.host_us is not None else ""
                        name = f"{model} {weights}, {r.columns or 'not our'} columns, {r.load}"
                        print(f"{name:60} {r.ms['median']:8.4f} ms a pass, {r.ratio:.3f}x{host}", flush=True)
    except FlashFormerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
