"""Writes a model's tensors as safetensors files, one tensor after the other, in shards of bounded size with their index.

The format: checkpoint/safetensors.py. A header comes first but is known last, so room is left for it and filled with spaces, which
the format allows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SHARD_BYTES = 4 << 30  # a shard ends before a tensor that would make it larger
HEADER_BYTES = 256 << 10  # room for the header of a shard: some 1,500 tensors

_ALIGNMENT = 8  # bytes; readers want tensors at a multiple of their elements' size
_TYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
}


class SafetensorsWriter:
    """Collects the tensors of one model in `folder`; `finish` names the files."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self._shard_bytes = folder, shard_bytes
        self.total_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._header_bytes = self._size = 0
        self._ragged: dict[str, np.ndarray] = {}  # whose size would leave the next tensor unaligned: they end the shard

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Append a tensor; a name may come once. Raises OSError where the disk does."""
        entry_bytes = 2 * len(name) + 200
        full = self._size + tensor.nbytes > self._shard_bytes or self._header_bytes + entry_bytes > HEADER_BYTES
        if self._file is not None and full:
            self._end_shard()
        if self._file is None:
            path = self.folder / f"shard-{len(self._shards)}"
            self._file = path.open("wb")
            self._file.seek(8 + HEADER_BYTES)
            self._shards.append((path, []))
            self._header, self._header_bytes, self._size = {"__metadata__": {"format": "pt"}}, 100, 0
        self._shards[-1][1].append(name)
        self._header_bytes += entry_bytes
        self._size += tensor.nbytes
        self.total_bytes += tensor.nbytes
        if tensor.nbytes % _ALIGNMENT:
            self._ragged[name] = tensor
        else:
            self._write(name, tensor)

    def finish(self) -> None:
        """End the last shard; name the files as Hugging Face folders do, and write the index if there are several."""
        self._end_shard()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for i, (path, names) in enumerate(self._shards, 1):
            file = f"model-{i:05}-of-{len(self._shards):05}.safetensors"
            path.rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Let go of the file that is being written; safe to call at any time."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, name: str, tensor: np.ndarray) -> None:
        """Put a tensor behind the others."""
        assert self._file is not None
        begin = self._file.tell() - 8 - HEADER_BYTES
        self._header[name] = {"dtype": _TYPES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": (begin, begin + tensor.nbytes)}
        self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    def _end_shard(self) -> None:
        """Write what was put off, larger elements first so that all are aligned, and then the header."""
        assert self._file is not None
        for name, tensor in sorted(self._ragged.items(), key=lambda item: -item[1].itemsize):
            self._write(name, tensor)
        self._ragged = {}
        self._file.seek(0)
        self._file.write(HEADER_BYTES.to_bytes(8, "little") + json.dumps(self._header).encode().ljust(HEADER_BYTES))
        self.close()
