"""The command line: `flashformer generate`, `chat`, `explain`, `check`, `bench`, `tune`, `quantize`, `quality` and `cache`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from . import __version__, cli_measure, env
from . import cli_options as options
from .errors import FlashFormerError, InputError

if TYPE_CHECKING:
    from .engine import Engine
    from .plan import KvType

_FAILED, _INTERRUPTED = 2, 130


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


@main.command(epilog=options.MODEL_HELP)
@click.argument("model")
@click.option("-p", "--prompt", required=True, help="The prompt; '-' reads it from standard input.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Most tokens to make.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@options.sampling(temperature=0.0, min_p=0.0)
@click.option("--chat/--raw", default=None, help="Use the model's chat template, or not; default: if it has one.")
@click.option("--stats", is_flag=True, help="Say afterwards how fast it was.")
@options.device
@options.context
@options.weights
@options.kv
@options.columns
@options.prompt_columns
@options.speculate
def generate(
    model: str, prompt: str, max_tokens: int, stop: tuple[str, ...], chat: bool | None, stats: bool, device: str, max_context: int | None,
    weights: str, kv: KvType, columns: int | None, prompt_columns: int | None, speculate: str, **sampling: Any,
) -> None:  # fmt: skip
    """Print a model's answer to a prompt as it is made. Without further options each token is the most likely one."""
    from .engine import load
    from .sampling import SamplingParams
    from .terminal import describe_logprobs, describe_stats

    if prompt == "-":
        prompt = sys.stdin.read()
    params = SamplingParams(max_tokens=max_tokens, stop=stop, **sampling)
    made = []
    with load(
        model, device, max_context, weights=weights, kv=kv, columns=columns, draft=_drafts(speculate), prompt_columns=prompt_columns
    ) as engine:
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


@main.command(epilog=options.MODEL_HELP)
@click.argument("model")
@click.option("--system", help="A system message for the model.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Most tokens of an answer.")
@options.sampling(temperature=0.7, min_p=0.05)
@options.device
@options.context
@options.weights
@options.kv
@options.columns
@options.prompt_columns
@options.speculate
def chat(
    model: str, system: str | None, max_tokens: int, device: str, max_context: int | None, weights: str, kv: KvType,
    columns: int | None, prompt_columns: int | None, speculate: str, **sampling: Any,
) -> None:  # fmt: skip
    """Talk with a model in the terminal; lines may also come from a pipe.

    Answers are sampled, so that the same question may get another one; --temperature 0 always takes the most likely token.
    """
    from .engine import load
    from .sampling import SamplingParams
    from .terminal import Chat

    with load(
        model, device, max_context, weights=weights, kv=kv, columns=columns, draft=_drafts(speculate), prompt_columns=prompt_columns
    ) as engine:
        _tell_notes(engine)
        Chat(engine, SamplingParams(max_tokens=max_tokens, **sampling), system).run()


def _drafts(speculate: str) -> str | None:
    """What `load` takes for --speculate."""
    return None if speculate == "none" else speculate


def _tell_notes(engine: Engine) -> None:
    """What a user should know of this model."""
    for note in engine.config.notes:
        click.echo(f"note: {note}", err=True)


@main.command(epilog=options.MODEL_HELP)
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
    """Make a model with weights of few bits: a folder in the compressed-tensors format of transformers and vLLM.

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


for _command in (cli_measure.explain, cli_measure.check, cli_measure.bench, cli_measure.tune, cli_measure.quality):
    main.add_command(_command)
