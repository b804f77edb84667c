"""Quantised matrices of a Hugging Face folder: the stored tensors of a module, put together under the name of its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from ..config import ModelConfig
from ..models import build_graph
from ..quant import decode, methods
from ..quant.forms import Form
from ..quant.scheme import Scheme
from . import PLAIN_TYPES, TensorSpec

# Values expanded at a time: in float32 (1 MB) they stay in the cache of a core between the passes over them.
_STEP = 1 << 18

_CLASSES = {"embed": "Embedding", "linear": "Linear"}  # the class that a configuration calls an operator's module


class QuantizedMatrix:
    """One matrix [N, K], decoded from views of its stored tensors. It holds no state, so any thread may read it."""

    def __init__(self, method: str, scheme: Scheme, module: str, shape: tuple[int, int], parts: Mapping[str, np.ndarray]) -> None:
        """`parts` are the tensors by what follows the module's name; nothing is checked yet."""
        self._method, self._scheme, self._module, self._shape, self._parts = method, scheme, module, shape, parts
        kind, nbytes = scheme.describe(), sum(part.nbytes for part in parts.values())
        self.spec = TensorSpec(f"{module}.weight", shape, kind if kind.startswith(method) else f"{method} {kind}", nbytes)
        self.stored = tuple(f"{module}.{part}" for part in parts)  # names of the tensors

    def form(self, rows: slice | None = None) -> Form:
        """The matrix, or some of its rows; raises what `quant.decode` raises."""
        return decode(self._method, self._module, self._parts, self._shape, self._scheme, slice(None) if rows is None else rows)

    def expand(self, rows: slice | None = None) -> np.ndarray:
        """The values in bfloat16, rounded to nearest, ties to even; memory for a few rows beside them. Raises what `form` raises."""
        n, k = self._shape
        chosen = range(n)[slice(None) if rows is None else rows]
        out = np.empty((len(chosen), k), ml_dtypes.bfloat16)
        step = max(_STEP // k // 8 * 8, 8)  # formats pack up to 8 rows together
        for at in range(0, len(chosen), step):
            part = chosen[at : at + step]
            form = self.form(slice(part.start, part.stop if part.stop >= 0 else None, part.step))
            with np.errstate(over="ignore"):  # what bfloat16 cannot hold is infinite
                out[at : at + step] = form.dequantize()
        return out


def quantized_matrices(
    config: ModelConfig, stored: Mapping[str, TensorSpec], view: Callable[[str], np.ndarray]
) -> dict[str, QuantizedMatrix]:
    """The matrices of a model that its configuration says are quantised and whose weight is not there plainly, by name.

    `stored` are the tensors of the folder, `view` gives one of them. Tensors that are not known to the method, or lie beside a
    plain weight, are left over.
    """
    if config.quantization is None:
        return {}
    method = config.quantization.method
    found: dict[str, QuantizedMatrix] = {}
    for op in build_graph(config).operators:
        for weight in op.weights:
            if op.kind not in _CLASSES or len(weight.shape) != 2 or weight.name in found:
                continue
            module = weight.name.removesuffix(".weight")
            plain = weight.name in stored and stored[weight.name].dtype in PLAIN_TYPES
            parts = [part for part in methods()[method].PARTS if f"{module}.{part}" in stored]
            scheme = config.quantization.scheme_of(module, _CLASSES[op.kind])
            if scheme is not None and not plain and parts:
                views = {part: view(f"{module}.{part}") for part in parts}
                found[weight.name] = QuantizedMatrix(method, scheme, module, (weight.shape[0], weight.shape[1]), views)
    return found
