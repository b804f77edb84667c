"""GPTQ, v1 and v2: 4 or 8 bits, weights packed along the columns and zero points along the rows, both in natural order.

Stored (AutoGPTQ, GPTQModel), with P = 32 / bits codes a word: `qweight` int32 [K / P, N], `qzeros` int32 [groups, N / P], `scales`
[groups, N], `g_idx` int32 [K], the group of each column. Value: (q - zero) * scale. v1 stores zero - 1, v2 the zero itself.
"""

from __future__ import annotations

import numpy as np

from ..config import Keys
from .forms import Affine
from .scheme import Quantization, Scheme, choice, group_size, names
from .source import FLOATS, Source, groups_of_columns, unpack_some_words, unpack_words

METHOD = "gptq"
PARTS = ("qweight", "qzeros", "scales", "g_idx")

# fmt: off
_HARMLESS = frozenset({
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment",
    "damp_percent", "dataset", "desc_act", "disable_exllama", "exllama_config", "max_input_length", "meta", "model_file_base_name",
    "model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "pad_token_id",
    "quant_method", "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama",
})
# fmt: on
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "is_marlin_format": (False,),
    "lm_head": (False, True),  # which modules are quantised shows in the tensors
    "dynamic": (None, {}),  # other bits for some modules
    "pack_dtype": ("int32",),
}


def parse(keys: Keys) -> Quantization:
    """What the configuration says; 2 and 3 bits and the marlin layout are refused."""
    given = [key for key in ("checkpoint_format", "format") if keys.mapping.get(key) is not None]
    layouts = {choice(keys, key, ("gptq", "gptq_v2")) for key in given}
    if len(layouts) > 1:
        keys.fail("checkpoint_format", "contradicts format")
    for key in ("checkpoint_format", "format"):
        keys.get(key, None)
    bits = keys.integer("bits", 4, 8)
    if bits not in (4, 8):
        keys.fail("bits", "is not supported; supported are 4 and 8")
    scope, group = group_size(keys)
    symmetric = keys.flag("sym", True)
    ignored = names(keys, "modules_to_not_convert")
    keys.finish(_HARMLESS, _NEUTRAL)
    return Quantization(METHOD, ((("Linear",), Scheme(next(iter(layouts), "gptq"), bits, scope, group, symmetric)),), ignored)


def decode(source: Source, shape: tuple[int, int], scheme: Scheme, rows: slice) -> Affine:
    """A matrix, or some of its rows. With act-order the form is `permuted`."""
    (n, k), bits, group = shape, scheme.bits, scheme.columns(shape[1])
    per_word = 32 // bits
    source.only(*PARTS)
    source.multiple("qweight", "K", k, per_word)
    source.multiple("qzeros", "N", n, per_word)
    groups = -(-k // group)
    weight = source.get("qweight", "int32", (k // per_word, n))
    zeros = source.get("qzeros", "int32", (groups, n // per_word))
    scale = source.sound("scales", source.get("scales", FLOATS, (groups, n)).T[rows].astype(np.float32))
    index = groups_of_columns(source, "g_idx", k, group)
    zero = unpack_some_words(zeros, bits, rows, n).T.astype(np.int16)
    if scheme.format == "gptq":
        # NOTE: some libraries read the largest stored value as zero = 0, some as 2^bits, and packing 0 damages the neighbours.
        if (zero == (1 << bits) - 1).any():
            source.fail("qzeros", "holds a zero point that overflows in this version of the format; export the model as gptq_v2")
        zero += 1
    return Affine(unpack_words(weight.T[rows], bits), bits, group, scale, zero=zero, group_of=index)
