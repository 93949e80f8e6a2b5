"""From a float network on digits to a physically smaller one, checked and written in every form: a few minutes on two cores.

    python examples/deploy.py runs/deploy

Searches the bits of every filter of resnet8 (0 = pruned) within 0.6 % of the float network's bit operations, takes out what is pruned,
fine-tunes, estimates the normalisations again, folds them into the layers, proves that integers give the same, and writes the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

import qprune
from qprune.tasks import data, models
from qprune.tasks.train import evaluate, fit

EDGE = qprune.SearchSpace.fixed(8, 8)
SPACE = qprune.SearchSpace(w_bits=(0, 2, 4, 8), a_bits=(2, 4, 8), granularity="filter")


def main(folder: Path) -> None:
    task, generator, console = data.load("digits"), torch.Generator().manual_seed(0), Console()
    torch.manual_seed(0)
    net = models.for_task("resnet8", task)
    loader, test, x = task.loader("train", 64, generator), task.loader("test", 256), task.test.x[:8]
    fit(net, loader, 30, lr=0.1)

    model = qprune.prepare(net, SPACE, {"conv1": EDGE, "fc": EDGE}, x)
    qprune.calibrate(model, [task.train.x[:256]])
    search = qprune.Search(model, qprune.Budget(bops="0.6%"), method="edmips", steps=15 * len(loader))
    for _ in range(15):
        for batch, labels in loader:
            search.step(lambda m, batch=batch, labels=labels: F.cross_entropy(m(batch), labels))
    policy = search.policy()

    final = qprune.convert(model, policy)
    fit(final, loader, 20, lr=0.03)
    qprune.recalibrate(final, loader)
    folded = qprune.fold(final.eval(), x)
    for row in qprune.removal_report(final):
        console.print(f"{row.name}: computes {row.computed} of {row.filters} filters, reads {row.read} of {row.inputs} channels; {row.why}")

    console.print(qprune.verify(folded, test))
    folder.mkdir(parents=True, exist_ok=True)
    qprune.save(final, folder / "net.safetensors")
    console.print(qprune.save_packed(folded, folder / "net.packed.safetensors"))
    qprune.export_onnx(folded, folder / "net.onnx", x)
    for name, network in (("float", net), ("searched", final), ("folded", folded)):
        cost, parameters = qprune.cost(network, x), sum(p.numel() for p in network.parameters())
        facts = f"{float(cost.bops) / 1e6:8.1f} M BOPs  {float(cost.size_bits) / 8e3:6.1f} kB  {parameters} parameters"
        console.print(f"{name:9} {evaluate(network, test)[1]:7.2%}  {facts}")
    for path in sorted(folder.iterdir()):
        console.print(f"{path.name:24} {path.stat().st_size:8} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/deploy"))
