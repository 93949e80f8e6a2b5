"""qprune: choose how many bits every filter and activation of a convolutional network gets, within a budget.

model = qprune.prepare(net, qprune.SearchSpace(w_bits=(2, 4, 8), a_bits=(2, 4, 8)), example_inputs=x)
search = qprune.Search(model, qprune.Budget(bops="w4a4"))
for x, y in loader:
    search.step(lambda m: F.cross_entropy(m(x), y))
final = qprune.convert(model, search.policy())
"""

from pathlib import Path as _Path

# In a bare checkout the kernels lie beside this package; installed, they lie inside it.
_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).parent / "kernels").is_dir() and (_root / "kernels" / "reference.py").is_file():
    __path__.append(str(_root))

# ruff: noqa: E402
from qprune import functional, nn
from qprune._version import __version__
from qprune.budget import Budget
from qprune.checkpoint import load, save
from qprune.convert import convert
from qprune.cost import cost
from qprune.errors import (
    CheckpointError,
    ExportError,
    InfeasibleBudgetError,
    NonFiniteError,
    PolicyMismatchError,
    QPruneError,
    UnsupportedLayerError,
    VerificationError,
)
from qprune.export.onnx import export_onnx
from qprune.export.packed import load_packed, save_packed
from qprune.export.qonnx import export_qonnx
from qprune.folding import fold
from qprune.gates import sample_gates, set_gates
from qprune.groups import channel_groups
from qprune.kernels import backend
from qprune.policy import Policy
from qprune.prepare import arch_parameters, calibrate, prepare, weight_parameters
from qprune.recalibrate import recalibrate
from qprune.removal import removal_report
from qprune.report import plot, report
from qprune.search.allocate import allocate
from qprune.search.driver import Search
from qprune.space import SearchSpace
from qprune.verification import Verification
from qprune.verify import verify

__all__ = [
    "Budget",
    "CheckpointError",
    "ExportError",
    "InfeasibleBudgetError",
    "NonFiniteError",
    "Policy",
    "PolicyMismatchError",
    "QPruneError",
    "Search",
    "SearchSpace",
    "UnsupportedLayerError",
    "Verification",
    "VerificationError",
    "__version__",
    "allocate",
    "arch_parameters",
    "backend",
    "calibrate",
    "channel_groups",
    "convert",
    "cost",
    "export_onnx",
    "export_qonnx",
    "fold",
    "functional",
    "load",
    "load_packed",
    "nn",
    "plot",
    "prepare",
    "recalibrate",
    "removal_report",
    "report",
    "sample_gates",
    "save",
    "save_packed",
    "set_gates",
    "verify",
    "weight_parameters",
]
