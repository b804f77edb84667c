"""Decisions of a plan: what becomes a stage, how matrices are cut, who owns what, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashformer.config import ModelConfig
from flashformer.errors import PlanError
from flashformer.formats import Format
from flashformer.fuse import fuse
from flashformer.geometry import PADDING, ceil_div, choose_geometry, round_up
from flashformer.graph import Graph, GraphBuilder, Operator, Weight
from flashformer.models import build_graph
from flashformer.plan import EVEN, Plan, balance, make_kv_layout, make_plan, prefix, spread
from flashformer.shapes import SHAPES, shape
from flashformer.targets import available, get

CUDA = get("sm_90")


def model(**changes: Any) -> ModelConfig:
    """A small model."""
    sizes: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "hidden_size": 96, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "head_dim": 20,
        "ffn_size": 100, "vocab_size": 300, "norm_eps": 1e-5, "rope_theta": 1e4, "max_positions": 256,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


def planned(config: ModelConfig, workers: int | None = None, target: str = "sm_90", max_context: int | None = None) -> Plan:
    """The plan of a model."""
    return make_plan(config, build_graph(config), get(target), max_context, workers)


# --- stages ----------------------------------------------------------------------------------------------------------------


def test_a_token_is_a_chain_of_stages() -> None:
    plan = planned(model())
    layer = ["qkv", "attention", "combine", "attention_output", "gate_up", "down"]
    assert [s.name for s in plan.stages] == ["embed", *layer, *layer, "head", "token"]
    assert [s.reads for s in plan.stages[1:]] == [(s.writes,) for s in plan.stages[:-1]]
    assert [s.layer for s in plan.stages] == [-1] + [0] * 6 + [1] * 6 + [-1, -1]
    assert plan.layer_stages(1) == plan.stages[7:13]


def test_norms_are_folded_into_the_stages_around_them() -> None:
    plan = planned(model(norm_eps=3e-5))
    gammas = {(s.layer, s.name): s.publish_gamma for s in plan.stages if s.publish_gamma}
    assert gammas == {
        (-1, "embed"): "model.layers.0.input_layernorm.weight",
        (0, "attention_output"): "model.layers.0.post_attention_layernorm.weight",
        (0, "down"): "model.layers.1.input_layernorm.weight",
        (1, "attention_output"): "model.layers.1.post_attention_layernorm.weight",
        (1, "down"): "model.norm.weight",
    }
    eps = {s.name: s.linear.eps for s in plan.stages if s.linear}
    assert eps == {"qkv": 3e-5, "attention_output": 0.0, "gate_up": 3e-5, "down": 0.0, "head": 3e-5}


def test_heads_are_padded_on_both_sides_of_attention() -> None:
    plan = planned(model())
    qkv, output = (next(s.linear for s in plan.stages if s.name == name) for name in ("qkv", "attention_output"))
    assert qkv is not None and output is not None
    assert [(b.rows, b.group, b.stride, b.padded) for b in qkv.blocks] == [(120, 20, 32, 192), (40, 20, 32, 64), (40, 20, 32, 64)]
    assert (qkv.rows, qkv.rows_used, output.columns_used, output.columns) == (320, 200, 120, 192)
    assert {b.name: b.values for b in plan.buffers}["attended"] == 192


@pytest.mark.parametrize("options", [(), ("qkv_bias",), ("output_bias", "mlp_bias"), ("qkv_bias", "output_bias", "mlp_bias")])
def test_biases_go_with_their_rows(options: tuple[str, ...]) -> None:
    plan = planned(model(**dict.fromkeys(options, True)))
    biases = {s.name: [bool(b.bias) for b in s.linear.blocks] for s in plan.stages if s.linear}
    assert biases == {
        "qkv": ["qkv_bias" in options] * 3,
        "attention_output": ["output_bias" in options],
        "gate_up": ["mlp_bias" in options] * 2,
        "down": ["mlp_bias" in options],
        "head": [False],
    }
    assert all(b.bias == b.weight.replace(".weight", ".bias") for s in plan.stages if s.linear for b in s.linear.blocks if b.bias)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_norms_of_heads_go_with_attention(qk_norm: bool) -> None:
    plan = planned(model(qk_norm=qk_norm))
    expected = [f"model.layers.1.self_attn.{name}.weight" for name in ("q_norm", "k_norm")] if qk_norm else []
    assert list(next(s.head_norms for s in plan.stages if s.name == "attention" and s.layer == 1)) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_the_embedding(tied: bool) -> None:
    plan = planned(model(tied_embeddings=tied))
    head = plan.stages[-2].linear
    assert head is not None and plan.embedding == "model.embed_tokens.weight"
    assert head.blocks[0].weight == (plan.embedding if tied else "lm_head.weight")
    assert ("lm_head.weight" in plan.weights) == (not tied)
    assert plan.weights[plan.embedding] == (300, 96)


def block(change: str = "") -> Graph:
    """One decoder layer with something unusual about it."""
    g = GraphBuilder()
    weights = iter(range(100))

    def linear(x: str, rows: int, columns: int = 32) -> str:
        return g.add("linear", x, size=rows, weights=(Weight(f"w{next(weights)}", (rows, columns)),))

    def rmsnorm(x: str) -> str:
        return g.add("rmsnorm", x, size=32, weights=(Weight(f"w{next(weights)}", (32,)),), eps=1e-5)

    def headnorm(x: str) -> str:
        return g.add("headnorm", x, size=32, weights=(Weight(f"w{next(weights)}", (16,)),), eps=1e-5, head_dim=16)

    def rope(x: str) -> str:
        return g.add("rope", x, size=32, head_dim=16)

    x = g.add("embed", "token", size=32, weights=(Weight("table", (50, 32)),))
    g.layer = 0
    n = rmsnorm(x)
    source = x if change == "key without norm" else linear(n, 32) if change == "key from elsewhere" else n
    if change == "value first":
        v, q, k = (linear(n, 32) for _ in range(3))
    else:
        q, k, v = linear(n, 32), linear(source, 32), linear(n, 32)
    if change == "norm of q alone":
        q = headnorm(q)
    if change == "norm of v":
        v = headnorm(v)
    if change == "rope of v":
        v = rope(v)
    if change == "swish in q":
        q = g.add("swish", q, size=32)
    q, k = rope(q), k if change == "no rope on k" else rope(k)
    if change == "norm after rope":
        q, k = headnorm(q), headnorm(k)
    a = g.add("attention", q, k, v, size=32, head_dim=16, kv_heads=2)
    o = linear(a, 32)
    if change == "norm after attention":
        o = rmsnorm(o)
    before = x
    x = g.add("residual", o, x, size=32) if change == "residual second" else g.add("residual", x, o, size=32)
    m = rmsnorm(before if change == "parallel" else x)
    gate, up = linear(m, 40), linear(m, 48 if change == "unequal halves" else 40)
    if change == "up first":
        gate, up = up, gate
    kind = "geglu" if change == "another activation" else "swiglu"
    h = g.add(kind, gate, up, size=40)
    d = linear(h, 32, 40)
    x = g.add("residual", before if change == "residual of the layer" else x, d, size=32)
    g.layer = -1
    n = rmsnorm(x)
    if change == "two norms":
        rmsnorm(x)
    logits = linear(n, 50)
    if change == "soft cap":
        logits = g.add("softcap", logits, size=50)
    g.add("sample", logits, size=1)
    return g.build()


def test_the_usual_block_is_fused() -> None:
    assert [s.name for s in fuse(block(), 16)] == [s.name for s in planned(model(num_layers=1)).stages]


def test_projections_are_laid_in_the_order_in_which_attention_reads_them() -> None:
    spec = fuse(block("value first"), 16)[1].linear
    assert spec is not None and [b.weight for b in spec.blocks] == ["w2", "w3", "w1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("key from elsewhere", "before linear"),
        ("key without norm", "q, k and v from one value"),
        ("norm of q alone", "norm on the heads of both q and k or of neither"),
        ("norm of v", "computes headnorm between a linear and attention's v"),
        ("rope of v", "computes rope between a linear and attention's v"),
        ("swish in q", "before swish"),
        ("no rope on k", "needs a rope on k, not linear"),
        ("norm after rope", "needs a rope on q, not headnorm"),
        ("norm after attention", "before rmsnorm"),
        ("residual second", "w4 is added to something else than the residual"),
        ("parallel", "must be read by one rmsnorm, not|reads something else than the residual"),
        ("unequal halves", "one size"),
        ("up first", "gate and an up projection"),
        ("another activation", "before geglu"),
        ("residual of the layer", "added to something else|must be read by one rmsnorm"),
        ("two norms", "must be read by one rmsnorm, not 2"),
        ("soft cap", "before softcap"),
    ],
)
def test_what_no_kernel_computes_is_refused(change: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fuse(block(change), 16)


def test_an_unknown_operator_is_refused() -> None:
    graph = block()
    with pytest.raises(PlanError, match="no stage computes the operator dropout"):
        fuse(Graph((*graph.operators, Operator("dropout", -1, (), "dropout", 1))), 16)


# --- geometry --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 32768))
def test_columns_are_cut_without_padding(columns: int) -> None:
    """As many warps share a tile as have a fragment, and none has two more than another."""
    g = choose_geometry(CUDA, columns)
    assert g.columns == round_up(columns, 32) and g.warps_rows * g.warps_columns == 8 and sum(g.part_sizes()) == g.fragments
    assert g.warps_columns == 8 or g.warps_columns <= g.columns // 32 < 2 * g.warps_columns
    assert 0 <= g.short_warps < g.warps_columns and (g.fragments > 1 or g.short_warps == 0)
    assert max(g.part_sizes()) - min(g.part_sizes()) <= 1 and max(g.part_sizes()) <= CUDA.part_fragments


@pytest.mark.parametrize(
    ("needed", "warps", "fragments", "short", "parts"),
    [
        (1, 1, 1, 0, 1), (2, 2, 1, 0, 1), (3, 2, 2, 1, 1), (4, 4, 1, 0, 1), (5, 4, 2, 3, 1), (7, 4, 2, 1, 1), (8, 8, 1, 0, 1),
        (9, 8, 2, 7, 1), (76, 8, 10, 4, 3), (84, 8, 11, 4, 3), (92, 8, 12, 4, 3), (96, 8, 12, 0, 3), (100, 8, 13, 4, 4),
        (212, 8, 27, 4, 7), (300, 8, 38, 4, 10),
    ],
)  # fmt: skip
def test_warps_that_have_a_fragment_fewer(needed: int, warps: int, fragments: int, short: int, parts: int) -> None:
    g = choose_geometry(CUDA, needed * 32)
    assert (g.warps_columns, g.fragments, g.short_warps, g.parts) == (warps, fragments, short, parts)
    assert g.tile_bytes == needed * 512 == sum(g.part_bytes(part) for part in range(g.parts))
    lacking = [warps * size * 512 - g.part_bytes(part) for part, size in enumerate(g.part_sizes())]
    assert lacking == [0] * (parts - 1) + [short * 512]


@given(st.integers(1, 32768))
def test_columns_of_codes_are_cut_with_little_padding(columns: int) -> None:
    """Under 2 % where any split over warps allows it, else as little as any; and of those the one with the most warps on a tile."""
    g = choose_geometry(CUDA, columns, Format("int", 4, 32))
    needed = ceil_div(columns, 128)
    waste = {s: ceil_div(needed, s) * s / needed - 1 for s in (1, 2, 4, 8) if ceil_div(needed, s) <= CUDA.max_fragments // 4}
    assert g.warps_rows * g.warps_columns == 8 and sum(g.part_sizes()) == g.fragments and g.short_warps == 0
    assert g.columns / 128 / needed - 1 == waste[g.warps_columns]
    good = [s for s, share in waste.items() if share <= PADDING]
    if good:
        assert g.warps_columns == max(good)
    else:
        assert waste[g.warps_columns] == min(waste.values())


@pytest.mark.parametrize("target", available())
@pytest.mark.parametrize("name", SHAPES)
def test_real_models_waste_less_than_a_percent(name: str, target: str) -> None:
    plan = planned(shape(name), target=target)
    assert plan.weight_bytes() <= plan.tape_bytes() <= plan.weight_bytes() * 1.01


def test_a_tile_of_a_single_core_is_read_in_one_piece() -> None:
    g = choose_geometry(get("cpu"), 14336)
    assert (g.warps_rows, g.warps_columns, g.parts, g.fragments) == (1, 1, 1, 224)


def test_a_matrix_can_be_too_wide() -> None:
    with pytest.raises(PlanError, match="a matrix with 32769 columns is too wide for sm_90"):
        choose_geometry(CUDA, 32769)


@pytest.mark.parametrize("target", available())
def test_what_is_usual_is_there(target: str) -> None:
    numbers = get(target)
    assert numbers.usual_columns in numbers.columns and numbers.usual_prompt_columns in (0, *numbers.columns[1:])
    config = shape("llama-3.2-1b")
    assert make_plan(config, build_graph(config), numbers, prompt_columns=0 if numbers.kind == "cpu" else numbers.usual_prompt_columns)


# --- owners ----------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.integers(1, 200))
def test_spread_is_even(tiles: int, workers: int) -> None:
    count = spread(tiles, workers)
    assert sum(count) == tiles and max(count) - min(count) <= 1
    assert prefix(count) == tuple(sum(count[:w]) for w in range(workers))


@given(st.integers(0, 500), st.lists(st.integers(0, 500), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 5), st.data())
def test_balance_gives_tiles_to_those_with_the_least(tiles: int, load: list[int], nbytes: int, more: int, data: st.DataObject) -> None:
    among = data.draw(st.lists(st.sampled_from(range(len(load))), min_size=1, unique=True))
    count = balance(tiles, among, load, nbytes, more)
    most, least = ceil_div(tiles, len(among)) + more, min(tiles // len(among), 1)
    assert sum(count[w] for w in among) == sum(count) == tiles
    assert all(least <= count[w] <= most for w in among)
    # The last tile of each was nobody else's who had room for it and less to read.
    last = [load[w] + (count[w] - 1) * nbytes for w in among if count[w] > least]
    assert max(last, default=0) <= min((load[w] + count[w] * nbytes for w in among if count[w] < most), default=max(last, default=0))


@pytest.mark.parametrize(
    ("sizes", "even"), [({"hidden_size": 3200}, 0.99), ({"hidden_size": 2560, "ffn_size": 9728}, EVEN), ({"ffn_size": 9600}, 0.99)]
)
def test_rows_that_do_not_divide_by_the_workers_leave_loads_even(sizes: dict[str, int], even: float) -> None:
    plan = planned(replace(shape("llama-3.2-3b"), **sizes))  # type: ignore[arg-type]
    load = [sum(s.count[w] * s.geometry.tile_bytes for s in plan.stages if s.geometry) for w in range(plan.target.workers)]
    assert sum(load) / len(load) >= even * max(load)
    assert plan.tape_bytes() == plan.weight_bytes()


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "qwen3-14b"])
def test_nobody_has_much_more_to_read_than_the_mean(name: str) -> None:
    """Some owners of the residual have a tile of each such stage more than others; the other stages make up for it."""
    plan = planned(shape(name))
    load = [sum(s.count[w] * s.geometry.tile_bytes for s in plan.stages if s.geometry) for w in range(plan.target.workers)]
    assert sum(load) == plan.tape_bytes()
    assert max(load) <= 1.01 * sum(load) / len(load)


def test_the_residual_has_fixed_owners() -> None:
    plan = planned(shape("llama-3.2-1b"))
    assert len({(s.first, s.count) for s in plan.stages if s.name in ("embed", "attention_output", "down")}) == 1


def test_tiles_of_padding_belong_to_owners_of_the_residual() -> None:
    """Heads of 20 are padded to 32: of each four tiles one holds nothing but padding."""
    plan = planned(model(), workers=40)
    idle = {w for w in range(40) if plan.stages[0].count[w] == 0}
    assert len(idle) == 28 and not any(plan.stages[1].count[w] for w in idle)
    whole = planned(model(head_dim=16), workers=40)
    assert any(whole.stages[1].count[w] for w in range(40) if whole.stages[0].count[w] == 0)


def test_plans_are_reproducible() -> None:
    assert planned(shape("qwen3-0.6b")) == planned(shape("qwen3-0.6b"))


# --- KV cache --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", range(1, 130))
def test_groups_of_heads_are_split_evenly(group: int) -> None:
    kv = make_kv_layout(model(num_heads=2 * group), 100)
    splits = kv.virtual_heads // 2
    held = [min(kv.virtual_group, group - i * kv.virtual_group) for i in range(splits)]
    assert sum(held) == group and min(held) >= 1 and max(held) <= 8
    assert splits == ceil_div(group, 8)


def test_sizes_of_the_kv_cache() -> None:
    kv = make_kv_layout(shape("llama-3.1-8b"), 1000)
    assert (kv.head_pad, kv.blocks, kv.block_bytes) == (128, 63, 8192)
    assert kv.layer_bytes == 8 * 63 * 16 * 2 * 128 * 2
    assert kv.bytes_read(1000) == 2 * 8 * 128 * 2 * 1000
    assert make_kv_layout(model(head_dim=2), 17).head_pad == 16


# --- limits ----------------------------------------------------------------------------------------------------------------


def test_the_context_is_what_was_asked_for() -> None:
    assert planned(model()).max_context == 256
    assert planned(model(), max_context=100).kv.blocks == 7
    for wrong in (0, -1, 257):
        with pytest.raises(PlanError, match=f"max_context is {wrong}; this model supports 1 to 256 positions"):
            planned(model(), max_context=wrong)


def test_layers_of_few_bytes_are_looked_for_sooner() -> None:
    def first_look(name: str, format: Format | None = None) -> int:
        graph = build_graph(shape(name))
        formats = dict.fromkeys(graph.weights(), format) if format else None
        return make_plan(shape(name), graph, CUDA, 256, formats=formats).target.first_look_cycles

    int4 = Format("int", 4, 128)
    assert first_look("qwen3-0.6b") == first_look("llama-3.2-1b", int4) == CUDA.short_first_look_cycles < CUDA.first_look_cycles
    assert first_look("llama-3.2-1b") == first_look("llama-3.1-8b", int4) == CUDA.first_look_cycles


def test_workers_replace_those_of_a_typical_device() -> None:
    assert planned(model()).target.workers == CUDA.workers
    assert planned(model(), workers=5).target == replace(planned(model()).target, workers=5)
    with pytest.raises(PlanError, match="at least one worker, not 0"):
        planned(model(), workers=0)


def test_targets_are_found_by_name() -> None:
    assert {"cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"} <= set(available())
    assert all(name == target.name for name, target in available().items())
    with pytest.raises(PlanError, match="unknown target 'sm_70'; known targets: cpu, sm_100"):
        get("sm_70")
