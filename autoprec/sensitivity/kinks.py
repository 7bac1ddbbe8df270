"""What jumps of the derivative add to the gradient error: ReLU, max pooling, clamps.

Where a pre-activation y_k crosses a kink, the gradient changes at once. With p_k the density of y_k
at the kink, g_k the gradient there and K_k^2 = |P^(1/2) dy_k/dw|^2, an error dy_k crosses it with
probability p_k |dy_k|, the moved weights of a probe (see probes.py), which change y_k by t K_k,
with p_k t K_k. A crossing costs (g_k K_k)^2 in d'Pd, and (g_k dy_k / t)^2 in the square of a
product z. So what is added to each is, summed over the kinks,

    true error of a layer          F   = sum p_k |dy_k| g_k^2 K_k^2
    its probed error  E z^2        B/t = sum p_k  dy_k^2 g_k^2 K_k   / t
    |P^(1/2) D|^2 of a moved pass  W t = sum p_k  K_k^3  g_k^2       * t

with D the change of the gradient in the moved pass. E z^2 diverges as the step t shrinks. But B, F
and W are sums of dy_k^2, |dy_k| K_k and K_k^2, all with the same weights p_k g_k^2 K_k. So where a
layer's error and the moved weights change the pre-activations in one ratio,

    F = sqrt(B W)        and F is at most that, by Cauchy's inequality, where the ratio varies

whatever t is, and for errors of any size: F grows with the error as B's square root. Two steps tell
B/t and W t from the smooth parts, which do not depend on t. Of W only kinks behind the layer count.
They are at least those that moved the gradients of parameters at and behind this layer, and at most
those of what is in front of it too; the geometric mean of the two is taken. Parameters in branches
beside it, which no error of it reaches (reach.py), cross their own kinks, and do not count.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from autoprec.common.grouping import grouped
from autoprec.common.recipes import Gemm
from autoprec.sensitivity.local import Component

# A finer step shows as much more of a gradient's squared change where kinks are crossed; a smooth
# network's differ by less, and its products are then left as they are.
CROSSED = 1.2
# The part of a usual change of the loss that gradients do not tell at either step: 0.001 at most in
# 15 smooth networks, from 0.02 on where a value is detached or a backward is somebody's own.
UNTOLD = 0.01

Key = tuple[str, Component]  # a layer's name and one source of its error


@dataclass(frozen=True)
class TwoSteps:
    """One batch under one code at the probes' own step and at one `ratio` times finer.

    `products` are sum_k z_k^2 by key, `changes` |P^(1/2) D|^2 over t^2 by parameter, times the own
    step's t^2; `related` are the places of parameters at or behind each layer, and of those in
    front of it. Pairs of numbers are (fine, own).
    """

    ratio: float
    products: dict[Key, tuple[float, float]]
    changes: Sequence[tuple[float, float]]
    related: Mapping[str, tuple[Sequence[int], ...]]
    jumps: float = 0.0  # W t of the choices
    choices: dict[str, float] = field(default_factory=dict)  # the part of them behind each layer
    # how far errors of output move choices beside the moved weights, squared, in the mean of all
    reached: dict[Key, float] = field(default_factory=dict)
    are_followed: bool = False  # by a layer, some of the choices or thresholds
    missed: float = 0.0  # of the loss's change, at the better of both steps (see moves.py)

    def correction(self, keys: Sequence[Key], square: float) -> float:
        """Return what the squares of one layer's errors of output have to be multiplied with.

        `square` is their mean over all batches and codes: kinks have the same part of it as here.
        """
        smooth = self._smooth(keys, square)
        if smooth is None:
            return 1.0
        return (smooth + self.added(keys, square) + self.chosen(keys, square)) / square

    @cached_property
    def are_kinked(self) -> bool:
        """Whether any parameter's gradient crossed kinks."""
        return any(fine > CROSSED * own for fine, own in self.changes)

    @property
    def is_untold(self) -> bool:
        """Whether the loss changes otherwise than its gradients say, and no kink is why."""
        return self.missed > UNTOLD and not self.are_kinked

    @property
    def are_guesses(self) -> bool:
        """Whether what probes say of single rows is in doubt.

        Choices too that a probe changed none of: one that FP8 changes may be all of a row.
        """
        return self.are_kinked or self.are_followed or self.jumps > 0.0 or self.is_untold

    @cached_property
    def _crossings(self) -> list[float]:
        """What kinks add to the changes of each parameter, B/t of A + B/t at the own step.

        Where kinks are crossed at all, a little counts too: F is a root of it.
        """
        return [
            max(fine - own, 0.0) / (self.ratio - 1.0) if self.are_kinked else 0.0
            for fine, own in self.changes
        ]

    def added(self, keys: Sequence[Key], square: float) -> float:
        """Return F of one layer's errors of output: what kinks add to d'Pd."""
        name, found = keys[0][0], self._crossings
        behind, in_front = (math.fsum(found[k] for k in own) for own in self.related[name])
        crossed = math.sqrt(behind * (behind + in_front))  # W t of the kinks behind the layer
        return math.sqrt(self._parts[name] * square * crossed)

    def _pair(self, keys: Sequence[Key]) -> tuple[float, float]:
        pairs = [self.products[key] for key in keys]
        return math.fsum(fine for fine, _ in pairs), math.fsum(own for _, own in pairs)

    def chosen(self, keys: Sequence[Key], square: float) -> float:
        """Return what other choices than the reference's add to one layer's errors of output.

        A choice is changed with a probability that grows as |dx|, x being what it compares. So it
        adds what it did in a moved pass, times how far errors move x beside that pass: in the mean
        over choices sqrt(behind * mean of squares), if they move all those behind alike. Where no
        gradient comes back to x, both are compared by the smooth part of what they do, forward;
        moved weights do about half of theirs backward.
        """
        added = self.jumps * self.choices.get(keys[0][0], 0.0)
        if added <= 0.0:
            return 0.0
        if all(key in self.reached for key in keys):
            return math.sqrt(self.jumps * added * math.fsum(self.reached[key] for key in keys))
        smooth, total = self._smooth(keys, square), math.fsum(map(min, self.changes)) / 2.0
        return added * math.sqrt(smooth / total) if smooth and total > 0.0 else 0.0

    def _smooth(self, keys: Sequence[Key], square: float) -> float | None:
        """Return what is left of a square without kinks; None where nothing is known."""
        fine, own = self._pair(keys)
        if own <= 0.0 or square <= 0.0:
            return None
        part = self._parts[keys[0][0]]
        return square * (1.0 - part if part > 0.0 else fine / own)

    @cached_property
    def _parts(self) -> dict[str, float]:
        """The part that kinks are of the squares of each layer's errors of output.

        A and B both grow as dy^2, so it is one for all casts, whose squares tell it together. Where
        kinks are crossed at all, a little counts too: F is its root.
        """
        keys = grouped((key[0], key) for key in self.products if key[1].gemm is Gemm.OUTPUT)
        pairs = {name: self._pair(own) for name, own in keys.items()}
        return {
            name: min(max(fine / own - 1.0, 0.0) / (self.ratio - 1.0), 1.0)
            if own > 0.0 and self.are_kinked
            else 0.0
            for name, (fine, own) in pairs.items()
        }
