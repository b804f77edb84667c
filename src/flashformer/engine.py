"""From the name of a model to tokens: the whole story, top to bottom."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, cast, overload

import numpy as np

from . import env
from .backends import Progress, Runner, RunStats
from .config import ModelConfig
from .errors import CheckpointError, DeviceError, InputError, ScoreError
from .formats import Format, choose
from .graph import Graph
from .plan import BLOCK_POSITIONS, KV_TYPES, KvType, Plan, make_plan
from .sampling import SEEDS, SamplingParams
from .scheduler import End, LogitsRequest, Request, Result, Scheduler
from .speculate import Drafter, DraftModel, Lookup, Speculation
from .stream import Stream
from .targets import Target, get

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .tokenizer import Tokenizer

DEVICES = ("auto", "cpu", "cuda")
WEIGHTS = ("native", "bf16")
CPU_CONTEXT = 8192  # default on CPUs, whose memory other programs need too
MEMORY_SHARE = 0.9  # of the memory that weights and the default context may fill


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
    config: ModelConfig, graph: Graph, device: Device, formats: Mapping[str, Format] | None = None, kv: KvType = "native", slots: int = 1
) -> int:
    """Positions that each slot of the KV cache gets where the user does not say: all of the model's, as far as memory allows.

    formats, kv, slots: as `make_plan` takes them. Raises DeviceError if the weights alone do not fit.
    """
    shortest = make_plan(config, graph, device.target, 1, formats=formats, kv_type=kv)
    weights = shortest.tape_bytes() + shortest.embedding_bytes()
    position_bytes = slots * config.num_layers * shortest.kv.layer_bytes / BLOCK_POSITIONS
    positions = int((device.memory_bytes * MEMORY_SHARE - weights) / position_bytes)
    if positions < 1:
        raise DeviceError(
            f"the model's weights take {weights / 1e9:.1f} GB; {device.name} has {device.memory_bytes / 1e9:.1f} GB of memory; "
            "choose a smaller model or another device"
        )
    return min(positions, config.max_positions, CPU_CONTEXT if device.backend == "cpu" else config.max_positions)


class Engine:
    """A model, loaded and ready, for any number of threads and tasks. A context manager; closing it frees everything.

    As many generations run at a time as there are slots; others wait for their turn. What the KV cache holds is remembered, so that the
    next turn of a conversation, or another prompt that begins alike, computes only what is new. Whoever launches the runner directly
    overwrites it unseen, and must not generate with the engine afterwards.
    """

    def __init__(
        self, plan: Plan, runner: Runner, checkpoint: Checkpoint, device: Device, drafter: Callable[[], Drafter] | None = None,
        draft: Engine | None = None,
    ) -> None:  # fmt: skip
        """Takes over `runner`, `checkpoint` and `draft`: they are closed with the engine. drafter: one for each generation. See `load`."""
        self.plan, self.runner, self.checkpoint, self.device = plan, runner, checkpoint, device
        self._drafter, self._draft = drafter, draft
        self._scheduler = Scheduler(plan, runner)
        self._tokenizer: Tokenizer | None = None
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
        """What the generation that made the latest token has done and how long it took."""
        return self._scheduler.stats

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises CheckpointError where there is none."""
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Generator[Result, None, None]: ...

    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generator[tuple[int, Result], None, None]: ...

    def generate(
        self, prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[Result, None, None] | Generator[tuple[int, Result], None, None]:  # fmt: skip
        """The continuation of a text or of token ids, token by token, as they are made; of a list of them, pairs (index, result).

        A text is encoded as the model expects it (with its beginning-of-text token); see `chat_prompt` for conversations.
        Where the prompt begins as what ran before, that part is not computed again (`stats.reused_tokens`).
        The last result says why it is the last. Closing the iterator ends the generation. A list may have parameters for each prompt; a
        seed that all share is counted up, from one prompt to the next. What goes wrong with one prompt of a list is its last result.

        Raises InputError before anything runs for a prompt that is empty, has ids outside the vocabulary, or does not fit into the
        context; DeviceError where the kernel fails, or the model's scores are not finite.
        """
        if _is_one(prompt):
            if not (params is None or isinstance(params, SamplingParams)):
                raise InputError("one prompt has one SamplingParams, not a list")
            return self._results(self._request(cast("str | Sequence[int]", prompt), params))
        prompts = cast("Sequence[str | Sequence[int]]", prompt)
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InputError(f"there are {len(prompts)} prompts and {len(each)} SamplingParams")
        if isinstance(params, SamplingParams) and params.seed is not None:
            each = [replace(params, seed=(params.seed + i) % SEEDS) for i in range(len(prompts))]
        return self._pairs([self._request(one, its) for one, its in zip(prompts, each, strict=True)])

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Stream:
        """`generate`, begun at once and to be read from any thread (`for`) or task (`async for`). See `Stream`."""
        return Stream(self._scheduler, self._request(prompt, params))

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role": ..., "content": ...} each) in the model's own format, ready for an answer.

        Raises InputError if the model has no chat template or the template refuses the messages.
        """
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special=False)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The model's scores for the token after each of `tokens`, float32 [len(tokens), vocab_size].

        Raises InputError as `generate` does.
        """
        request = LogitsRequest(self._checked(tokens))
        self._scheduler.submit(request)
        outcome = request.outcome.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self) -> None:
        """Free the device and let go of the files; safe to call twice."""
        if not self._closed:
            self._closed = True
            self._scheduler.close()
            self.runner.close()
            if self._draft:
                self._draft.close()
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

    def _request(self, prompt: str | Sequence[int], params: SamplingParams | None) -> Request:
        """A generation, checked and ready to be submitted."""
        params = params or SamplingParams()
        ids = self._checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        stop = params.stop_ids
        if not params.ignore_eos:
            stop |= set(self.config.eos_token_ids)
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
        speculation = Speculation(self._drafter()) if self._drafter else None
        return Request(ids, params, params.lower(self.config.vocab_size, ids), stop, count, decoder, speculation)

    def _results(self, request: Request) -> Generator[Result, None, None]:
        """What comes of one request."""
        try:
            self._scheduler.submit(request)
            while isinstance(result := request.results.get(), Result):
                yield result
                if result.finish:
                    return
            if result.error:
                raise result.error
        finally:
            self._scheduler.cancel(request)

    def _pairs(self, requests: Sequence[Request]) -> Generator[tuple[int, Result], None, None]:
        """What comes of several, in the order in which it comes."""
        results: SimpleQueue[tuple[int, Result | End]] = SimpleQueue()
        try:
            for index, request in enumerate(requests):
                request.tell = partial(_tell, results, index)
            self._scheduler.submit(*requests)
            left = len(requests)
            while left:
                index, result = results.get()
                if isinstance(result, End):
                    if not isinstance(result.error, ScoreError):
                        raise result.error or InputError("this generation was ended")
                    result = Result(-1, "", "error", error=result.error)
                left -= result.finish is not None
                yield index, result
        finally:
            for request in requests:
                self._scheduler.cancel(request)


def load(
    model: str | os.PathLike[str], device: str = "auto", max_context: int | None = None, progress: Progress | None = None,
    weights: str = "native", kv: KvType = "native", slots: int = 1, columns: int | None = None,
    draft: str | os.PathLike[str] | None = None, prompt_columns: int | None = None,
) -> Engine:  # fmt: skip
    """Load a model and make it ready to run.

    model: a Hugging Face folder, a GGUF file, "demo", or a name on the Hugging Face hub. device: "auto", "cpu" or "cuda".
    max_context: positions of each slot of the KV cache (default: all that the model supports and the memory holds; on a CPU at most
    8,192). progress: told what is being done; by default bars on stderr, where that is a terminal. weights: "native" keeps quantised
    matrices in formats that hold them exactly wherever the device has kernels for them, "bf16" expands all to 16 bits; what that
    costs is in the notes of the engine's configuration. kv: "native" keeps keys and values in 16 bits, "int8" and "fp8" (e4m3) in 8,
    which is half the bytes to read at long context; `flashformer quality` says what a model loses by it. slots: generations that run
    at a time, each with a KV cache of its own. columns: token positions that a pass carries at most (default: 16 on a CPU; on a GPU 1,
    which is the fastest for one text, or with a draft as many as there are kernels for). draft: speculate, without changing a token:
    "lookup" guesses that texts repeat themselves, else a smaller model with the same vocabulary guesses. prompt_columns: tokens of a prompt
    that a pass feeds, by a second kernel beside a GPU's of one column (default: as many as there are kernels for on Hopper, where this is
    measured; else 0, none: one token a pass).

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
    if slots < 1:
        raise InputError(f"slots is {slots}; it must be at least 1")
    if kv not in KV_TYPES:
        raise InputError(f"kv is {kv!r}; it must be one of {', '.join(KV_TYPES)}")
    where = find_device(device)
    checkpoint = open_checkpoint(resolve(os.fspath(model)))
    try:
        graph = build_graph(checkpoint.config)
        check_tensors(checkpoint, graph.weights())
        formats = choose(checkpoint, graph.weights()) if weights == "native" else {}
        if max_context is None:
            max_context = default_context(checkpoint.config, graph, where, formats, kv, slots)
        if columns is None:
            columns = where.target.usual_columns if draft is None else max(where.target.columns)
        if prompt_columns is None:
            prompt_columns = where.target.usual_prompt_columns if columns == 1 else 0
        if draft is not None and columns == 1:
            raise InputError("speculation verifies drafts in the columns of a pass, and a kernel of one column has no room for any")
        plan = make_plan(
            checkpoint.config, graph, where.target, max_context, formats=formats, kv_type=kv, columns=columns, slots=slots,
            prompt_columns=prompt_columns,
        )  # fmt: skip
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
    if draft is None or draft == "lookup":
        return Engine(plan, runner, checkpoint, where, Lookup if draft else None)
    engine = Engine(plan, runner, checkpoint, where)
    try:
        return _with_draft(engine, load(draft, device, None, progress, weights, kv, slots, columns))
    except BaseException:
        engine.close()
        raise


def _with_draft(engine: Engine, draft: Engine) -> Engine:
    """An engine that speculates with another one. Raises InputError if their vocabularies differ."""
    ours, theirs = engine.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        draft.close()
        raise InputError(f"a draft model needs the model's vocabulary: it has {theirs} tokens, the model {ours}")
    drafter = DraftModel(draft.runner, draft.max_context)
    return Engine(engine.plan, engine.runner, engine.checkpoint, engine.device, lambda: drafter, draft)


def _is_one(prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> bool:
    """Whether this is one prompt and not several."""
    return isinstance(prompt, str) or not len(prompt) or not (isinstance(prompt[0], str) or np.ndim(prompt[0]))


def _tell(results: SimpleQueue[tuple[int, Result | End]], index: int, result: Result | End) -> None:
    """Hand on a result with the index of its prompt."""
    results.put((index, result))


def _described(plan: Plan) -> str:
    """A plan as text, for FF_DEBUG."""
    from .explain import describe

    return describe(plan)
