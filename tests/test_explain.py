"""What `explain` says: bytes counted by hand, and a table that a person can read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashformer.explain import describe, predict
from flashformer.models import build_graph
from flashformer.plan import Plan, make_plan
from flashformer.shapes import SHAPES, shape
from flashformer.targets import available, get

# Llama 3.1 8B, counted by hand, in bytes of 16-bit weights.
LAYERS, HIDDEN, FFN, KV, VOCAB = 32, 4096, 14336, 8 * 128, 128256
BY_STAGE = {
    "qkv": LAYERS * (HIDDEN + 2 * KV) * HIDDEN * 2,
    "attention_output": LAYERS * HIDDEN * HIDDEN * 2,
    "gate_up": LAYERS * 2 * FFN * HIDDEN * 2,
    "down": LAYERS * HIDDEN * FFN * 2,
    "head": VOCAB * HIDDEN * 2,
}


def planned(name: str, target: str = "sm_90", **changes: object) -> Plan:
    """The plan of a known shape."""
    config = replace(shape(name), **changes)  # type: ignore[arg-type]
    return make_plan(config, build_graph(config), get(target))


def test_bytes_of_llama_3_1_8b() -> None:
    plan = planned("llama-3.1-8b")
    assert plan.weight_bytes() == sum(BY_STAGE.values()) == 15_009_316_864
    assert plan.tape_bytes() == plan.weight_bytes()
    assert plan.embedding_bytes() == 1_050_673_152
    assert plan.token_bytes(0) == plan.weight_bytes()
    assert plan.token_bytes(1024) - plan.weight_bytes() == LAYERS * 1024 * 2 * KV * 2 == 134_217_728
    predicted = predict(plan, 1024)
    assert predicted.bytes_read == plan.token_bytes(1024)
    for tokens in (0, 1, 2, 129):
        assert plan.bytes_of(1023, tokens) == sum(plan.token_bytes(1023 + i) for i in range(tokens))
    assert {s.name: s.weight_bytes for s in predicted.stages if s.weight_bytes} == BY_STAGE
    assert {s.name: s.kv_bytes for s in predicted.stages if s.kv_bytes} == {"attention": 134_217_728}


def test_a_tied_head_is_read_and_counted_once() -> None:
    plan = planned("llama-3.2-1b")
    assert plan.weight_bytes() == 2 * (16 * (2048 * 2048 * 2 + 2 * 512 * 2048 + 3 * 8192 * 2048) + 128256 * 2048) == 2_471_493_632
    assert "1.236 B parameters in bfloat16, tied embeddings" in describe(plan)


@pytest.mark.parametrize("target", available())
@pytest.mark.parametrize("name", SHAPES)
def test_predictions_are_the_sums_of_their_stages(name: str, target: str) -> None:
    """No stage is faster than the memory, none is lost, and a longer context takes longer."""
    plan = planned(name, target)
    predicted = predict(plan, 1000)
    assert predicted.milliseconds == pytest.approx(sum(s.microseconds for s in predicted.stages) / 1e3)
    assert sum(s.times for s in predicted.stages) == len(plan.stages)
    assert sum(s.exchanges for s in predicted.stages) == len(plan.stages) - 1  # the head's candidates go with the token
    per_us = plan.target.bandwidth_gb_s * 1e3
    assert all(s.microseconds >= (s.weight_bytes + s.kv_bytes) / per_us and s.imbalance >= 1 for s in predicted.stages)
    assert 0.1 < predicted.fraction < 1
    assert predict(plan, 2000).milliseconds > predicted.milliseconds


def test_the_table() -> None:
    text = describe(planned("llama-3.1-8b"), 1024)
    for line in (
        "LlamaForCausalLM, 8.030 B parameters in bfloat16",
        "32 x (hidden 4096, ffn 14336)",
        "32 heads, 8 kv heads of 128; rope theta 500000, llama3 scaling by 8",
        "sm_90: NVIDIA Hopper (H100, H200), 132 workers, 4700 GB/s",
        "33.24 GB: weights 15.01 and embeddings 1.05, KV cache 17.18 for 131072 positions",
        "One token after 1024 positions",
        "0.00% of the tape is padding",
    ):
        assert line in text
    cells = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()) if row}
    assert cells["qkv"][:5] == ["32", "768", "1610.6", "1.031", "6144"]
    assert cells["attention"][:5] == ["32", "", "134.2", "", ""]
    assert cells["head"][:5] == ["1", "16032", "1050.7", "1.004", ""]
    assert cells["token"][2] == "15143.5"


def test_padding_is_shown() -> None:
    """Columns of 40 are padded to 64."""
    plan = planned("llama-3.1-8b", hidden_size=40, ffn_size=64)
    assert plan.tape_bytes() > plan.weight_bytes()
    assert f"{plan.tape_bytes() / plan.weight_bytes() - 1:.2%} of the tape is padding" in describe(plan)


def test_notes_of_the_configuration_are_shown() -> None:
    plan = planned("llama-3.2-1b", notes=("The context is limited to 100 tokens.",), qkv_bias=True)
    assert "The context is limited to 100 tokens." in describe(plan) and "qkv bias, tied embeddings" in describe(plan)


def test_the_shortest_context_can_be_described() -> None:
    config = shape("llama-3.2-1b")
    plan = make_plan(config, build_graph(config), get("cpu"), 1)
    assert "One token after 0 positions" in describe(plan)
