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
    """loss + T² · KL(softmax(teacher / T) ‖ softmax(student / T)), a mean over samples; the factor T² keeps the term's gradient in the
    loss's scale, as in section 2.1 of the paper.

    teacher      gets what the student got; run in eval mode without gradients, logits [N, classes] as the student's
    temperature  T > 0
    """

    def __init__(self, teacher: nn.Module, temperature: float) -> None:
        if not 0 < temperature < math.inf:
            raise InputError(f"distillation: the temperature must be a positive number, got {temperature!r}")
        self.teacher, self.temperature = teacher.eval().requires_grad_(False), temperature

    def term(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = self.temperature
        log_p, log_q = (student.float() / t).log_softmax(1), (teacher.float() / t).log_softmax(1)
        return t * t * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    def wrap(self, closure: Closure) -> Closure:
        """The closure whose loss has the term for every call of the model in it. Raises InputError if it does not call the model."""

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
            for args, kwargs, logits in calls:
                with torch.no_grad():
                    target = self.teacher(*args, **kwargs)
                loss = loss + self.term(logits, target)
            return loss

        return together
