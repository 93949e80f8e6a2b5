"""LeNet-5 on digits pruned and coded to 1/30, 1/80 and 1/200 of its size by method `annc`, one search after the other.

    python examples/annc_chain.py                       # one seed, some minutes
    python examples/annc_chain.py --seeds 5 --out annc.csv

Prints, per seed, the test accuracy of the float network (trained for 30 epochs, and for as many as the whole chain) and of every network of
the chain, and how many times smaller that is: by the bits of the weights that remain, with their positions, and with codebooks.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import qprune
from qprune.nn.codebook import CodebookRefresh
from qprune.search.annc import continued
from qprune.stored import stored_sizes
from qprune.tasks import data as tasks
from qprune.tasks import models
from qprune.tasks.task import Task
from qprune.tasks.train import evaluate, fit

SIZES = (30, 80, 200)
FLOAT_EPOCHS, SEARCH_EPOCHS, FINETUNE_EPOCHS = 30, 60, 16
BATCH, RATE = 64, 0.05


def trained(data: Task, seed: int, epochs: int) -> tuple[nn.Module, torch.Generator]:
    """A float network, and the generator that its batches were drawn from."""
    torch.manual_seed(seed)
    net, generator = models.for_task("lenet5", data), torch.Generator().manual_seed(seed)
    fit(net, data.loader("train", BATCH, generator), epochs, lr=RATE)
    return net, generator


def chain(data: Task, seed: int) -> Iterator[dict[str, object]]:
    def accuracy(net: nn.Module) -> float:
        return round(100 * evaluate(net, data.loader("test", 256))[1], 2)

    net, generator = trained(data, seed, FLOAT_EPOCHS)
    yield {"seed": seed, "network": "float", "accuracy": accuracy(net), "weights": 1, "index": 1, "codebooks": 1}
    epochs = FLOAT_EPOCHS + len(SIZES) * (SEARCH_EPOCHS + FINETUNE_EPOCHS)
    longer = accuracy(trained(data, seed, epochs)[0])
    yield {"seed": seed, "network": f"float, {epochs} epochs", "accuracy": longer, "weights": 1, "index": 1, "codebooks": 1}
    bits: object = 3
    for times in SIZES:
        loader = data.loader("train", BATCH, generator)
        search = qprune.Search(
            net,
            qprune.Budget(size=f"{100 / times}%"),
            "annc",
            example_inputs=data.train.x[:2],
            steps=SEARCH_EPOCHS * len(loader),
            weight_lr=0.1,
            coupling=0.3,
            warmup=0.1,
            bits=bits,
        )
        search.fit(loader, epochs=SEARCH_EPOCHS)
        final = search.method.network()
        refresh = CodebookRefresh(final, len(loader))
        fit(final, loader, FINETUNE_EPOCHS, lr=0.02, weight_decay=1e-4, progress=refresh.progress, on_epoch=refresh.on_epoch)
        size = stored_sizes(final).total
        yield {
            "seed": seed,
            "network": f"1/{times}",
            "accuracy": accuracy(final),
            "weights": round(size.dense / size.values, 1),
            "index": round(size.dense / (size.values + size.index), 1),
            "codebooks": round(size.dense / size.total, 1),
        }
        net, bits = continued(final)


def main() -> None:
    parser = argparse.ArgumentParser(description="A chain of searches with method annc.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    data, rows = tasks.load("digits"), []
    for seed in range(options.seeds):
        for row in chain(data, seed):
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
