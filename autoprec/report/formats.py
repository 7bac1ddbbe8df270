"""How the report writes numbers, options and names. Everything here is ASCII but what users named.

Names of layers come from user code: `clean_text` makes control, format and surrogate characters
visible, so that no name can move a cursor, reverse a line or end one.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence

from autoprec.common.text import percent, shown_bytes, significant
from autoprec.records import Estimate, LossGap, Option, Precision

UNKNOWN = "-"
STEP_TITLES = {  # in the order in which steps are shown
    "plan": "this plan",
    "as_written": "as written",
    "bf16_o2": "BF16 O2",
    "autocast_bf16": "autocast BF16",
    "fp32": "FP32",
    "fp8_o1": "FP8 where eligible",
    "eager_bf16_o2": "BF16 O2, eager",
    "eager_fp8_o1": "FP8, eager",
}
HUGE_MS = 1e6  # a quarter of an hour: nothing that anybody would run
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def clean_text(text: str) -> str:
    """Return `text` with every character that is not plainly visible written as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if unicodedata.category(c) in _HIDDEN_CATEGORIES else c for c in text)


def ms(value: float | None) -> str:
    """Return a time in ms with three significant digits, `-` for None; huge ones as 1.6e+06."""
    if value is None:
        return UNKNOWN
    return f"{value:.2g}" if value >= HUGE_MS else significant(value, 3)


def share(value: float | None, *, sign: bool = False) -> str:
    """Return a fraction as percent with two significant digits, e.g. `0.43 %`, `-` for None."""
    if value is None:
        return UNKNOWN
    return f"+{percent(value)}" if sign and value > 0 else percent(value)


def grad_error(error: Estimate) -> str:
    """Return a gradient error with its standard error, e.g. `0.43 % +- 0.05 %`."""
    return with_stderr(error.mean, error.stderr)


def with_stderr(mean: float | None, stderr: float | None) -> str:
    """Return a fraction as percent with its standard error where it is known, `-` for None."""
    return share(mean) if mean is None or stderr is None else f"{share(mean)} +- {share(stderr)}"


def interval(low: float | None, high: float | None, show: Callable[[float], str]) -> str:
    """Return `1.2x to 1.4x`; "" where an end is not known."""
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def gap(gap: LossGap) -> str:
    """Return a loss gap with its interval and seeds; of the reference itself it has none."""
    if gap.low == gap.high == 0.0:
        return share(0.0)
    mean, low, high = (share(each, sign=True) for each in (gap.mean, gap.low, gap.high))
    seeds = count_of(gap.seeds, "seed")
    return f"{mean} ({100 * gap.confidence:.0f} % interval {low} to {high}, {seeds})"


def gap_ends(gap: LossGap) -> str:
    """Return a gap with its interval, which reaches further up than down."""
    mean, low, high = (share(each, sign=True) for each in (gap.mean, gap.low, gap.high))
    return f"{mean} ({low} to {high})"


def ratio(value: float | None) -> str:
    """Return a speedup, e.g. `1.64x`."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value < 0.01:
        return f"{value:.1g}x"
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def size(value: float | None) -> str:
    """Return bytes in the largest unit that leaves a number of at least 1, `-` for None."""
    return UNKNOWN if value is None else shown_bytes(value)


def text(value: object) -> str:
    """Return a text as it is, `-` for None."""
    return UNKNOWN if value is None else str(value)


def option(option: Option | str | None) -> str:
    """Return an option, or its key, for people: `fp8_o1 rowwise (grad_weight in BF16)`."""
    if not option:
        return UNKNOWN if option is None else ""
    option = Option.parse(option) if isinstance(option, str) else option
    if option.recipe is None:
        return option.precision.value
    gemms_hp = f" ({', '.join(option.gemms_hp)} in BF16)" if option.gemms_hp else ""
    return f"{option.precision.value} {option.recipe.value}{gemms_hp}"


def precision_counts(options: Sequence[Option]) -> dict[Precision, int]:
    """Return the numbers of a plan's layers in each precision."""
    return {precision: sum(o.precision is precision for o in options) for precision in Precision}


def step_title(label: str) -> str:
    """Return the heading of a whole-step timing."""
    return STEP_TITLES.get(label, clean_text(label))


def and_more(number: int, noun: str, where: str = "") -> list[str]:
    """Return the line below a list that was cut, `... and 3 more layers`; none for a whole one."""
    return [f"... and {count_of(number, f'more {noun}')}{where}"] if number > 0 else []


def count_of(number: int, noun: str, plural: str = "") -> str:
    """Return `1 layer`, `2 layers`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def parameters(number: int) -> str:
    """Return a number of parameters, e.g. `9,600 parameters`, `3.2 M parameters`."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit} parameters"
    return count_of(number, "parameter")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
