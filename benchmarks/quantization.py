"""What quantisation loses, by format and method: writes benchmarks/results/quantization.json.

usage: python benchmarks/quantization.py --calibration perlfaq.txt --text classes.rst.txt [--model demo] [--formats int4,mxfp4]

Every model is measured by the reference (float32) on the exact values of its weights, on another text than the one to calibrate with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flashformer.checkpoint import open_checkpoint
from flashformer.errors import FlashFormerError
from flashformer.hub import resolve
from flashformer.models import build_graph
from flashformer.quality import cut_windows, measure
from flashformer.quant_methods.calibration import WINDOW, WINDOWS, read_text
from flashformer.quantize import Recipe, quantize
from flashformer.records import commit
from flashformer.reference import Reference

RESULTS = Path(__file__).parent / "results" / "quantization.json"


def main() -> None:
    """Measure the model as it is, then each format by rounding to nearest and calibrated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", type=Path, required=True, help="text file for gptq")
    parser.add_argument("--text", type=Path, required=True, help="text file to measure on")
    parser.add_argument("--formats", default="int4,mxfp4,int8,fp8")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "name": "quantization",
        "model": options.model,
        "text": options.text.name,
        "window": options.window,
        "calibration": {"text": options.calibration.name, "windows": WINDOWS, "window": WINDOW},
        "head": "16",
        "date": date.today().isoformat(),
        "commit": options.commit or commit(),
    }
    try:
        record["figures"] = figures(options)
    except FlashFormerError as error:
        sys.exit(f"error: {error}")
    options.results.write_text(json.dumps(record, indent=1) + "\n")
    shown = Table()
    for column in record["figures"][-1]:
        shown.add_column(column, justify="right")
    for row in record["figures"]:
        shown.add_row(*(f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in record["figures"][-1]))
    Console(width=120).print(shown)


def figures(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for the model, and one for each format and method."""
    with open_checkpoint(resolve(options.model)) as source:
        windows = cut_windows(read_text(options.text), source.tokenizer(), options.window, options.tokens)
        reference = Reference(build_graph(source.config), source)
        known = {tuple(ids): reference.logits(ids) for ids, _ in windows}
        base = measure(windows, lambda ids: known[tuple(ids)])
        rows: list[dict[str, Any]] = [{"format": "source", "tokens": base.tokens, "perplexity": base.perplexity}]
        for to in options.formats.split(","):
            for method, text in (("rtn", None), ("gptq", options.calibration)):
                with tempfile.TemporaryDirectory() as folder:
                    began = time.monotonic()
                    outcome = quantize(options.model, Path(folder) / "model", Recipe(to, text=text))
                    seconds = time.monotonic() - began
                    with open_checkpoint(Path(folder) / "model") as made:
                        found = measure(windows, Reference(build_graph(made.config), made).logits, lambda ids: known[tuple(ids)])
                rows.append({
                    "format": to, "method": method, "tokens": found.tokens, "perplexity": found.perplexity, "kl_mean": found.kl_mean,
                    "kl_p99": found.kl_p99, "top1": found.top1, "bytes": outcome.bytes_after, "seconds": round(seconds, 1),
                })  # fmt: skip
                print(rows[-1], file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
