"""Operand statistics in words, for reasons and tables. No torch in here."""

from collections.abc import Sequence

from autoprec.common.text import percent
from autoprec.records import OperandStatistics

NOTABLE = 0.01  # a fraction of underflow or saturation below this is not worth a word
GENTLE = 0.5  # another recipe is named when it has at most this part of the worst one's
MOST_OUTLIERS = 0.05  # more channels than this part are no outliers but the distribution


def explain_statistics(rows: Sequence[OperandStatistics]) -> str:
    """Return what FP8 casts do to one layer's operands, worst first; "" when nothing stands out.

    For example `grad_output: 31 % underflow under tensorwise; rowwise 0.4 %`.
    """
    notable = [(_worst(row)[1], row) for row in rows]
    lines = [
        line
        for _, row in sorted(notable, key=lambda pair: -pair[0])
        for line in (_losses(row), _outliers(row))
        if line
    ]
    return "; ".join(lines)


def _losses(row: OperandStatistics) -> str:
    (kind, recipe), worst = _worst(row)
    if worst < NOTABLE:
        return ""
    table = row.underflow if kind == "underflow" else row.saturation
    others = {name: value for name, value in table.items() if value <= GENTLE * worst}
    text = f"{row.operand.value}: {percent(worst)} {kind} under {recipe}"
    if others:
        best = min(others, key=lambda name: others[name])
        text += f"; {best} {percent(others[best])}"
    return text


def _worst(row: OperandStatistics) -> tuple[tuple[str, str], float]:
    found = {("underflow", name): value for name, value in row.underflow.items()}
    found.update({("saturation", name): value for name, value in row.saturation.items()})
    if not found:
        return ("", ""), 0.0
    key = max(found, key=lambda k: found[k])
    return key, found[key]


def _outliers(row: OperandStatistics) -> str:
    count = len(row.outlier_channels)
    if not 0 < count <= MOST_OUTLIERS * row.channels:
        return ""
    shown = ", ".join(str(channel) for channel in row.outlier_channels[:3])
    more = ", ..." if count > 3 else ""
    channels = "channel" if count == 1 else "channels"
    return f"{row.operand.value}: outlier {channels} {shown}{more}"
