"""FP8 checkpoints as DeepSeek and Qwen3 publish them: e4m3 values with a scale per block of 128 x 128, or one for the matrix.

Stored: `weight` e4m3 [N, K], `weight_scale_inv` [ceil(N / 128), ceil(K / 128)], which multiplies in spite of its name; float32,
bfloat16, or e8m0 (`scale_fmt: ue8m0`: powers of two). Without blocks: one scalar, `weight_scale` or `weight_scale_inv`.
"""

from __future__ import annotations

import numpy as np

from ..config import Keys
from .eight_bits import decode_values
from .forms import Scaled
from .scheme import WEIGHTS_ONLY, Quantization, Scheme, block_size, choice, names
from .source import Source

METHOD = "fp8"
PARTS = ("weight", "weight_scale", "weight_scale_inv", "input_scale", "activation_scale")

_HARMLESS = frozenset({"dequantize", "is_checkpoint_fp8_serialized", "quant_method"})
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "expert_dtype": ("fp8", None),
    "fmt": ("e4m3", None),
    "kv_cache_scheme": (None,),
    "modules_to_convert": (None, []),
}


def parse(keys: Keys) -> Quantization:
    """What the configuration says."""
    choice(keys, "activation_scheme", ("dynamic", "static"), "dynamic")
    form = choice(keys, "scale_fmt", ("float", "ue8m0"), "float")
    block = block_size(keys, "weight_block_size")
    ignored = names(keys, "modules_to_not_convert") + names(keys, "ignored_layers")
    keys.finish(_HARMLESS, _NEUTRAL)
    scheme = Scheme(form, 8, "tensor" if block is None else "block", block=block, floating=True)
    return Quantization(METHOD, ((("Linear",), scheme),), ignored, (WEIGHTS_ONLY,))


def decode(source: Source, shape: tuple[int, int], scheme: Scheme, rows: slice) -> Scaled:
    """A matrix, or some of its rows."""
    plain = scheme.scope == "tensor" and source.has("weight_scale")
    part = "weight_scale" if plain else "weight_scale_inv"
    source.only("weight", part, "input_scale", "activation_scale")
    form = decode_values(source, shape, scheme, rows, part)
    if scheme.format == "ue8m0" and (np.frexp(form.scale)[0] != 0.5).any():
        source.fail(part, "a scale is not a power of two, which scale_fmt = ue8m0 says")
    return form
