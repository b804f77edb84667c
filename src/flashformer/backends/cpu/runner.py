"""A model on the CPU: loaded once, then one call runs whole passes on workers that stay alive between calls."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Collection, Generator, Sequence

import numpy as np

from ...checkpoint import Checkpoint
from ...errors import DeviceError
from ...ops.rope import rope_table
from ...plan import Plan
from .. import GREEDY, Made, Progress, RunStats, Turn, generate_alone, no_progress
from ..sampling import REPORT_WORDS, Sampling, Scores, read_report, token_error
from ..sequence import check_turns
from .codegen import Launch, Params, SequenceStruct, Source, Status, generate
from .codegen import Progress as SequenceProgress
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
        self.columns, self.slots = plan.columns, plan.slots
        self.stats = RunStats()
        self.limit = LIMIT_SECONDS
        self._engine: int | None = None
        self._launch: Launch | None = None  # the latest one
        self._parts: list[_Part] = []  # its sequences
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
                f"the system refuses {plan.target.workers} threads or {plan.kv_bytes() / 1e9:.1f} GB for the KV cache "
                f"({reason.value.decode(errors='replace')}); choose a smaller --max-context or fewer workers (FF_THREADS)"
            )

    def run(self, turns: Sequence[Turn]) -> Generator[Made, None, None]:
        """See `Runner.run`."""
        return self._run(turns)

    def generate(
        self, tokens: Sequence[int], start: int, count: int, stop: Collection[int], sampling: Sampling = GREEDY
    ) -> Generator[int, None, None]:
        """See `Runner.generate`."""
        return generate_alone(self, self.plan, Turn(0, tokens, start, count, stop, sampling))

    def feeder(self, prompt: int) -> int:
        """See `Runner.feeder`."""
        return 0

    def scores(self, index: int) -> Scores:
        """See `Runner.scores`."""
        return self._parts[0].scores(index)

    def logits(self, tokens: Sequence[int], start: int, slot: int = 0) -> np.ndarray:
        """See `Runner.logits`."""
        out = np.full((len(tokens), self.plan.config.vocab_size), np.nan, np.float32)
        for _ in self._run([Turn(slot, tokens, start, 1)], out):
            pass
        return out

    def copy(self, source: int, target: int, positions: int) -> None:
        """See `Runner.copy`. Raises DeviceError while a launch runs, and for slots or positions that there are not."""
        if not (0 <= min(source, target) <= max(source, target) < self.slots and 0 <= positions <= self.plan.max_context):
            raise DeviceError(f"{positions} positions of slot {source} cannot be copied to slot {target}")
        self._claim()
        self._library.flashformer_copy(self._engine, source, target, positions)

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

    def _claim(self) -> None:
        """Raise DeviceError while a launch runs, or after `close`."""
        if self._wait(Status(), 0, 0.0).running:
            raise DeviceError("this model is generating already")

    def _run(self, turns: Sequence[Turn], logits: np.ndarray | None = None) -> Generator[Made, None, None]:
        """`run`; fills `logits` (float32 [tokens, vocab]) of the only turn. Raises DeviceError where a worker is stuck, too."""
        vocab = self.plan.config.vocab_size
        check_turns(turns, self.plan)
        self._claim()
        parts = [_Part(turn, vocab, logits) for turn in turns]
        sequences = (SequenceStruct * len(parts))(*(part.struct() for part in parts))
        progress = (SequenceProgress * len(parts))()
        launch = Launch(sequences=ctypes.addressof(sequences), limit=self.limit, count=len(parts))
        # The workers use all of it until they have ended, even if this generator does not live that long.
        self._launch, self._parts, self._launched = launch, parts, sequences
        status, seen = Status(running=1), [0] * len(parts)
        try:
            self._library.flashformer_start(self._engine, launch)  # NOTE: in here, so that no interrupt leaves it running
            while status.running or sum(seen) < status.news:
                self._wait(status, sum(seen), POLL_SECONDS, progress)
                for index, part in enumerate(parts):
                    while seen[index] < progress[index].made:
                        seen[index] += 1
                        yield part.made(index, seen[index] - 1)
                        if self._launch is not launch:
                            raise DeviceError("this model has been closed, or started anew, while it was generating")
        finally:
            if self._launch is launch:
                self._library.flashformer_cancel(self._engine)
                while status.running:
                    self._wait(status, ALL, POLL_SECONDS, progress)
                for turn, told in zip(turns, progress, strict=True):
                    turn.fed = 0 if status.given_up else told.fed
        if status.given_up:
            raise DeviceError(self._stuck(status.given_up - 1))

    def _wait(self, status: Status, seen: int, seconds: float, progress: ctypes.Array[SequenceProgress] | None = None) -> Status:
        """Bring `status` and `progress` up to date once there is more news, the launch has ended, or `seconds` are over."""
        if self._engine is None:
            raise DeviceError("this model has been closed")
        self._library.flashformer_wait(self._engine, seen, seconds, status, progress)
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


def _check_memory(plan: Plan, weights: int) -> None:
    """Raise DeviceError if weights and KV cache exceed this machine's memory."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = weights + plan.kv_bytes()
    if needed > there:
        raise DeviceError(
            f"the model needs {needed / 1e9:.1f} GB ({weights / 1e9:.1f} weights, {plan.kv_bytes() / 1e9:.1f} KV cache for "
            f"{plan.slots} x {plan.max_context} positions), this machine has {there / 1e9:.1f}; "
            "choose a smaller --max-context or a smaller model"
        )


class _Part:
    """A turn in a launch: the arrays that the kernel reads and fills."""

    def __init__(self, turn: Turn, vocab: int, logits: np.ndarray | None) -> None:
        self.turn, self._alternatives, sampling = turn, turn.sampling.logprobs or 0, turn.sampling
        self._arrays: dict[str, np.ndarray] = {
            "forced": np.array(turn.tokens, np.uint32),
            "stop": np.array(sorted(turn.stop), np.uint32),
            "tokens": np.zeros(turn.count, np.uint32),
            "seconds": np.zeros(turn.count, np.float64),
            "cancel": turn.flag,
        }
        if logits is not None:
            self._arrays["logits"] = logits
        self._sampled: dict[str, np.ndarray] = {}
        if sampling.bias is not None:
            self._sampled["bias"] = sampling.bias
        if sampling.seen is not None:
            self._sampled["seen"] = sampling.seen.copy()
        if sampling.logprobs is not None:
            self._sampled["report"] = np.zeros((turn.count, REPORT_WORDS), np.uint64)

    def struct(self) -> SequenceStruct:
        """What the kernel is told; only while this object lives."""
        turn = self.turn
        return SequenceStruct(
            **{name: array.ctypes.data for name, array in self._arrays.items()},
            sampling=turn.sampling.struct(**{name: array.ctypes.data for name, array in self._sampled.items()}),
            forced_count=len(turn.tokens), drafts=turn.drafts, stop_count=len(turn.stop), slot=turn.slot, start=turn.start,
            count=turn.count,
        )  # fmt: skip

    def scores(self, index: int) -> Scores:
        """Log probabilities of its token number `index`."""
        return read_report(self._sampled["report"][index], self._alternatives)

    def made(self, number: int, index: int) -> Made:
        """Its token number `index`, as turn `number`."""
        token, turn = int(self._arrays["tokens"][index]), self.turn
        error = token_error(token, turn.start + len(turn.tokens) - turn.drafts + index)
        scores = self.scores(index) if "report" in self._sampled and not error else None
        return Made(number, token, float(self._arrays["seconds"][index]), scores, error)


def _load_library(source: str) -> ctypes.CDLL:
    """The library of a generated source, with its entry points (entry.h) declared."""
    library = compile_source(source)
    engine, u32 = ctypes.c_void_p, ctypes.c_uint32
    for name, result, *arguments in (
        ("create", engine, ctypes.POINTER(Params), ctypes.c_char_p, u32),
        ("start", None, engine, ctypes.POINTER(Launch)),
        ("wait", None, engine, u32, ctypes.c_double, ctypes.POINTER(Status), ctypes.POINTER(SequenceProgress)),
        ("copy", None, engine, u32, u32, u32),
        ("cancel", None, engine),
        ("destroy", None, engine),
    ):
        function = getattr(library, f"flashformer_{name}")
        function.restype, function.argtypes = result, arguments
    return library
