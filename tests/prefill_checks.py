"""What the kernel for long prompts must get right, on the H200 as on the emulated GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import flashformer
from flashformer.backends.cuda import load as load_runner
from flashformer.backends.cuda import runner as runners
from flashformer.backends.cuda.prefill import LEAST, Prefill, possible
from flashformer.backends.cuda.runner import CudaRunner
from flashformer.backends.cuda.turns import QUANTUM
from flashformer.check import compare, sample_tokens
from flashformer.checkpoint import Checkpoint
from flashformer.formats import choose
from flashformer.models import build_graph
from flashformer.plan import KvType, make_plan
from flashformer.reference import Reference
from flashformer.sampling import SamplingParams
from flashformer.tape import lay_tapes
from flashformer.targets import Target
from quant_models import FORMS
from running import assert_near
from test_formats import STAGES


@dataclass
class Case:
    """A model and how its cache is kept."""

    architecture: str = "LlamaForCausalLM"
    dtype: str = "bfloat16"
    kv: KvType = "native"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """How far logits may be off."""
        return 2e-2 if self.kv == "native" else 5e-2


CASES = {
    "two heads a kv head": Case(),
    "odd sizes, fp16": Case(dtype="float16", config={"hidden_size": 200, "intermediate_size": 341, "vocab_size": 301}),
    "biases, seven heads a kv head": Case("Qwen2ForCausalLM", config={"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 32}),
    "norms of heads, three a kv head, padded": Case(
        "Qwen3ForCausalLM", config={"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 40}
    ),
    "large heads": Case(config={"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 2}),
    "int8 cache": Case(kv="int8"),
    "fp8 cache, large heads": Case(
        kv="fp8", config={"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 256, "num_hidden_layers": 2}
    ),
    "short warps": Case(config={"hidden_size": 330, "intermediate_size": 41 * 32 + 12, "num_hidden_layers": 2}),
    "a layer": Case(config={"num_hidden_layers": 1}),
}
LAYER_STAGES = [stage for stage in STAGES if stage != "head"]
UNSUITED = ("Q4_1", "Q4_K", "fp8 exponents")  # with minimums, and scales that are too few bytes to be copied
SUITED = [name for name in FORMS if name not in UNSUITED]


@contextmanager
def running(
    checkpoint: Checkpoint, target: Target, context: int, kv: KvType = "native", quantised: bool = False
) -> Iterator[tuple[CudaRunner, Reference]]:
    """A runner with the kernel, without the one of several columns that there would be, too; and what judges it."""
    graph = build_graph(checkpoint.config)
    formats = choose(checkpoint, graph.weights()) if quantised else None
    plan = make_plan(checkpoint.config, graph, target, context, formats=formats, kv_type=kv, slots=2, prompt_columns=2)
    assert possible(plan)
    runner = load_runner(replace(plan, prompt_columns=0), checkpoint)
    try:
        source = runners.generate(plan, prefill=True)
        runner.prefill = Prefill(runner, lay_tapes(plan), source, runners.compile_source(source.text, plan.target))
        yield runner, Reference(graph, checkpoint)
    finally:
        runner.close()


def cache_of(runner: CudaRunner, slot: int = 0) -> np.ndarray:
    """The bytes of a slot's KV cache."""
    nbytes = runner.plan.kv_bytes() // runner.slots
    return runner.context.download(runner.kv + slot * nbytes, np.empty(nbytes, np.uint8), "the KV cache")


def check_prefill(runner: CudaRunner, reference: Reference, length: int, limit: float) -> None:
    """What it leaves in the cache is right, and has the same bits however it is cut; and so are logits that go on from its last token."""
    assert runner.prefill is not None
    tokens = sample_tokens(runner.plan.config, length + 4, seed=1)
    runner.prefill.feed(tokens[:length], 0, 0)
    for first, end in ((0, 20), (20, length - 1), (length - 1, length)):
        runner.prefill.feed(tokens[first:end], first, 1)
    whole, pieces = cache_of(runner), cache_of(runner, 1)
    assert whole.any() and np.array_equal(whole, pieces)
    wanted = reference.logits(tokens, last=5)
    assert_near(compare(runner.logits(tokens[length:], length), wanted[1:]), limit)
    resumed = [resumed_logits(runner, tokens[length - 1 :], length - 1, slot) for slot in (0, 1)]
    assert np.array_equal(*resumed)
    assert_near(compare(resumed[0], wanted), limit)


def resumed_logits(runner: CudaRunner, tokens: Sequence[int], start: int, slot: int) -> np.ndarray:
    """Logits of tokens of which the first is the one that the kernel for long prompts has fed last, in this slot.

    The runner must have given logits before, and so have room for them.
    """
    out = np.empty((len(tokens), runner.plan.config.vocab_size), np.float32)
    runner.context.use()
    with runner.in_slot(slot, resumes=True):
        runner.launch(tokens, start, 1, logits=True)
    runner.finish()
    return runner.context.download(runner.logit_address, out, "logits")


def check_engine(folder: Path, context: int) -> None:
    """Long prompts go through it, alone or beside others. What is made does not tell which, or what was in the cache."""
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=0)

    def answers(engine: flashformer.Engine, ids: list[int], params: SamplingParams = params) -> list[tuple[int, float]]:
        return [(r.token, r.logprob or 0.0) for r in engine.generate(ids, params)]

    def together(engine: flashformer.Engine, prompts: list[list[int]], params: SamplingParams = params) -> list[list[tuple[int, float]]]:
        made: list[list[tuple[int, float]]] = [[] for _ in prompts]
        for index, r in engine.generate(prompts, [params] * len(prompts)):
            made[index].append((r.token, r.logprob or 0.0))
        return made

    with flashformer.load(folder, "cuda", context, prompt_columns=0) as engine:
        ids = sample_tokens(engine.config, LEAST + 9, seed=3)
        slow = answers(engine, ids)
    with flashformer.load(folder, "cuda", context, slots=2, prompt_columns=2) as engine:
        runner = engine.runner
        assert isinstance(runner, CudaRunner) and runner.prefill is not None and runner.prompts is not None
        before = runner.prompts.params.epoch
        first = answers(engine, ids)
        assert runner.prompts.params.epoch == before  # the other kernel fed none of it
        assert abs(first[0][1] - slow[0][1]) < 0.05
        assert answers(engine, ids) == first and engine.stats.reused_tokens == len(ids) - 1
        longer = [*ids, *(token for token, _ in first), *ids[:3]]
        reused = answers(engine, longer)
        assert engine.stats.reused_tokens == len(ids) - 1 and runner.prompts.params.epoch == before
        short = answers(engine, ids[:7])  # which the other kernel feeds, all of it: nothing may tell what was in the cache
        assert engine.stats.reused_tokens == 0 and runner.prompts.params.epoch > before
        assert together(engine, [ids[:7], longer]) == [short, reused]
        # More of them than slots, and more tokens than a launch makes while others wait: what goes on with an answer is no prompt.
        prompts, many = [longer, ids[:7], ids, ids[:9]], replace(params, max_tokens=QUANTUM + 4)
        alone = [answers(engine, prompt, many) for prompt in prompts]
        assert together(engine, prompts, many) == alone
    with flashformer.load(folder, "cuda", context, prompt_columns=2) as engine:
        assert [answers(engine, prompt) for prompt in (longer, ids[:7], ids)] == [reused, short, first]
