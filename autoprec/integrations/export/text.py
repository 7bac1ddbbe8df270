"""The parts that exports have in common: layers by option, comment lines, safe names."""

from collections.abc import Iterable

from autoprec.common.text import first_and_more
from autoprec.records import Assignment, LayerKind, Option, Plan, Precision


def fp8_choices(plan: Plan) -> dict[Option, list[str]]:
    """Return the names of the FP8 layers by option, in plan order."""
    found: dict[Option, list[str]] = {}
    for layer in plan.layers:
        if layer.option.is_fp8:
            found.setdefault(layer.option, []).append(layer.name)
    return found


def linears(plan: Plan) -> list[Assignment]:
    """Return the linear layers, in plan order."""
    return [layer for layer in plan.layers if layer.kind is LayerKind.LINEAR]


def header(plan: Plan, *lines: str) -> str:
    """Return comment lines: the plan's origin, how to use the text, and what is not in it."""
    counts = ", ".join(f"{plan.count(p)} {p.value}" for p in Precision if plan.count(p))
    origin = f"autoprec plan {plan.digest} ({counts}), made for {plan.fingerprint.device}"
    return "".join(f"# {ascii_line(line)}\n" for line in (origin, *lines))


def left_to_trainer(plan: Plan) -> str:
    """Return the line that says what an FP8 export does not set."""
    fp32 = [layer.name for layer in plan.layers if layer.precision is Precision.FP32]
    return (
        f"Not in here, set it in your trainer: {plan.count(Precision.BF16_O2)} x bf16_o2 (BF16 "
        f"parameters, FP32 masters), {len(fp32)} x fp32{f' ({named(fp32)})' if fp32 else ''}."
    )


def named(names: Iterable[str]) -> str:
    """Return the first names and how many more there are, on one line."""
    return first_and_more(map(ascii_line, names))


def ascii_line(text: str) -> str:
    """Return `text` as one line of visible ASCII; the rest is escaped."""
    return ascii(text)[1:-1].replace("\\'", "'")


def quoted(names: Iterable[str], *, indent: int) -> str:
    """Return names as Python string literals, one a line."""
    space = " " * indent
    return "".join(f"{space}{name!a},\n" for name in names)


def yaml_string(text: str) -> str:
    """Return `text` as a double-quoted YAML scalar in ASCII: YAML has all of Python's escapes."""
    escaped = text.encode("unicode_escape").decode("ascii")
    return '"' + escaped.replace('"', '\\"') + '"'
