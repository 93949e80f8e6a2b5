"""Methods in their less common forms go on, too: cut short in the middle of an epoch of the search, again later, and in the fine-tuning."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from resume_cases import FORMS, METHODS, Killed, Watcher, options, outcome, patch, small_network, tied_network

from qprune.gates import TiedGate
from qprune.recipes import recipe_for
from qprune.search.driver import METHODS as METHODS_THERE_ARE
from qprune.seeds import run


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", FORMS)
def test_other_forms_go_on(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch, tied_network if case == "edmips-pairs-zero" else small_network)
    chosen, watcher = options(case, float_epochs=1), Watcher()
    run(chosen, tmp_path / "whole", watcher)
    (_, before, _), (_, search, _), (_, finetune, _), _ = watcher.phases
    assert [name for name, *_ in watcher.phases] == ["float", "search", "finetune", "uniform"]
    # neither the search nor the fine-tuning is cut at the end of an epoch
    kills = [0, before + search // 3, before + 2 * search // 3 + 1, before + search + finetune // 2]
    for last, now in pairwise(kills):
        step = now - max(last - 1, 0)  # the step of the kill was not saved, and is done again
        with pytest.raises(Killed):
            run(chosen, tmp_path / "parts", Watcher(step), resume=True, minutes=1e-9)
    rest = Watcher()
    run(chosen, tmp_path / "parts", rest, resume=True)
    assert rest.phases[0] == ("finetune", finetune, finetune // 2 - 1)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_form_has_tied_filters() -> None:
    net, x = tied_network(), torch.zeros(2, 1, 8, 8)
    mixed = recipe_for(options("edmips-pairs-zero"), x).prepare(net, [x])
    assert {name for name, module in mixed.named_modules() if isinstance(module, TiedGate)} == {
        "block.0.weight_gate", "block.3.conv2.weight_gate",
    }  # fmt: skip


def test_every_method_is_among_the_cases() -> None:
    assert {values.get("method", case) for case, values in {**METHODS, **FORMS}.items()} == set(METHODS_THERE_ARE)
