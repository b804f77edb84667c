"""Measure what the results of a commit should hold and do not yet, most important first, for as long as there is time on the GPU.

usage: python benchmarks/refresh.py [--seconds 1800] [--only decode,columns] [--commit COMMIT] [--results DIR] [--list]

Each measurement is a run of another script of this folder. One that is cut short or fails is told, and the next ones go on; what is there
is not measured again, so that a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ablation
import losses

from flashformer.records import commit

HERE = Path(__file__).parent
CONTEXTS = (128, 1024, 4096, 32768)
TIMED = 128  # tokens, for which the longest context leaves room


def records_in(path: Path) -> list[dict[str, Any]]:
    """What a script has kept: records, or one."""
    kept = json.loads(path.read_text())
    return kept if isinstance(kept, list) else [kept]


@dataclass(frozen=True)
class Measurement:
    """One run of a script, which is also the beginning of the name of its results."""

    script: str
    options: tuple[str, ...]
    seconds: int  # that it takes on an H200, about
    records: Mapping[str, Any] = field(default_factory=dict)  # what those that it writes have in common
    contexts: tuple[int, ...] = ()  # of which they are; none: of any
    count: int = 1  # how many they are at least
    beside: str = ""  # what one of them is compared with
    timed: str = ""  # a field that one of them has

    def is_in(self, results: Path, commit: str) -> bool:
        """Whether its records are there, of this commit."""
        there = [
            record
            for path in results.glob(f"{self.script}-*.json")
            for record in records_in(path)
            if all(record[name] == value for name, value in {**self.records, "commit": commit}.items())
            if not self.contexts or {record["context"], record["context"] + TIMED}.intersection(self.contexts)
        ]
        compared = not self.beside or any(self.beside in record["baselines"] for record in there)
        return len(there) >= self.count and compared and (not self.timed or any(record.get(self.timed) is not None for record in there))

    def __str__(self) -> str:
        return " ".join((self.script, *self.options))


def decode(
    model: str, weights: str, seconds: int, contexts: Sequence[int] = (1024,), kv: str = "native", beside: str = "", prompts: bool = False
) -> Measurement:
    """Speed of decoding; `prompts`: and of prompts, until their first token."""
    options = ["--models", model, "--weights", weights, "--contexts", ",".join(map(str, contexts)), "--kv", kv]
    options += ["--baselines", beside or "none", *["--first-token"] * prompts]
    named = weights + ("" if kv == "native" else f", KV cache in {kv}")
    records, timed = {"model": model, "weights": named}, "first_token_ms" * prompts
    return Measurement("decode", tuple(options), seconds, records, tuple(contexts), len(contexts), beside, timed)


def columns(model: str, weights: str, seconds: int, most: int) -> Measurement:
    """Passes of several columns; the widest kernel comes last."""
    widths = [n for n in (1, 2, 4, 8, 16) if n <= most]
    options = ("--models", model, "--weights", weights, "--columns", ",".join(map(str, widths)), "--repeats", "3", "--no-check")
    return Measurement("columns", options, seconds, {"model": model, "weights": weights, "columns": widths[-1]})


def prompts(model: str, weights: str, seconds: int, columns: int) -> Measurement:
    """Passes of a kernel for prompts beside one of one column."""
    options = ("--models", model, "--weights", weights, "--columns", "1", "--prompt-columns", str(columns), "--repeats", "3", "--no-check")
    load = f"prompt, {columns} columns beside it"
    return Measurement("columns", options, seconds, {"model": model, "weights": weights, "columns": 1, "load": load})


def techniques(model: str, seconds: int) -> Measurement:
    """What each technique is worth; one or two may be passed over."""
    return Measurement("ablation", ("--models", model), seconds, {"model": model}, count=len(ablation.TECHNIQUES) - 2)


def measurements() -> Iterator[Measurement]:
    """All of them, most important first."""
    yield decode("llama-3.1-8b", "bf16", 80, CONTEXTS, prompts=True)
    yield decode("llama-3.1-8b", "int4", 65, CONTEXTS, prompts=True)
    yield decode("llama-3.1-8b", "bf16", 240, beside="torch.compile", prompts=True)
    yield decode("llama-3.1-8b", "int4", 240, beside="tinygemm", prompts=True)
    yield decode("llama-3.2-1b", "bf16", 80, CONTEXTS, beside="torch.compile", prompts=True)
    yield decode("llama-3.2-1b", "int4", 40, CONTEXTS, prompts=True)
    yield decode("qwen3-0.6b", "bf16", 20, CONTEXTS)
    yield decode("llama-3.2-3b", "bf16", 35, CONTEXTS)
    yield decode("llama-3.2-3b", "int4", 25)
    yield prompts("llama-3.1-8b", "bf16", 25, 16)
    yield prompts("llama-3.1-8b", "int4", 25, 16)
    yield prompts("llama-3.2-1b", "int4", 20, 16)
    yield columns("llama-3.1-8b", "bf16", 70, 16)
    yield columns("llama-3.1-8b", "int4", 60, 16)
    yield Measurement("soak", (), 300)
    yield Measurement("sampling", (), 30, {"model": "llama-3.2-1b"})
    yield Measurement("losses", (), 60, count=len(losses.MODELS.split(",")))
    yield techniques("llama-3.1-8b", 100)
    yield Measurement("cliffs", (), 120)
    for model, seconds in (("llama-3.2-1b", 20), ("llama-3.2-3b", 25), ("llama-3.1-8b", 30)):
        for weights in ("int8", "fp8", "mxfp4", "nf4"):
            yield decode(model, weights, seconds + 40 * (weights == "nf4"))  # whose reference is slow
    yield decode("qwen3-1.7b", "bf16", 25, CONTEXTS)
    yield Measurement("load", (), 90, count=2)
    yield columns("llama-3.2-1b", "bf16", 30, 8)
    yield columns("llama-3.2-1b", "int4", 30, 8)
    for weights, kv in (("int4", "native"), ("int4", "int8"), ("int4", "fp8"), ("bf16", "native")):
        yield decode("llama-3.1-8b", weights, 30, (131072,), kv)
    yield decode("qwen3-14b", "bf16", 60, CONTEXTS)
    yield decode("qwen3-32b", "bf16", 120, CONTEXTS)
    yield decode("llama-3.1-70b", "int4", 120)
    yield techniques("llama-3.2-1b", 60)
    yield techniques("qwen3-0.6b", 60)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600, help="after which all ends (default: %(default)s)")
    parser.add_argument("--only", default="", help="scripts, with commas between them")
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--list", action="store_true", help="say what is missing")
    options = parser.parse_args()
    of, end = options.commit or commit(), time.monotonic() + options.seconds
    chosen = [name for name in options.only.split(",") if name]
    for one in measurements():
        if (chosen and one.script not in chosen) or one.is_in(options.results, of):
            continue
        left = int(end - time.monotonic())
        if options.list or left < one.seconds:
            print(f"{one}: some {one.seconds} s" + ("" if options.list else f", {max(left, 0)} are left"), flush=True)
            continue
        began = time.monotonic()
        command = [sys.executable, str(HERE / f"{one.script}.py"), *one.options, "--commit", of, "--results", str(options.results)]
        try:
            code = subprocess.run(command, timeout=left, check=False).returncode
            told = f"failed with status {code}" if code else f"{time.monotonic() - began:.0f} s"
        except subprocess.TimeoutExpired:
            told = "cut short"
        print(f"{one}: {told}", flush=True)


if __name__ == "__main__":
    main()
