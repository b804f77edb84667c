"""The compiled PyTorch baseline with weights of 4 bits: tinygemm, the int4 matrix product that PyTorch brings along.

Groups of 128 columns; all linears and the head, while the embedding table stays in bf16, as in ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flashformer.config import ModelConfig

from . import torch_compile

GROUP = 128  # columns that share a scale and a zero
INNER_TILES = 8  # of the packed layout: the most, and the fastest for one row of x


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int32 [rows, columns] from 0 to 15 and, in bf16, (scale, zero) [columns / GROUP, rows, 2]: (code - 8) * scale + zero.

    Raises ValueError where the groups do not divide the columns.
    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise ValueError(f"a matrix with {columns} columns has no whole groups of {GROUP}")
    groups = weight.float().view(rows, -1, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).to(torch.bfloat16).float().clamp(min=1e-6)
    zero = (low + 8 * scale).to(torch.bfloat16).float()
    codes = ((groups - zero) / scale).round_().add_(8).clamp_(0, 15)
    beside = torch.cat((scale, zero), -1).transpose(0, 1).to(torch.bfloat16)
    return codes.view(rows, columns).to(torch.int32), beside.contiguous()


class Int4Decoder(torch_compile.Decoder):
    """The same decoder; `prepare` and `linear` as tinygemm wants them."""

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
        """Packed codes, scales with zeros, and the bias."""
        codes, scales = quantise(weight)
        return self.pack(codes), scales, bias

    def linear(self, x: torch.Tensor, *prepared: Any) -> torch.Tensor:
        """See `Decoder.linear`."""
        codes, scales, bias = prepared
        y = self.multiply(x, codes, scales)
        return y if bias is None else y + bias

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes in tinygemm's layout."""
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
        return packed

    def multiply(self, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Its product."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)
        return y


def measure(config: ModelConfig, contexts: Sequence[int], tokens: int, repeats: int) -> Iterator[tuple[int, float]]:
    """See the package. Raises ValueError as `quantise` does."""
    return torch_compile.measure(config, contexts, tokens, repeats, Int4Decoder)
