"""Measure what sampling adds to a token on this GPU: writes benchmarks/results/sampling-<gpu>.json.

usage: python benchmarks/sampling.py [--model llama-3.2-1b] [--context 1024] [--repeats 9] [--commit HASH] [--results FOLDER]

The time of a token is the difference between long and short launches by their difference in tokens, so that what a launch costs
once does not count. Every kind of sampling is timed in turn, again and again; what it adds is the median of the differences to the
greedy launches of the same turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from flashformer import FlashFormerError, SamplingParams
from flashformer.backends.cuda import RandomWeights, load
from flashformer.backends.cuda.runner import CudaRunner
from flashformer.backends.sampling import Sampling
from flashformer.bench import plan_for_gpu
from flashformer.records import results_file, whence
from flashformer.shapes import shape

RESULTS = Path(__file__).parent / "results"
SHORT, LONG = 32, 160  # tokens of a launch
KINDS: dict[str, dict[str, float | int | dict[int, float]]] = {
    "greedy": {},
    "greedy again": {},  # how far two equal kinds differ
    "temperature": {"temperature": 0.8},
    "penalties and bias": {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {5: 1.0}},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "logprobs": {"logprobs": 0},
    "20 logprobs": {"logprobs": 20},
    "all": {
        "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1, "presence_penalty": 0.1,
        "frequency_penalty": 0.1, "logit_bias": {5: 1.0}, "logprobs": 20,
    },
}  # fmt: skip


def token_us(runner: CudaRunner, context: int, sampling: Sampling) -> float:
    """Microseconds of a token."""
    short, long = (runner.time_generate(context, count, sampling) for count in (SHORT, LONG))
    return (long - short) / (LONG - SHORT) * 1e6


def measure(model: str, context: int, repeats: int) -> list[dict[str, object]]:
    """One record for each kind of sampling."""
    config = shape(model)
    runner = load(plan_for_gpu(config, context + LONG), RandomWeights(config))
    try:
        runner.fill_kv()
        kinds = {
            name: SamplingParams(seed=1, **options).lower(config.vocab_size, [1])  # type: ignore[arg-type]
            for name, options in KINDS.items()
        }
        turns = [{name: token_us(runner, context, sampling) for name, sampling in kinds.items()} for _ in range(repeats + 1)][1:]
        return [
            {
                "model": model, "vocabulary": config.vocab_size, "context": context, "sampling": name, "options": KINDS[name],
                "us_per_token": statistics.median(turn[name] for turn in turns),
                "added_us": {
                    "median": statistics.median(turn[name] - turn["greedy"] for turn in turns),
                    "min": min(turn[name] - turn["greedy"] for turn in turns),
                    "max": max(turn[name] - turn["greedy"] for turn in turns),
                },
                "repeats": repeats, "gpu": runner.info.name,
            }
            for name in KINDS
        ]  # fmt: skip
    finally:
        runner.close()


def main() -> None:
    """Measure, print, and replace the file of this GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        records = measure(options.model, options.context, options.repeats)
    except FlashFormerError as error:
        sys.exit(f"error: {error}")
    where = whence(str(records[0]["gpu"]), options.commit)
    path = results_file(options.results, str(records[0]["gpu"]), "sampling")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{**record, **where} for record in records], indent=1) + "\n")
    for record in records:
        added = record["added_us"]
        assert isinstance(added, dict)
        spread = f"{added['median']:+6.2f} ({added['min']:+.2f} to {added['max']:+.2f})"
        print(f"{record['sampling']:20} {record['us_per_token']:9.2f} us a token, {spread}")


if __name__ == "__main__":
    main()
