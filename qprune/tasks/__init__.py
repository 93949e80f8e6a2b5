"""What the runnable examples need: data sets (`data`), networks (`models`) and plain training (`train`).

task = qprune.tasks.data.load("digits", seed=0)
net = qprune.tasks.models.for_task("resnet8", task)
history = qprune.tasks.train.fit(net, task.loader("train", 64), epochs=12, val_loader=task.loader("val", 256))
"""

from . import data, models, train

__all__ = ["data", "models", "train"]
