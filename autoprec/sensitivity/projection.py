"""Gradients too large to keep, reduced to short sketches whose inner products are right.

The sketch of x [n] folds it into rows of WIDTH and adds the rows up under random signs r:

    s_j = sum_i r_ij x_ij        <s(x), s(y)> = <x, y> + noise of about |x| |y| / sqrt(WIDTH)

without bias, because E r_ij r_kj is 1 for i = k and 0 otherwise. Signs are drawn again from the
seed and the parameter's place, so nothing of the model's size is stored.
"""

import torch
from torch import Tensor

WIDTH = 8192  # an inner product is off by 1.1 % of |x| |y|; a sketch has 32 kB


class Projection:
    """A fixed random projection of gradients, parameter by parameter."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device

    def add(self, sketch: Tensor, part: Tensor, *, place: int) -> None:
        """Add one parameter's part of a gradient (FP32) to `sketch`, in place."""
        flat = part.reshape(-1)
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + place)
        for chunk in torch.split(flat, WIDTH * 128):  # 4 MB at a time
            signs = torch.empty(len(chunk), dtype=torch.int8, device=self.device)
            signs.random_(0, 2, generator=generator).mul_(2).sub_(1)
            signed = chunk * signs
            whole = len(chunk) // WIDTH * WIDTH
            sketch += signed[:whole].view(-1, WIDTH).sum(0)
            sketch[: len(chunk) - whole] += signed[whole:]

    def empty(self) -> Tensor:
        """Return the sketch of zero."""
        return torch.zeros(WIDTH, device=self.device)
