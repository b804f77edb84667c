"""What others reach on the same GPU, in the same process: batch 1, greedy, random weights of the same shape.

One file each. It has `measure(config, contexts, tokens, repeats)`, which yields (context, median milliseconds per token) as they
become known, contexts ascending, and leaves the GPU's memory as it found it. None of them is needed by anything else.

How far one is goes to stderr, as does where it failed: what compiles for minutes must not look stuck, and need not fail twice to be
understood.
"""

from __future__ import annotations

import importlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

from flashformer.config import ModelConfig

FRAMES = 5  # places, the innermost ones, that are shown of a traceback
EVERY = 20.0  # seconds after which what takes long says that it goes on


@dataclass(frozen=True)
class Baseline:
    """One way to decode; `packages` are the distributions that it is made of, the first one names it.

    `weights` is what the records that it is set beside call theirs.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    weights: str = "bf16"

    def version(self) -> str | None:
        """What is installed, such as "torch 2.11.0"; None: not all of it is."""
        try:
            return ", ".join(f"{package} {metadata.version(package)}" for package in self.packages)
        except metadata.PackageNotFoundError:
            return None

    def measure(self, config: ModelConfig, contexts: Sequence[int], tokens: int, repeats: int) -> Iterator[tuple[int, float]]:
        """(context, median milliseconds per token over `repeats` times `tokens` tokens).

        Raises whatever goes wrong in it, and says where that was.
        """
        try:
            yield from importlib.import_module(f"{__name__}.{self.module}").measure(config, contexts, tokens, repeats)
        except Exception as error:
            say(f"{self.name} failed:\n{places(error)}")
            raise


def say(text: str) -> None:
    """Something about how far a baseline is, at once."""
    print(f"  {text}", file=sys.stderr, flush=True)


def places(error: BaseException) -> str:
    """An error and those that it came of, each whole and with the last FRAMES places of its traceback."""
    return "".join(traceback.format_exception(error, limit=-FRAMES)).rstrip()


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Says that `what` begins, every EVERY seconds at which place in the code this thread is, and how long it took."""
    began, over, watched = time.monotonic(), threading.Event(), threading.get_ident()

    def tick() -> None:
        while not over.wait(EVERY):
            frame = sys._current_frames()[watched]
            say(f"{what}: {time.monotonic() - began:.0f} s, in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})")

    say(f"{what} ...")
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    say(f"{what}: done in {time.monotonic() - began:.1f} s")


# vLLM comes last: it claims most of the memory that is free.
BASELINES = {
    b.name: b
    for b in (
        Baseline("torch.compile", "torch_compile", ("torch",)),
        Baseline("tinygemm", "torch_int4", ("torch",), "int4"),
        Baseline("transformers", "transformers_static", ("transformers", "torch")),
        Baseline("llama.cpp", "llama_cpp_graph", ("llama-cpp-python", "gguf")),
        Baseline("vllm", "vllm_offline", ("vllm",)),
    )
}
