"""A third kernel, for long prompts: hundreds of tokens at a time, on the same weights and the same KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...geometry import Geometry, ceil_div, round_up
from ...plan import Plan
from ...tape import Tape, all_offsets
from .codegen import (
    OCTET,
    PREFILL_THREADS,
    PREFILL_TILES,
    PREFILL_TOKENS,
    PrefillParams,
    Source,
    most_shares,
    prefill_octets,
    prefill_places,
    prefill_shares,
)
from .compile import Kernel
from .driver import check
from .launcher import gave_up

if TYPE_CHECKING:
    from .runner import CudaRunner

STACK = 8  # tiles of weights whose rows have a part of the sums of squares
COPIED = 16  # bytes: copies are multiples of it
ROOM = 1024  # tokens of a launch, at most
LEAST = 17  # tokens of a prompt up to which it is not worth it: all but the last are one pass of 16 columns


def possible(plan: Plan) -> bool:
    """Whether there is such a kernel beside a plan's own.

    It takes zeros from codes, but not minimums, nor the only zero of a row; and copies the scales of a tile slice by slice.
    """

    def suits(g: Geometry) -> bool:
        f = g.format
        if not f.group:
            return f.offset == "none"
        return f.offset != "minimum" and g.fragment_columns // f.group * g.tile_rows * f.group_bytes % COPIED == 0

    geometries = [s.geometry for s in plan.stages if s.geometry and s.layer >= 0]
    return plan.prompt_columns > 0 and plan.target.prefill and all(map(suits, geometries))


def places(plan: Plan, tape: Tape) -> np.ndarray:
    """Where each tile's fragments and scales are: `places` of `PREFILL_PARAMETERS`."""
    whole = np.concatenate(all_offsets(plan, tape)).astype(np.uint64)
    return whole[: plan.config.num_layers * prefill_places(plan)[1]]  # the head is behind all layers


def room(plan: Plan) -> int:
    """Tokens of a launch, at most."""
    return min(ROOM, round_up(plan.max_context, PREFILL_TOKENS))


def token_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of a token in each of the vectors of `PREFILL_PARAMETERS`. NOTE: they begin as zeros, which columns of padding stay."""
    stages, rows = plan.layer_stages(0), plan.target.tile_rows
    return {
        "residual": round_up(plan.config.hidden_size, rows) * 4,
        "qkv": round_up(plan.buffer("qkv").values, rows) * 4,
        "queries": plan.config.num_heads * plan.kv.head_pad * 2,
        **{name: octets * OCTET * 2 for name, octets in prefill_octets(plan).items()},
        "moments": max(ceil_div(s.tiles, STACK) for s in stages if s.publish_gamma) * 4,
    }


def counters_bytes(plan: Plan) -> int:
    """Bytes of what counts blocks that meet: `arrived`, then `shared` of `PREFILL_PARAMETERS`."""
    return 8 * (1 + plan.config.num_layers * prefill_shares(plan)[1])


def splits_bytes(plan: Plan) -> int:
    """Bytes of the sums of splits."""
    return most_shares(plan) * PREFILL_TILES * plan.target.tile_rows * PREFILL_TOKENS * 4


def memory(plan: Plan) -> int:
    """Bytes of the GPU's memory that it takes beside the weights and the KV cache."""
    if not possible(plan):
        return 0
    table, each = plan.config.num_layers * prefill_places(plan)[1] * 8, token_bytes(plan)
    return room(plan) * sum(each.values()) + plan.slots * each["residual"] + table + counters_bytes(plan) + splits_bytes(plan)


class Prefill:
    """Fills the KV cache of a runner for pieces of a prompt.

    What it computes of a token depends on the tokens before it alone, and not on where a prompt is cut. Of the last layer it computes no
    more than the cache holds: the usual kernel goes on from there with the last token.
    """

    def __init__(self, runner: CudaRunner, tape: Tape, source: Source, kernel: Kernel) -> None:
        """`tape` is the runner's, `source` and `kernel` are for its plan. Raises DeviceError where the memory is short."""
        self.runner, self.source = runner, source
        plan, context = runner.plan, runner.context
        self.function = context.function(context.load(kernel.cubin), "flashformer_prefill")
        context.allow_shared(self.function, plan.target.shared_bytes)
        self.room = room(plan)
        self.status = context.allocate(8, "status", fill=0)
        self.counters, self.counters_bytes = context.allocate(counters_bytes(plan), "counters", fill=0), counters_bytes(plan)
        self._residual_bytes = token_bytes(plan)["residual"]
        self._last = context.allocate(plan.slots * self._residual_bytes, "a prompt's last vectors", fill=0)
        self.params = PrefillParams(
            places=context.upload(places(plan, tape), "places of weights"), arrived=self.counters, shared=self.counters + 8, room=self.room,
            splits=context.allocate(splits_bytes(plan), "sums of splits") if splits_bytes(plan) else 0,
            **{name: context.allocate(self.room * nbytes, "a prompt's vectors", fill=0) for name, nbytes in token_bytes(plan).items()},
        )  # fmt: skip

    def feed(self, tokens: Sequence[int], start: int, slot: int) -> None:
        """Compute what the KV cache of a slot holds of `tokens` at positions start... Raises DeviceError where the kernel fails."""
        runner = self.runner
        context = runner.context
        context.use()
        for first in range(0, len(tokens), self.room):
            piece = np.array(tokens[first : first + self.room], np.uint32)
            context.copy_async(runner.forced, piece.ctypes.data, piece.nbytes)
            self.launch(start + first, len(piece), slot)
            last = self.params.residual + (len(piece) - 1) * self._residual_bytes
            copied = context.driver.cuMemcpyDtoDAsync(self.last_residual(slot), last, self._residual_bytes, context.stream)
            check(copied, "keep a prompt's last vector")
            context.wait()
            status = context.download(self.status, np.zeros(2, np.uint32), "status")
            if status[0]:
                context.driver.cuMemsetD8(self.status, 0, 8)
                raise gave_up(self.source, status)

    def last_residual(self, slot: int) -> int:
        """Where the residual is, float32 [hidden], of the token that a slot was fed last, in front of the last layer."""
        return self._last + slot * self._residual_bytes

    def launch(self, start: int, count: int, slot: int = 0) -> None:
        """Start the kernel on so many tokens that are on the device."""
        runner, p = self.runner, self.params
        p.model = runner.params
        p.model.kv = runner.kv + slot * (runner.plan.kv_bytes() // runner.plan.slots)
        p.model.start, p.model.status, p.count = start, self.status, count
        context = runner.context
        context.driver.cuMemsetD8Async(self.counters, 0, self.counters_bytes, context.stream)
        context.launch(self.function, runner.plan.target.workers, PREFILL_THREADS, (p,), runner.plan.target.shared_bytes, cooperative=True)
