"""Data and network of a run, from the options that name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from . import data, models, own
from .task import Task
from .weights import load_weights


class Sources(Protocol):
    """The options that name data and network.

    data, data_dir, data_options   a data set or module:function, the folder with its files, further arguments of its function
    model, weights                 a network or module:function, and a file with its weights
    batch_size                     for functions of one's own that make loaders
    """

    @property
    def data(self) -> str: ...
    @property
    def data_dir(self) -> str: ...
    @property
    def data_options(self) -> Mapping[str, Any]: ...
    @property
    def model(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def batch_size(self) -> int: ...


@dataclass(frozen=True)
class Named:
    """`Sources` and nothing else."""

    data: str = "digits"
    data_dir: str = ""
    data_options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "resnet8"
    weights: str = ""
    batch_size: int = 64


def task_of(options: Sources) -> Task:
    """The data. What is not divided yet is drawn by seed 0, or by the data option of that name."""
    given = {**({"directory": options.data_dir} if options.data_dir else {}), **options.data_options}
    if own.is_reference(options.data) and "batch_size" not in given and own.takes(options.data, "batch_size"):
        given["batch_size"] = options.batch_size
    return data.load(options.data, **given)


def network_of(options: Sources, task: Task) -> nn.Module:
    """The network, with the weights of the file, or random ones from torch's global generator."""
    net = models.for_task(options.model, task)
    if options.weights:
        load_weights(net, options.weights)
    return net
