"""qprune cost: what a network costs, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qprune.commands import shared
from qprune.console import cost_table


def cost(
    model: shared.Model = "resnet8",
    policy: Annotated[Path | None, typer.Option(help="A policy.json; or give --bits.")] = None,
    bits: Annotated[str, typer.Option(help='A uniform policy, "w4a4".')] = "",
    edge_bits: Annotated[int, typer.Option(help="With --bits: bits of the first and the last layer.")] = 8,
    input_shape: Annotated[str, typer.Option(help="Channels x height x width.")] = "3x32x32",
    num_classes: Annotated[int, typer.Option(help="Outputs of the network.")] = 10,
    convention: Annotated[str, typer.Option(help="product, zur or uniq.")] = "product",
    preactivation: Annotated[bool, typer.Option("--preactivation", help="ResNets: the pre-activation form.")] = False,
) -> None:
    """Print what a network costs, layer by layer: float, with uniform bits, or with a policy."""
    from qprune.costing import cost_report

    title, result, geometry = cost_report(model, policy, bits, edge_bits, input_shape, num_classes, convention, preactivation)
    shared.console.print(cost_table(title, result, geometry))
