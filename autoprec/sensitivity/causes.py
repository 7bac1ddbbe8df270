"""What stands out in a linear's operands, and which of it causes the error of FP8, in words.

What stands out need not hurt. Where a layer's error was measured again with each suspect repaired
(see repairs.py), that is blamed which takes most of the error away, and nothing if none does.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from autoprec.common.text import percent, significant
from autoprec.records import Operand, OperandStatistics

NOTABLE = 0.01  # a fraction of underflow below this is not worth a word
OTHER_SHARE = 0.5  # another recipe is named when it has at most this part of it
OFFSET = 1.0  # |mean| / std from which an operand's own size is what is rounded, not its spread
FAR = 4.0  # the same where no repair was measured: 94 % of what is rounded is the mean's
MOST_OUTLIERS = 0.05  # more channels than this part are no outliers but the distribution
MOST_TOKENS = 0.125  # the same of tokens: one in 8, as the first of short sequences
CAUSE = 0.5  # of the error: a repair that takes less away has not found its cause
AS_GOOD = 0.1  # of the error: a repair that takes so much less away than the best is named too


class Suspect(NamedTuple):
    """What stands out in an operand, in words."""

    text: str
    is_mean: bool  # the input's, repaired by taking it out; all else by more range
    share: float | None  # of the error that its repair takes away, where it was measured


def suspects(row: OperandStatistics, recipe: str) -> Iterator[Suspect]:
    """Yield what stands out in an operand under a recipe."""
    lines = [text for text in (_loss(row, recipe), _outliers(row)) if text]
    if lines:
        yield Suspect("; ".join(lines), False, row.range_share.get(recipe))
    if offset := offset_of(row):
        is_input = row.operand is Operand.INPUT
        shares = row.mean_share if is_input else row.range_share
        yield Suspect(offset, is_input, shares.get(recipe))


def explain_statistics(rows: Sequence[OperandStatistics], *, recipe: str) -> str:
    """Return what causes one layer's error; where that was not measured, all that stands out.

    For example `grad_output: 31 % underflow under tensorwise; rowwise 0.4 % (98 % of the error)`;
    "" when nothing stands out.
    """
    by_worst = sorted(rows, key=lambda row: -row.underflow.get(recipe, 0.0))
    found = [suspect for row in by_worst for suspect in suspects(row, recipe)]
    best = max((one.share for one in found if one.share is not None), default=None)
    if best is None:
        return "; ".join(one.text for one in found)
    if best < CAUSE:
        return "by rounding itself, not by a single underflow, outlier or offset"
    named = [(one.share or 0.0, one.text) for one in found]
    return "; ".join(
        f"{text} ({percent(share)} of the error)"
        for share, text in sorted(named, reverse=True)
        if share >= best - AS_GOOD
    )


def _loss(row: OperandStatistics, recipe: str) -> str:
    lost = row.underflow
    if lost.get(recipe, 0.0) < NOTABLE:
        return ""
    best = min(lost, key=lambda name: lost[name])
    text = f"{row.operand.value}: {percent(lost[recipe])} underflow under {recipe}"
    better = lost[best] <= OTHER_SHARE * lost[recipe]
    return f"{text}; {best} {percent(lost[best])}" if better else text


def _outliers(row: OperandStatistics) -> str:
    """Name few channels and few tokens far above the others; of one value both stand out."""
    count, share = len(row.outlier_channels), row.outlier_token_share or 0.0
    found = []
    if 0 < count <= MOST_OUTLIERS * row.channels:
        shown = ", ".join(map(str, row.outlier_channels[:3])) + (", ..." if count > 3 else "")
        found.append(f"outlier channel{'' if count == 1 else 's'} {shown}")
    if 0.0 < share <= MOST_TOKENS:
        found.append(f"outlier tokens ({percent(share)})")
    return f"{row.operand.value}: {', '.join(found)}" if found else ""


def offset_of(row: OperandStatistics, least: float = OFFSET) -> str:
    """Return that an operand's values sit far from zero beside their spread, or an empty string."""
    ratio = row.mean_over_std or 0.0
    if ratio < least or row.operand is Operand.WEIGHT:
        return ""
    spreads = f"{significant(ratio, 2)}x its spread"
    return f"{row.operand.value}: mean {spreads}, which rounding is relative to"
