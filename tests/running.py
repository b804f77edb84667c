"""A model of a checkpoint, planned, validated and run on some backend, with its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from flashformer.backends import Runner
from flashformer.check import Comparison
from flashformer.checkpoint import Checkpoint
from flashformer.formats import Format
from flashformer.models import build_graph
from flashformer.plan import KvType, Plan, make_plan
from flashformer.reference import Reference
from flashformer.targets import Target
from flashformer.validate import validate

R = TypeVar("R", bound=Runner)


def assert_near(result: Comparison, most: float) -> None:
    """Everything is within tolerance, and the root mean square error is at most so much of that of the logits.

    NOTE: random models with quantised heads have one token with nearly all of the probability, so that KL alone would pass anything.
    """
    assert result.within, result.describe()
    assert result.rms_error <= most * result.rms_reference, result.describe()


@contextmanager
def run_checkpoint(
    checkpoint: Checkpoint, load: Callable[[Plan, Checkpoint], R], target: Target, max_context: int, workers: int,
    formats: Mapping[str, Format] | None = None, kv_type: KvType = "native", columns: int = 1, slots: int = 1,
) -> Iterator[tuple[R, Reference]]:  # fmt: skip
    """The runner that `load` makes of a plan for `target`, closed at the end, and the reference."""
    graph = build_graph(checkpoint.config)
    plan = make_plan(checkpoint.config, graph, target, max_context, workers, formats, kv_type, columns, slots)
    validate(plan)
    runner = load(plan, checkpoint)
    try:
        yield runner, Reference(graph, checkpoint, kv_type=kv_type)
    finally:
        runner.close()
