"""transformers' own model with its static cache: the decoding step of `generate`, compiled, as one CUDA graph.

What `generate` adds around a step (stopping criteria, streaming, Python) is left out, to its favour.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from flashformer.config import ModelConfig

from .graphs import WARM_UP, capture, time_replays
from .huggingface import config_json


def make_model(config: ModelConfig, device: str = "cuda", dtype: Any = torch.bfloat16) -> Any:
    """A model with random weights."""
    content = config_json(config)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), dtype=dtype, attn_implementation="sdpa").eval()


class Decoder:
    """A model with a static cache of `length` positions; `token` and `position` change in place."""

    def __init__(self, model: Any, length: int, compiled: bool = True) -> None:
        """The cache holds random values."""
        c, like = model.config, model.lm_head.weight
        self.cache = StaticCache(config=c, max_cache_len=length)
        self.cache.early_initialization(1, c.num_key_value_heads, c.head_dim, like.dtype, like.device)
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.token = torch.zeros(1, 1, dtype=torch.long, device=like.device)
        self.position = torch.zeros(1, dtype=torch.long, device=like.device)
        forward: Callable[..., Any] = model.forward
        known = inspect.signature(forward).parameters  # the names changed between versions
        self.options: dict[str, Any] = {"cache" if "cache" in known else "past_key_values": self.cache, "use_cache": True}
        if "cache_position" in known:
            self.options["cache_position"] = self.position
        self.forward = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward

    def reset(self, context: int) -> None:
        """Go on after `context` positions."""
        self.position.fill_(context)
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):  # where the cache itself counts
                layer.cumulative_length.fill_(context)

    def step(self) -> None:
        """The greedy token after `token` takes its place."""
        logits = self.forward(self.token, position_ids=self.position[None], **self.options).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)


def measure(config: ModelConfig, contexts: Sequence[int], tokens: int, repeats: int) -> Iterator[tuple[int, float]]:
    """See the package."""
    model = make_model(config)
    try:
        for context in contexts:
            yield context, _measure(model, context, tokens, repeats)
    finally:
        del model
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _measure(model: Any, context: int, tokens: int, repeats: int) -> float:
    """Milliseconds per token at one context."""
    torch._dynamo.reset()
    decoder = Decoder(model, context + tokens + WARM_UP)
    decoder.reset(context)
    with torch.no_grad():
        graph = capture(decoder.step, f"the step at {context:,}")
    return time_replays(graph, lambda: decoder.reset(context), tokens, repeats)
