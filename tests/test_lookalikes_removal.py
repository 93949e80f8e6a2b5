"""Taking pruned filters out of the networks that people bring, and folding what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lookalikes import LOOKALIKES, SHAPE
from lookalikes.policies import NAMES, X, assert_same_outputs, outputs, prepared, random_policy, size

from qprune import convert, cost, fold, load, save
from qprune.removal import removal_report

GROUPED = {"resnext", "regnet", "shufflenet", "split_attention"}
"""Some of their convolutions need equal numbers of filters in all groups."""
NONE = {"shufflenet_v2", "branching"}
"""No channel can go: nothing is known of them, or a layer reads what it made itself, or they are the network's output."""


@pytest.mark.parametrize(("seed", "whole"), [(1, False), (2, True)])
@pytest.mark.parametrize("name", NAMES)
def test_without_its_pruned_filters_the_network_is_the_masked_one(name: str, seed: int, whole: bool) -> None:
    model = prepared(name)
    policy = random_policy(model, seed, whole)
    masked, final = convert(model, policy, remove=False), convert(model, policy)
    assert_same_outputs(final, masked, X.double(), 1e-9)
    assert size(final) < size(masked)
    other = torch.randn(3, *SHAPE[1:], generator=torch.Generator().manual_seed(seed)).double()
    assert_same_outputs(final, masked, other, 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_cost_saves_is_saved(name: str) -> None:
    model = prepared(name)
    policy = random_policy(model, seed=3)
    final = convert(model, policy)
    stored, fresh = cost(final), cost(final, X.double())
    assert (stored.bops, stored.macs, stored.size_bits) == (fresh.bops, fresh.macs, fresh.size_bits)
    report = removal_report(final)
    assert (stored.bops == cost(policy).bops) == (not any(layer.fillers for layer in report))
    assert any(layer.fillers for layer in report) == (name in GROUPED)
    assert any(layer.removed for layer in report) == (name not in NONE)
    pruned = {layer: bits.per_filter(policy.geometry.layers[layer].filters).count(0) for layer, bits in policy.layers.items()}
    told = {layer.name: layer for layer in report}
    for layer, count in pruned.items():
        if count:
            assert told[layer].removed + told[layer].spread + told[layer].fillers >= count, layer
            assert told[layer].why or told[layer].removed == count


@pytest.mark.parametrize("name", NAMES)
def test_the_file_of_the_small_network(name: str, tmp_path: Path) -> None:
    model = prepared(name).float()
    final = convert(model, random_policy(model, seed=4))
    save(final, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", LOOKALIKES[name]).eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(back, X), outputs(final, X), strict=True))
    assert cost(back).bops == cost(final).bops


@pytest.mark.parametrize("name", NAMES)
def test_removal_then_folding(name: str) -> None:
    model = prepared(name)
    final = convert(model, random_policy(model, seed=5, whole=True))
    assert_same_outputs(fold(final, X.double()), final, X.double(), 1e-9)
