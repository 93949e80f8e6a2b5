"""What runs need: data sets (`data`), networks (`models`) and plain training (`train`); docs/data.md has what they are named by.

>>> task = qprune.tasks.data.load("digits", seed=0)
>>> net = qprune.tasks.models.for_task("resnet8", task)
>>> loader = task.loader("train", 64, generator=torch.Generator().manual_seed(0))
>>> history = qprune.tasks.train.fit(net, loader, epochs=40, val_loader=task.loader("val", 256))

With the defaults of `fit` this brings resnet8 to 98.6-99.2 % on the validation part and 98.9-99.4 % on the test part (3 seeds), in
8-12 s on 2 CPU cores that nobody else uses; 20 epochs end 0.6-0.8 points lower. lenet5 wants lr=0.02.
"""

from . import data, models, train

__all__ = ["data", "models", "train"]
