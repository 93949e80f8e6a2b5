"""Removal and folding where a channel of zeros differs from none, or where nobody can tell who reads what."""

from __future__ import annotations

import pytest
from lookalikes import TRICKY
from lookalikes.policies import X, assert_same_outputs, prepared, random_policy, size

from qprune import convert, cost, fold, removal_report

STAYS = {
    "conv": ("group_norm", "shifted", "neighbour_attention", "softmax_over_channels", "partial", "ghost", "scales", "modulated"),
    "conv2": ("hard_coded",),
}
"""Layers whose channels cannot go: something that depends on their number, or that makes something of zeros, comes behind them."""


@pytest.mark.parametrize("name", TRICKY)
def test_what_is_left_computes_the_same(name: str) -> None:
    model, x = prepared(name), X.double()
    for seed, whole in ((1, False), (2, True)):
        policy = random_policy(model, seed, whole)
        masked, final = convert(model, policy, remove=False), convert(model, policy)
        assert_same_outputs(final, masked, x, 1e-9)
        assert_same_outputs(fold(final, x), masked, x, 1e-9)
        assert size(final) < size(masked)
        stored, fresh = cost(final), cost(final, x)
        assert (stored.bops, stored.macs) == (fresh.bops, fresh.macs)
        assert (stored.bops == cost(policy).bops) == (not any(layer.fillers for layer in removal_report(final)))


@pytest.mark.parametrize(("layer", "name"), [(layer, name) for layer, names in STAYS.items() for name in names])
def test_channels_that_must_stay_do_and_say_why(layer: str, name: str) -> None:
    model = prepared(name)
    final = convert(model, random_policy(model, seed=1))
    told = {row.name: row for row in removal_report(final)}
    assert told[layer].removed == 0 and told[layer].spread > 0 and told[layer].why


@pytest.mark.parametrize("name", ["instance_norm", "tracked_instance_norm", "two_norms"])
def test_norms_of_single_channels_lose_theirs(name: str) -> None:
    model = prepared(name)
    policy = random_policy(model, seed=1)
    left = 8 - policy.bits("conv").per_filter(8).count(0)
    final = convert(model, policy)
    assert left < 8 and final.conv.weight.size(0) == left
    assert all(len(p) == left for p in final.middle.parameters()) and final.last.in_channels == left


def test_two_filters_per_channel_go_together_or_stay() -> None:
    model = prepared("multiplier")
    told = {row.name: row for row in removal_report(convert(model, random_policy(model, seed=1)))}
    assert told["middle.conv"].fillers > 0 and "equal numbers" in told["middle.conv"].why
