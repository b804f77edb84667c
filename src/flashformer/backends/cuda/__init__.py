"""The CUDA backend: one persistent cooperative kernel per model."""

from .driver import DeviceInfo, probe
from .random_weights import RandomWeights
from .runner import CudaRunner, load

__all__ = ["CudaRunner", "DeviceInfo", "RandomWeights", "load", "probe"]
