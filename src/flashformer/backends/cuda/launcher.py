"""A kernel that is ready to run: its parameters, the memory of its exchanges, and one launch after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DeviceError
from ...plan import Plan
from ...tape import Tape
from .. import Turn
from .codegen import BEGINS, ROUND_TAGS, Params, Source, threads
from .compile import Kernel
from .driver import Context, check
from .ending import Endings
from .pace import Pace

if TYPE_CHECKING:
    from .columns import Columns

ABSENT = 0xFF  # bytes of kAbsent (exchange.cuh)


def chunk_table(plan: Plan, tape: Tape) -> np.ndarray:
    """The producers' table of chunks, uint32 [workers, chunks, 2]: `table` of `PARAMETERS`."""
    entries = np.zeros((plan.target.workers, tape.offset.shape[0], 2), np.uint32)
    entries[:, :, 0] = tape.offset.T
    entries[:, :, 1] = tape.size.T
    stages, workers = np.nonzero(tape.starts[1:] > tape.starts[:-1])
    entries[workers, tape.starts[stages, workers], 1] |= BEGINS
    for index, stage in enumerate(plan.stages):
        if stage.kind == "attention":
            entries[np.arange(plan.target.workers), tape.first_chunk(index), 0] = stage.layer
    return entries


def gave_up(source: Source, status: np.ndarray) -> DeviceError:
    """What a kernel's `status` says that waited too long."""
    where = int(status[0]) - 1
    stage = source.stage_names[where >> 16] if where >> 16 < len(source.stage_names) else "unknown"
    return DeviceError(
        f"the kernel waited too long and gave up: stage {stage!r}, layer {where & 0xFFFF}, block {int(status[1])}; "
        "please report this with the model's configuration"
    )


class Launcher:
    """What a runner's kernels have in common. `context`, `plan` and `source` come first, then `function` and `params`."""

    context: Context
    plan: Plan
    source: Source
    function: Any
    params: Params
    status: int  # address of what a stuck kernel reports
    exchange_bytes: int
    pace: Pace
    endings: Endings
    many: Columns | None  # how a kernel of several columns is told what to do

    def ready(self, kernel: Kernel, plan: Plan) -> Any:
        """The function of a kernel that was made for `plan`, loaded and allowed its shared memory."""
        function = self.context.function(self.context.load(kernel.cubin), "flashformer_decode")
        self.context.allow_shared(function, plan.target.shared_bytes)
        return function

    def claim_exchange(self) -> dict[str, int]:
        """Memory through which blocks exchange vectors, and where they report: parameters of the kernel."""
        self.pace = Pace()
        self.endings = Endings(self.context)
        self.exchange_bytes = self.source.exchange_words * 8
        self.status = self.context.allocate(8, "status", fill=0)
        return {"exchange": self.context.allocate(self.exchange_bytes, "exchanges", fill=0), "status": self.status, "epoch": 1}

    def start(self, steps: int) -> None:
        """Launch the kernel for so many passes at most, with the parameters as they are."""
        p, target = self.params, self.plan.target
        # Tags must never repeat: before they would wrap, the exchange memory is cleared and counting starts again.
        if (p.epoch + steps + 1) * max(self.plan.config.num_layers + 1, ROUND_TAGS) >= 1 << 32:
            self._clear_exchange()
        context, absent = self.context, 8 * self.source.plain_words
        if absent:  # no version of these vectors is there
            check(context.driver.cuMemsetD8Async(p.exchange, ABSENT, absent, context.stream), "prepare the exchanges")
        p.steps = steps
        p.run = p.run % 0x7FFFFFFF + 1
        context.launch(self.function, target.workers, threads(self.plan), (p,), target.shared_bytes, cooperative=True)
        p.epoch += steps

    def finish(self) -> None:
        """Wait for the kernel and raise DeviceError where it gave up."""
        self.context.wait()
        status = self.context.download(self.status, np.zeros(2, np.uint32), "status")
        if not status[0]:
            return
        self.context.driver.cuMemsetD8(self.status, 0, 8)
        self._clear_exchange()
        raise gave_up(self.source, status)

    def seconds(self, launch: Callable[[], None]) -> float:
        """Seconds on the device for one launch (benchmarks)."""
        self.context.use()
        first = self.context.event()
        launch()
        seconds = self.context.elapsed(first, self.context.event())
        self.finish()
        return seconds

    def time_turns(self, turns: Sequence[Turn]) -> float:
        """Seconds on the device for one launch of turns, by a kernel of several columns (benchmarks)."""
        if self.many is None:
            raise DeviceError("this kernel has one column")
        return self.seconds(partial(self.many.launch, turns))

    def _clear_exchange(self) -> None:
        """Forget every tag."""
        driver = self.context.driver
        driver.cuMemsetD8Async(self.params.exchange, 0, self.exchange_bytes, self.context.stream)
        self.context.wait()
        self.params.epoch = 1
