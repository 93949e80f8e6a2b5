"""Mixing the weights of a whole network at once gives what every layer gives alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune import Budget, Search, SearchSpace, prepare
from qprune.gates import Gate, gates, probabilities, sample_gates, set_gates
from qprune.nn.premix import Premix
from qprune.quantizers import Quantizer, WeightQuantizer, learned_ranges
from qprune.tasks.mobilenet import mobilenet
from qprune.tasks.models import resnet8

EDGE = SearchSpace.fixed(8, 8)
SPACES = {
    "factorised": SearchSpace((2, 4, 8), (2, 4, 8), granularity="filter"),
    "per layer": SearchSpace((2, 4), (4, 8), scales="layer"),
    "pruning and one bit": SearchSpace((0, 1, 4, 32), (4, 8), granularity="filter"),
    "joint": SearchSpace((2, 4), (4, 8), joint=True, granularity="filter"),
    "pairs": SearchSpace(pairs=((2, 4), (4, 4), (4, 8)), granularity="filter"),
    "lsq+": SearchSpace((2, 8), (4, 8), input_quantizer="lsq+"),
    "nice": SearchSpace((2, 4, 8), (4, 8), granularity="filter", weight_quantizer="nice"),
}


def _model(space: SearchSpace, network: Any = resnet8, size: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, size, size, generator=g)
    model = prepare(network(), space, rules={"conv1": EDGE}, example_inputs=x)
    model.train()(x)
    with torch.no_grad():
        for _, gate in gates(model):
            gate.logits.copy_(torch.randn(gate.logits.shape, generator=g))
    return model, x, torch.randint(10, (4,), generator=g)


def _gradients(model: nn.Module, x: Tensor, y: Tensor, together: bool) -> dict[str, Tensor]:
    model.zero_grad()
    state = copy.deepcopy(model.state_dict())
    premix = Premix(model)
    if together:
        premix.__enter__()
    loss = F.cross_entropy(model(x), y)
    premix.__exit__(None, None, None)
    loss.backward()
    model.load_state_dict(state)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("mode", ["relaxed", "sampled", "fixed"])
@pytest.mark.parametrize("name", SPACES)
def test_the_same_loss_and_gradients(name: str, mode: str) -> None:
    model, x, y = _model(SPACES[name])
    set_gates(model, mode, temperature=0.7)
    sample_gates(model, torch.Generator().manual_seed(1))
    alone, together = (_gradients(model, x, y, flag) for flag in (False, True))
    assert together.keys() == alone.keys() == {"loss", *(n for n, _ in model.named_parameters())}
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_one_call_for_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import qprune.nn.premix

    calls: list[int] = []
    original = qprune.nn.premix.mix_quantize_many
    monkeypatch.setattr(qprune.nn.premix, "mix_quantize_many", lambda xs, *a: (calls.append(len(xs)), original(xs, *a))[1])
    model, x, _ = _model(SearchSpace((2, 4, 8), (2, 4, 8), granularity="filter"))
    with Premix(model) as premix:
        model(x)
    assert calls == [len(premix.layers)] == [10]


def test_layers_of_other_candidates_are_mixed_apart() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 5, 1).double())
    rules = {"1": SearchSpace((3, 5), (8,)), "2": SearchSpace((2, 4), (4, 8), joint=True)}
    model = prepare(net, SearchSpace((2, 4), (8,)), rules=rules)
    assert [len(family.layers) for family in Premix(model).families] == [1, 1, 1, 1]


def test_depthwise_layers() -> None:
    model, x, _ = _model(SearchSpace((2, 4), (4, 8), granularity="filter"), mobilenet, 32)
    model.eval()
    with torch.no_grad():
        want = model(x)
        with Premix(model):
            got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_ends_with_the_block_also_after_an_error() -> None:
    model, x, _ = _model(SPACES["factorised"])
    premix = Premix(model)
    with pytest.raises(RuntimeError, match="stop"), premix:
        model(x)
        assert all(layer.ready is not None for layer in premix.layers)
        raise RuntimeError("stop")
    assert all(layer.ready is None for layer in premix.layers)
    assert not model._forward_pre_hooks
    copy.deepcopy(model)


def test_autocast_decides_about_the_weights() -> None:
    model, x, _ = _model(SPACES["factorised"])
    with Premix(model) as premix:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
        assert {layer.ready.weight.dtype for layer in premix.layers if layer.ready} == {torch.bfloat16}


def test_the_first_batch_calibrates() -> None:
    x = torch.rand(4, 3, 8, 8) * 5
    models = [prepare(resnet8(), SPACES["factorised"]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0].train()(x)
    with Premix(models[1]):
        models[1].train()(x)
    ranges = [[q.log_range for q in model.modules() if isinstance(q, Quantizer)] for model in models]
    for a, b in zip(*ranges, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_model_mixes_layer_by_layer() -> None:
    model, x, _ = _model(SPACES["joint"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with Premix(compiled):
        got = compiled(x)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_search_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = _model(SPACES["factorised"])
    used: list[nn.Module] = []
    original = Premix._begin
    monkeypatch.setattr(Premix, "_begin", lambda self, root, args: (used.append(root), original(self, root, args))[1])
    search = Search(model, Budget(bops="w4a4"), example_inputs=x)
    search.step(lambda m: F.cross_entropy(m(x), y))
    assert used == [model]


def test_probabilities_and_ranges_of_many() -> None:
    members = [Gate(3, 4), Gate(3), Gate(2, 5), Gate(3, 2)]
    for gate in members:
        nn.init.normal_(gate.logits)
    members[3].mode = "sampled"
    members[0].temperature.fill_(0.5)
    for gate, p in zip(members, probabilities(members), strict=True):
        torch.testing.assert_close(p, gate().view(-1, p.size(1)))
    model, _, _ = _model(SPACES["pruning and one bit"])
    quantizers = [q for q in model.modules() if isinstance(q, Quantizer)]
    for quantizer, r in zip(quantizers, learned_ranges(quantizers), strict=True):
        assert torch.equal(r, quantizer.learned_range())


def test_members_on_several_devices() -> None:
    """The meta device stands for a second one. A network spread over several has its parts evaluated apart."""
    devices = [torch.device(name) for name in ("cpu", "meta", "cpu")]
    assert [p.device for p in probabilities([Gate(3, 4, device) for device in devices])] == devices
    quantizers = [WeightQuantizer("lsq", (2, 4), 3, device) for device in devices]
    assert [r.device for r in learned_ranges(quantizers)] == devices
