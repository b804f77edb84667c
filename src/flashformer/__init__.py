"""FlashFormer: the whole forward pass of a decoder transformer in one kernel, generated for one model.

    import flashformer

    with flashformer.load("demo") as engine:
        for result in engine.generate("The capital of France is"):
            print(result.text, end="")
"""

from .engine import Engine, load
from .errors import FlashFormerError
from .sampling import SamplingParams
from .scheduler import Result
from .stream import Stream
from .version import __version__

__all__ = ["Engine", "FlashFormerError", "Result", "SamplingParams", "Stream", "__version__", "load"]
