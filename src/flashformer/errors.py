"""What can go wrong, by the part of the story where it is noticed.

Every error that a user can cause derives from `FlashFormerError`; its message says what is wrong and what to do, and the
command line prints it without a traceback. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations


class FlashFormerError(Exception):
    """Base of every error that a user can cause or meet."""


class CheckpointError(FlashFormerError):
    """A model file is missing, truncated, malformed, or lacks a tensor."""


class ConfigError(FlashFormerError):
    """A model's configuration is unsupported, contradictory, or changes the mathematics in a way we do not implement."""


class PlanError(FlashFormerError):
    """A plan cannot be made for this model on this target, or a plan does not prove right."""


class BuildError(FlashFormerError):
    """The generated kernel could not be compiled, or its cache folder cannot be used."""


class DeviceError(FlashFormerError):
    """No device, too little memory, or a kernel that stopped."""


class ScoreError(DeviceError):
    """A sequence whose scores leave no token to choose; the kernel and other sequences go on."""


class InputError(FlashFormerError):
    """A prompt, token id or option that cannot be served."""
