"""The reference against transformers, family by family, with random weights; and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashformer.checkpoint import check_tensors, open_checkpoint
from flashformer.errors import ConfigError
from flashformer.models import build_graph, families
from flashformer.ops.rope import rope_frequencies, rope_table
from flashformer.reference import Reference
from flashformer.shapes import shape
from model_files import make_config, write_folder

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama untied": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama3 scaling": ("LlamaForCausalLM", {"rope_scaling": LLAMA3, "rope_theta": 5e5, "head_dim": 64}),
    "linear scaling": ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "one kv head": ("LlamaForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {"head_dim": 24}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 odd": ("Qwen2ForCausalLM", {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 341}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 48}),
    "wide heads": ("Qwen3ForCausalLM", {"head_dim": 256, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "many layers": ("LlamaForCausalLM", {"num_hidden_layers": 80}),
    "large vocabulary": ("Qwen2ForCausalLM", {"vocab_size": 262144, "num_hidden_layers": 1}),
    "mistral odd": ("MistralForCausalLM", {"hidden_size": 136, "head_dim": 18, "num_attention_heads": 10, "num_key_value_heads": 5}),
    "llama odd": ("LlamaForCausalLM", {"hidden_size": 1036, "num_attention_heads": 14, "head_dim": 8, "intermediate_size": 341}),
    "qwen3 odd": ("Qwen3ForCausalLM", {"hidden_size": 100, "head_dim": 10, "intermediate_size": 37, "vocab_size": 1003}),
}


def model(path: Path, name: str) -> tuple[Reference, list[int]]:
    """A random model in float64, and tokens for it."""
    architecture, changes = MODELS[name]
    checkpoint = open_checkpoint(write_folder(path, make_config(architecture, **changes), dtype="float32"))
    graph = build_graph(checkpoint.config)
    check_tensors(checkpoint, graph.weights())
    config = checkpoint.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 12 if config.num_layers > 2 or config.vocab_size > 2000 else 150)
    return Reference(graph, checkpoint, np.float64), [int(t) for t in tokens]


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_transformers(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")
    reference, tokens = model(tmp_path, name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0].double().numpy()
    ours = reference.logits(tokens)
    scale = np.sqrt(np.mean(np.square(expected)))
    assert np.abs(ours - expected).max() <= 1e-4 * scale


@pytest.mark.parametrize("name", ["llama3 scaling", "qwen3 odd"])
def test_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reference, tokens = model(tmp_path, name)
    whole = reference.logits(tokens)
    parts = [reference.logits(tokens[a:b], a) for a, b in ((0, 1), (1, 7), (7, 100), (100, 150))]
    assert np.allclose(np.concatenate(parts), whole, rtol=0, atol=1e-12)
    monkeypatch.setattr("flashformer.reference.BLOCK", 40)
    for last in (3, 40, 45):  # of the last block, all of it, and of the one before
        assert np.allclose(reference.logits(tokens, last=last), whole[-last:], rtol=0, atol=1e-12)


def test_float32_is_near_float64(tmp_path: Path) -> None:
    reference, tokens = model(tmp_path, "qwen3")
    single = Reference(reference.graph, reference.checkpoint, np.float32)
    assert np.abs(single.logits(tokens) - reference.logits(tokens)).max() < 1e-4


def test_greedy_tokens_are_the_largest_logits(tmp_path: Path) -> None:
    reference, tokens = model(tmp_path, "llama")
    made = reference.generate(tokens[:10], 5)
    assert [int(i) for i in reference.logits(tokens[:10] + made[:-1])[-5:].argmax(axis=-1)] == made


def test_a_position_sees_only_earlier_ones(tmp_path: Path) -> None:
    reference, tokens = model(tmp_path, "llama")
    changed = [*tokens[:-1], (tokens[-1] + 1) % 300]
    a, b = reference.logits(tokens), reference.logits(changed)
    assert np.array_equal(a[:-1], b[:-1]) and not np.allclose(a[-1], b[-1])


def test_rotary_table() -> None:
    config = shape("llama-3.1-8b")
    table = rope_table(config, 10_000)
    angles = 9_999 * rope_frequencies(config)
    assert np.array_equal(table[9_999, :, 0], np.cos(angles).astype(np.float32))
    assert np.array_equal(table[9_999, :, 1], np.sin(angles).astype(np.float32))
    assert np.array_equal(table[0], np.tile(np.float32([1, 0]), (64, 1)))


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    config = shape("llama-3.1-8b")
    plain = config.rope_theta ** (-np.arange(0, 128, 2) / 128)
    ratio = rope_frequencies(config) / plain
    assert np.allclose(ratio[plain * 8192 > 2 * np.pi * 4], 1)
    assert np.allclose(ratio[plain * 8192 < 2 * np.pi], 1 / 8)
    assert np.all(np.diff(ratio) <= 1e-12)


def test_every_architecture_that_a_configuration_can_name_has_a_family() -> None:
    from flashformer.config import FAMILIES

    assert set(FAMILIES) == set(families())
    with pytest.raises(ConfigError, match=r"'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM"):
        from dataclasses import replace

        build_graph(replace(shape("llama-3.2-1b"), architecture="GPT2LMHeadModel"))
