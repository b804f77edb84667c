"""Time variants of the decode kernel on the same packed weights, in one process: how a change is measured before it is made.

usage: python benchmarks/variants.py VARIANTS.json [--models llama-3.2-1b,llama-3.1-8b] [--context 1024] [--tokens 128] [--repeats 5]

VARIANTS.json: {name: {"patch": [[header, old text, new text], ...], "target": {field of Target: value, ...}, "wrong": false}, ...};
"wrong" marks one whose tokens are not expected to be right, such as an ablation. The kernel as it is comes first, as "base".
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from columns import launch_seconds, turns

from flashformer.backends.cuda.codegen import generate, include_paths
from flashformer.backends.cuda.compile import Kernel, run_nvrtc
from flashformer.bench import plan_for_gpu
from flashformer.errors import FlashFormerError
from flashformer.formats import NAMED
from flashformer.plan import Plan, retarget
from flashformer.shapes import shape


def patched(patches: list[list[str]]) -> dict[str, str]:
    """The headers, patched. Raises ValueError where a text to be replaced is not there."""
    paths = (path for source in include_paths() for path in source.iterdir() if path.suffix in (".cuh", ".hpp"))
    headers = {path.name: path.read_text() for path in paths}
    for header, old, new in patches:
        if old not in headers.get(header, ""):
            raise ValueError(f"{header} does not hold {old!r}")
        headers[header] = headers[header].replace(old, new)
    return headers


def build(plan: Plan, patches: list[list[str]]) -> Kernel:
    """The kernel of a plan from patched copies of the headers. Raises ValueError where a text to be replaced is not there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for header, text in patched(patches).items():
            (folder / header).write_text(text)
        cubin, log = run_nvrtc(generate(plan).text, plan.target, [folder])
        return Kernel(folder, cubin, log)


def changed(plan: Plan, variant: dict[str, Any]) -> Plan:
    """The plan of a variant: the same weights in the same places, other numbers of the target."""
    given: dict[str, Any] = variant.get("target", {})
    fields: dict[str, Any] = {name: tuple(map(tuple, value)) if isinstance(value, list) else value for name, value in given.items()}
    return retarget(plan, **fields)


def measure(model: str, variants: dict[str, Any], context: int, tokens: int, repeats: int, weights: str = "bf16", columns: int = 1) -> None:
    """Print one line a variant: time, share of the read ceiling, what a layer loses, registers, and whether the tokens are the same."""
    from flashformer.backends.cuda import RandomWeights, load

    config = shape(model)
    drawn = RandomWeights(config, format=NAMED[weights])
    plan = plan_for_gpu(config, context + tokens, drawn.formats, columns=columns, slots=columns)
    with ProcessPoolExecutor() as pool:
        building = {name: pool.submit(build, changed(plan, v), v.get("patch", [])) for name, v in variants.items()}
        runner = load(plan, drawn)
        runner.fill_kv()
        ceiling = runner.read_bandwidth()
        first, all_bytes = (plan.token_bytes(position) for position in (0, context + tokens // 2))
        floor = (first + columns * (all_bytes - first)) / ceiling / 1e6
        where = f"{model} in {weights} at {context}, {columns} columns"
        print(f"{where}: {runner.info.name}, read ceiling {ceiling:.0f} GB/s, floor {floor:.4f} ms")
        expected: list[int] = []
        for name, variant in variants.items():
            kernel = building[name].result()
            present = changed(plan, variant)
            with runner.instead(runner.ready(kernel, present), present):
                times = [launch_seconds(runner, columns, context, tokens) / tokens * 1e3 for _ in range(repeats + 1)][1:]
                made = [one.token for one in sorted(runner.run(turns(columns, context, min(tokens, 32))), key=lambda one: one.turn)]
            expected = expected or made
            same = "" if variant.get("wrong") else "same tokens" if made == expected else "OTHER TOKENS"
            ms = statistics.median(times)
            print(
                f"  {name:32} {ms:.4f} ms {floor / ms:6.1%}  spread {(max(times) - min(times)) / ms:.1%}  "
                f"{(ms - floor) * 1e3 / config.num_layers:6.2f} us lost a layer  "
                f"{kernel.registers} registers, {kernel.spills} spilled  {same}",
                flush=True,
            )
        runner.close()


def main() -> None:
    """Model by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--models", default="qwen3-0.6b,llama-3.2-1b,llama-3.2-3b,llama-3.1-8b")
    parser.add_argument("--weights", default="bf16", help="formats of random weights, with commas between them (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=1, help="of the kernel; each has a sequence (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    try:
        variants = {"base": {}, **json.loads(options.variants.read_text())}
        for model, weights in itertools.product(options.models.split(","), options.weights.split(",")):
            measure(model, variants, options.context, options.tokens, options.repeats, weights, options.columns)
    except (FlashFormerError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
