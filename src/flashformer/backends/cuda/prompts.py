"""A second kernel for prompts, of several columns, beside one of one column that makes the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...plan import Plan
from ...targets import get
from .. import Turn
from .codegen import Params, Source
from .columns import Columns
from .compile import Kernel
from .launcher import Launcher

if TYPE_CHECKING:
    from .runner import CudaRunner


def prompt_plan(plan: Plan) -> Plan:
    """The plan of the kernel for prompts beside that of `plan`: the same tapes, as many finishers as are usual."""
    target = replace(plan.target, finisher_warps=get(plan.target.name).finisher_warps)
    return replace(plan, target=target, columns=plan.prompt_columns, prompt_columns=0)


class PromptKernel(Launcher):
    """Feeds tokens, `plan.prompt_columns` a pass, on the weights and the KV cache of a runner.

    Its plan differs in the number of columns alone, so that both kernels read the same tapes. It sums in another order than the runner's
    own kernel does: so what it has fed must never depend on what else there is to do (turns.py, scheduler.py).
    """

    def __init__(self, runner: CudaRunner, source: Source, kernel: Kernel) -> None:
        """`source` and `kernel` are those of `prompt_plan`. Raises DeviceError where it does not fit."""
        self.context, self.plan, self.source = runner.context, prompt_plan(runner.plan), source
        self.function = self.ready(kernel, self.plan)
        self.params = Params.from_buffer_copy(runner.params)
        for name, value in self.claim_exchange().items():
            setattr(self.params, name, value)
        self.columns = self.plan.columns
        self.many: Columns = Columns(self)

    def feed(self, tokens: Sequence[int], start: int, slot: int) -> None:
        """Compute what the KV cache of a slot holds of `tokens` at positions start... Raises DeviceError where the kernel fails."""
        for _ in self.many.run([Turn(slot, tokens, start, 1)]):
            pass  # what follows is known, or what is wrong with its scores is told by who feeds the last token
