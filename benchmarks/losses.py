"""Where a token's time goes, stage by stage, from the kernel's own timestamps: writes benchmarks/results/losses-<gpu>.json.

usage: python benchmarks/losses.py [--models llama-3.2-1b,llama-3.1-8b] [--context 1024] [--tokens 128] [--repeats 5]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from flashformer.bench import Bench, open_subject
from flashformer.errors import FlashFormerError
from flashformer.records import Kept, Record, results_file, save
from flashformer.trace import Trace, summarize, table

MODELS = "qwen3-0.6b,llama-3.2-1b,llama-3.2-3b,llama-3.1-8b"
RESULTS = Path(__file__).parent / "results"


@dataclass
class Losses(Kept):
    """One model's token, in microseconds; losses are what a stage takes beyond its bytes at the read ceiling, in all layers together."""

    model: str
    context: int
    token: float  # without timestamps
    floor: float  # its bytes at the read ceiling
    stages: dict[str, float]  # loss of each
    exchange: dict[str, float]  # mean of one: from the last SM's publication of a stage's input to having gathered it
    other: float  # between an SM's visits to stages, and the skew at both ends
    choice: float  # of the token, and what no mark covers

    @property
    def key(self) -> tuple[object, ...]:
        """See `Kept`."""
        return self.gpu, self.model, self.context


def make_losses(trace: Trace, record: Record) -> Losses:
    """The losses of a traced token of the model that `record` measured."""
    stages, token = summarize(trace), record.ms * 1e3
    floor, lost = sum(s.floor * s.times for s in stages), sum(s.loss for s in stages)
    return Losses(
        record.model, record.context, token, floor, {s.name: s.loss for s in stages},
        {s.name: s.exchange for s in stages if s.exchange == s.exchange},  # nan where it was not marked
        trace.duration - floor - lost, token - trace.duration, **record.whence,
    )  # fmt: skip


def main() -> None:
    """Model by model; each is merged into the results of this GPU as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="named shapes (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        for name in options.models.split(","):
            with open_subject(name) as subject, Bench(subject, [options.context], options.tokens, checked=False) as bench:
                record = bench.measure(options.context, options.repeats)
                trace = bench.trace(options.context)
            record.commit = options.commit or record.commit
            save([make_losses(trace, record)], results_file(options.results, record.gpu, "losses"))
            Console(width=140).print(table(trace, record.ms * 1e3))
    except FlashFormerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
