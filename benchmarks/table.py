"""Write benchmarks/results as tables into README.md and docs/performance.md, between markers. With --check: fail if they would change."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from ablation import Ablation
from cliffs import MOST_STEP, Cliff
from losses import Losses

from flashformer.records import Kept, Record, load_records, newest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMPARED_AT = 1024  # context of the table that sets ours beside others


def tables(records: Sequence[Record]) -> str:
    """The records of 16-bit weights as Markdown, for each GPU and type: speed by model and context, and ours beside others."""
    ordered = sorted((r for r in records if r.plain), key=lambda r: (r.gpu, r.weights, r.bytes_per_token, r.context))
    return "".join(
        line + "\n"
        for (gpu, weights), group in groupby(ordered, key=lambda r: (r.gpu, r.weights))
        for line in _section(gpu, weights, [*group])
    )


def _section(gpu: str, weights: str, records: list[Record]) -> Iterator[str]:
    """Lines about one GPU and one format."""
    models = sorted({r.model for r in records}, key=lambda m: min(r.bytes_per_token for r in records if r.model == m))
    contexts = sorted({r.context for r in records})
    known = {(r.model, r.context): r for r in newest(records)}
    compared = {r.model: r for r in records if r.context == COMPARED_AT and r.baselines}
    yield f"{gpu}, {weights}, batch 1, greedy, {_dates(records)}: tokens/s, and bytes read as a share of the read ceiling, by context:"
    yield ""
    yield f"| model | {' | '.join(f'{c:,}' for c in contexts)} |"
    yield "|---" * (len(contexts) + 1) + "|"
    for model in models:
        cells = [f"{1e3 / r.ms:,.0f} ({r.fraction_of_ceiling:.1%})" if (r := known.get((model, c))) else "" for c in contexts]
        yield f"| {model} | {' | '.join(cells)} |"
    yield ""
    names = list(dict.fromkeys(n for r in compared.values() for n in r.baselines))
    if not names:
        return
    yield f"Beside others in the same process, ms per token at {COMPARED_AT:,} positions, and how many times as fast ours is:"
    yield ""
    yield f"| model | FlashFormer | {' | '.join(names)} |"
    yield "|---" * (len(names) + 2) + "|"
    for model in models:
        if r := compared.get(model):
            others = [f"{r.baselines[n]:.3f} ({r.baselines[n] / r.ms:.2f}x)" if n in r.baselines else "" for n in names]
            yield f"| {model} | {r.ms:.3f} | {' | '.join(others)} |"
    yield ""
    yield _versions(records, names)
    yield ""


def formats_tables(records: Sequence[Record]) -> str:
    """The records of quantised weights or KV caches as Markdown, for each GPU: model by model, beside bf16 and others."""
    ordered = sorted(records, key=lambda r: (r.gpu, -r.bytes_per_token))
    return "".join(line + "\n" for gpu, group in groupby(ordered, key=lambda r: r.gpu) for line in _formats(gpu, [*group]))


def _formats(gpu: str, records: list[Record]) -> Iterator[str]:
    """Lines about one GPU: models by size, contexts in order, the format with the most bytes first."""
    plain = {(r.model, r.context): r for r in newest(records) if r.weights == "bf16"}
    compared = {r.of: r for r in records if r.baselines}
    shown = [r for r in newest(records) if not r.plain]
    if not shown:
        return
    size = {r.model: r.bytes_per_token for r in shown}  # of the smallest format: the records come by bytes
    shown.sort(key=lambda r: (size[r.model], r.model, r.context))
    names = list(dict.fromkeys(n for r in shown if r.of in compared for n in compared[r.of].baselines))
    yield f"{gpu}, batch 1, greedy, {_dates(shown)}:"
    yield ""
    yield f"| model | weights | context | ms per token | tokens/s | of the ceiling | {' | '.join(['beside bf16', *names])} |"
    yield "|---" * (7 + len(names)) + "|"
    for r in shown:
        others = [f"{p.ms / r.ms:.2f}x" if (p := plain.get((r.model, r.context))) else ""]
        beside = compared.get(r.of, r)
        others += [f"{beside.baselines[n] / beside.ms:.2f}x" if n in beside.baselines else "" for n in names]
        row = (r.model, r.weights, f"{r.context:,}", f"{r.ms:.3f}", f"{1e3 / r.ms:,.0f}", f"{r.fraction_of_ceiling:.1%}", *others)
        yield f"| {' | '.join(row)} |"
    yield ""
    if names:
        yield _versions([r for r in records if not r.plain], names)
        yield ""


def first_tokens(records: Sequence[Record]) -> str:
    """How long prompts take until their first token, as Markdown, for each GPU: by model, weights and length."""
    timed = sorted((r for r in newest(records) if r.first_token_ms is not None), key=lambda r: (r.gpu, r.bytes_per_token, r.context))
    return "".join(line + "\n" for gpu, group in groupby(timed, key=lambda r: r.gpu) for line in _first_tokens(gpu, [*group]))


def _first_tokens(gpu: str, records: list[Record]) -> Iterator[str]:
    """Lines about one GPU, the smallest weights first."""
    lengths = sorted({r.context for r in records})
    known = {(r.model, r.weights, r.context): r.first_token_ms for r in records}
    yield f"{gpu}, {_dates(records)}: milliseconds from a prompt of so many tokens to the first of its answer."
    yield ""
    yield f"| model | weights | {' | '.join(f'{length:,}' for length in lengths)} |"
    yield "|---" * (len(lengths) + 2) + "|"
    for model, weights in dict.fromkeys((r.model, r.weights) for r in records):
        cells = [f"{ms:,.1f}" if (ms := known.get((model, weights, length))) is not None else "" for length in lengths]
        yield f"| {model} | {weights} | {' | '.join(cells)} |"
    yield ""


def _dates(records: Sequence[Kept]) -> str:
    """The first day and the last."""
    return " to ".join(dict.fromkeys((min(r.date for r in records), max(r.date for r in records))))


def _versions(records: Sequence[Record], names: Sequence[str]) -> str:
    """What the baselines were."""
    known = {n: sorted({r.baseline_versions[n] for r in records if n in r.baseline_versions}) for n in names}
    return "; ".join(f"{name}: {' or '.join(versions)}" for name, versions in known.items()) + "."


def sections(lines: Callable[[list[Any]], Iterator[str]], records: Sequence[Any]) -> str:
    """What `lines` makes of the records of each GPU and context; records keep the order of their file."""

    def place(record: Any) -> tuple[str, int]:
        return record.gpu, record.context

    return "".join(line + "\n" for _, group in groupby(sorted(records, key=place), key=place) for line in lines([*group]))


def _where(records: Sequence[Any]) -> str:
    """GPU, context, dates and commits of a section."""
    commits = dict.fromkeys(r.commit for r in records)
    return f"{records[0].gpu}, {records[0].context:,} positions, {_dates(records)}, commit {', '.join(commits)}:"


def ablation_lines(records: list[Ablation]) -> Iterator[str]:
    """What switching a technique off costs on each model."""
    base = {m: median(r.base_ms for r in records if r.model == m) for m in dict.fromkeys(r.model for r in records)}
    models = sorted(base, key=lambda m: base[m])
    known = {(r.technique, r.instead, r.model): r for r in records}
    yield f"{_where(records)} time of a token with one technique switched off,"
    yield f"against the whole kernel; medians of {records[0].repeats} pairs of launches of {records[0].tokens_timed} tokens."
    yield ""
    yield f"| technique | in its place | {' | '.join(models)} |"
    yield "|---" * (len(models) + 2) + "|"
    yield f"| the whole kernel | | {' | '.join(f'{base[m]:.4f} ms' for m in models)} |"
    for technique, instead in dict.fromkeys((r.technique, r.instead) for r in records):
        cells = [f"{r.ratio - 1:+.1%}" if (r := known.get((technique, instead, m))) else "" for m in models]
        yield f"| {technique} | {instead} | {' | '.join(cells)} |"
    yield ""


def losses_lines(records: list[Losses]) -> Iterator[str]:
    """Where the time goes that is not the bytes'."""
    records = sorted(records, key=lambda r: r.floor)
    columns = [
        {"the bytes": r.floor, **r.stages, "between stages": r.other, "choice of the token": r.choice, "a token": r.token}
        for r in records
    ]  # fmt: skip
    yield f"{_where(records)} microseconds of a token beyond its bytes at the read ceiling, by stage."
    yield ""
    yield f"| | {' | '.join(r.model for r in records)} |"
    yield "|---" * (len(records) + 1) + "|"
    for name in dict.fromkeys(name for column in columns for name in column):
        yield f"| {name} | {' | '.join(f'{column[name]:,.1f}' if name in column else '' for column in columns)} |"
    yield ""


def cliffs_lines(records: list[Cliff]) -> Iterator[str]:
    """How near to the read ceiling models are that differ in one number."""
    worst = max(records, key=lambda r: r.largest_step)
    yield f"{_where(records)} share of the read ceiling of models that differ in one number alone."
    yield f"The largest step between neighbours is {worst.largest_step:.1%} ({worst.axis} {worst.value:,}); we allow {MOST_STEP:.0%}."
    yield ""
    yield "| number | values | share of the read ceiling | largest step |"
    yield "|---" * 4 + "|"
    for (axis, _), group in groupby(records, key=lambda r: (r.axis, r.group)):
        beside = [*group]
        values, shares = " / ".join(f"{r.value:,}" for r in beside), " / ".join(f"{r.fraction_of_ceiling:.1%}" for r in beside)
        yield f"| {axis} | {values} | {shares} | {max(r.largest_step for r in beside):.1%} |"
    yield ""


# Where each table is: the document, the name in its markers, the program that measures, the type of its records, and the text.
TABLES: tuple[tuple[Path, str, str, type[Kept], Callable[[Any], str]], ...] = (
    (Path("README.md"), "decode", "decode", Record, tables),
    (Path("README.md"), "formats", "decode", Record, formats_tables),
    (Path("README.md"), "prompts", "decode", Record, first_tokens),
    (Path("docs/performance.md"), "ablation", "ablation", Ablation, partial(sections, ablation_lines)),
    (Path("docs/performance.md"), "losses", "losses", Losses, partial(sections, losses_lines)),
    (Path("docs/performance.md"), "cliffs", "cliffs", Cliff, partial(sections, cliffs_lines)),
)


def filled(text: str, name: str, program: str, content: str) -> str:
    """A document with `content` between the markers of one table, or a word that nobody has run `program` yet."""
    begin, end = f"<!-- {name}: begin (written by benchmarks/table.py) -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return before + begin + (content or f"Not measured yet: run `python benchmarks/{program}.py` on a GPU.\n") + end + rest.split(end)[1]


def main() -> None:
    """Replace what is between the markers."""
    fresh: dict[Path, str] = {}
    for document, name, program, kind, text in TABLES:
        records = [r for path in sorted(RESULTS.glob(f"{program}-*.json")) for r in load_records(path, kind)]
        fresh[document] = filled(fresh.get(document) or (ROOT / document).read_text(), name, program, text(records))
    stale = [document for document, text in fresh.items() if (ROOT / document).read_text() != text]
    if "--check" in sys.argv[1:]:
        where = " and ".join(map(str, stale))
        sys.exit(f"the tables in {where} are not those of benchmarks/results; run python benchmarks/table.py" if stale else 0)
    for document in stale:
        (ROOT / document).write_text(fresh[document])


if __name__ == "__main__":
    main()
