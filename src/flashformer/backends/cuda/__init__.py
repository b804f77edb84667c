"""The CUDA backend: one persistent cooperative kernel per model."""

from .driver import DeviceInfo, probe
from .pack import RandomWeights
from .runner import CudaRunner, load_cuda

__all__ = ["CudaRunner", "DeviceInfo", "RandomWeights", "load_cuda", "probe"]
