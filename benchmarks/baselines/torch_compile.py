"""The baseline that any user of PyTorch can have: the whole decoding step compiled, a static KV cache, one CUDA graph.

Coordinate-descent tuning; attention by `scaled_dot_product_attention` or by `flex_attention`, whichever is faster at a context. Compiling
takes as long as a model has layers, so which one that is, the first layers alone tell.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from flashformer.config import ModelConfig
from flashformer.geometry import round_up
from flashformer.graph import Weight
from flashformer.models import build_graph
from flashformer.ops.rope import rope_table

from . import places, say
from .graphs import WARM_UP, capture, time_replays

TRIED_LAYERS = 2  # that are compiled with each kind of attention
CACHE_MULTIPLE = 128  # positions: attention kernels are slower, or copy their mask, where lengths are odd

Attention = Literal["sdpa", "flex"]
ATTENTIONS: tuple[Attention, ...] = ("sdpa", "flex")
Make = Callable[[Weight], torch.Tensor]


def random_weight(weight: Weight) -> torch.Tensor:
    """A tensor of that shape on the GPU; activations stay of order one."""
    if len(weight.shape) == 1:
        return torch.zeros(weight.shape, device="cuda", dtype=torch.bfloat16) + (not weight.name.endswith(".bias"))
    return torch.randn(weight.shape, device="cuda", dtype=torch.bfloat16) * weight.shape[1] ** -0.5


class Decoder:
    """A decoder-only transformer of our configuration, written as plainly as PyTorch allows. One sequence, or several of one length."""

    def __init__(self, config: ModelConfig, make: Make = random_weight) -> None:
        """`make` gives each tensor; linears with one input are joined."""
        self.config = config
        known = build_graph(config).weights()

        def single(name: str) -> Any:
            return make(known[name]) if name in known else None

        def join(prefix: str, *names: str) -> tuple[Any, ...]:
            weights = [single(f"{prefix}.{name}.weight") for name in names]
            biases = [single(f"{prefix}.{name}.bias") for name in names]
            return self.prepare(torch.cat(weights), None if biases[0] is None else torch.cat(biases))

        self.embedding = single("model.embed_tokens.weight")
        self.head = self.prepare(self.embedding if config.tied_embeddings else single("lm_head.weight"), None)
        self.norm = single("model.norm.weight")
        self.layers: list[dict[str, Any]] = []
        for prefix in (f"model.layers.{i}" for i in range(config.num_layers)):
            self.layers.append(
                {
                    "attention_norm": single(f"{prefix}.input_layernorm.weight"),
                    "qkv": join(f"{prefix}.self_attn", "q_proj", "k_proj", "v_proj"),
                    "q_norm": single(f"{prefix}.self_attn.q_norm.weight"),
                    "k_norm": single(f"{prefix}.self_attn.k_norm.weight"),
                    "output": join(f"{prefix}.self_attn", "o_proj"),
                    "mlp_norm": single(f"{prefix}.post_attention_layernorm.weight"),
                    "gate_up": join(f"{prefix}.mlp", "gate_proj", "up_proj"),
                    "down": join(f"{prefix}.mlp", "down_proj"),
                }
            )

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
        """A matrix [rows, columns] and its bias [rows] as `linear` takes them."""
        return weight, bias

    def linear(self, x: torch.Tensor, *prepared: Any) -> torch.Tensor:
        """[sequences, rows] of x [sequences, columns] and what `prepare` has returned."""
        return F.linear(x, *prepared)

    def allocate(self, length: int, sequences: int = 1) -> None:
        """A KV cache of `length` positions for each sequence with random values, and the rotary angles.

        NOTE: a tensor each for the keys and values of a layer. Were they views of one, a compiled step would copy it whole.
        """
        c, like = self.config, self.embedding
        shape = (sequences, c.num_kv_heads, length, c.head_dim)
        self.cache = [[torch.randn(shape, device=like.device, dtype=like.dtype) for _ in "kv"] for _ in range(c.num_layers)]
        angles = torch.from_numpy(rope_table(c, length)).to(like.device)  # [length, head_dim / 2, 2]
        self.cos, self.sin = (angles[..., i].repeat(1, 2).to(like.dtype) for i in (0, 1))
        self.places = torch.arange(length, device=like.device)

    def step(self, token: torch.Tensor, position: torch.Tensor, attention: Attention, layers: int | None = None) -> torch.Tensor:
        """Logits [sequences, vocab] after a token of each, `token` [sequences], at `position` [1] of all.

        Its keys and values go into the cache. layers: the first ones alone.
        """
        c, sequences = self.config, token.shape[0]
        x = F.embedding(token, self.embedding)  # [sequences, hidden]
        cos, sin = self.cos[position], self.sin[position]
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def rotate(t: torch.Tensor) -> torch.Tensor:
            low, high = t.chunk(2, -1)
            return t * cos + torch.cat((-high, low), -1) * sin

        for layer, (keys, values) in zip(self.layers[:layers], self.cache[:layers], strict=True):
            y = F.rms_norm(x, (c.hidden_size,), layer["attention_norm"], c.norm_eps)
            q, k, v = self.linear(y, *layer["qkv"]).split([q_size, kv_size, kv_size], -1)
            q, k, v = (t.view(sequences, -1, 1, c.head_dim) for t in (q, k, v))
            if c.qk_norm:
                q = F.rms_norm(q, (c.head_dim,), layer["q_norm"], c.norm_eps)
                k = F.rms_norm(k, (c.head_dim,), layer["k_norm"], c.norm_eps)
            keys.index_copy_(2, position, rotate(k))
            values.index_copy_(2, position, v)
            a = self._attend(rotate(q), keys, values, position, attention)
            x = x + self.linear(a.reshape(sequences, -1), *layer["output"])
            gate, up = self.linear(F.rms_norm(x, (c.hidden_size,), layer["mlp_norm"], c.norm_eps), *layer["gate_up"]).chunk(2, -1)
            x = x + self.linear(F.silu(gate) * up, *layer["down"])
        return self.linear(F.rms_norm(x, (c.hidden_size,), self.norm, c.norm_eps), *self.head)

    def _attend(self, q: Any, keys: Any, values: Any, position: torch.Tensor, attention: Attention) -> Any:
        """Attention of one query of each sequence over its cache up to `position`."""
        if attention == "sdpa":
            mask = (self.places <= position)[None, None, None]
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        from torch.nn.attention.flex_attention import flex_attention

        now = position[0]

        def seen(score: Any, batch: Any, head: Any, query: Any, place: Any) -> Any:
            return torch.where(place <= now, score, -float("inf"))

        return flex_attention(q, keys, values, score_mod=seen, enable_gqa=True)


def measure(
    config: ModelConfig, contexts: Sequence[int], tokens: int, repeats: int, kind: type[Decoder] = Decoder, sequences: int = 1
) -> Iterator[tuple[int, float]]:
    """See the package; `kind` is what is measured, with so many sequences at a time: milliseconds of a token of each."""
    decoder = kind(config)
    try:
        for context in contexts:
            yield context, _fastest(decoder, context, tokens, repeats, sequences)
    finally:
        del decoder
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _fastest(decoder: Decoder, context: int, tokens: int, repeats: int, sequences: int) -> float:
    """Milliseconds per token with the attention whose first layers are fastest, or the next that works. Raises what none survived."""

    def times(kinds: Sequence[Attention], layers: int) -> Iterator[tuple[float, Attention]]:
        """Of those that work; others are told of."""
        for attention in kinds:
            try:
                yield _measure(decoder, context, tokens, repeats, sequences, attention, layers), attention
            except Exception as error:
                failed.append(error)
                say(f"{attention} attention failed:\n{places(error)}")

    failed: list[Exception] = []
    for ms, _ in times([attention for _, attention in sorted(times(ATTENTIONS, TRIED_LAYERS))], decoder.config.num_layers):
        return ms
    raise failed[0]


def _measure(
    decoder: Decoder, context: int, tokens: int, repeats: int, sequences: int, attention: Attention, layers: int
) -> float:  # fmt: skip
    """Milliseconds per token of each sequence at one context with so many of the layers."""
    import torch._inductor.config as inductor

    decoder.allocate(round_up(context + tokens + WARM_UP, CACHE_MULTIPLE), sequences)
    token, position = torch.zeros(sequences, dtype=torch.long, device="cuda"), torch.tensor([context], device="cuda")

    def step(token: torch.Tensor, position: torch.Tensor) -> None:
        token.copy_(decoder.step(token, position, attention, layers).argmax(-1))
        position.add_(1)

    torch._dynamo.reset()
    with torch.no_grad(), inductor.patch(coordinate_descent_tuning=True):
        compiled = torch.compile(step, fullgraph=True, dynamic=False)
        graph = capture(lambda: compiled(token, position), f"{layers} layers with {attention} attention at {context:,}")
    ms = time_replays(graph, lambda: position.fill_(context), tokens, repeats)
    say(f"{layers} layers with {attention} attention at {context:,}: {ms:.4f} ms/token")
    return ms
