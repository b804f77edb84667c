"""GGUF files as checkpoints: Hugging Face names and layout for the tensors, block types as forms or expanded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..quant.forms import Affine
from ..quant.gguf_blocks import BLOCKS, decode
from ..quant.source import Source
from . import PLAIN_TYPES, Checkpoint, TensorSpec, shown
from .blocks import expand
from .gguf_config import config_from_gguf
from .gguf_file import GGUFFile, Placed

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

# GGUF names -> Hugging Face names, without the suffix .weight or .bias.
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?([a-z_]+)\.(weight|bias)")


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that is not known stays as it is."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    layer, part, suffix = match.groups()
    stem = _MODEL_NAMES.get(part) if layer is None else _LAYER_NAMES.get(part)
    prefix = "" if layer is None else f"model.layers.{layer}."
    return name if stem is None else f"{prefix}{stem}.{suffix}"


class GGUFCheckpoint(Checkpoint):
    """One GGUF file with its metadata, tokenizer and tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        try:
            factors = self._rope_factors()
            self.config = config_from_gguf(self._file.metadata, self._file.tensors.keys(), factors)
        except (CheckpointError, ConfigError):
            self.close()
            raise
        self._tensors: dict[str, Placed] = {}
        for name, placed in self._file.tensors.items():
            if self._tensors.setdefault(hugging_face_name(name), placed) is not placed:
                self.close()
                raise CheckpointError(f"{path}: the tensor {shown(name)} occurs twice, under two names")
        # llama.cpp stores q and k of its llama architecture with the halves of the rotary embedding interleaved.
        self._interleaved = self._file.metadata["general.architecture"] == "llama"

    def _rope_factors(self) -> np.ndarray | None:
        """The divisors of the rotary frequencies that llama3 scaling is stored as, float32 [head_dim / 2]."""
        placed = self._file.tensors.get("rope_freqs.weight")
        if placed is None:
            return None
        if placed.spec.dtype != "float32" or len(placed.spec.shape) != 1:
            raise CheckpointError(f"{self.path}: rope_freqs.weight must be a float32 vector")
        return self._plain(placed)

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        return replace(self._find(name).spec, name=name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        spec, part = self.spec(name), self._stored(name, rows)
        if spec.dtype in PLAIN_TYPES:
            return part
        return expand(spec.dtype, part.reshape(-1, BLOCKS[spec.dtype][1])).reshape(len(part), spec.shape[1])

    def form(self, name: str, rows: slice | None = None) -> Affine | None:
        spec = self.spec(name)
        if spec.dtype in PLAIN_TYPES:
            return None
        part = self._stored(name, rows)
        return decode(Source(name.removesuffix(".weight"), {"weight": part}), spec.dtype, (len(part), spec.shape[1]))

    def _stored(self, name: str, rows: slice | None) -> np.ndarray:
        """A tensor, or some of its rows, in our order: plain values, or uint8 [rows, bytes of a row's blocks]."""
        placed = self._find(name)
        spec = placed.spec
        order = self._row_order(name, spec.shape[0])
        if spec.dtype in PLAIN_TYPES:
            stored = self._plain(placed)
        elif len(spec.shape) == 2:
            columns, block_bytes = BLOCKS[spec.dtype]
            row_bytes = spec.shape[1] // columns * block_bytes
            stored = self._file.file.array(placed.begin, np.dtype(np.uint8), (spec.shape[0], row_bytes))
        else:
            raise CheckpointError(f"{self.path}: {shown(name)} is {spec.dtype}, which only matrices can be")
        selected = rows if rows is not None else slice(None)
        return stored[selected] if order is None else stored[order[selected]]

    def _plain(self, placed: Placed) -> np.ndarray:
        return self._file.file.array(placed.begin, PLAIN_TYPES[placed.spec.dtype], placed.spec.shape)

    def _row_order(self, name: str, rows: int) -> np.ndarray | None:
        """Where each row of q or k lies, if rotary pairs are interleaved: a head's row 2i + j is our row j * half + i."""
        heads_of = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        heads = heads_of.get(name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2])
        if not self._interleaved or heads is None:
            return None
        expected = heads * self.config.head_dim
        if rows != expected:
            raise CheckpointError(f"{self.path}: {shown(name)} has {rows} rows, the configuration says {expected}")
        return np.arange(rows).reshape(heads, self.config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def _find(self, name: str) -> Placed:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {shown(name)}")
        return self._tensors[name]

    def tokenizer(self) -> Tokenizer:
        from ..tokenizer import from_gguf

        return from_gguf(self._file.metadata, self.config)

    def close(self) -> None:
        self._file.file.close()
        self._tensors = {}
