"""Muon (Keller Jordan, 2024): momentum whose matrices are brought near to orthogonal by a Newton-Schulz iteration.

Matrices of one shape are stacked and iterated together; learning rates are tensors, so that a step can be captured in
a CUDA graph and still follow a schedule.
"""

import math
from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the reference implementation
_ITERATIONS = 5


def orthogonalise(updates: torch.Tensor) -> torch.Tensor:
    """Bring each matrix of (n, rows, columns) near to the closest one with orthonormal rows or columns, in bfloat16."""
    a, b, c = _COEFFICIENTS
    tall = updates.shape[1] > updates.shape[2]
    x = updates.transpose(1, 2) if tall else updates
    x = (x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(_ITERATIONS):
        square = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon:
    """Nesterov momentum with orthogonalised updates for two-dimensional parameters; `rate` is a scalar tensor."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        rate: torch.Tensor,
        *,
        momentum: float = 0.95,
        decay: float = 0.05,
    ) -> None:
        self.rate, self.momentum, self.decay = rate, momentum, decay
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient."""
        for shape, group in self.groups.items():
            gradients = torch.stack([p.grad for p in group])
            buffer = self.buffers[shape]
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp(buffer, self.momentum)).float()
            update *= 0.2 * math.sqrt(max(shape)) * self.rate
            torch._foreach_mul_([p.data for p in group], 1 - self.rate * self.decay)
            torch._foreach_sub_([p.data for p in group], list(update.unbind(0)))
