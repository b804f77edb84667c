"""What importing the package costs."""

from __future__ import annotations

import subprocess
import sys


def test_import_is_light() -> None:
    """NumPy and its types of 16 and 8 bits, nothing else that is not Python's own: whoever needs torch, CUDA or a tokenizer imports it."""
    program = (
        "import sys; before = set(sys.modules); import flashformer\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert imported == ["flashformer", "ml_dtypes", "numpy"]
