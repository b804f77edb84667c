"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable

import click

MODEL_HELP = "MODEL is a Hugging Face folder, a GGUF file, 'demo', or a name on the Hugging Face hub."
device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run.")
context = click.option("--max-context", type=click.IntRange(1), help="Positions of the KV cache; default: what model and memory allow.")
weights = click.option(
    "--weights", type=click.Choice(["native", "bf16"]), default="native", show_default=True,
    help="Quantised weights as they are, where the device has kernels for them, or expanded.",
)  # fmt: skip
kv = click.option(
    "--kv", type=click.Choice(["native", "int8", "fp8"]), default="native", show_default=True,
    help="The KV cache: 16 bits a value, or 8 with a scale for each key and value.",
)  # fmt: skip
columns = click.option(
    "--columns", type=int,
    help="Token positions of a pass, at most: prompts are read so many at a time. Default: 16 on a CPU; 1 on a GPU, the fastest answer.",
)
prompt_columns = click.option(
    "--prompt-columns", type=int,
    help="On a GPU: tokens of a prompt that a pass of a second kernel feeds; on Hopper a third one feeds long prompts. 0: neither. "
    "Default: 16 on Hopper, else 0.",
)  # fmt: skip
speculate = click.option(
    "--speculate", default="none", show_default=True,
    help="Guess tokens and verify several in one pass, which changes none of them: 'lookup' (the text repeats itself), or a small MODEL.",
)  # fmt: skip


def sampling(temperature: float, min_p: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
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
