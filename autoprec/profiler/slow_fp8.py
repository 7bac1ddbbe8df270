"""FP8 options that would take longer to time than training itself: predicted from a small layer.

Where a CPU has only a reference kernel for FP8 GEMMs (oneDNN 3.12 with AVX512-FP16 but no FP8
units: 900 times slower than FP32), the time of a small layer per multiply-add tells. On a GPU there
is FP8 where its units multiply it, and a microsecond that launching the small layer took longer
would be minutes at the size of a real one: there nothing is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoprec.device.timing import Clock
from autoprec.model.recording import Call
from autoprec.profiler.candidates import Attempt, try_option
from autoprec.records import Option

# Times the FP32 layer; far from both that were seen: 1.2 where FP8 GEMMs have a kernel of their own
# (AVX512-BF16 CPU, torch 2.13.0), 900 with a reference kernel.
WORTH_TIMING = 6.0
WIDTH, ROWS, REPEATS = 64, (16, 144), 3  # of the small layer; few and more rows


@dataclass
class SlowFp8:
    """Finds the FP8 options of one device that are too slow to be timed."""

    device: torch.device
    clock: Clock
    seed: int = 0
    known: dict[Option, tuple[float, Attempt]] = field(default_factory=dict)  # ms per M * K * N

    def predict(self, option: Option, calls: Sequence[Call], *, limit_ms: float) -> Attempt | None:
        """Return the option with a predicted time if that is above the limit, else None."""
        if not option.is_fp8 or self.device.type == "cuda":
            return None
        if option not in self.known:
            self.known[option] = self._run_small(option)
        ms_per_mac, small = self.known[option]
        predicted = ms_per_mac * _linear_macs(calls)
        if predicted <= limit_ms:
            return None
        return Attempt(option, predicted_ms=predicted, kernels=small.kernels)

    def _run_small(self, option: Option) -> tuple[float, Attempt]:
        """Time a small layer with few and with more rows; the difference has no overhead."""
        generator = torch.Generator().manual_seed(self.seed)
        elapsed: list[float] = []  # a reference kernel's grows with the rows, overhead does not
        small = Attempt(option)
        for rows in ROWS:
            x, gradient = (torch.randn(rows, WIDTH, generator=generator) for _ in "xg")
            call = Call((x.to(self.device).requires_grad_(),), {}, [gradient.to(self.device)])
            small = try_option(option, [call], lambda: nn.Linear(WIDTH, WIDTH, device=self.device))
            if small.step is None:
                return 0.0, small  # the layer's own attempt will say why
            elapsed.append(min(self.clock.measure(small.step) for _ in range(REPEATS)))
        macs = (ROWS[1] - ROWS[0]) * WIDTH**2
        return max(elapsed[1] - elapsed[0], 0.0) / macs, small


def _linear_macs(calls: Sequence[Call]) -> float:
    """Return M * K * N of a linear's calls in one step."""
    total = 0.0
    for call in calls:
        gradient = next((g for g in call.gradients if g is not None), None)
        first = call.args[0] if call.args else next(iter(call.kwargs.values()))
        if isinstance(first, Tensor) and gradient is not None:
            total += call.count * float(first.numel()) * gradient.shape[-1]
    return total
