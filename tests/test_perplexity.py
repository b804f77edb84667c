"""A real model on a real text: SmolLM2 on documentation that is part of Python."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

import flashformer
from flashformer import SamplingParams
from flashformer.checkpoint import open_checkpoint
from flashformer.checkpoint.gguf import hugging_face_name
from flashformer.models import build_graph
from flashformer.reference import Reference

TEXT = topics["objects"]
TOLERANCE = 0.005  # relative


def perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    """Of all tokens but the first, from the logits of all positions."""
    total = 0.0
    for scores, token in zip(logits, tokens[1:], strict=False):
        shifted = scores.astype(np.float64) - scores.max()
        total += np.log(np.exp(shifted).sum()) - shifted[token]
    return float(np.exp(total / (len(tokens) - 1)))


def transformers_model(path: Path) -> Any:
    """SmolLM2 in float32 from its GGUF file, read and expanded by the packages of others."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")
    gguf = pytest.importorskip("gguf")
    with open_checkpoint(path) as checkpoint:
        c = checkpoint.config
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.ffn_size, num_hidden_layers=c.num_layers,
                num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
                rope_theta=c.rope_theta, max_position_embeddings=c.max_positions, tie_word_embeddings=True,
            )
        )  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name, values = hugging_face_name(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads}.get(name.split(".")[-2])
        if heads:
            values = values.reshape(heads, c.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        state[name] = torch.from_numpy(np.array(values, np.float32))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


def test_the_reference_agrees_with_transformers(demo_model: Path) -> None:
    model = transformers_model(demo_model)
    import torch

    with open_checkpoint(demo_model) as checkpoint:
        tokens = checkpoint.tokenizer().encode(TEXT)[:512]
        with torch.inference_mode():
            expected = perplexity(model(torch.tensor([tokens])).logits[0].numpy(), tokens)
        ours = perplexity(Reference(build_graph(checkpoint.config), checkpoint).logits(tokens), tokens)
    assert 5 < expected < 30
    assert abs(ours / expected - 1) < TOLERANCE


def test_the_cpu_agrees_with_the_reference(demo_model: Path) -> None:
    with flashformer.load(demo_model, "cpu", max_context=1024) as engine:
        tokens = engine.tokenizer.encode(TEXT)[:1024]
        assert len(tokens) == 1024
        ours = perplexity(engine.logits(tokens), tokens)
        expected = perplexity(Reference(build_graph(engine.config), engine.checkpoint).logits(tokens), tokens)
    assert abs(ours / expected - 1) < TOLERANCE


def test_the_cpu_answers(demo_model: Path) -> None:
    with flashformer.load(demo_model, "cpu", max_context=1024) as engine:
        prompt = engine.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
        text = "".join(r.text for r in engine.generate(prompt, SamplingParams(max_tokens=20)))
        assert text == "The capital of France is Paris."
