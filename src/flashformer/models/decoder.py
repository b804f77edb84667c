"""The decoder block that the supported families share: pre-norm attention and a gated MLP."""

from __future__ import annotations

from ..config import ModelConfig
from ..graph import Graph, GraphBuilder, Weight


def build_decoder(config: ModelConfig) -> Graph:
    """The graph of one token of a Llama-like decoder; biases and q/k norms as the configuration says.

    Weight names are those of Hugging Face checkpoints. Shapes: matrices are [output rows, input columns].
    """
    c, g = config, GraphBuilder()
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def linear(x: str, name: str, rows: int, columns: int, bias: bool) -> str:
        weights = (Weight(f"{name}.weight", (rows, columns)),)
        return g.add("linear", x, size=rows, weights=weights + ((Weight(f"{name}.bias", (rows,)),) if bias else ()))

    def rmsnorm(x: str, name: str) -> str:
        return g.add("rmsnorm", x, size=c.hidden_size, weights=(Weight(name, (c.hidden_size,)),), eps=c.norm_eps)

    def headnorm(x: str, name: str, size: int) -> str:
        if not c.qk_norm:
            return x
        return g.add("headnorm", x, size=size, weights=(Weight(name, (c.head_dim,)),), eps=c.norm_eps, head_dim=c.head_dim)

    embedding = Weight("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
    x = g.add("embed", "token", size=c.hidden_size, weights=(embedding,))
    for layer in range(c.num_layers):
        g.layer, p = layer, f"model.layers.{layer}"
        n = rmsnorm(x, f"{p}.input_layernorm.weight")
        q = linear(n, f"{p}.self_attn.q_proj", q_size, c.hidden_size, c.qkv_bias)
        k = linear(n, f"{p}.self_attn.k_proj", kv_size, c.hidden_size, c.qkv_bias)
        v = linear(n, f"{p}.self_attn.v_proj", kv_size, c.hidden_size, c.qkv_bias)
        q = headnorm(q, f"{p}.self_attn.q_norm.weight", q_size)
        k = headnorm(k, f"{p}.self_attn.k_norm.weight", kv_size)
        q = g.add("rope", q, size=q_size, head_dim=c.head_dim)
        k = g.add("rope", k, size=kv_size, head_dim=c.head_dim)
        a = g.add("attention", q, k, v, size=q_size, head_dim=c.head_dim, kv_heads=c.num_kv_heads)
        o = linear(a, f"{p}.self_attn.o_proj", c.hidden_size, q_size, c.output_bias)
        x = g.add("residual", x, o, size=c.hidden_size)
        n = rmsnorm(x, f"{p}.post_attention_layernorm.weight")
        gate = linear(n, f"{p}.mlp.gate_proj", c.ffn_size, c.hidden_size, c.mlp_bias)
        up = linear(n, f"{p}.mlp.up_proj", c.ffn_size, c.hidden_size, c.mlp_bias)
        h = g.add("swiglu", gate, up, size=c.ffn_size)
        d = linear(h, f"{p}.mlp.down_proj", c.hidden_size, c.ffn_size, c.mlp_bias)
        x = g.add("residual", x, d, size=c.hidden_size)
    g.layer = -1
    n = rmsnorm(x, "model.norm.weight")
    head = embedding if c.tied_embeddings else Weight("lm_head.weight", (c.vocab_size, c.hidden_size))
    logits = g.add("linear", n, size=c.vocab_size, weights=(head,))
    g.add("sample", logits, size=1)
    return g.build()
