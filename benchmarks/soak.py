"""Many sequences that come, stay and leave at random, on this GPU: writes benchmarks/results/soak-<gpu>.json.

usage: python benchmarks/soak.py [--model smollm2-135m] [--columns 8] [--slots 8] [--operations 10000] [--tokens 1000000] [--seed 0]

Sequences of known answers are begun, read, left and cancelled, `operations` times and until so many tokens were read; every token is
compared. Now and then the numbers that tell one pass from another are set to where they are about to wrap. In the end all slots must be
free, and no memory lost since the first of these times: until then each slot claims what it needs. Random weights.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from flashformer import FlashFormerError, SamplingParams
from flashformer.backends import Turn
from flashformer.backends.cuda import RandomWeights, load
from flashformer.backends.cuda.codegen import ROUND_TAGS
from flashformer.backends.cuda.runner import CudaRunner
from flashformer.bench import plan_for_gpu
from flashformer.records import results_file, whence
from flashformer.scheduler import Request, Result, Scheduler
from flashformer.shapes import shape

RESULTS = Path(__file__).parent / "results"
CONTEXT = 512
ANSWERS = 24  # that are known
MOST_PROMPT = 100  # tokens
MOST_TOKENS = 200  # of an answer
WRAP_EVERY = 500  # operations


class Text:
    """A prompt, how its tokens are chosen, and what comes."""

    def __init__(self, rng: random.Random, vocab: int, seed: int) -> None:
        self.vocab = vocab
        self.prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, MOST_PROMPT))]
        self.params = SamplingParams(
            max_tokens=rng.randint(1, MOST_TOKENS), ignore_eos=True, temperature=rng.choice([0.0, 1.0]), top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.2]), seed=seed,
        )  # fmt: skip
        self.answer: list[int] = []

    def learn(self, runner: CudaRunner) -> None:
        """Its answer, alone."""
        sampling = self.params.lower(self.vocab, self.prompt)
        self.answer = [made.token for made in runner.run([Turn(0, self.prompt, 0, self.params.max_tokens, (), sampling)])]

    def request(self) -> Request:
        """It once more."""
        sampling = self.params.lower(self.vocab, self.prompt)
        return Request(self.prompt, self.params, sampling, frozenset(), self.params.max_tokens, None)


class Soak:
    """A scheduler and those that it serves."""

    def __init__(self, runner: CudaRunner, seed: int) -> None:
        self.runner, self.rng = runner, random.Random(seed)
        self.scheduler = Scheduler(runner.plan, runner)
        self.alive: list[tuple[Request, Text, int]] = []  # and how many tokens were read
        self.wrap = False  # with the next launch
        self._start = runner.start
        runner.start = self._start_shortly_before_wrapping  # type: ignore[method-assign]
        self.counts = dict.fromkeys(("operations", "tokens", "finished", "cancelled", "wraps"), 0)
        self.free = self.free_bytes()

    def free_bytes(self) -> int:
        """Of the GPU's memory."""
        return self.runner.context.free_bytes()

    def run(self, texts: list[Text], operations: int, tokens: int, tell: Any) -> None:
        """Raises AssertionError at the first wrong token."""
        rng, counts = self.rng, self.counts
        while counts["operations"] < operations or counts["tokens"] < tokens:
            counts["operations"] += 1
            if counts["operations"] == WRAP_EVERY:
                self.free = self.free_bytes()
            if counts["operations"] % WRAP_EVERY == 0:
                self.wrap = True
                tell(counts)
            action = rng.random()
            if not self.alive or (action < 0.3 and len(self.alive) < 2 * self.runner.slots):
                text = rng.choice(texts)
                request = text.request()
                self.scheduler.submit(request)
                self.alive.append((request, text, 0))
                continue
            request, text, read = self.alive.pop(rng.randrange(len(self.alive)))
            if action < 0.35:
                self.scheduler.cancel(request)
                self._read(request, text, read, len(text.answer) - read)
                counts["cancelled"] += 1
            else:  # what has ended says so with its last token
                read = self._read(request, text, read, 1 if action < 0.7 else len(text.answer) - read)
                if read < len(text.answer):
                    self.alive.append((request, text, read))
                else:
                    counts["finished"] += 1
        for request, text, read in self.alive:
            self._read(request, text, read, len(text.answer) - read)
        self.scheduler.close()

    def _read(self, request: Request, text: Text, read: int, count: int) -> int:
        """Up to `count` more tokens, which must be right; how many were read in all."""
        for _ in range(count):
            result = request.results.get()
            if not isinstance(result, Result):
                if result.error:
                    raise result.error
                break
            if result.token != text.answer[read]:
                raise AssertionError(f"token {read} of a text is {result.token}, not {text.answer[read]}; {self.counts}")
            read += 1
            self.counts["tokens"] += 1
        return read

    def _start_shortly_before_wrapping(self, steps: int) -> None:
        """In the place of the runner's: where it is time, the number of passes moves to shortly before the end of its range."""
        if self.wrap:
            p, layers = self.runner.params, self.runner.plan.config.num_layers
            p.epoch = max(p.epoch, (1 << 32) // max(layers + 1, ROUND_TAGS) - CONTEXT)
            self.counts["wraps"] += 1
            self.wrap = False
        self._start(steps)


def main() -> None:
    """Run, print, and write the file of this GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="commit of this tree, where git is not at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = shape(options.model)
    try:
        runner = load(plan_for_gpu(config, CONTEXT, columns=options.columns, slots=options.slots), RandomWeights(config))
        try:
            rng = random.Random(options.seed)
            texts = [Text(rng, config.vocab_size, i) for i in range(ANSWERS)]
            for text in texts:
                text.learn(runner)
            began, soak = time.perf_counter(), Soak(runner, options.seed)
            soak.run(texts, options.operations, options.tokens, lambda counts: print(f"\r{counts}", end="", file=sys.stderr, flush=True))
            seconds, lost = time.perf_counter() - began, soak.free - soak.free_bytes()
            idle = sorted(soak.scheduler._free) == list(range(options.slots))
        finally:
            runner.close()
    except FlashFormerError as error:
        sys.exit(f"error: {error}")
    record = {
        "model": options.model, "columns": options.columns, "slots": options.slots, "seed": options.seed, **soak.counts,
        "seconds": seconds, "bytes_lost": lost, "all_slots_free": idle, **whence(runner.info.name, options.commit),
    }  # fmt: skip
    path = results_file(options.results, runner.info.name, "soak")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{record}")
    if not idle:
        sys.exit("error: a slot was lost")
    if lost > 0:
        sys.exit(f"error: {lost} bytes of the GPU's memory were lost")


if __name__ == "__main__":
    main()
