"""From the name of a model to tokens: the whole story, top to bottom."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from . import env
from .backends import Progress, Runner, RunStats
from .backends.sampling import Sampling
from .config import ModelConfig
from .errors import CheckpointError, DeviceError, InputError
from .formats import Format, choose
from .graph import Graph
from .plan import BLOCK_POSITIONS, KV_TYPES, KvType, Plan, make_plan
from .sampling import SamplingParams, StopMatcher
from .targets import Target, get

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .tokenizer import Tokenizer

DEVICES = ("auto", "cpu", "cuda")
WEIGHTS = ("native", "bf16")
CPU_CONTEXT = 8192  # default on CPUs, whose memory other programs need too
MEMORY_SHARE = 0.9  # of the memory that weights and the default context may fill


@dataclass(frozen=True)
class Result:
    """One token of a generation and the text that it completes (often none, in the middle of a character).

    finish: None while the text goes on; "stop" with the last token if the model or a stop ended it, "length" if a limit did.
    logprob, top_logprobs: where `SamplingParams.logprobs` asks for them, the token's log probability, and (token id, log probability)
    of the most likely ones, best first; else None.
    """

    token: int
    text: str
    finish: Literal["stop", "length"] | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


@dataclass(frozen=True)
class Device:
    """Where a model is to run: a target with its real number of workers, and the memory there is."""

    backend: Literal["cpu", "cuda"]
    name: str
    target: Target
    memory_bytes: int


def find_device(device: str = "auto") -> Device:
    """The device that `device` names: "cuda", "cpu", or "auto" for a GPU where there is one.

    Raises InputError for another word, DeviceError where there is no usable GPU for "cuda".
    """
    if device not in DEVICES:
        raise InputError(f"device is {device!r}; it must be one of {', '.join(DEVICES)}")
    if device != "cpu":
        from .backends.cuda import probe

        info = probe()
        if info is not None and info.target is not None:
            return Device("cuda", info.name, replace(info.target, workers=info.workers), info.memory_bytes)
        if device == "cuda":
            if info is not None:
                raise DeviceError(f"{info.name} ({info.target_name}) is older than what this program supports; use --device cpu")
            raise DeviceError(
                "no CUDA GPU was found; use --device cpu, or check that nvidia-smi shows the GPU and install the CUDA packages: "
                'pip install "flashformer[cuda]"'
            )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", "CPU", replace(get("cpu"), workers=env.threads()), memory)


def default_context(
    config: ModelConfig, graph: Graph, device: Device, formats: Mapping[str, Format] | None = None, kv: KvType = "native"
) -> int:
    """Positions that the KV cache gets where the user does not say: all of the model's, as far as memory allows.

    formats, kv: as `make_plan` takes them. Raises DeviceError if the weights alone do not fit.
    """
    shortest = make_plan(config, graph, device.target, 1, formats=formats, kv_type=kv)
    weights = shortest.tape_bytes() + shortest.embedding_bytes()
    position_bytes = config.num_layers * shortest.kv.layer_bytes / BLOCK_POSITIONS
    positions = int((device.memory_bytes * MEMORY_SHARE - weights) / position_bytes)
    if positions < 1:
        raise DeviceError(
            f"the model's weights take {weights / 1e9:.1f} GB; {device.name} has {device.memory_bytes / 1e9:.1f} GB of memory; "
            "choose a smaller model or another device"
        )
    return min(positions, config.max_positions, CPU_CONTEXT if device.backend == "cpu" else config.max_positions)


class Engine:
    """A model, loaded and ready. A context manager; closing it frees everything. One generation at a time.

    What the KV cache holds is remembered, so that the next turn of a conversation computes only what is new. Whoever launches
    the runner directly overwrites it unseen, and must not generate with the engine afterwards.
    """

    def __init__(self, plan: Plan, runner: Runner, checkpoint: Checkpoint, device: Device) -> None:
        """Takes over `runner` and `checkpoint`: they are closed with the engine. See `load`."""
        self.plan, self.runner, self.checkpoint, self.device = plan, runner, checkpoint, device
        self._tokenizer: Tokenizer | None = None
        self._cached: list[int] = []  # tokens of the positions 0, 1, ... whose KV entries are certain
        self._busy = False
        self._closed = False

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.plan.config

    @property
    def max_context(self) -> int:
        """Positions that prompt and answer may fill together."""
        return self.plan.max_context

    @property
    def stats(self) -> RunStats:
        """What the last generation did and how long it took."""
        return self.runner.stats

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises CheckpointError where there is none."""
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Generator[Result, None, None]:
        """The continuation of a text or of token ids, token by token, as they are made.

        A text is encoded as the model expects it (with its beginning-of-text token); see `chat_prompt` for conversations.
        Where the prompt begins as what ran before, that part is not computed again (`stats.reused_tokens`).
        The last result says why it is the last. Raises InputError before anything runs for a prompt that is empty, has ids
        outside the vocabulary, or does not fit into the context; DeviceError where the kernel fails, or the model's scores are not
        finite.
        """
        params = params or SamplingParams()
        ids = self._checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        return self._generate(ids, params, params.lower(self.config.vocab_size, ids))

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role": ..., "content": ...} each) in the model's own format, ready for an answer.

        Raises InputError if the model has no chat template or the template refuses the messages.
        """
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special=False)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The model's scores for the token after each of `tokens`, float32 [len(tokens), vocab_size].

        Raises InputError as `generate` does.
        """
        ids = self._checked(tokens)
        self._claim()
        self._cached = []
        try:
            scores = self.runner.logits(ids, 0)
            self._cached = ids
            return scores
        finally:
            self._busy = False

    def close(self) -> None:
        """Free the device and let go of the files; safe to call twice."""
        if not self._closed:
            self._closed = True
            self.runner.close()
            self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        """Token ids as a list; InputError if the model cannot take them."""
        ids = np.asarray(tokens)
        if ids.size == 0:
            raise InputError("the prompt is empty: it has no tokens")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError("a prompt is a text or a list of whole numbers")
        vocab = self.config.vocab_size
        wrong = (ids < 0) | (ids >= vocab)
        if wrong.any():
            at = int(wrong.argmax())
            raise InputError(f"token id {ids[at]} at position {at} is outside the vocabulary of {vocab}")
        if len(ids) > self.max_context:
            raise InputError(
                f"the prompt has {len(ids)} tokens; the context holds {self.max_context} "
                f"(the model supports {self.config.max_positions}; see max_context)"
            )
        return [int(i) for i in ids]

    def _claim(self) -> None:
        """Mark the runner as in use."""
        if self._closed:
            raise InputError("this engine has been closed")
        if self._busy:
            raise InputError("this engine is generating already; finish or close that generation first")
        self._busy = True

    def _generate(self, ids: list[int], params: SamplingParams, sampling: Sampling) -> Generator[Result, None, None]:
        """`generate` after its checks."""
        config = self.config
        stop = params.stop_ids
        if not params.ignore_eos:
            stop |= set(config.eos_token_ids)
        try:
            if not params.ignore_eos:
                stop |= set(self.tokenizer.eos_ids)
            decoder = self.tokenizer.stream_decoder()
        except CheckpointError:  # ids in, ids out: that needs no tokenizer
            if params.stop_texts:
                raise
            decoder = None
        # The token made after the last position of the context has no position of its own.
        count = min(params.max_tokens, self.max_context - len(ids) + 1)
        matcher = StopMatcher(params.stop_texts)
        self._claim()
        start = min(_common_length(self._cached, ids), len(ids) - 1)  # the last token of the prompt has the answer
        self._cached, fed = ids[:start], ids[start:]
        try:
            with closing(self.runner.generate(fed, start, count, stop, sampling)) as tokens:
                for made, token in enumerate(tokens, 1):
                    # NOTE: a token is made once all before it have KV entries; its own follows, or never does where the kernel ends.
                    self._cached += fed
                    fed = [token]
                    last = token in stop or made == count
                    scores = self.runner.scores(made - 1) if sampling.logprobs is not None else None
                    logprobs = (scores.logprob, scores.top) if scores else (None, None)
                    text = ""
                    if decoder is not None and token not in stop:
                        text = matcher.push(decoder.push(token))
                    if decoder is not None and last:
                        text += matcher.push(decoder.finish()) + matcher.finish()
                    if matcher.stopped:
                        yield Result(token, text, "stop", *logprobs)
                        return
                    yield Result(token, text, ("stop" if token in stop else "length") if last else None, *logprobs)
        except Exception:
            self._cached = []  # nobody knows what a kernel that failed has written
            raise
        finally:
            self._busy = False


def load(
    model: str | os.PathLike[str], device: str = "auto", max_context: int | None = None, progress: Progress | None = None,
    weights: str = "native", kv: KvType = "native",
) -> Engine:  # fmt: skip
    """Load a model and make it ready to run.

    model: a Hugging Face folder, a GGUF file, "demo", or a name on the Hugging Face hub. device: "auto", "cpu" or "cuda".
    max_context: positions of the KV cache (default: all that the model supports and the memory holds; on a CPU at most
    8,192). progress: told what is being done; by default bars on stderr, where that is a terminal. weights: "native" keeps quantised
    matrices in formats that hold them exactly wherever the device has kernels for them, "bf16" expands all to 16 bits; what that
    costs is in the notes of the engine's configuration. kv: "native" keeps keys and values in 16 bits, "int8" and "fp8" (e4m3) in 8,
    which is half the bytes to read at long context; `flashformer quality` says what a model loses by it.

    Raises CheckpointError, ConfigError, PlanError, BuildError or DeviceError, each a FlashFormerError.
    """
    from .checkpoint import check_tensors, open_checkpoint
    from .explain import expansions
    from .hub import resolve
    from .models import build_graph
    from .progress import bars
    from .tune import tuned
    from .validate import validate

    began = time.perf_counter()
    if weights not in WEIGHTS:
        raise InputError(f"weights is {weights!r}; it must be one of {', '.join(WEIGHTS)}")
    if kv not in KV_TYPES:
        raise InputError(f"kv is {kv!r}; it must be one of {', '.join(KV_TYPES)}")
    where = find_device(device)
    checkpoint = open_checkpoint(resolve(os.fspath(model)))
    try:
        graph = build_graph(checkpoint.config)
        check_tensors(checkpoint, graph.weights())
        formats = choose(checkpoint, graph.weights()) if weights == "native" else {}
        if max_context is None:
            max_context = default_context(checkpoint.config, graph, where, formats, kv)
        plan = make_plan(checkpoint.config, graph, where.target, max_context, formats=formats, kv_type=kv)
        if where.backend == "cuda":
            plan = tuned(plan, where.name)
        validate(plan)
        if note := expansions(plan, checkpoint):
            plan = replace(plan, config=replace(plan.config, notes=(*plan.config.notes, note)))
        env.debug(2, lambda: f"planned in {time.perf_counter() - began:.3f} s")
        env.debug(3, lambda: _described(plan))
        with bars(progress) as told:
            runner: Runner = importlib.import_module(f"{__package__}.backends.{where.backend}").load(plan, checkpoint, told)
        env.debug(1, lambda: f"{where.name}: ready in {time.perf_counter() - began:.2f} s, {plan.weight_bytes() / 1e9:.2f} GB of weights")
    except BaseException:
        checkpoint.close()
        raise
    return Engine(plan, runner, checkpoint, where)


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _described(plan: Plan) -> str:
    """A plan as text, for FF_DEBUG."""
    from .explain import describe

    return describe(plan)
