"""Measure decoding on this GPU: bytes per token over time, as a fraction of what a plain read reaches in the same process.

Before its speed is recorded, the kernel is compared with the reference, on the same weights, in the same run.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import env, models
from .backends import Progress, Turn, no_progress
from .check import Comparison, compare, sample_tokens
from .config import ModelConfig
from .errors import DeviceError, InputError
from .formats import NAMED, Format, choose
from .plan import KvType, Plan, make_plan
from .records import PLAIN, Record, commit, driver_version
from .reference import Reference
from .targets import Target
from .trace import Trace, make_trace
from .tune import differences, tuned

if TYPE_CHECKING:
    from .backends.cuda import CudaRunner, DeviceInfo
    from .checkpoint import Checkpoint

TIMED_REGION = "one launch: embedding, all layers with attention and KV append, norm, head, greedy choice, for every token"
LONGEST_PROMPTS = 10.0  # seconds, after which a prompt is not timed again
CHECK_PARAMETERS = 2.0e9  # most that the reference computes with: it takes some 10 ns each
CHECK_LAYERS = 2  # least that are checked, whatever their size
CHECK_PROMPT, CHECK_GREEDY = 481, 32  # tokens: together one block of the reference
PACKAGE = "flashformer_baselines"  # what benchmarks/baselines is imported as
TRACE_TOKENS = 16  # of the launch whose last token is traced


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    name: str
    config: ModelConfig
    weights: Checkpoint
    formats: Mapping[str, Format]  # of the matrices that are not stored plainly
    stored: str = ""  # what a record calls the weights; empty: by their type


@contextmanager
def open_subject(model: str, weights: str = "", plain_head: bool = False) -> Iterator[Subject]:
    """A named shape with random weights, or a checkpoint.

    weights: for a shape the name of a format (formats.NAMED; bf16 by default), `plain_head` leaves its head in 16 bits; for a checkpoint
    "native" (the default) or "bf16". Raises CheckpointError or ConfigError as those do, InputError for an unknown name.
    """
    from .backends.cuda import RandomWeights
    from .checkpoint import check_tensors, open_checkpoint
    from .hub import resolve
    from .shapes import SHAPES

    if model in SHAPES and not Path(model).exists():
        if (name := weights or "bf16") not in NAMED:
            raise InputError(f"weights are {weights!r}; random ones can be {', '.join(NAMED)}")
        drawn = RandomWeights(SHAPES[model], format=NAMED[name], plain_head=plain_head)
        stored = "" if name == "bf16" else name + ", 16-bit head" * plain_head
        yield Subject(model, SHAPES[model], drawn, drawn.formats, stored)
        return
    if weights not in ("", "native", "bf16"):
        raise InputError(f"weights are {weights!r}; those of a checkpoint can be native or bf16")
    with open_checkpoint(resolve(model)) as checkpoint:
        names = models.build_graph(checkpoint.config).weights()
        check_tensors(checkpoint, names)
        formats = choose(checkpoint, names) if weights != "bf16" else {}
        stored = ", ".join(sorted({format.name for format in formats.values()}))
        yield Subject(Path(model).name, checkpoint.config, checkpoint, formats, stored)


def gpu() -> DeviceInfo:
    """The GPU of this machine. Raises DeviceError where there is none that we know."""
    from .backends.cuda import probe

    info = probe()
    if info is None or info.target is None:
        found = f"{info.name} ({info.target_name}) is not supported" if info else "none was found (does nvidia-smi show it?)"
        raise DeviceError(f"measuring needs a CUDA GPU; {found}")
    return info


def gpu_target() -> Target:
    """Its target, with as many workers as it has. Raises DeviceError as `gpu` does."""
    info = gpu()
    assert info.target is not None
    return replace(info.target, workers=info.workers)


def plan_for_gpu(
    config: ModelConfig, max_context: int | None = None, formats: Mapping[str, Format] | None = None, kv: KvType = "native",
    columns: int = 1, slots: int = 1, prompt_columns: int = 0,
) -> Plan:  # fmt: skip
    """A validated plan for the GPU of this machine. Raises DeviceError as `gpu_target` does."""
    from .validate import validate

    graph = models.build_graph(config)
    plan = make_plan(
        config, graph, gpu_target(), max_context, formats=formats, kv_type=kv, columns=columns, slots=slots, prompt_columns=prompt_columns
    )
    validate(plan)
    return plan


def starts(config: ModelConfig, contexts: Sequence[int], tokens: int) -> list[int]:
    """Where the timed tokens of each context begin: early enough that the last of them has a position.

    Raises InputError for a context that the model does not have, or for more tokens than it has positions.
    """
    positions = config.max_positions
    if tokens > positions:
        raise InputError(f"{tokens} tokens do not fit into this model's {positions} positions")
    if not contexts or min(contexts) < 0 or max(contexts) > positions:
        raise InputError(f"contexts {', '.join(map(str, contexts)) or '(none)'}: this model has 0 to {positions} positions")
    return sorted({min(c, positions - tokens) for c in contexts})


class Bench:
    """A model on this GPU, packed once, to be measured at any of the contexts it was made for. A context manager."""

    def __init__(
        self, subject: Subject, contexts: Sequence[int], tokens: int = 128, checked: bool = True, progress: Progress = no_progress,
        kv: KvType = "native", prompts: bool = False,
    ) -> None:  # fmt: skip
        """prompts: how long they take is to be measured, too, with the kernel that an engine feeds them by on this GPU.

        Raises InputError as `starts` does, and DeviceError where there is no GPU, or the kernel is out of tolerance.
        """
        from .backends.cuda import load

        self.subject, self.tokens, self.prompts = subject, tokens, prompts
        columns = gpu_target().usual_prompt_columns if prompts else 0
        self.contexts = starts(subject.config, contexts, tokens)
        self.checked: dict[str, float] | None = None
        whole = min(subject.config.max_positions, CHECK_PROMPT + CHECK_GREEDY)
        usual = plan_for_gpu(subject.config, max(self.contexts[-1] + tokens, whole), subject.formats, kv, prompt_columns=columns)
        self.plan = tuned(usual, gpu().name)
        self.tuned = differences(usual.target, self.plan.target)
        layers = layers_to_check(subject.config)
        if checked and layers < subject.config.num_layers:
            # The first layers and the head, as a model of their own.
            cut = replace(subject.config, num_layers=layers)
            plan = replace(plan_for_gpu(cut, whole, subject.formats, kv, prompt_columns=columns), target=self.plan.target)
            runner = load(plan, subject.weights, progress)
            try:
                self.checked = check_kernel(runner, subject.weights)
            finally:
                runner.close()
        self.runner: CudaRunner = load(self.plan, subject.weights, progress)
        try:
            if checked and self.checked is None:
                self.checked = check_kernel(self.runner, subject.weights)
            self.runner.fill_kv()
            self.ceiling = self.runner.read_bandwidth()
        except BaseException:
            self.runner.close()
            raise

    def measure(self, context: int, repeats: int = 5) -> Record:
        """Decode greedily from position `context` (one of `contexts`): the median of `repeats` launches."""
        plan, tokens = self.plan, self.tokens
        times = [self.runner.time_generate(context, tokens) / tokens for _ in range(repeats + 1)][1:]  # the first warms up
        median = statistics.median(times)
        nbytes = plan.token_bytes(context + tokens // 2)
        cache = "" if plan.kv.type == "native" else f", KV cache in {plan.kv.type}"
        return Record(
            model=self.subject.name,
            weights=(self.subject.stored or PLAIN[plan.config.dtype]) + cache,
            batch=1,
            context=context,
            tokens_timed=tokens,
            repeats=repeats,
            ms_per_token={"min": min(times) * 1e3, "median": median * 1e3, "max": max(times) * 1e3},
            spread=(max(times) - min(times)) / median,
            bytes_per_token=nbytes,
            read_ceiling_gb_s=self.ceiling,
            fraction_of_ceiling=nbytes / median / 1e9 / self.ceiling,
            checked=self.checked,
            timed_region=TIMED_REGION,
            gpu=self.runner.info.name,
            driver=driver_version(),
            date=date.today().isoformat(),
            commit=commit(),
            tuned=self.tuned,
            first_token_ms=self.first_token(context, repeats) if self.prompts and context else None,
        )

    def first_token(self, length: int, repeats: int = 5) -> float:
        """Milliseconds from a prompt of so many tokens (one at least) to the first token behind it, as the host sees it: the median.

        Prompts that take seconds are not repeated as often. Nothing of the prompt is in the KV cache; what is there is overwritten.
        """
        prompt = sample_tokens(self.subject.config, length, seed=0)
        times: list[float] = []
        while len(times) <= repeats and (len(times) < 2 or sum(times) < LONGEST_PROMPTS):
            began = time.perf_counter()
            for _made in self.runner.run([Turn(0, prompt, 0, 1)]):
                times.append(time.perf_counter() - began)
        return statistics.median(times[1:]) * 1e3  # the first warms up

    def trace(self, context: int) -> Trace:
        """Where the time of one token goes, `TRACE_TOKENS` - 1 positions after `context`."""
        tokens = min(TRACE_TOKENS, self.tokens)
        stamps = self.runner.trace(context, tokens)
        return make_trace(self.subject.name, self.plan, self.runner.source.stage_names, stamps, context + tokens - 1, self.ceiling)

    def close(self) -> None:
        """Free the GPU; safe to call twice."""
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- Is it right? ----------------------------------------------------------------------------------------------------------


def layers_to_check(config: ModelConfig) -> int:
    """How many layers, with embedding and head, the reference can afford: CHECK_PARAMETERS, but CHECK_LAYERS at least."""

    def parameters(layers: int) -> int:
        weights = models.build_graph(replace(config, num_layers=layers)).weights()
        return sum(int(np.prod(w.shape)) for w in weights.values())

    one = parameters(2) - parameters(1)
    affordable = int((CHECK_PARAMETERS - parameters(1)) // one) + 1
    return min(max(affordable, CHECK_LAYERS), config.num_layers)


def check_kernel(runner: CudaRunner, weights: Checkpoint, seed: int = 0) -> dict[str, float]:
    """Greedy tokens after a random prompt, and the logits behind each, against the reference: what a record keeps.

    Raises DeviceError where they are out of tolerance: the speed of a wrong kernel is worth nothing.
    """
    config = runner.plan.config
    positions = min(runner.plan.max_context, CHECK_PROMPT + CHECK_GREEDY)
    greedy = min(CHECK_GREEDY, positions // 2)
    prompt = sample_tokens(config, positions - greedy, seed)
    made = list(runner.generate(prompt, 0, greedy, ()))
    text = [*prompt, *made[:-1]]
    first = len(prompt) - 1
    ours = runner.logits(text[first:], first)
    reference = Reference(models.build_graph(config), weights, kv_type=runner.plan.kv.type).logits(text, last=greedy)
    wrong = np.flatnonzero(ours.argmax(axis=-1) != np.array(made))
    result = Comparison(**{**vars(compare(ours, reference)), "greedy_differs": int(wrong[0]) if len(wrong) else None})
    if not result.within:
        raise DeviceError(f"the kernel is not measured: its results are out of tolerance\n{result.describe()}")
    return {
        "layers": config.num_layers,
        "positions": result.positions,
        "kl_mean": result.kl_mean,
        "kl_max": result.kl_max,
        "top1": result.top1_agreement,
    }


# --- Beside it -------------------------------------------------------------------------------------------------------------


def choose_baselines(names: Iterable[str]) -> list[Any]:
    """Baselines by name ("all": every one), from benchmarks/baselines of the checkout that this package lies in.

    Raises InputError for an unknown name, or where the package was installed without that folder.
    """
    names = list(names)
    if not names:
        return []
    folder = Path(__file__).parents[2] / "benchmarks" / "baselines"
    if not (folder / "__init__.py").is_file():
        raise InputError("baselines are in benchmarks/ of the repository: run this from a checkout, or without them")
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    known: dict[str, Any] = sys.modules[PACKAGE].BASELINES
    unknown = [name for name in names if name not in known and name != "all"]
    if unknown:
        raise InputError(f"unknown baseline {unknown[0]!r}; known are {', '.join(known)} and all")
    return list(known.values()) if "all" in names else [known[name] for name in names]


def compare_with(chosen: Iterable[Any], config: ModelConfig, records: Sequence[Record], tell: Callable[[str], None]) -> None:
    """Run baselines on a shape in this process and note in each record what they reach.

    Skipped are those that are not installed, and those for other weights than the records are of. One that fails is told of and left
    out: it must not cost us our own records. With FF_DEBUG its whole traceback is shown.
    """
    ours = {r.context: r for r in records}
    for baseline in chosen:
        if baseline.weights != records[0].weights:
            tell(f"{baseline.name}: for {baseline.weights} weights, not for {records[0].weights}; skipped")
            continue
        version = baseline.version()
        if version is None:
            tell(f"{baseline.name}: not installed, skipped")
            continue
        try:
            for context, ms in baseline.measure(config, sorted(ours), records[0].tokens_timed, records[0].repeats):
                record = ours[context]
                record.baselines[baseline.name], record.baseline_versions[baseline.name] = ms, version
                tell(f"{baseline.name} ({version}) at {context:,}: {ms:.4f} ms/token; ours is {ms / record.ms:.2f}x as fast")
        except Exception as error:
            tell(f"{baseline.name} failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            env.debug(1, traceback.format_exc)
        gc.collect()
