"""The CPU backend: one library per model, with cores as workers."""

from .runner import CpuRunner, load

__all__ = ["CpuRunner", "load"]
