"""Decoding speed on this GPU, ours and the baselines in the same process: writes benchmarks/results/decode-<gpu>.json.

usage: python benchmarks/decode.py [--models llama-3.2-1b,llama-3.1-8b] [--weights bf16,int4] [--kv native,fp8] [--contexts 128,1024]
       [--baselines torch.compile|all|none] [--first-token]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from rich.console import Console

from flashformer.bench import Bench, choose_baselines, compare_with, open_subject
from flashformer.errors import FlashFormerError
from flashformer.records import Record, results_file, save, table

MODELS = "qwen3-0.6b,llama-3.2-1b,qwen3-1.7b,llama-3.2-3b,llama-3.1-8b,qwen3-14b,qwen3-32b"
CONTEXTS = "128,1024,4096,32768,131072"
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure model by model; what is known is merged into the results of this GPU after each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="named shapes, or checkpoints (default: %(default)s)")
    parser.add_argument("--contexts", default=CONTEXTS, help="those that a model does not have are passed over (default: %(default)s)")
    parser.add_argument("--weights", default="bf16", help="formats of random weights, with commas between them (default: %(default)s)")
    parser.add_argument("--plain-head", action="store_true", help="leave the head in 16 bits")
    parser.add_argument("--kv", default="native", help="types of the KV cache, with commas between them (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--baselines", default="all", help="names, 'all' that are installed (default), or 'none'")
    parser.add_argument("--first-token", action="store_true", help="time prompts as long as the contexts, too")
    parser.add_argument("--no-check", action="store_true", help="do not compare the kernel with the reference first")
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(width=120)

    def tell(text: str) -> None:
        console.print(f"  {text}", highlight=False, soft_wrap=True)

    try:
        chosen = choose_baselines(options.baselines.split(",") if options.baselines != "none" else [])
        wanted = [int(c) for c in options.contexts.split(",")]
        for name, weights, kv in itertools.product(*(text.split(",") for text in (options.models, options.weights, options.kv))):
            with open_subject(name, weights, options.plain_head) as subject:
                contexts = [c for c in wanted if c <= subject.config.max_positions]
                with Bench(subject, contexts, options.tokens, not options.no_check, kv=kv, prompts=options.first_token) as bench:
                    records: list[Record] = [bench.measure(context, options.repeats) for context in bench.contexts]
                for record in records:
                    record.commit = options.commit or record.commit
                path = results_file(options.results, records[0].gpu)
                save(records, path)  # a baseline may take the process down
                compare_with(chosen, subject.config, records, tell)
                save(records, path)
                console.print(table(records))
    except (FlashFormerError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
