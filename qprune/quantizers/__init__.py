"""Quantizers of weights, of layer inputs, and of activations where they are produced."""

from qprune.quantizers.base import Candidates, Quantizer, learned_ranges, sample_values, spread
from qprune.quantizers.input import InputQuantizer
from qprune.quantizers.weight import WeightQuantizer

__all__ = ["Candidates", "InputQuantizer", "Quantizer", "WeightQuantizer", "learned_ranges", "sample_values", "spread"]
