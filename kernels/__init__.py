"""The fused operations of qprune. They know tensors; modules, layers and searches live in `qprune`."""

from .conv_ops import mixed_conv2d
from .depthwise_ops import mixed_depthwise
from .dispatch import backend
from .errors import BackendError, InputError, QPruneError
from .int8_ops import quant_conv2d_int8
from .multi_ops import mix_quantize_many
from .ops import mix_quantize
from .reference import IDENTITY
from .reference_conv import Geometry as ConvGeometry

__all__ = [
    "IDENTITY",
    "BackendError",
    "ConvGeometry",
    "InputError",
    "QPruneError",
    "backend",
    "mix_quantize",
    "mix_quantize_many",
    "mixed_conv2d",
    "mixed_depthwise",
    "quant_conv2d_int8",
]
