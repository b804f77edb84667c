"""Pictures, where matplotlib is installed: one style that reads on light and on dark pages, and the plot of a trace."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .trace import Trace, Visits, summarize, utilisation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
INK = "#7d8590"  # text and lines, on white as on black
COLOURS = ("#4c8dd6", "#e0863d", "#3fa66b", "#c9577e", "#9a7bd0", "#b89b2e", "#3aa6b9", "#8f8f8f")
BINS = 1000  # of a time axis
TINY = 0.005  # us: a loss below that is none
ZOOM = 2  # layers that the closer view shows
SETTINGS = {
    "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": INK, "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "flashformer", "font.family": "sans-serif",
}  # fmt: skip


def require(path: Path | None = None) -> None:
    """Raise InputError, before anything is measured, if a plot could not be drawn or `path` is no name for one."""
    if path is not None and path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a plot is a {' or '.join(FORMATS)} file")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('a plot needs matplotlib, which is not installed; run: pip install "flashformer[plots]"')


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[tuple[Figure, np.ndarray]]:
    """An empty figure in our style and its axes [rows, columns]; what is drawn in the `with` block ends up in `path`.

    `size` in inches, `options` as of `Figure.subplots`. The same figure gives the same bytes.
    """
    require(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        made = Figure(figsize=size, layout="constrained")
        yield made, made.subplots(rows, columns, squeeze=False, **options)
        made.savefig(path, dpi=160, transparent=True, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def draw_trace(path: Path, trace: Trace, token_us: float | None = None) -> None:
    """Stream utilisation over one token and over two of its layers, stage by stage, and what each stage loses.

    `token_us` as in `trace.table`. Raises InputError as `require` does.
    """
    with figure(path, 4, 1, (11, 11), height_ratios=(3, 3, 2.2, 2.4)) as (made, axes):
        _draw_trace(made, axes[:, 0], trace, token_us)


def _draw_trace(made: Figure, panels: np.ndarray, trace: Trace, token_us: float | None) -> None:
    """`draw_trace` once there is something to draw on."""
    whole, close, phases, losses = panels
    colour = dict(zip(trace.names, COLOURS * len(trace.names), strict=False))

    total = trace.duration if token_us is None else token_us
    read = sum(float(v.nbytes.sum()) for v in trace.visits)
    reached = trace.floor(read) / total
    made.suptitle(
        f"{trace.name}, one token after {trace.position:,} positions: {total / 1e3:.3f} ms, {read / 1e6:,.0f} MB, "
        f"{reached:.1%} of the read ceiling ({trace.ceiling_gb_s:,.0f} GB/s)",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    _stream(whole, trace, colour, 0.0, trace.duration)
    whole.set_title("Stream utilisation: bytes that all SMs take from their rings")
    layer = max(v.stage.layer for v in trace.visits) // 2
    shown = [v for v in trace.visits if layer <= v.stage.layer < layer + ZOOM]
    begin = float(np.nanmin([v.begin for v in shown]))
    end = float(np.nanmax([[v.end, v.done] for v in shown]))
    _stream(close, trace, colour, begin, end)
    close.set_title(f"The same, layers {layer} to {shown[-1].stage.layer}")
    _phases(phases, shown, colour)
    phases.set_xlim(begin, end)
    _losses(losses, trace, colour, total)


def _stream(axes: Axes, trace: Trace, colour: dict[str, str], begin: float, end: float) -> None:
    """Stacked utilisation by stage from `begin` to `end`, us."""
    edges = np.linspace(begin, end, BINS + 1)
    rates = utilisation(trace, edges)
    names = [name for name, rate in rates.items() if rate.any()]
    middles = (edges[1:] + edges[:-1]) / 2
    axes.stackplot(middles, *(rates[n] / trace.ceiling_gb_s * 100 for n in names), colors=[colour[n] for n in names], labels=names, lw=0)
    axes.axhline(100, color=INK, lw=1, ls="--")
    mean = sum(float((r * np.diff(edges)).sum()) for r in rates.values()) / (end - begin) / trace.ceiling_gb_s
    axes.annotate(f"mean {mean:.0%}", (1.0, 1.02), xycoords="axes fraction", ha="right", va="bottom")
    axes.set(xlim=(begin, end), ylim=(0, None), ylabel="% of the ceiling", xlabel="us")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)


def _phases(axes: Axes, shown: list[Visits], colour: dict[str, str]) -> None:
    """When the SMs wait, stream and finish in each stage: means as bars, the slowest SM as a tick."""
    rows = {name: i for i, name in enumerate(dict.fromkeys(v.stage.name for v in shown))}
    for v in shown:
        row = rows[v.stage.name]
        if not np.isnan(v.end).all():
            begin, ready, end = (float(np.nanmean(x)) for x in (v.begin, v.ready, v.end))
            axes.barh(row, ready - begin, left=begin, height=0.7, color=INK, alpha=0.35, lw=0)
            axes.barh(row, end - ready, left=ready, height=0.7, color=colour[v.stage.name], lw=0)
        else:
            end = v.complete
        if not np.isnan(v.done).all():
            axes.barh(row, float(np.nanmean(v.done)) - end, left=end, height=0.25, color=colour[v.stage.name], alpha=0.6, lw=0)
            last = float(np.nanmax(v.done))
            axes.plot([last, last], [row - 0.35, row + 0.35], color=colour[v.stage.name], lw=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set(xlabel="us")
    axes.set_title("Mean SM: wait (grey), stream (wide), finish (narrow); tick: the last SM has published")


def _losses(axes: Axes, trace: Trace, colour: dict[str, str], total: float) -> None:
    """Floor and loss of each stage, in us of a token that takes `total`."""
    stages = summarize(trace)
    rows = [(s.name, s.floor * s.times, s.loss, colour[s.name]) for s in stages if s.floor > 0 or abs(s.loss) > TINY]
    rows.append(("other", 0.0, total - sum(floor + loss for _, floor, loss, _ in rows), INK))
    for row, (_, floor, loss, shade) in enumerate(rows):
        axes.barh(row, floor, color=shade, alpha=0.45, lw=0)
        axes.barh(row, loss, left=floor, color=shade, lw=0)
        axes.annotate(
            f"{loss:+.1f} us", (max(floor, floor + loss), row), xytext=(4, 0), textcoords="offset points", va="center", fontweight="bold"
        )
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="us per token")
    floor = sum(f for _, f, *_ in rows)
    axes.set_title(f"Floor (pale) and loss against it (full) of each stage: {total - floor:.1f} us lost of {total:.1f}")
