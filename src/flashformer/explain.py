"""What a plan will do, for people: configuration, stages, bytes, exchanges, predicted time. Needs no device."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .checkpoint import Checkpoint
from .formats import PLAIN, Format
from .plan import Plan


@dataclass(frozen=True)
class StageSummary:
    """All stages of one name; bytes and microseconds are those of all of them together."""

    name: str
    times: int  # how often a token runs it
    tiles: int  # of one
    weight_bytes: int
    kv_bytes: int
    imbalance: float  # bytes of the busiest worker / mean
    hands_on: int  # values that one hands to all workers; 0: none
    exchanges: int
    microseconds: float
    formats: tuple[str, ...]  # that its weights are held in


@dataclass(frozen=True)
class Prediction:
    """A token with `context` positions before it."""

    context: int
    stages: tuple[StageSummary, ...]
    bytes_read: int
    milliseconds: float
    fraction: float  # of the bandwidth that the target's file names


def predict(plan: Plan, context: int) -> Prediction:
    """Bytes and time of one token, stage by stage: the bytes at the target's bandwidth, and its exchange where it has one.

    The model of time is deliberately simple: a stage takes its slowest worker's bytes plus the part of an exchange that the
    stream of weights does not hide.
    """
    target = plan.target
    stages = tuple(_summaries(plan, context))
    total = sum(s.microseconds for s in stages)
    read = plan.token_bytes(context)
    return Prediction(context, stages, read, total / 1e3, read / (target.bandwidth_gb_s * 1e3) / total)


def _summaries(plan: Plan, context: int) -> Iterator[StageSummary]:
    """One summary for each name of a stage, in the order of their first appearance."""
    order = {s.name: i for i, s in reversed(list(enumerate(plan.stages)))}
    for name, group in groupby(sorted(plan.stages, key=lambda s: order[s.name]), key=lambda s: s.name):
        stages = list(group)
        first = stages[0]
        weights = sum(s.weight_bytes for s in stages)
        kv = plan.kv.bytes_read(context) * len(stages) if first.kind == "attention" else 0
        slowest = sum(s.geometry.bytes_of(max(s.count)) * plan.target.workers for s in stages if s.geometry)
        exchanges = len(stages) if first.writes or first.kind == "token" else 0
        microseconds = (slowest + kv) / (plan.target.bandwidth_gb_s * 1e3) + exchanges * plan.target.exchange_us
        hands_on = plan.buffer(first.writes).values if first.writes else 0
        if first.name == "head":
            exchanges, microseconds = 0, microseconds - len(stages) * plan.target.exchange_us  # the token stage exchanges
        formats = tuple(dict.fromkeys(s.geometry.format.name for s in stages if s.geometry))
        yield StageSummary(
            name, len(stages), first.tiles, weights, kv, slowest / weights if weights else 1.0, hands_on, exchanges, microseconds, formats
        )


def expansions(plan: Plan, checkpoint: Checkpoint) -> str:
    """One line about the quantised matrices that take more bytes than in the checkpoint, and how many; empty where there are none."""
    told: dict[str, dict[str, None]] = {}  # what becomes of a type -> the stages with it
    stored, held = 0, 0

    def compare(where: str, name: str, format: Format) -> None:
        nonlocal stored, held
        spec = checkpoint.spec(name)
        nbytes = spec.shape[0] * format.row_bytes(spec.shape[1])
        if nbytes <= spec.nbytes or checkpoint.form(name, slice(0, 0)) is None:
            return
        stored, held = stored + spec.nbytes, held + nbytes
        becomes = f"expanded to {plan.config.dtype}" if format == PLAIN else f"held as {format.name}"
        told.setdefault(f"{spec.dtype} is {becomes}", {})[where] = None

    matrices = {block.weight: s for s in plan.stages if s.linear for block in s.linear.blocks}
    for name, s in matrices.items():
        if s.geometry:
            compare(s.name, name, s.geometry.format)
    if plan.embedding not in matrices:
        compare("embedding", plan.embedding, plan.embedding_format)
    return "; ".join(f"{', '.join(where)}: {what}" for what, where in told.items()) + f": +{(held - stored) / 1e9:.2f} GB" if told else ""


def render(plan: Plan, context: int | None = None) -> RenderableType:
    """Configuration and plan as tables, predicted for `context` earlier positions (default: 1,024, or what fits)."""
    context = min(1024, plan.max_context - 1) if context is None else context
    predicted = predict(plan, context)
    c, kv = plan.config, plan.kv
    facts = Table.grid(padding=(0, 2))
    scaling = f", {c.rope_scaling.kind} scaling by {c.rope_scaling.factor:g}" if c.rope_scaling else ""
    options = [name for name, on in (("qkv bias", c.qkv_bias), ("q/k norm", c.qk_norm), ("tied embeddings", c.tied_embeddings)) if on]
    # Of the matrices: vectors (norms, biases) are too few to matter. A tied head counts once.
    matrices = [s.linear.rows_used * s.linear.columns_used for s in plan.stages if s.linear]
    parameters = sum(matrices) + (0 if c.tied_embeddings else c.vocab_size * c.hidden_size)
    cache = plan.kv_bytes()
    memory = plan.tape_bytes() + plan.embedding_bytes() + cache
    for label, value in (
        ("model", f"{c.architecture}, {parameters / 1e9:.3f} B parameters in {c.dtype}{', ' + ', '.join(options) if options else ''}"),
        ("layers", f"{c.num_layers} x (hidden {c.hidden_size}, ffn {c.ffn_size})"),
        ("attention", f"{c.num_heads} heads, {c.num_kv_heads} kv heads of {c.head_dim}; rope theta {c.rope_theta:g}{scaling}"),
        ("vocabulary", f"{c.vocab_size}"),
        ("target", f"{plan.target.name}: {plan.target.description}, {plan.target.workers} workers, {plan.target.bandwidth_gb_s:g} GB/s"),
        ("memory", f"{memory / 1e9:.2f} GB: weights {plan.tape_bytes() / 1e9:.2f} and embeddings {plan.embedding_bytes() / 1e9:.2f}, "
                   f"KV cache {cache / 1e9:.2f} for {plan.max_context} positions{'' if kv.type == 'native' else f' in {kv.type}'}"),
    ):  # fmt: skip
        facts.add_row(Text(label, style="bold"), value)
    table = Table(title=f"One token after {context} positions, predicted", title_justify="left", title_style="bold")
    for column in ("stage", "times", "tiles", "MB", "max/mean", "exchanged", "us", "weights"):
        table.add_column(column, justify="left" if column in ("stage", "weights") else "right", no_wrap=column == "stage")
    for s in predicted.stages:
        table.add_row(
            s.name, str(s.times), str(s.tiles or ""), _megabytes(s.weight_bytes + s.kv_bytes),
            f"{s.imbalance:.3f}" if s.weight_bytes else "", f"{s.hands_on}" if s.exchanges and s.hands_on else "", f"{s.microseconds:.1f}",
            ", ".join(s.formats),
        )  # fmt: skip
    padding = plan.tape_bytes() / plan.weight_bytes() - 1
    table.add_section()
    table.add_row("token", "", "", _megabytes(predicted.bytes_read), "", "", f"{predicted.milliseconds * 1e3:.1f}", style="bold")
    closing = Text(
        f"{predicted.milliseconds:.3f} ms per token, {1e3 / predicted.milliseconds:.0f} tokens/s, "
        f"{predicted.fraction:.0%} of the target's bandwidth (predicted); {padding:.2%} of the tape is padding"
    )
    notes = [Text(note) for note in c.notes]
    return Group(facts, Text(""), table, closing, *notes)


def describe(plan: Plan, context: int | None = None, width: int = 120) -> str:
    """`render` as plain text."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(render(plan, context))
    return out.getvalue().rstrip()


def _megabytes(nbytes: int) -> str:
    """Megabytes with one digit, or nothing."""
    return f"{nbytes / 1e6:.1f}" if nbytes else ""
