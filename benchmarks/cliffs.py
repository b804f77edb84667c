"""No cliffs: sizes that kernels are prone to stumble over, each between models that differ in that one number a little.

usage: python benchmarks/cliffs.py [--axes hidden_size,vocab_size] [--context 1024] [--tokens 64] [--repeats 3] [--predict]

Writes benchmarks/results/cliffs-<gpu>.json. --predict says what the plans promise, without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from flashformer.backends.cuda import RandomWeights
from flashformer.backends.cuda.codegen import generate
from flashformer.backends.cuda.compile import compile_source
from flashformer.bench import Bench, Subject, plan_for_gpu
from flashformer.config import ModelConfig
from flashformer.errors import FlashFormerError
from flashformer.explain import predict
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.records import Kept, Record, results_file, save
from flashformer.targets import get

RESULTS = Path(__file__).parent / "results"
MOST_STEP = 0.03  # of the ceiling, between neighbours
PREDICTED_FOR = "sm_90"  # with --predict
BASE = ModelConfig("LlamaForCausalLM", 3072, 16, 32, 8, 128, 8192, 32768, 1e-5, 5e5, 131072)


Model = tuple["Axis", int, ModelConfig]  # an axis, the number of a group, and a model of it


@dataclass(frozen=True)
class Axis:
    """One number of a model, the sizes that are asked about, and their neighbours: each group in ascending order."""

    name: str  # field of ModelConfig
    groups: tuple[tuple[int, ...], ...]
    bases: tuple[ModelConfig, ...]  # what else the models of a group are, 3 to 8 GB of them

    def models(self) -> Iterator[Model]:
        """Every model, group after group."""
        for number, (group, base) in enumerate(zip(self.groups, self.bases, strict=True)):
            for value in group:
                yield self, number, replace(base, **{self.name: value})  # type: ignore[arg-type]


_WIDE = replace(BASE, hidden_size=5120, num_layers=8)
AXES = (
    Axis("hidden_size", ((2432, 2560, 2688), (2944, 3072, 3200), (4864, 5120, 5376)), (replace(BASE, num_layers=20), BASE, _WIDE)),
    Axis(
        "ffn_size", ((6784, 6912, 7040), (9600, 9728, 9856), (25216, 25600, 25984)),
        (replace(BASE, hidden_size=2560, num_layers=20), replace(BASE, hidden_size=2560), replace(_WIDE, num_layers=6)),
    ),
    Axis("head_dim", ((48, 64, 80, 96, 112, 128, 144), (224, 240, 256)), (BASE, replace(BASE, num_heads=16))),
    Axis(
        "vocab_size",
        ((31000, 32000, 33000), (50000, 50257, 51200), (126976, 128256, 129536), (150016, 151936, 153600), (258048, 262144, 266240)),
        (replace(BASE, hidden_size=2048, num_layers=24),) * 5,
    ),
)  # fmt: skip


@dataclass
class Cliff(Kept):
    """One model of an axis."""

    axis: str
    group: int
    value: int
    context: int
    tokens_timed: int
    repeats: int
    ms: float  # per token, median
    spread: float  # (max - min) / median
    bytes_per_token: int
    read_ceiling_gb_s: float  # the best that any model of the run has met
    fraction_of_ceiling: float
    largest_step: float  # to a neighbour, in fractions of the ceiling
    predicted: float  # by `flashformer explain`
    at_most: float  # see `bound`

    @property
    def key(self) -> tuple[object, ...]:
        """See `Kept`."""
        return self.gpu, self.axis, self.value, self.context


def bound(plan: Plan) -> float:
    """The share of the bandwidth at which all blocks but the heaviest would wait for nothing but it: no stream can be faster."""
    total = np.zeros(plan.target.workers)
    for stage in plan.stages:
        if stage.geometry:
            nbytes = {tiles: stage.geometry.bytes_of(tiles) for tiles in set(stage.count)}
            total += [nbytes[tiles] for tiles in stage.count]
    return plan.weight_bytes() / float(total.max() * plan.target.workers)


def largest_steps(fractions: Sequence[float]) -> list[float]:
    """The larger of the differences of each to those beside it."""
    steps = [abs(a - b) for a, b in pairwise(fractions)]
    return [max(steps[max(i - 1, 0) : i + 1], default=0.0) for i in range(len(fractions))]


def make_records(models: Sequence[Model], plans: Sequence[Plan], measured: Sequence[Record]) -> list[Cliff]:
    """Records of all models; fractions are of the best ceiling that any of them has met, so that its noise makes no steps."""
    ceiling = max(r.read_ceiling_gb_s for r in measured)
    made = [
        Cliff(
            axis.name, number, getattr(config, axis.name), r.context, r.tokens_timed, r.repeats, r.ms, r.spread, r.bytes_per_token,
            ceiling, r.bytes_per_token / r.ms / 1e6 / ceiling, 0.0, predict(plan, r.context).fraction, bound(plan), **r.whence,
        )
        for (axis, number, config), plan, r in zip(models, plans, measured, strict=True)
    ]  # fmt: skip
    for _, group in groupby(made, key=lambda c: (c.axis, c.group)):
        beside = list(group)
        for record, step in zip(beside, largest_steps([c.fraction_of_ceiling for c in beside]), strict=True):
            record.largest_step = step
    return made


def promised(config: ModelConfig, name: str, context: int, tokens: int) -> tuple[Plan, Record]:
    """The plan for a typical GPU, and what `flashformer explain` predicts of it, as if it had been measured."""
    plan = make_plan(config, build_graph(config), get(PREDICTED_FOR), context + tokens)
    p = predict(plan, context)
    times = dict.fromkeys(("min", "median", "max"), p.milliseconds)
    ceiling = plan.target.bandwidth_gb_s
    return plan, Record(
        name, "bf16", 1, context, tokens, 0, times, 0.0, p.bytes_read, ceiling, p.fraction, None, "predicted",
        gpu=PREDICTED_FOR, driver="", date="", commit="",
    )


def show(records: Sequence[Cliff]) -> None:
    """A table for each axis, groups apart; steps beyond MOST_STEP in red."""
    for axis, mine in groupby(records, key=lambda c: c.axis):
        table = Table(title=f"{axis}, {records[0].gpu}, {records[0].context:,} positions", title_justify="left")
        for column in ("value", "GB", "ms/token", "of ceiling", "step", "predicted", "at most"):
            table.add_column(column, justify="right")
        for _, group in groupby(mine, key=lambda c: c.group):
            for c in group:
                step = f"[red]{c.largest_step:.1%}[/red]" if c.largest_step > MOST_STEP else f"{c.largest_step:.1%}"
                table.add_row(
                    f"{c.value:,}", f"{c.bytes_per_token / 1e9:.2f}", f"{c.ms:.4f}", f"{c.fraction_of_ceiling:.1%}", step,
                    f"{c.predicted:.1%}", f"{c.at_most:.1%}",
                )  # fmt: skip
            table.add_section()
        Console(width=120).print(table)


def measure(models: Sequence[Model], context: int, tokens: int, repeats: int) -> tuple[list[Plan], list[Record]]:
    """Build the kernels of all models side by side, then time one model after another."""
    plans = [plan_for_gpu(config, context + tokens) for _, _, config in models]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda plan: compile_source(generate(plan).text, plan.target), plans))
    measured = []
    for axis, _, config in models:
        subject = Subject(f"{axis.name} {getattr(config, axis.name)}", config, RandomWeights(config), formats={})
        with Bench(subject, [context], tokens, checked=False) as ready:
            measured.append(ready.measure(context, repeats))
        print(f"{subject.name}: {measured[-1].ms:.4f} ms, {measured[-1].fraction_of_ceiling:.1%}", flush=True)
    return plans, measured


def main() -> None:
    """Measure, or predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(axis.name for axis in AXES), help="(default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--predict", action="store_true", help="what the plans promise; needs no GPU")
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = {axis.name: axis for axis in AXES}
    try:
        models = [model for name in options.axes.split(",") for model in known[name].models()]
        if options.predict:
            both = [promised(config, axis.name, options.context, options.tokens) for axis, _, config in models]
            show(make_records(models, *zip(*both, strict=True)))
            return
        records = make_records(models, *measure(models, options.context, options.tokens, options.repeats))
        for record in records:
            record.commit = options.commit or record.commit
        save(records, results_file(options.results, records[0].gpu, "cliffs"))
        show(records)
    except KeyError as error:
        sys.exit(f"error: there is no axis {error}; known are {', '.join(known)}")
    except FlashFormerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
