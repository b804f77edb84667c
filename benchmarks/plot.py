"""Draw the records of benchmarks/results into docs/: speed by size of the model and by context, ours and theirs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashformer.errors import FlashFormerError
from flashformer.plots import COLOURS, INK, figure, require
from flashformer.records import Record, load_records

ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
OURS = "FlashFormer"
SIZE_AT = 1024  # context of the picture by size
MOST_MODELS = 3  # in the picture by context: the smallest, the largest, one between
READINGS: tuple[tuple[str, Callable[[Record, float], float]], ...] = (  # of a record and milliseconds per token
    ("tokens/s", lambda r, ms: 1e3 / ms),
    ("% of the read ceiling", lambda r, ms: r.bytes_per_token / ms / 1e4 / r.read_ceiling_gb_s),
)


def times(record: Record) -> dict[str, float]:
    """Milliseconds per token of everyone who was measured there."""
    return {OURS: record.ms, **record.baselines}


def colour_of(records: Sequence[Record]) -> dict[str, str]:
    """One colour for each who was measured, the same in every picture."""
    names = dict.fromkeys(name for r in records for name in times(r))
    return dict(zip(names, COLOURS, strict=False))


def draw(axes: Any, records: Sequence[Record], x: Callable[[Record], float], reading: int, colour: dict[str, str]) -> None:
    """One line for each who was measured, over `x`."""
    label, value = READINGS[reading]
    for name, shade in colour.items():
        points = [(x(r), value(r, times(r)[name])) for r in records if name in times(r)]
        if points:
            width = 2.2 if name == OURS else 1.3
            axes.plot(*zip(*points, strict=True), color=shade, lw=width, marker="o", ms=4, label=name)
    axes.set(xscale="log", ylabel=label)
    if reading == 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter(lambda v, _: f"{v:,.0f}" if f"{v:e}"[0] in "25" else "")
    else:
        axes.set_ylim(0, 105)
        axes.axhline(100, color=INK, lw=1, ls="--")


def legend(made: Any, axes: Any) -> None:
    """One for all panels, beside them."""
    known = {name: line for panel in axes.flat for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    made.legend(known.values(), known.keys(), loc="outside right upper")


def by_size(records: Sequence[Record], path: Path) -> None:
    """Speed over bytes read per token, all models at one context."""
    from matplotlib.ticker import NullLocator

    here = sorted((r for r in records if r.context == SIZE_AT), key=lambda r: r.bytes_per_token)
    with figure(path, 1, 2, (11, 4.2)) as (made, axes):
        for reading, panel in enumerate(axes[0]):
            draw(panel, here, lambda r: r.bytes_per_token / 1e9, reading, colour_of(records))
            panel.set_xticks([r.bytes_per_token / 1e9 for r in here], [r.model for r in here], rotation=25, ha="right")
            panel.xaxis.set_minor_locator(NullLocator())
        axes[0, 0].set_title(f"{here[0].gpu}, batch 1, {SIZE_AT:,} earlier positions, by bytes read per token")
        legend(made, axes)


def by_context(records: Sequence[Record], path: Path) -> None:
    """Speed over the number of earlier positions, some models."""
    sizes = {m: min(r.bytes_per_token for r in records if r.model == m) for m in {r.model for r in records}}
    long = [m for m in sorted(sizes, key=lambda m: sizes[m]) if len({r.context for r in records if r.model == m}) > 1]
    shown = long if len(long) <= MOST_MODELS else [long[0], long[len(long) // 2], long[-1]]
    if not shown:
        return
    with figure(path, 2, len(shown), (1.5 + 3.3 * len(shown), 5.5), sharex="col", sharey="row") as (made, axes):
        for column, model in enumerate(shown):
            mine = sorted((r for r in records if r.model == model), key=lambda r: r.context)
            for reading in (0, 1):
                draw(axes[reading, column], mine, lambda r: max(r.context, 1), reading, colour_of(records))
                axes[reading, column].label_outer()
            axes[1, column].set(xlabel="earlier positions", xscale="log")
            axes[1, column].xaxis.set_major_formatter("{x:,.0f}")
            axes[0, column].set_title(model)
        legend(made, axes)


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Both pictures, for the GPU and format with the most records."""
    records = [r for path in sorted(results.glob("decode-*.json")) for r in load_records(path, Record)]
    if not records:
        print("there are no records yet; run benchmarks/decode.py on a GPU")
        return
    ((gpu, weights), _), *_ = Counter((r.gpu, r.weights) for r in records).most_common()
    mine = [r for r in records if (r.gpu, r.weights) == (gpu, weights)]
    require()
    by_context(mine, docs / "speed-by-context.svg")
    if any(r.context == SIZE_AT for r in mine):
        by_size(mine, docs / "speed-by-size.svg")


if __name__ == "__main__":
    try:
        main()
    except FlashFormerError as error:
        sys.exit(f"error: {error}")
