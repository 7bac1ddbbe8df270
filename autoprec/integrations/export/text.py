"""A plan -> the text of an export, from its template in templates/.

Text of a plan goes into a template through a filter only, so that no name ends a comment or string.
"""

import glob
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from autoprec.common.grouping import grouped
from autoprec.common.text import first_and_more
from autoprec.records import Option, Plan, Precision

TEMPLATES = Path(__file__).parent / "templates"
exact_glob = glob.escape  # the glob that fits this name and no other


def render(template: str, plan: Plan, **words: object) -> str:
    """Return the text that a template makes of a plan, and of what else it needs."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,  # Python and YAML are no HTML; names go through filters
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(literal=ascii, line=ascii_line, named=named)
    environment.filters.update(yaml=yaml_string, glob=exact_glob)
    return environment.get_template(template).render(
        plan=plan, choices=fp8_choices(plan), precisions=Precision, **words
    )


def fp8_choices(plan: Plan) -> dict[Option, list[str]]:
    """Return the names of the FP8 layers by option, in plan order."""
    return grouped((layer.option, layer.name) for layer in plan.layers if layer.option.is_fp8)


def named(names: Iterable[str]) -> str:
    """Return the first names and how many more there are, on one line."""
    return first_and_more(map(ascii_line, names))


def ascii_line(text: str) -> str:
    """Return `text` as one line of visible ASCII; the rest is escaped."""
    return ascii(text)[1:-1].replace("\\'", "'")


def yaml_string(text: str) -> str:
    """Return `text` as a double-quoted YAML scalar in ASCII: YAML has all of Python's escapes."""
    escaped = text.encode("unicode_escape").decode("ascii")
    return '"' + escaped.replace('"', '\\"') + '"'
