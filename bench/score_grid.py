"""Print how good the cost model is on aiconfigurator's GEMMs, parts of the grid left out.

    .venv/bin/python bench/score_grid.py [DEVICE ...]

The error of FP8 over BF16 is the median of |predicted / measured - 1|; the side is the share that
agree on whether FP8 is faster. Six devices take about six minutes.
"""

import statistics
import sys
from collections.abc import Sequence

from holdout import Held, hold_out_grid
from published import GRID_SOURCE, Kind, observations


def main(devices: Sequence[str]) -> None:
    rows = observations()
    for device in devices or sorted({r.device for r in rows if r.source == GRID_SOURCE}):
        print(f"\n{device}")
        for label, held in hold_out_grid(rows, device).items():
            print(f"  {label:<12}  {scores(held)}", flush=True)


def scores(held: Sequence[Held]) -> str:
    """Return the errors of ratios and of both times, in one line."""
    ratios = _of(held, Kind.GEMM)
    errors = [abs(h.predicted / h.actual - 1) for h in ratios]
    sides = [(h.predicted >= 1) == (h.actual >= 1) for h in ratios]
    times = {kind: _of(held, kind) for kind in (Kind.BF16_US, Kind.FP8_US)}
    parts = [
        f"GEMMs {len(ratios):>3}  FP8 over BF16 {statistics.median(errors):5.1%} "
        f"(mean {statistics.fmean(errors):5.1%})  right side {statistics.fmean(sides):6.1%}"
    ]
    for kind, group in times.items():
        off = [h.predicted / h.actual - 1 for h in group]
        median = statistics.median(map(abs, off))
        parts.append(f"{kind} {median:5.1%}, bias {statistics.median(off):+5.1%}")
    return "  ".join(parts)


def _of(held: Sequence[Held], kind: Kind) -> list[Held]:
    return [h for h in held if h.label.startswith(f"{kind} ")]


if __name__ == "__main__":
    main(sys.argv[1:])
