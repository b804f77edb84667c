"""`flashformer quality`: how well a model predicts a text, and how far its predictions are from another model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .backends import Progress, no_progress
from .check import log_softmax
from .errors import InputError
from .export import added_ids
from .quant_methods.calibration import read_text

if TYPE_CHECKING:
    from rich.table import Table

    from .plan import KvType
    from .tokenizer import Tokenizer

BLOCK = 64  # positions whose distributions are held in float64 at a time

Logits = Callable[[Sequence[int]], np.ndarray]  # token ids -> scores of the token after each, [tokens, vocab]


@dataclass(frozen=True)
class Quality:
    """Figures over the tokens of a text that were predicted from those before them in their window."""

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None  # None: there was no reference, nor are there the figures below
    kl_mean: float | None = None  # of the reference's distribution to the model's, in nats
    kl_p99: float | None = None  # the 99th percentile
    top1: float | None = None  # share of positions with the same most likely token

    def table(self) -> Table:
        """The figures for people."""
        from rich.table import Table

        shown = Table(show_header=False)
        rows = [("tokens predicted", f"{self.tokens:,}"), ("perplexity", f"{self.perplexity:.4f}")]
        if self.reference_perplexity is not None:
            change = self.perplexity / self.reference_perplexity - 1
            rows += [
                ("perplexity of the reference", f"{self.reference_perplexity:.4f} ({change:+.2%})"),
                ("KL divergence, mean", f"{self.kl_mean:.3e} nats"),
                ("KL divergence, 99th percentile", f"{self.kl_p99:.3e} nats"),
                ("top-1 agreement", f"{self.top1:.2%}"),
            ]
        for row in rows:
            shown.add_row(*row)
        return shown


def cut_windows(text: str, tokenizer: Tokenizer, window: int, tokens: int) -> list[tuple[list[int], int]]:
    """The first `tokens` token ids of a text in windows of at most `window`, each with the position of its first predicted token.

    Each window begins as the model expects a text to begin (such as with its bos token). Raises InputError if there is nothing to
    predict.
    """
    before, _ = added_ids(tokenizer)
    ids = tokenizer.encode(text, add_special=False)[:tokens]
    step = window - len(before)
    first = max(len(before), 1)
    windows = [([*before, *ids[i : i + step]], first) for i in range(0, len(ids), max(step, 1))]
    windows = [(part, first) for part, first in windows if len(part) > first]
    if not windows or step < 1:
        raise InputError(f"there is nothing to predict: {len(ids)} tokens in windows of {window}")
    return windows


def measure(
    windows: Sequence[tuple[Sequence[int], int]], model: Logits, reference: Logits | None = None, progress: Progress = no_progress
) -> Quality:
    """The quality of `model` on windows of token ids (see `cut_windows`), against `reference` if there is one."""
    losses, reference_losses, divergences, agreed = [], [], [], 0
    for done, (ids, first) in enumerate(windows):
        progress("measuring", done, len(windows))
        targets = np.array(ids[first:])
        ours = model(ids)[first - 1 : -1]
        theirs = reference(ids)[first - 1 : -1] if reference else None
        for at in _blocks(len(targets)):
            q, here = log_softmax(ours[at].astype(np.float64)), targets[at]
            losses.append(-q[np.arange(len(here)), here])
            if theirs is not None:
                p = log_softmax(theirs[at].astype(np.float64))
                reference_losses.append(-p[np.arange(len(here)), here])
                divergences.append((np.exp(p) * (p - q)).sum(axis=-1))
                agreed += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
    progress("measuring", len(windows), len(windows))
    count = sum(map(len, losses))
    perplexity = float(np.exp(np.concatenate(losses).mean()))
    if reference is None:
        return Quality(count, perplexity)
    kl = np.maximum(np.concatenate(divergences), 0.0)
    theirs_perplexity = float(np.exp(np.concatenate(reference_losses).mean()))
    return Quality(count, perplexity, theirs_perplexity, float(kl.mean()), float(np.quantile(kl, 0.99)), agreed / count)


def quality(
    model: str, against: str | None, text: Path, tokens: int, window: int, device: str = "auto", progress: Progress | None = None,
    kv: KvType = "native",
) -> Quality:  # fmt: skip
    """Measure `model` with a KV cache of type `kv` on the first `tokens` tokens of a text file, and compare it with `against`, if that
    is given, with a native one.

    Raises InputError for a text that cannot be used or models whose tokens differ; whatever `engine.load` raises.
    """
    from .engine import load
    from .progress import bars

    content = read_text(text)
    with ExitStack() as stack:
        engines = [stack.enter_context(load(model, device, window, progress, kv=kv))]
        if against is not None:
            engines.append(stack.enter_context(load(against, device, window, progress)))
        windows = cut_windows(content, engines[0].tokenizer, window, tokens)
        for other in engines[1:]:
            if engines[0].config.vocab_size != other.config.vocab_size or windows != cut_windows(content, other.tokenizer, window, tokens):
                raise InputError(f"{model} and {against} have different tokens: their predictions cannot be compared")
        told = stack.enter_context(bars(progress))
        return measure(windows, engines[0].logits, engines[1].logits if against else None, told)


def _blocks(count: int) -> Iterator[slice]:
    """Slices of at most BLOCK that cover `count` positions."""
    return (slice(i, i + BLOCK) for i in range(0, count, BLOCK))
