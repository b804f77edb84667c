"""The commands that look at a model in place of talking with it: `explain`, `check`, `bench`, `tune` and `quality`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import cli_options as options
from .errors import InputError

if TYPE_CHECKING:
    from .config import ModelConfig
    from .formats import Format
    from .plan import KvType


@click.command(epilog=options.MODEL_HELP + " config.json alone is enough; named shapes such as llama-3.1-8b work too.")
@click.argument("model")
@click.option("--target", "target_name", help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 or cpu; default: this machine's.")
@click.option("--workers", type=click.IntRange(1), help="SMs or cores; default: those of a typical device.")
@click.option("--context", type=click.IntRange(0), help="Earlier positions of the predicted token; default: 1,024.")
@options.context
@options.kv
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


@click.command(epilog=options.MODEL_HELP)
@click.argument("model")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="Positions to compare.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random token ids.")
@options.device
@options.weights
@options.kv
@options.columns
@click.pass_context
def check(
    ctx: click.Context, model: str, tokens: int, seed: int, device: str, weights: str, kv: KvType, columns: int | None
) -> None:  # fmt: skip
    """Compare the kernel on this device with a plain reference on this very model; exit status 1 if it is out of tolerance."""
    from .check import check_runner, sample_tokens
    from .engine import load
    from .models import build_graph
    from .reference import Reference

    with load(model, device, weights=weights, kv=kv, columns=columns) as engine:
        if tokens >= engine.max_context:
            raise InputError(f"--tokens is {tokens}; the context holds {engine.max_context}")
        click.echo(f"Comparing {tokens} positions on {engine.device.name} with the reference ...", err=True)
        reference = Reference(build_graph(engine.config), engine.checkpoint, kv_type=kv)
        result = check_runner(engine.runner, reference, sample_tokens(engine.config, tokens, seed))
    click.echo(result.describe())
    if not result.within:
        ctx.exit(1)


@click.command(epilog=options.MODEL_HELP + " A named shape such as llama-3.1-8b is measured with random weights.")
@click.argument("model")
@click.option("--context", "contexts", default="1024", show_default=True, help="Earlier positions; several with commas between them.")
@click.option("--tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens of a launch.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Launches at each context.")
@click.option("--baselines", default="", help="Run beside ours: torch.compile, tinygemm, transformers, llama.cpp, vllm (commas), or all.")
@click.option("--check/--no-check", "checked", default=True, show_default=True, help="Compare the kernel with the reference first.")
@click.option("--weights", default="", help="Of a named shape: bf16, int8, fp8, int4, mxfp4, nvfp4, nf4; of a checkpoint: native or bf16.")
@click.option("--plain-head", is_flag=True, help="With such random weights, leave the head in 16 bits.")
@click.option("--first-token", is_flag=True, help="Time prompts as long as each context, too, until their first token.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Merge the records into this file.")
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="Write the spans of one token for ui.perfetto.dev.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw where that token's time goes (.png or .svg).")
@options.device
@options.kv
def bench(
    model: str, contexts: str, tokens: int, repeats: int, baselines: str, checked: bool, weights: str, plain_head: bool, first_token: bool,
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
        with bars() as told, Bench(subject, wanted, tokens, checked, told, kv, first_token) as ready:
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


@click.command(epilog=options.MODEL_HELP + " A named shape such as llama-3.1-8b is tried with random weights.")
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


@click.command(epilog=options.MODEL_HELP)
@click.argument("model")
@click.option("--against", help="A model with the same tokens to compare with, such as the one it was quantised from.")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="The text file to predict.")
@click.option("--tokens", type=click.IntRange(2), default=4096, show_default=True, help="How many of its first tokens.")
@click.option("--window", type=click.IntRange(2), default=1024, show_default=True, help="Tokens that see each other.")
@options.device
@options.kv
def quality(model: str, against: str | None, text: Path, tokens: int, window: int, device: str, kv: KvType) -> None:
    """Measure a model's perplexity on a text, and how far its predictions are from another model's.

    --kv is of MODEL alone: against the same model it says what the cache loses.
    """
    from rich.console import Console

    from .quality import quality as run

    Console(width=None if sys.stdout.isatty() else 160).print(run(model, against, text, tokens, window, device, kv=kv).table())
