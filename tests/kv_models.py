"""Small models on which a cache of 8 bits shows: some dimensions of their values dwarf the others, and nothing reads those."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model_files import make_config, write_folder

OUTLIERS = {"int8": 100.0, "fp8": 2e5}  # with which the other dimensions have the least codes: of fp8, subnormal ones


def write_outliers(folder: Path, factor: float) -> Path:
    """A model whose values are `factor` times larger in the first dimension of every head, which the output projection passes over."""
    from safetensors.numpy import load_file, save_file

    config = make_config(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    write_folder(folder, config)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("v_proj.weight"):
            tensor[:: config["head_dim"]] = (tensor[:: config["head_dim"]].astype(np.float32) * factor).astype(tensor.dtype)
        if name.endswith("o_proj.weight"):
            tensor[:, :: config["head_dim"]] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


def size_of_the_effect(ours: np.ndarray, own: np.ndarray, native: np.ndarray) -> float:
    """How far logits are from those of a native cache, in what those of their own reference are: 1 where as much is lost."""
    return float(np.linalg.norm((ours - native).astype(np.float64)) / np.linalg.norm((own - native).astype(np.float64)))


def share_of_the_effect(ours: np.ndarray, own: np.ndarray, native: np.ndarray) -> float:
    """How far logits are from those of their own reference towards those of a native cache: 0 at the one, 1 at the other."""
    effect = (native - own).astype(np.float64)
    return float(((ours - own) * effect).sum() / np.square(effect).sum())
