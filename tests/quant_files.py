"""Small quantised matrices that other libraries made, in tests/data/quant_*.safetensors.

Made by compressed-tensors 0.20.0, bitsandbytes 0.50.2 (its CPU code), transformers 5.24.0 (Fp8Dequantize), AutoAWQ 0.2.9, AutoGPTQ 0.7.1
(GPTQ v1) and GPTQModel 7.7.0 (v2); `made by` in the metadata of each file says it again. A file holds cases: the stored tensors of a
module, `CASE.PART`, and `CASE.expected`, the values that the library itself gives for them (in float32 where it allows that).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashformer.checkpoint.safetensors import SafetensorsFile

Parts = dict[str, np.ndarray]


def load(library: str) -> dict[str, Parts]:
    """The cases of a file, each with its tensors by part."""
    file = SafetensorsFile(Path(__file__).parent / "data" / f"quant_{library}.safetensors")
    cases: dict[str, Parts] = {}
    for name in file.specs:
        case, _, part = name.partition(".")
        cases.setdefault(case, {})[part] = file.view(name)
    return cases


def stored(parts: Parts) -> Parts:
    """What a checkpoint would hold of a case."""
    return {part: tensor for part, tensor in parts.items() if not part.startswith("expected")}


def element(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """A change to a tensor: its last element becomes `value`."""

    def change(tensor: np.ndarray) -> np.ndarray:
        changed = tensor.copy()
        changed.reshape(-1)[-1] = value
        return changed

    return change
