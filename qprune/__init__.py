"""qprune: choose how many bits every filter and activation of a convolutional network gets, within a budget."""

from pathlib import Path as _Path

# In a bare checkout the kernels lie beside this package; installed, they lie inside it.
_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).parent / "kernels").is_dir() and (_root / "kernels" / "reference.py").is_file():
    __path__.append(str(_root))
