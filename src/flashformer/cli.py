"""The command line: `flashformer generate`, `chat`, `explain`, `check`, `bench`, `tune`, `quantize`, `quality` and `cache`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from . import __version__, env
from .errors import FlashFormerError, InputError

if TYPE_CHECKING:
    from .config import ModelConfig
    from .engine import Engine
    from .formats import Format
    from .plan import KvType

_MODEL_HELP = "MODEL is a Hugging Face folder, a GGUF file, 'demo', or a name on the Hugging Face hub."
_device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run.")
_context = click.option("--max-context", type=click.IntRange(1), help="Positions of the KV cache; default: what model and memory allow.")
_weights = click.option(
    "--weights", type=click.Choice(["native", "bf16"]), default="native", show_default=True,
    help="Quantised weights as they are, where the device has kernels for them, or expanded.",
)  # fmt: skip
_kv = click.option(
    "--kv", type=click.Choice(["native", "int8", "fp8"]), default="native", show_default=True,
    help="The KV cache: 16 bits a value, or 8 with a scale for each key and value.",
)  # fmt: skip
_FAILED, _INTERRUPTED = 2, 130


def _sampling(temperature: float, min_p: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options that choose tokens; a command gets them by the names that they have in SamplingParams."""
    options = [
        click.option("--temperature", type=float, default=temperature, show_default=True, help="0 always takes the most likely token."),
        click.option("--top-k", type=int, default=0, help="Only the K most likely tokens; 0: all."),
        click.option("--top-p", type=float, default=1.0, help="Only the most likely tokens that reach this share together; 1: all."),
        click.option(
            "--min-p", type=float, default=min_p, show_default=True, help="Only tokens this likely relative to the most likely; 0: all."
        ),
        click.option("--repetition-penalty", type=float, default=1.0, help="For tokens of prompt and answer; 1: none."),
        click.option("--presence-penalty", type=float, default=0.0, help="For tokens of the answer; 0: none."),
        click.option("--frequency-penalty", type=float, default=0.0, help="For tokens of the answer, each time; 0: none."),
        click.option("--seed", type=int, help="The same seed gives the same answer."),
        click.option("--logprobs", type=int, help="Show each token's log probability afterwards, and this many of the most likely ones."),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class Commands(click.Group):
    """A group whose commands end with one line instead of a traceback when something goes wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a FlashFormerError becomes "error: ..." and exit status 2, Ctrl-C exit status 130."""
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except FlashFormerError as error:
            with contextlib.suppress(FlashFormerError):  # FF_DEBUG itself may be what is wrong
                if env.debug_level():
                    traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            ctx.exit(_FAILED)
        except KeyboardInterrupt:
            click.echo("", err=True)
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line."""
    click.echo(f"warning: {message}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flashformer")
def main() -> None:
    """Run a language model as one kernel: the whole forward pass, generated for this model and this device.

    FF_DEBUG=1..6 tells more about what happens, FF_CACHE_DIR and FF_THREADS change where and how.
    """


@main.command(epilog=_MODEL_HELP)
@click.argument("model")
@click.option("-p", "--prompt", required=True, help="The prompt; '-' reads it from standard input.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Most tokens to make.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@_sampling(temperature=0.0, min_p=0.0)
@click.option("--chat/--raw", default=None, help="Use the model's chat template, or not; default: if it has one.")
@click.option("--stats", is_flag=True, help="Say afterwards how fast it was.")
@_device
@_context
@_weights
@_kv
def generate(
    model: str, prompt: str, max_tokens: int, stop: tuple[str, ...], chat: bool | None, stats: bool, device: str, max_context: int | None,
    weights: str, kv: KvType, **sampling: Any,
) -> None:  # fmt: skip
    """Print a model's answer to a prompt as it is made. Without further options each token is the most likely one."""
    from .engine import load
    from .sampling import SamplingParams
    from .terminal import describe_logprobs, describe_stats

    if prompt == "-":
        prompt = sys.stdin.read()
    params = SamplingParams(max_tokens=max_tokens, stop=stop, **sampling)
    made = []
    with load(model, device, max_context, weights=weights, kv=kv) as engine:
        _tell_notes(engine)
        if not prompt:
            raise InputError("the prompt is empty")
        if chat or (chat is None and engine.tokenizer.has_chat_template):
            results = engine.generate(engine.chat_prompt([{"role": "user", "content": prompt}]), params)
        else:
            results = engine.generate(prompt, params)
        with contextlib.closing(results):
            for result in results:
                made.append(result)
                click.echo(result.text, nl=False)
                sys.stdout.flush()
        click.echo()
        if params.logprobs is not None:
            click.echo(describe_logprobs(engine, made), err=True)
        if stats:
            click.echo(describe_stats(engine), err=True)


@main.command(epilog=_MODEL_HELP)
@click.argument("model")
@click.option("--system", help="A system message for the model.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Most tokens of an answer.")
@_sampling(temperature=0.7, min_p=0.05)
@_device
@_context
@_weights
@_kv
def chat(
    model: str, system: str | None, max_tokens: int, device: str, max_context: int | None, weights: str, kv: KvType, **sampling: Any
) -> None:  # fmt: skip
    """Talk with a model in the terminal; lines may also come from a pipe.

    Answers are sampled, so that the same question may get another one; --temperature 0 always takes the most likely token.
    """
    from .engine import load
    from .sampling import SamplingParams
    from .terminal import Chat

    with load(model, device, max_context, weights=weights, kv=kv) as engine:
        _tell_notes(engine)
        Chat(engine, SamplingParams(max_tokens=max_tokens, **sampling), system).run()


def _tell_notes(engine: Engine) -> None:
    """What a user should know of this model."""
    for note in engine.config.notes:
        click.echo(f"note: {note}", err=True)


@main.command(epilog=_MODEL_HELP + " config.json alone is enough; named shapes such as llama-3.1-8b work too.")
@click.argument("model")
@click.option("--target", "target_name", help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 or cpu; default: this machine's.")
@click.option("--workers", type=click.IntRange(1), help="SMs or cores; default: those of a typical device.")
@click.option("--context", type=click.IntRange(0), help="Earlier positions of the predicted token; default: 1,024.")
@_context
@_kv
def explain(
    model: str, target_name: str | None, workers: int | None, context: int | None, max_context: int | None, kv: KvType
) -> None:
    """Show a model's configuration and the plan of its kernel. Needs no GPU."""
    from rich.console import Console

    from .engine import find_device
    from .explain import render
    from .models import build_graph
    from .plan import make_plan
    from .targets import get
    from .validate import validate

    config, formats = _configuration(model)
    target = get(target_name) if target_name else find_device().target
    positions = min(config.max_positions, max_context or config.max_positions)
    target = replace(target, workers=workers or target.workers)
    plan = make_plan(config, build_graph(config), target, positions, formats=formats, kv_type=kv)
    if context is not None and context >= plan.max_context:
        raise InputError(f"--context is {context}; there are {plan.max_context} positions")
    validate(plan)
    Console(soft_wrap=not sys.stdout.isatty()).print(render(plan, context))


def _configuration(model: str) -> tuple[ModelConfig, dict[str, Format]]:
    """The configuration of a model and the formats of its quantised weights, as far as its files are here.

    Reads as little as possible; `model` may be a config.json or a named shape.
    """
    from .checkpoint import open_checkpoint
    from .config import read_config
    from .formats import choose
    from .hub import resolve
    from .models import build_graph
    from .shapes import SHAPES

    path = Path(model)
    if path.name == "config.json" and path.is_file():
        return read_config(path.parent), {}
    if model in SHAPES and not path.exists():
        return SHAPES[model], {}
    path = resolve(model, config_only=True)
    if path.is_dir() and (read_config(path).quantization is None or not any(path.glob("*.safetensors"))):
        return read_config(path), {}
    with open_checkpoint(path) as checkpoint:
        names = [name for name in build_graph(checkpoint.config).weights() if name in checkpoint.names()]
        return checkpoint.config, choose(checkpoint, names)


@main.command(epilog=_MODEL_HELP)
@click.argument("model")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="Positions to compare.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random token ids.")
@_device
@_weights
@_kv
@click.pass_context
def check(ctx: click.Context, model: str, tokens: int, seed: int, device: str, weights: str, kv: KvType) -> None:
    """Compare the kernel on this device with a plain reference on this very model; exit status 1 if it is out of tolerance."""
    from .check import check_runner, sample_tokens
    from .engine import load
    from .models import build_graph
    from .reference import Reference

    with load(model, device, weights=weights, kv=kv) as engine:
        if tokens >= engine.max_context:
            raise InputError(f"--tokens is {tokens}; the context holds {engine.max_context}")
        click.echo(f"Comparing {tokens} positions on {engine.device.name} with the reference ...", err=True)
        reference = Reference(build_graph(engine.config), engine.checkpoint, kv_type=kv)
        result = check_runner(engine.runner, reference, sample_tokens(engine.config, tokens, seed))
    click.echo(result.describe())
    if not result.within:
        ctx.exit(1)


@main.command(epilog=_MODEL_HELP + " A named shape such as llama-3.1-8b is measured with random weights.")
@click.argument("model")
@click.option("--context", "contexts", default="1024", show_default=True, help="Earlier positions; several with commas between them.")
@click.option("--tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens of a launch.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Launches at each context.")
@click.option("--baselines", default="", help="Run beside ours: torch.compile, transformers, llama.cpp, vllm (with commas), or all.")
@click.option("--check/--no-check", "checked", default=True, show_default=True, help="Compare the kernel with the reference first.")
@click.option("--weights", default="", help="Of a named shape: bf16, int8, fp8, int4, mxfp4 or nf4; of a checkpoint: native or bf16.")
@click.option("--plain-head", is_flag=True, help="With such random weights, leave the head in 16 bits.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Merge the records into this file.")
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="Write the spans of one token for ui.perfetto.dev.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw where that token's time goes (.png or .svg).")
@_device
@_kv
def bench(
    model: str, contexts: str, tokens: int, repeats: int, baselines: str, checked: bool, weights: str, plain_head: bool,
    json_path: Path | None, trace_path: Path | None, plot_path: Path | None, device: str, kv: KvType,
) -> None:  # fmt: skip
    """Measure decoding on this GPU against the read ceiling, and show where the time goes.

    A trace and its plot are of one token at the shortest context.
    """
    from rich.console import Console

    from . import trace as tracing
    from .bench import Bench, choose_baselines, compare_with, gpu_target, open_subject
    from .plots import draw_trace, require
    from .progress import bars
    from .records import save, table

    if device == "cpu":
        raise InputError("bench measures a GPU; for a CPU see: flashformer generate MODEL --stats --device cpu")
    try:
        wanted = [int(c) for c in contexts.split(",")]
    except ValueError:
        raise InputError(f"--context is {contexts!r}; it must be whole numbers with commas between them") from None
    for path in filter(None, (json_path, trace_path, plot_path)):
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"{path}: there is no folder {path.parent} to write into")
    if plot_path:
        require(plot_path)
    chosen = choose_baselines(name.strip() for name in baselines.split(",") if name.strip())
    gpu_target()
    with open_subject(model, weights, plain_head) as subject:
        with bars() as told, Bench(subject, wanted, tokens, checked, told, kv) as ready:
            if moved := set(wanted) - set(ready.contexts):
                most = subject.config.max_positions
                told_of = f"context {max(moved):,} is measured at {most - tokens:,}: the last {tokens} of {most:,} positions"
                click.echo(f"note: {told_of}", err=True)
            records = [ready.measure(context, repeats) for context in ready.contexts]
            traced = ready.trace(ready.contexts[0]) if trace_path or plot_path else None
        # NOTE: all that is known is written first: a baseline may take the process down.
        token_us = records[0].ms * 1e3
        if json_path:
            save(records, json_path)
        if traced and trace_path:
            tracing.write_chrome(traced, trace_path)
        if traced and plot_path:
            draw_trace(plot_path, traced, token_us)
        compare_with(chosen, subject.config, records, lambda text: click.echo(text, err=True))
    if json_path:
        save(records, json_path)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has no width of its own
    console.print(table(records))
    if traced:
        console.print(tracing.table(traced, token_us))


@main.command(epilog=_MODEL_HELP + " A named shape such as llama-3.1-8b is tried with random weights.")
@click.argument("model")
@click.option("--context", type=click.IntRange(0), default=1024, show_default=True, help="Earlier positions of the timed tokens.")
@click.option("--seconds", type=click.IntRange(1), default=120, show_default=True, help="For the search, once the model is loaded.")
@click.option("--reset", is_flag=True, help="Forget what was found for this model on this GPU.")
def tune(model: str, context: int, seconds: int, reset: bool) -> None:
    """Search for the numbers with which this model is fastest on this GPU, and keep them for all who load it.

    They are kept in the cache folder. A model has the same results with them, but for the rounding of attention where the cut of
    its KV cache is another.
    """
    from . import tune as tuning
    from .progress import bars

    if reset:
        click.echo("forgotten" if tuning.reset(model) else "nothing was kept for this model on this GPU")
        return
    with bars() as told:
        tuning.tune(model, context, seconds, told, click.echo)


@main.command(epilog=_MODEL_HELP)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["int4", "int8", "fp8", "mxfp4"]), required=True, help="What the weights become.")
@click.option("--group", type=click.Choice(["32", "64", "128", "row"]), help="Columns that share a scale in int4; default: 128.")
@click.option("--method", type=click.Choice(["rtn", "gptq"]), help="Round to nearest, or calibrate; default: gptq if there is a --text.")
@click.option("--head", type=click.Choice(["16", "same"]), default="16", show_default=True, help="16 bits for the head, or as the rest.")
@click.option("--text", type=click.Path(path_type=Path), help="A text file that gptq calibrates with.")
def quantize(
    model: str, out: Path, to: Literal["int4", "int8", "fp8", "mxfp4"], group: str | None, method: str | None,
    head: Literal["16", "same"], text: Path | None,
) -> None:  # fmt: skip
    """Make a model with weights of few bits: a folder that transformers and vLLM read too (compressed-tensors).

    int4 has groups of 128 columns (64 or 32 where those do not divide all matrices), mxfp4 of 32; int8 and fp8 have a scale a row.
    Embedding and norms stay in 16 bits. OUT must not exist, or be empty.
    """
    from .quantize import GROUPS, Recipe
    from .quantize import quantize as run

    if method is not None and (method == "gptq") != (text is not None):
        raise InputError("gptq calibrates with a text (--text FILE); rtn reads none")
    if group is not None and to != "int4":
        raise InputError(f"--group is for int4; {to} has groups of its own")
    columns = GROUPS[0] if group is None else None if group == "row" else int(group)
    began = time.monotonic()
    outcome = run(model, out, Recipe(to, columns, head, text))
    for note in outcome.notes:
        click.echo(f"note: {note}", err=True)
    seconds = time.monotonic() - began
    click.echo(f"{out}: {outcome.bytes_before / 1e6:,.1f} MB of weights became {outcome.bytes_after / 1e6:,.1f} MB in {seconds:.1f} s")


@main.command(epilog=_MODEL_HELP)
@click.argument("model")
@click.option("--against", help="A model with the same tokens to compare with, such as the one it was quantised from.")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="The text file to predict.")
@click.option("--tokens", type=click.IntRange(2), default=4096, show_default=True, help="How many of its first tokens.")
@click.option("--window", type=click.IntRange(2), default=1024, show_default=True, help="Tokens that see each other.")
@_device
@_kv
def quality(model: str, against: str | None, text: Path, tokens: int, window: int, device: str, kv: KvType) -> None:
    """Measure a model's perplexity on a text, and how far its predictions are from another model's.

    --kv is of MODEL alone: against the same model it says what the cache loses.
    """
    from rich.console import Console

    from .quality import quality as run

    Console(width=None if sys.stdout.isatty() else 160).print(run(model, against, text, tokens, window, device, kv=kv).table())


@main.command()
@click.option("--clear", is_flag=True, help="Remove everything that was built or packed.")
def cache(clear: bool) -> None:
    """Show what the cache of kernels and packed weights holds."""
    from .build import Cache

    kept = Cache(env.cache_dir())
    if clear:
        click.echo(f"freed {kept.clear() / 1e6:.1f} MB in {kept.root}")
        return
    entries = kept.entries()
    for kind in sorted({entry.kind for entry in entries}):
        sizes = [entry.nbytes for entry in entries if entry.kind == kind]
        click.echo(f"{kind:16} {len(sizes):5} entries {sum(sizes) / 1e6:10.1f} MB")
    click.echo(f"{'all':16} {len(entries):5} entries {sum(e.nbytes for e in entries) / 1e6:10.1f} MB in {kept.root}")
