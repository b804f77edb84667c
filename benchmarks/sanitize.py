"""Run the kernel of a small model under NVIDIA's compute-sanitizer and keep what it says: writes benchmarks/results/sanitizer-<gpu>.json.

usage: python benchmarks/sanitize.py [--tools memcheck,racecheck,synccheck] [--commit HASH] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from flashformer import SamplingParams
from flashformer.bench import plan_for_gpu
from flashformer.records import results_file, whence
from flashformer.shapes import shape

RESULTS = Path(__file__).parent / "results"
TOOLS = "memcheck,racecheck,synccheck"
SECONDS = 120  # for one tool


def run_model() -> None:
    """What is watched: packing, 24 prompt tokens with logits and 40 generated tokens of a model of two layers, over several KV blocks.

    Then 20 tokens that use all there is of sampling.
    """
    from flashformer.backends.cuda import RandomWeights, load

    config = replace(shape("qwen3-0.6b"), num_layers=2, vocab_size=4099, ffn_size=680, max_positions=128, tied_embeddings=False)
    runner = load(plan_for_gpu(config), RandomWeights(config))
    try:
        runner.logits(list(range(24)), 0)
        print("tokens", list(runner.generate([1, 2, 3], 24, 40, ())))
        every = SamplingParams(
            temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1,
            logit_bias={5: 1.0}, logprobs=20,
        )  # fmt: skip
        print("sampled", list(runner.generate([1, 2, 3], 64, 20, (), every.lower(config.vocab_size, [1, 2, 3]))))
    finally:
        runner.close()


def main() -> None:
    """Each tool on a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=TOOLS)
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_model()
        return
    from flashformer.backends.cuda import probe

    info = probe()
    if info is None:
        sys.exit("no CUDA GPU was found")
    outcomes = {tool: watch(tool) for tool in options.tools.split(",")}
    record: dict[str, object] = {**whence(info.name, options.commit), "tools": outcomes}
    keep(record, results_file(options.results, info.name, "sanitizer"))
    for tool, outcome in outcomes.items():
        print(tool, outcome)


def keep(record: dict[str, object], path: Path) -> None:
    """Add a run to those in a file; it replaces one of the same commit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else []
    runs = [run for run in runs if run["commit"] != record["commit"]]
    path.write_text(json.dumps([*runs, record], indent=1) + "\n")


def watch(tool: str) -> dict[str, object]:
    """{outcome, errors, what the tool said} of one tool."""
    command = ["compute-sanitizer", "--tool", tool, sys.executable, __file__, "--child"]
    with tempfile.TemporaryFile("w+") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=SECONDS, check=False).returncode
        except subprocess.TimeoutExpired:
            return {"outcome": f"did not end within {SECONDS} s"}
        except FileNotFoundError:
            return {"outcome": "compute-sanitizer is not installed"}
        out.seek(0)
        text = out.read()
    return judge(text.replace("\0", " "), code)


def judge(text: str, code: int) -> dict[str, object]:
    """What a tool's output and the program's exit status come to; of the output only the tool's own lines are kept."""
    said = [line.removeprefix("========= ") for line in text.splitlines() if line.startswith("========= ") and line[10:].strip()]
    errors = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if code or errors is None or "tokens [" not in text:
        return {"outcome": f"the program ended with status {code}", "said": said[-12:]}
    found = int(errors[1])
    return {"outcome": "clean" if found == 0 else "errors", "errors": found, **({"said": said[:12]} if found else {})}


if __name__ == "__main__":
    main()
