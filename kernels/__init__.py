"""The fused operations of qprune. They know tensors; modules, layers and searches live in `qprune`."""

from .conv_ops import mixed_conv2d
from .dispatch import backend
from .errors import BackendError, InputError, QPruneError
from .ops import mix_quantize
from .reference import IDENTITY

__all__ = ["IDENTITY", "BackendError", "InputError", "QPruneError", "backend", "mix_quantize", "mixed_conv2d"]
