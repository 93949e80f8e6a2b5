"""Drop-in layers: Mixed* hold several candidate bit widths and are searched, Quant* have fixed bits."""

from qprune.nn.activation import QuantActivation
from qprune.nn.mixed import MixedActivation, MixedConv2d, MixedLinear
from qprune.nn.quant import QuantConv2d, QuantLinear

__all__ = ["MixedActivation", "MixedConv2d", "MixedLinear", "QuantActivation", "QuantConv2d", "QuantLinear"]
