"""What was chosen: the bits of every layer, as a small JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qprune.errors import CheckpointError, PolicyMismatchError, SpaceError
from qprune.files import write_atomically
from qprune.geometry import Geometry, Unit
from qprune.plainjson import parse, shown
from qprune.space import FLOAT, IMAGE_BITS, PRUNED, check_bits

FORMAT = 1


@dataclass(frozen=True)
class LayerBits:
    """w_bits    of the weight: one int, or one per filter
    a_bits    of the input, which the layer quantizes: one int; 32 where it does not
    out_bits  of the layer's activation, which is quantized where it is produced: one int, or one per filter; None where it is not
    """

    w_bits: int | tuple[int, ...]
    a_bits: int
    out_bits: int | tuple[int, ...] | None = None

    def per_filter(self, filters: int) -> tuple[int, ...]:
        return (self.w_bits,) * filters if isinstance(self.w_bits, int) else self.w_bits

    def to_json(self) -> dict[str, Any]:
        listed = {name: list(bits) if isinstance(bits, tuple) else bits for name, bits in vars(self).items()}
        return {name: bits for name, bits in listed.items() if bits is not None}


def _layer_bits(name: str, value: Any) -> LayerBits:
    try:
        if isinstance(value, LayerBits):
            w, a, out = value.w_bits, value.a_bits, value.out_bits
        else:
            w, a, out = (value["w_bits"], value["a_bits"], value.get("out_bits")) if isinstance(value, Mapping) else (*value, None)
    except (KeyError, TypeError, ValueError):
        raise PolicyMismatchError(f"layer {name}: expected w_bits and a_bits, got {shown(value)}") from None
    try:
        check_bits("a_bits", (a,))
        for key, bits in (("w_bits", w), *([("out_bits", out)] if out is not None else [])):
            check_bits(key, bits if isinstance(bits, int) else sorted(set(bits)))
        if out is not None and PRUNED in ((out,) if isinstance(out, int) else out):
            raise SpaceError("out_bits: 0 is not possible; a filter is pruned by its w_bits")
    except (SpaceError, TypeError) as error:
        raise PolicyMismatchError(f"layer {name}: {error}") from None
    return LayerBits(w if isinstance(w, int) else tuple(w), a, out if out is None or isinstance(out, int) else tuple(out))


@dataclass(frozen=True)
class Policy:
    """The bits of every layer that is quantized; layers that are not named stay float.

    layers    {layer name: LayerBits, or {"w_bits": …, "a_bits": …}, or (w_bits, a_bits)}; "out_bits" where an activation is quantized
              by its producer
    geometry  of the network it was made for (None: it cannot be costed on its own)

    Raises PolicyMismatchError for bits that do not exist, layers that the geometry lacks, and per-filter lists of the wrong length.
    """

    layers: Mapping[str, LayerBits]
    geometry: Geometry | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", {name: _layer_bits(name, value) for name, value in self.layers.items()})
        if self.geometry is not None:
            self.check(self.geometry)

    def check(self, geometry: Geometry) -> None:
        """Raise PolicyMismatchError unless every layer is in `geometry` with as many filters as bits, and the policy was made for it."""
        if self.geometry is not None and self.geometry.fingerprint != geometry.fingerprint:
            raise PolicyMismatchError(
                f"the policy was made for another network (fingerprint {self.geometry.fingerprint}, this one has {geometry.fingerprint})"
            )
        for name, bits in self.layers.items():
            if name not in geometry.layers:
                raise PolicyMismatchError(f"the policy names layer {name!r}, which this network does not have")
            filters = geometry.layers[name].filters
            for key, listed in (("w_bits", bits.w_bits), ("out_bits", bits.out_bits)):
                if isinstance(listed, tuple) and len(listed) != filters:
                    raise PolicyMismatchError(f"layer {name}: the policy has {key} for {len(listed)} filters, the layer has {filters}")
            if bits.out_bits is not None and geometry.units.get(name, Unit()).activation is None:
                raise PolicyMismatchError(f"layer {name}: the policy has out_bits, but no activation is known that this layer produces")

    @classmethod
    def uniform(cls, geometry: Geometry, w_bits: int, a_bits: int, fixed: Mapping[str, LayerBits | None] | None = None) -> Policy:
        """The homogeneous network: these bits everywhere, except the layers in `fixed`, which keep theirs (None: float). Where activations
        are quantized by their producers, a convolution that reads none of them, but the image, has 8 bits for it."""
        fixed = fixed or {}
        images = {name for name, unit in geometry.units.items() if unit.source is None and geometry.layers[name].kind == "Conv2d"}
        each = {name: LayerBits(w_bits, IMAGE_BITS if name in images else a_bits) for name in geometry.layers}
        layers = {name: fixed.get(name, bits) for name, bits in each.items()}
        return cls({name: bits for name, bits in layers.items() if bits is not None}, geometry)

    def bits(self, name: str) -> LayerBits:
        """The bits of a layer; 32 and 32 for one that the policy does not name."""
        return self.layers.get(name, LayerBits(FLOAT, FLOAT))

    def pruned(self) -> dict[str, list[int]]:
        """The filters at 0 bits, per layer that has some."""
        rows = {name: (bits.w_bits,) if isinstance(bits.w_bits, int) else bits.w_bits for name, bits in self.layers.items()}
        return {name: [f for f, b in enumerate(row) if b == PRUNED] for name, row in rows.items() if PRUNED in row}

    def to_json(self) -> str:
        layers = {name: bits.to_json() for name, bits in self.layers.items()}
        data: dict[str, Any] = {"format": FORMAT, "fingerprint": None, "layers": layers}
        if self.geometry is not None:
            data |= {"fingerprint": self.geometry.fingerprint, "geometry": self.geometry.to_json()}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Read `to_json`'s text. Raises CheckpointError for anything else, and for a newer format."""
        try:
            data = parse(text)
            version = data["format"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a policy file: {type(error).__name__}: {error}") from None
        if version != FORMAT:
            raise CheckpointError(f"the policy has format {shown(version)}; this version of qprune reads format {FORMAT}")
        try:
            geometry = Geometry.from_json(data["geometry"]) if data.get("geometry") else None
            layers = dict(data["layers"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the policy is damaged: {type(error).__name__}: {error}") from None
        if geometry is not None and geometry.fingerprint != data.get("fingerprint"):
            raise CheckpointError(
                f"the policy is damaged: its geometry has fingerprint {geometry.fingerprint}, it says {shown(data.get('fingerprint'))}"
            )
        return cls(layers, geometry)

    def save(self, path: str | Path) -> None:
        write_atomically(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read the policy {path}: {error}") from None
        return cls.from_json(text)
