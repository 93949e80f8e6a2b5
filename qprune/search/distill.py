"""Knowledge distillation as a term of any closure's loss: Hinton, Vinyals and Dean (1503.02531)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import InputError
from qprune.search.method import Closure


class Distillation:
    """(1 − α) · loss + α · T² · KL(softmax(teacher / T) ‖ softmax(student / T)), a mean over samples; the factor T² keeps the term's
    gradient in the loss's scale while logits are small against T, as in section 2.1 of the paper.

    teacher      gets what the student got; run in eval mode without gradients, logits [N, classes] as the student's
    temperature  T > 0
    share        α, from above 0 to 1

    Raises InputError for other numbers.
    """

    def __init__(self, teacher: nn.Module, temperature: float, share: float = 0.5) -> None:
        if not 0 < temperature < math.inf:
            raise InputError(f"distillation: the temperature must be a positive number, got {temperature!r}")
        if not 0 < share <= 1:
            raise InputError(f"distillation: the share must be above 0 and at most 1, got {share!r}")
        self.teacher, self.temperature, self.share = teacher.eval(), temperature, share

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T² · KL for logits [N, classes]."""
        t = self.temperature
        log_p, log_q = (student.float() / t).log_softmax(1), (teacher.float() / t).log_softmax(1)
        return t * t * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    def wrap(self, closure: Closure) -> Closure:
        """The closure with this loss, the mean of the term over its calls of the model. Raises InputError if it does not call the model."""

        def together(model: nn.Module, *batch: Tensor) -> Tensor:
            calls: list[tuple[Any, Any, Tensor]] = []

            def remember(module: nn.Module, args: Any, kwargs: Any, logits: Tensor) -> None:
                calls.append((args, kwargs, logits))

            handle = model.register_forward_hook(remember, with_kwargs=True)
            try:
                loss = closure(model, *batch)
            finally:
                handle.remove()
            if not calls:
                raise InputError("distillation: the closure did not call the model that it was given, so there are no logits to compare")
            terms = []
            for args, kwargs, logits in calls:
                with torch.no_grad():
                    target = self.teacher(*args, **kwargs)
                terms.append(self.term(logits, target))
            return (1 - self.share) * loss + self.share * torch.stack(terms).mean()

        return together
