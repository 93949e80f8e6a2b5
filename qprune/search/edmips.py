"""EdMIPS: Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks" (CVPR 2020).

From the paper: one softmax over weight widths and one over activation widths per layer, a shared weight tensor, the mixture of quantized
weights
and of quantized activations combined in one convolution, weights and logits trained together on one stream of data, and the expected bit
operations Σ MACs·E[w]·E[a] in the loss.

Ours: learned ranges (LSQ and PACT instead of HWGQ); softmax per filter where the space asks for it (as PLiNIO, 2407.01054); the cost
enters through
an augmented Lagrangian instead of a fixed weight, and the bits are read off by an allocation under the exact budget instead of an arg-max.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qprune.search.method import Closure, Method, StepResult


class EdMIPS(Method):
    name = "edmips"

    def step(
        self, closure: Closure, arch_closure: Closure | None = None, batch: Sequence[Tensor] = (), arch_batch: Sequence[Tensor] = ()
    ) -> StepResult:
        """One update of weights, quantizers and gates on the same batch. arch_closure is not used."""
        self.optimizers.schedule(self.steps)
        return self.result(self.run(self.update, closure, batch))

    def update(self, closure: Closure, batch: Sequence[Tensor]) -> Tensor:
        self.optimizers.zero_grad()
        loss = self.task_loss(closure, batch)
        slack = self.constraint.slack(self.expected_cost())
        self.backward(loss + self.constraint.penalty(slack))
        self.optimizers.step_weights()
        self.optimizers.step_arch()
        self.constraint.update(slack)
        return self.values(loss, slack)
