"""Quantizers of weights, of layer inputs, and of activations where they are produced."""

from qprune.quantizers.base import Candidates, Quantizer, RangeQuantizer, learned_ranges, sample_values, spread
from qprune.quantizers.input import InputQuantizer
from qprune.quantizers.output import OutputQuantizer
from qprune.quantizers.staging import StagedQuantizer
from qprune.quantizers.stored import StoredUniqWeightQuantizer, StoredWeightQuantizer
from qprune.quantizers.uniq import UniqWeightQuantizer
from qprune.quantizers.weight import WeightQuantizer, make_weight_quantizer

__all__ = [
    "Candidates",
    "InputQuantizer",
    "OutputQuantizer",
    "Quantizer",
    "RangeQuantizer",
    "StagedQuantizer",
    "StoredUniqWeightQuantizer",
    "StoredWeightQuantizer",
    "UniqWeightQuantizer",
    "WeightQuantizer",
    "learned_ranges",
    "make_weight_quantizer",
    "sample_values",
    "spread",
]
