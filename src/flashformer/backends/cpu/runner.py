"""A model on the CPU: loaded once, then one call runs whole tokens on workers that stay alive between calls."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Collection, Generator, Sequence
from contextlib import closing

import numpy as np

from ...checkpoint import Checkpoint
from ...errors import DeviceError
from ...ops.rope import rope_table
from ...plan import Plan
from .. import GREEDY, Progress, RunStats, no_progress
from ..sampling import REPORT_WORDS, Sampling, Scores, checked_token, read_report
from .codegen import Launch, Params, Source, Status, generate
from .compile import compile_source
from .layout import gather_vectors, lay_out, tile_ranges
from .pack import Tools, packed_weights

LIMIT_SECONDS = 30.0  # that a worker waits for the others before it gives up
POLL_SECONDS = 0.1  # between two chances for a signal, such as that of Ctrl-C, to be heard
ALL = 0xFFFFFFFF  # more tokens than any launch makes


class CpuRunner:
    """Implements `Runner` (backends/__init__.py) on the cores of this machine."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint, progress: Progress = no_progress) -> None:
        """See `load`."""
        self.plan = plan
        self.stats = RunStats()
        self.limit = LIMIT_SECONDS
        self._engine: int | None = None
        self._launch: Launch | None = None  # the latest one
        self._sampled: dict[str, np.ndarray] = {}  # its arrays; see `_sampling_arrays`
        self._alternatives = 0  # that it reports for each token
        layout = lay_out(plan)
        _check_memory(plan, layout.nbytes)
        self.source: Source = generate(plan)
        progress("compiling", 0, 1)
        self._library = _load_library(self.source.text)
        self._tools = Tools(plan)
        progress("compiling", 1, 1)
        weights, strange = packed_weights(plan, layout, checkpoint, self._tools, progress)
        vectors, strange_vectors = gather_vectors(plan, self.source, checkpoint)
        for name in (*strange, *strange_vectors):
            warnings.warn(f"{name} holds values that are not finite; the model's output will not be, either", stacklevel=2)
        self._arrays: dict[str, np.ndarray] = {  # as long as the engine lives
            "tape": weights,
            "tape_start": layout.tape_start,
            "ranges": tile_ranges(plan, self.source),
            "vectors": vectors,
            "rope": rope_table(plan.config, plan.max_context),
            "embedding": layout.embedding,
        }
        reason = ctypes.create_string_buffer(200)
        params = Params(**{name: array.ctypes.data for name, array in self._arrays.items()})
        self._engine = self._library.flashformer_create(params, reason, len(reason))
        if not self._engine:
            raise DeviceError(
                f"the system refuses {plan.target.workers} threads or {kv_bytes(plan) / 1e9:.1f} GB for the KV cache "
                f"({reason.value.decode(errors='replace')}); choose a smaller --max-context or fewer workers (FF_THREADS)"
            )

    def generate(
        self, tokens: Sequence[int], start: int, count: int, stop: Collection[int], sampling: Sampling = GREEDY
    ) -> Generator[int, None, None]:
        """See `Runner.generate`."""
        status = Status()
        try:
            with closing(self._run(status, tokens, start, count, stop, sampling)) as made:
                for position, token in enumerate(made, start + len(tokens)):
                    yield checked_token(token, position)
        finally:
            steps = max(status.made - 1, 0)
            kv = sum(self.plan.kv.bytes_read(i) for i in range(steps)) * self.plan.config.num_layers
            self.stats = RunStats(
                len(tokens), start, status.first, status.made, status.last - status.first,
                steps * self.plan.token_bytes(start + len(tokens)) + kv,
            )  # fmt: skip

    def scores(self, index: int) -> Scores:
        """See `Runner.scores`."""
        return read_report(self._sampled["report"][index], self._alternatives)

    def logits(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """See `Runner.logits`."""
        out = np.full((len(tokens), self.plan.config.vocab_size), np.nan, np.float32)
        for _ in self._run(Status(), tokens, start, 1, (), GREEDY, out):
            pass
        return out

    def read_bandwidth(self) -> float:
        """See `Runner.read_bandwidth`; measured on the weights where they are too large for caches."""
        if self._engine is None:
            raise DeviceError("this model has been closed")
        return self._tools.bandwidth(self._arrays["tape"])

    def close(self) -> None:
        """See `Runner.close`. A launch that is still running ends with its present token."""
        engine, self._engine, self._launch = self._engine, None, None
        if engine is not None:
            self._library.flashformer_destroy(engine)
        self._arrays = {}

    def _run(
        self, status: Status, tokens: Sequence[int], start: int, count: int, stop: Collection[int], sampling: Sampling,
        logits: np.ndarray | None = None,
    ) -> Generator[int, None, None]:  # fmt: skip
        """One launch: `tokens` at positions start.., then `count` - 1 of the model's own; yields those that it makes.

        `status` is kept up to date; `logits` (float32 [steps, vocab]) are filled. Raises DeviceError for what does not fit,
        and where a worker is stuck.
        """
        steps, room = len(tokens) - 1 + count, self.plan.max_context
        if not tokens or count < 1 or start < 0 or start + steps > room:
            raise DeviceError(f"{len(tokens)} tokens at position {start} and {count} more do not fit into {room} positions")
        vocab = self.plan.config.vocab_size
        if not 0 <= min(tokens) <= max(tokens) < vocab:
            raise DeviceError(f"token ids from {min(tokens)} to {max(tokens)} are outside the vocabulary of {vocab}")
        if self._wait(Status(), 0, 0.0).running:
            raise DeviceError("this model is generating already")
        made = np.zeros(count, np.uint32)
        arrays = np.array(tokens, np.uint32), np.array(sorted(stop), np.uint32), made, logits
        sampled = _sampling_arrays(sampling, vocab, count)
        launch = Launch(
            *(None if a is None else a.ctypes.data for a in arrays),
            sampling=sampling.struct(**{name: array.ctypes.data for name, array in sampled.items()}),
            limit=self.limit, forced_count=len(tokens), stop_count=len(stop), start=start, steps=steps,
        )  # fmt: skip
        # The workers use all of it until they have ended, even if this generator does not live that long.
        self._launch, self._launched = launch, arrays
        self._sampled, self._alternatives = sampled, sampling.logprobs or 0
        self._library.flashformer_start(self._engine, launch)
        status.running, seen = 1, 0
        try:
            while status.running or seen < status.made:
                self._wait(status, seen, POLL_SECONDS)
                while seen < status.made:
                    yield int(made[seen])
                    seen += 1
                    if self._launch is not launch:
                        raise DeviceError("this model has been closed, or started anew, while it was generating")
        finally:
            if self._launch is launch:
                self._library.flashformer_cancel(self._engine)
                while status.running:
                    self._wait(status, ALL, POLL_SECONDS)
        if status.given_up:
            raise DeviceError(self._stuck(status.given_up - 1))

    def _wait(self, status: Status, seen: int, seconds: float) -> Status:
        """Bring `status` up to date once there are more than `seen` tokens, the launch has ended, or `seconds` are over."""
        if self._engine is None:
            raise DeviceError("this model has been closed")
        self._library.flashformer_wait(self._engine, seen, seconds, status)
        return status

    def _stuck(self, where: int) -> str:
        """The message for a wait that took too long at stage << 16 | layer."""
        name, layer = self.source.stage_names[where >> 16], where & 0xFFFF
        return (
            f"a worker waited {self.limit:g} s for the others and gave up: stage {name!r}, layer {layer}; "
            "is the machine overloaded? FF_THREADS=1 runs without waiting"
        )


def load(plan: Plan, checkpoint: Checkpoint, progress: Progress = no_progress) -> CpuRunner:
    """Compile `plan`, pack the weights, and return the model ready to run.

    Raises BuildError without a C++ compiler, DeviceError for too little memory, CheckpointError for weights of another type.
    """
    return CpuRunner(plan, checkpoint, progress)


def kv_bytes(plan: Plan) -> int:
    """Bytes of the KV cache."""
    return plan.config.num_layers * plan.kv.layer_bytes


def _check_memory(plan: Plan, weights: int) -> None:
    """Raise DeviceError if weights and KV cache exceed this machine's memory."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = weights + kv_bytes(plan)
    if needed > there:
        raise DeviceError(
            f"the model needs {needed / 1e9:.1f} GB ({weights / 1e9:.1f} weights, {kv_bytes(plan) / 1e9:.1f} KV cache for "
            f"{plan.max_context} positions), this machine has {there / 1e9:.1f}; choose a smaller --max-context or a smaller model"
        )


def _sampling_arrays(sampling: Sampling, vocab: int, count: int) -> dict[str, np.ndarray]:
    """What the pointers of a launch's `SamplingStruct` point to; what it does not use is left out."""
    arrays: dict[str, np.ndarray] = {}
    if sampling.flags:
        arrays["scores"] = np.empty(vocab, np.float32)
    if sampling.bias is not None:
        arrays["bias"] = sampling.bias
    if sampling.seen is not None:
        arrays["seen"] = sampling.seen.copy()
    if sampling.logprobs is not None:
        arrays["raw"] = np.empty(vocab, np.float32)
        arrays["report"] = np.zeros((count, REPORT_WORDS), np.uint64)
    return arrays


def _load_library(source: str) -> ctypes.CDLL:
    """The library of a generated source, with its entry points (entry.h) declared."""
    library = compile_source(source)
    engine, u32 = ctypes.c_void_p, ctypes.c_uint32
    for name, result, *arguments in (
        ("create", engine, ctypes.POINTER(Params), ctypes.c_char_p, u32),
        ("start", None, engine, ctypes.POINTER(Launch)),
        ("wait", None, engine, u32, ctypes.c_double, ctypes.POINTER(Status)),
        ("cancel", None, engine),
        ("destroy", None, engine),
    ):
        function = getattr(library, f"flashformer_{name}")
        function.restype, function.argtypes = result, arguments
    return library
