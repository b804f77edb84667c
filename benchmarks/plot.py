"""Draw the records of benchmarks/results into docs/: speed by size of the model, by context and by format, ours and theirs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashformer.errors import FlashFormerError
from flashformer.geometry import ceil_div
from flashformer.plots import COLOURS, INK, figure, require
from flashformer.records import Record, load_records, newest

ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
OURS = "FlashFormer"
SIZE_AT = 1024  # context of the picture by size
PANELS, LEAST_BARS = 2, 4  # of the picture by format: in a row, and for how many formats there is room in each
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
        measured = newest([r for r in records if name in times(r)])
        points = [(x(r), value(r, times(r)[name])) for r in measured]
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


def by_format(records: Sequence[Record], path: Path) -> None:
    """Speed by format of the weights, all models at one context that were measured in several; what the floor allows is drawn pale."""
    here = sorted((r for r in newest(records) if r.context == SIZE_AT), key=lambda r: -r.bytes_per_token)
    size = {r.model: r.bytes_per_token for r in here if not r.plain}  # of the smallest format
    if not size:
        return
    models = sorted(size, key=lambda m: size[m])
    shade = dict(zip(dict.fromkeys(r.weights for r in here if r.model in size), COLOURS * len(here), strict=False))
    rows, columns = ceil_div(len(models), PANELS), min(len(models), PANELS)
    with figure(path, rows, columns, (1.5 + 4.7 * columns, 0.4 + 3.2 * rows)) as (made, axes):
        for panel in axes.flat[len(models) :]:
            panel.remove()
        for panel, model in zip(axes.flat, models, strict=False):
            mine = [r for r in here if r.model == model]
            for place, r in enumerate(mine):
                most = 1e3 / r.floor_ms
                panel.bar(place, most, color=shade[r.weights], alpha=0.35, width=0.8, lw=0)
                panel.bar(place, 1e3 / r.ms, color=shade[r.weights], width=0.8, lw=0)
                panel.plot([place - 0.4, place + 0.4], [most, most], color=INK, lw=1.5)
                label = f"{1e3 / r.ms:,.0f}\n{r.fraction_of_ceiling:.0%}"
                panel.annotate(label, (place, most), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
            panel.set_xticks(range(len(mine)), [r.weights.replace(", ", ",\n") for r in mine])
            panel.set(title=model, xlim=(-0.7, max(len(mine), LEAST_BARS) - 0.3))
            panel.tick_params(axis="x", labelsize=8)
            panel.margins(y=0.2)
            panel.grid(axis="x", visible=False)
            panel.yaxis.set_major_formatter("{x:,.0f}")
        for panel in axes[:, 0]:
            panel.set_ylabel("tokens/s")
        title = f"{here[0].gpu}, batch 1, {SIZE_AT:,} earlier positions; line: the bytes of a token at the read ceiling"
        made.suptitle(title, x=0.01, ha="left", fontsize=10)


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """All pictures, for the GPU with the most records; of sizes and contexts for the 16-bit type with the most."""
    records = [r for path in sorted(results.glob("decode-*.json")) for r in load_records(path, Record)]
    if not records:
        print("there are no records yet; run benchmarks/decode.py on a GPU")
        return
    ((gpu, _), *_) = Counter(r.gpu for r in records).most_common()
    here = [r for r in records if r.gpu == gpu]
    require()
    by_format(here, docs / "speed-by-format.svg")
    ((weights, _), *_) = Counter(r.weights for r in here if r.plain).most_common() or [("", 0)]
    mine = [r for r in here if r.weights == weights]
    by_context(mine, docs / "speed-by-context.svg")
    if any(r.context == SIZE_AT for r in mine):
        by_size(mine, docs / "speed-by-size.svg")


if __name__ == "__main__":
    try:
        main()
    except FlashFormerError as error:
        sys.exit(f"error: {error}")
