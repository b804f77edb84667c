"""llama.cpp through llama-cpp-python's low-level interface: all layers on the GPU, flash attention, greedy choice on the host.

Its model is a GGUF file, which is written into a temporary folder (TMPDIR) first: as many bytes as the weights.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import llama_cpp
import ml_dtypes
import numpy as np

from flashformer.config import ModelConfig
from flashformer.models import build_graph

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
PERIOD = 1 << 20  # random values, repeated to fill a matrix: their number does not change the speed
SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)  # its messages are for its developers
BATCH = 512  # tokens of the prompt that go through together


def write_gguf(config: ModelConfig, path: Path) -> None:
    """A file of random bf16 matrices with no vocabulary. Scaled rotary frequencies are left out: they cost no time."""
    c, architecture = config, ARCHITECTURES[config.architecture]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.ffn_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], c.num_layers)
    weights = list(build_graph(c).weights().values())
    for weight in weights:
        name = names.get_name(weight.name, try_suffixes=(".weight", ".bias"))
        assert name is not None
        if len(weight.shape) == 2:
            rows, columns = weight.shape
            shape, nbytes = (rows, 2 * columns), 2 * rows * columns
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), nbytes, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor_info(name, weight.shape, np.dtype(np.float32), 4 * weight.shape[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    values = np.random.default_rng(0).standard_normal(PERIOD).astype(np.float32)
    for weight in weights:
        if len(weight.shape) == 2:
            scaled = (values * weight.shape[1] ** -0.5).astype(ml_dtypes.bfloat16)
            writer.write_tensor_data(np.resize(scaled.view(np.uint8), (weight.shape[0], 2 * weight.shape[1])))
        else:
            writer.write_tensor_data(np.full(weight.shape, 0.0 if weight.name.endswith(".bias") else 1.0, np.float32))
    writer.close()


class Decoder:
    """A model of a GGUF file with a KV cache of `length` positions."""

    def __init__(self, path: Path, length: int, vocab: int) -> None:
        """Raises RuntimeError where llama.cpp does not take the file."""
        self.vocab = vocab
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 999
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError("llama.cpp does not load the model")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = length, BATCH, BATCH
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context of that length")
        self.filled = 0

    def feed(self, tokens: Sequence[int]) -> None:
        """Tokens at the next positions."""
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            ids = (ctypes.c_int32 * len(part))(*part)  # must live as long as the batch, which only points to it
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, len(part))):
                raise RuntimeError("llama.cpp fails to decode")
        self.filled += len(tokens)

    def best(self) -> int:
        """The greedy token after the last one."""
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.vocab,)).argmax())

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), 0, position, -1)
        self.filled = position

    def time(self, context: int, tokens: int) -> float:
        """Seconds for `tokens` greedy tokens after `context` random ones."""
        if self.filled < context:
            self.feed(np.random.default_rng(self.filled).integers(0, self.vocab, context - self.filled).tolist())
        self.rewind(context)
        llama_cpp.llama_synchronize(self.context)
        token, began = 1, time.perf_counter()
        for _ in range(tokens):
            self.feed([token])
            token = self.best()
        return time.perf_counter() - began

    def close(self) -> None:
        """Free everything."""
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def measure(config: ModelConfig, contexts: Sequence[int], tokens: int, repeats: int, needs_gpu: bool = True) -> Iterator[tuple[int, float]]:
    """See the package."""
    if needs_gpu and not llama_cpp.llama_supports_gpu_offload():
        raise RuntimeError("llama-cpp-python was built without CUDA; reinstall it with CMAKE_ARGS=-DGGML_CUDA=on")
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(config, path)
        decoder = Decoder(path, contexts[-1] + tokens, config.vocab_size)
        try:
            for context in contexts:
                times = [decoder.time(context, tokens) / tokens * 1e3 for _ in range(repeats + 1)][1:]  # the first warms up
                yield context, statistics.median(times)
        finally:
            decoder.close()
