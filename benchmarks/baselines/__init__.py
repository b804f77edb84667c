"""What others reach on the same GPU, in the same process: batch 1, greedy, random weights of the same shape.

One file each. It has `measure(config, contexts, tokens, repeats)`, which yields (context, median milliseconds per token) as they
become known, contexts ascending, and leaves the GPU's memory as it found it. None of them is needed by anything else.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from flashformer.config import ModelConfig


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
        """(context, median milliseconds per token over `repeats` times `tokens` tokens). Raises whatever goes wrong in it."""
        found: Iterator[tuple[int, float]] = importlib.import_module(f"{__name__}.{self.module}").measure(config, contexts, tokens, repeats)
        return found


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
