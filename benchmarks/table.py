"""Write the tables of benchmarks/results into the README, between its markers. With --check: fail if they would change."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from flashformer.records import Record, load_records

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- table: begin (written by benchmarks/table.py) -->\n", "<!-- table: end -->"
COMPARED_AT = 1024  # context of the table that sets ours beside others


def tables(records: Sequence[Record]) -> str:
    """The records as Markdown, for each GPU and format of weights: speed by model and context, and ours beside others."""
    ordered = sorted(records, key=lambda r: (r.gpu, r.weights, r.bytes_per_token, r.context))
    return "".join(
        line + "\n"
        for (gpu, weights), group in groupby(ordered, key=lambda r: (r.gpu, r.weights))
        for line in _section(gpu, weights, [*group])
    )


def _section(gpu: str, weights: str, records: list[Record]) -> Iterator[str]:
    """Lines about one GPU and one format."""
    models = sorted({r.model for r in records}, key=lambda m: min(r.bytes_per_token for r in records if r.model == m))
    contexts = sorted({r.context for r in records})
    dates = dict.fromkeys((min(r.date for r in records), max(r.date for r in records)))
    known = {(r.model, r.context): r for r in records}
    yield f"{gpu}, {weights}, batch 1, greedy, {' to '.join(dates)}: tokens/s, and bytes read as a share of the read ceiling, by context:"
    yield ""
    yield f"| model | {' | '.join(f'{c:,}' for c in contexts)} |"
    yield "|---" * (len(contexts) + 1) + "|"
    for model in models:
        cells = [f"{1e3 / r.ms:,.0f} ({r.fraction_of_ceiling:.1%})" if (r := known.get((model, c))) else "" for c in contexts]
        yield f"| {model} | {' | '.join(cells)} |"
    yield ""
    names = list(dict.fromkeys(n for r in records if r.context == COMPARED_AT for n in r.baselines))
    if not names:
        return
    yield f"Beside others in the same process, ms per token at {COMPARED_AT:,} positions, and how many times as fast ours is:"
    yield ""
    yield f"| model | FlashFormer | {' | '.join(names)} |"
    yield "|---" * (len(names) + 2) + "|"
    for model in models:
        if r := known.get((model, COMPARED_AT)):
            others = [f"{r.baselines[n]:.3f} ({r.baselines[n] / r.ms:.2f}x)" if n in r.baselines else "" for n in names]
            yield f"| {model} | {r.ms:.3f} | {' | '.join(others)} |"
    versions = [f"{n}: {' or '.join(sorted({r.baseline_versions[n] for r in records if n in r.baseline_versions}))}" for n in names]
    yield ""
    yield f"{'; '.join(versions)}."
    yield ""


def main() -> None:
    """Replace what is between the markers."""
    records = [r for path in sorted(RESULTS.glob("decode-*.json")) for r in load_records(path)]
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    fresh = before + BEGIN + tables(records) + END + rest.split(END)[1]
    if "--check" in sys.argv[1:]:
        sys.exit(0 if fresh == text else "the tables in README.md are not those of benchmarks/results; run python benchmarks/table.py")
    readme.write_text(fresh)


if __name__ == "__main__":
    main()
