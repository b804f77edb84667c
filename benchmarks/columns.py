"""Measure what a pass of several columns costs on this GPU: writes benchmarks/results/columns-<gpu>.json.

usage: python benchmarks/columns.py [--models llama-3.1-8b] [--weights bf16,int4] [--columns 1,2,4,8,16] [--context 1024] [--repeats 5]
                                    [--baseline 8] [--no-check]

Each kernel runs passes of one sequence up to as many as it has columns, and prompts, which fill all columns. The time of a pass is the
difference between long and short launches by their difference in passes. The kernel of one column is measured in the same process, before
and after the others. --baseline measures torch.compile with so many sequences, on weights of bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path

from flashformer import FlashFormerError
from flashformer.backends import Turn
from flashformer.backends.cuda import RandomWeights, load
from flashformer.backends.cuda.runner import CudaRunner
from flashformer.bench import check_kernel, plan_for_gpu
from flashformer.formats import NAMED
from flashformer.records import commit, driver_version, results_file
from flashformer.shapes import shape

RESULTS = Path(__file__).parent / "results"
SHORT, LONG = 16, 80  # passes of a launch



def pass_ms(runner: CudaRunner, sequences: int, context: int) -> float:
    """Milliseconds of a pass with a token of each sequence."""
    if runner.columns == 1:
        short, long = (runner.time_generate(context, count) for count in (SHORT, LONG))
    else:
        short, long = (runner.time_turns([Turn(i, [1], context, count) for i in range(sequences)]) for count in (SHORT, LONG))
    return (long - short) / (LONG - SHORT) * 1e3


def prompt_ms(runner: CudaRunner, context: int) -> float:
    """Milliseconds of a pass that feeds as many tokens of a prompt as there are columns."""
    short, long = (runner.time_turns([Turn(0, [1] * (passes * runner.columns), context, 1)]) for passes in (SHORT, LONG))
    return (long - short) / (LONG - SHORT) * 1e3


def measure(model: str, weights: str, columns: int, context: int, repeats: int, checked: bool) -> list[dict[str, object]]:
    """Records of one kernel: of each number of sequences, and of prompts."""
    config = shape(model)
    drawn = RandomWeights(config, format=NAMED[weights])
    positions = context + LONG * columns + 1
    runner = load(plan_for_gpu(config, positions, drawn.formats, columns=columns, slots=columns), drawn)
    try:
        quality = check_kernel(runner, drawn) if checked else None
        runner.fill_kv()
        numbers = [n for n in (1, 2, 4, 8, 16) if n <= columns]
        kinds: dict[str, list[float]] = {}
        for _ in range(repeats + 1):
            for n in numbers:
                kinds.setdefault(f"{n} sequences", []).append(pass_ms(runner, n, context))
            if columns > 1:
                kinds.setdefault("prompt", []).append(prompt_ms(runner, context))
        return [
            {
                "model": model, "weights": weights, "columns": columns, "context": context, "pass": kind, "repeats": repeats,
                "ms": {"min": min(times[1:]), "median": statistics.median(times[1:]), "max": max(times[1:])},
                "checked": quality, "gpu": runner.info.name,
            }
            for kind, times in kinds.items()
        ]  # fmt: skip
    finally:
        runner.close()


def baseline(model: str, sequences: int, context: int, repeats: int) -> dict[str, object]:
    """A record of torch.compile."""
    import torch
    from baselines import torch_compile

    ((_, ms),) = torch_compile.measure(shape(model), [context], LONG, repeats, sequences=sequences)
    name = f"torch.compile {torch.__version__}, {sequences} sequences"
    return {
        "model": model, "weights": "bf16", "columns": None, "context": context, "pass": name, "repeats": repeats, "ms": {"median": ms},
        "checked": None, "gpu": torch.cuda.get_device_name(),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write the file of this GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-3.1-8b")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--columns", default="1,2,4,8,16,1")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--baseline", type=int, metavar="SEQUENCES", help="measure torch.compile, too")
    parser.add_argument("--no-check", action="store_true", help="do not compare with the reference first")
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    records: list[dict[str, object]] = []

    def keep(record: dict[str, object], base: float | None) -> float:
        """Print it beside the first one's milliseconds, and return those."""
        records.append(record)
        ms = record["ms"]
        assert isinstance(ms, dict)
        base = ms["median"] if base is None else base
        name = f"{record['model']} {record['weights']}, {record['columns'] or ''} columns, {record['pass']}"
        print(f"{name:60} {ms['median']:8.4f} ms a pass, {ms['median'] / base:.3f}x", flush=True)
        return base

    try:
        for model in options.models.split(","):
            for weights in options.weights.split(","):
                base: float | None = None
                for columns in map(int, options.columns.split(",")):
                    for record in measure(model, weights, columns, options.context, options.repeats, not options.no_check):
                        base = keep(record, base)
                if options.baseline and weights == "bf16":
                    keep(baseline(model, options.baseline, options.context, options.repeats), base)
    except FlashFormerError as error:
        sys.exit(f"error: {error}")
    where = {"driver": driver_version(), "date": date.today().isoformat(), "commit": options.commit or commit()}
    path = results_file(options.results, str(records[0]["gpu"]), "columns")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{**record, **where} for record in records], indent=1) + "\n")


if __name__ == "__main__":
    main()
