"""vLLM's offline engine in this process: its CUDA graphs and compilation, dummy weights, one sequence.

A token's time is that of a request for many tokens less that of a request for one; the prompt is in the prefix cache of both.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashformer.config import ModelConfig

from .huggingface import config_json

BLOCK = 16  # positions: a request needs one token more than the prefix cache gives it
MEMORY_SHARE = 0.9  # of the GPU's memory, weights included


def measure(config: ModelConfig, contexts: Sequence[int], tokens: int, repeats: int) -> Iterator[tuple[int, float]]:
    """See the package; needs two tokens at least."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, as all others
    import torch
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json(config)))
        engine = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_num_seqs=1,
            enable_prefix_caching=True,
            max_model_len=min(contexts[-1] + tokens + BLOCK, config.max_positions),
            gpu_memory_utilization=MEMORY_SHARE,
        )
    try:
        for context in contexts:
            prompt = np.random.default_rng(0).integers(0, config.vocab_size, max(context, 1)).tolist()
            for count in (1, tokens):
                _seconds(engine, prompt, count)
            times = [(_seconds(engine, prompt, tokens) - _seconds(engine, prompt, 1)) / (tokens - 1) for _ in range(repeats)]
            yield context, statistics.median(times) * 1e3
    finally:
        del engine
        gc.collect()
        torch.cuda.empty_cache()


def _seconds(engine: Any, prompt: list[int], count: int) -> float:
    """Wall time of one request for `count` tokens."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    made = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0].token_ids
    if len(made) != count:
        raise RuntimeError(f"vLLM made {len(made)} tokens of {count}")
    return time.perf_counter() - began
