"""A second kernel for prompts, of several columns, beside one of one column that makes the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...plan import Plan, in_batches
from ...tape import Tape, reordered
from ...targets import get
from .. import Turn
from .codegen import Params, Source
from .columns import Columns
from .compile import Kernel
from .launcher import Launcher, chunk_table

if TYPE_CHECKING:
    from .runner import CudaRunner


def prompt_plan(plan: Plan) -> Plan:
    """The plan of the kernel for prompts beside that of `plan`: the same chunks, in its own batches; as many finishers as are usual."""
    target = replace(plan.target, finisher_warps=get(plan.target.name).finisher_warps)
    stages = tuple(
        replace(s, geometry=in_batches(s.geometry, target, plan.prompt_columns, s.count)) if s.geometry else s for s in plan.stages
    )
    return replace(plan, target=target, stages=stages, columns=plan.prompt_columns, prompt_columns=0)


class PromptKernel(Launcher):
    """Feeds tokens, `plan.prompt_columns` a pass, on the weights and the KV cache of a runner.

    Both kernels read the same tapes, each in an order of its own. It sums in another order than the runner's
    own kernel does: so what it has fed must never depend on what else there is to do (turns.py, scheduler.py).
    """

    def __init__(self, runner: CudaRunner, plan: Plan, tape: Tape, source: Source, kernel: Kernel) -> None:
        """`plan` is a `prompt_plan`, `source` and `kernel` are its; `tape` is the runner's. Raises DeviceError where it does not fit."""
        self.context, self.plan, self.source = runner.context, plan, source
        self.function = self.ready(kernel, plan)
        self.params = Params.from_buffer_copy(runner.params)
        for name, value in self.claim_exchange().items():
            setattr(self.params, name, value)
        if plan.stages != runner.plan.stages:
            entries = chunk_table(plan, reordered(tape, runner.plan, plan))
            self.params.table = self.context.upload(entries, "chunk table")
        self.columns = plan.columns
        self.many: Columns = Columns(self)

    def feed(self, tokens: Sequence[int], start: int, slot: int) -> None:
        """Compute what the KV cache of a slot holds of `tokens` at positions start... Raises DeviceError where the kernel fails."""
        for _ in self.many.run([Turn(slot, tokens, start, 1)]):
            pass  # what follows is known, or what is wrong with its scores is told by who feeds the last token
