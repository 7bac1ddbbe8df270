"""The base of every record: frozen data, strict when read, atomic when written.

A record is what one stage hands to the next and, byte for byte, a JSON file. Reading is strict
(an unknown field, another version, a truncated or huge file is one `RecordError`), and a file from
anywhere can be read: it runs nothing and takes bounded time and memory. Writing goes through a
temporary file in the same folder and `os.replace`, so that a kill leaves the old file or the new
one, never half of one.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, Self, TypeVar

from pydantic import BaseModel, FailFast, ValidationError

from autoprec.common.files import read_text, write_atomically
from autoprec.common.text import one_line, shown_value
from autoprec.errors import RecordError

MAX_VALUES = 4_000_000  # 20 for each of 200,000 layers; 64 MB of [[],[],...] would take 2 GB
MAX_KEYS = 10_000  # of one object; pydantic keeps a KB for each key that it does not know
BRACKET = re.compile(r"[\[\]{}]")
# Possessive, and matching an unterminated string too: linear in time, whatever the text is.
STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
MAX_NESTING = 32  # no record nests deeper than 8; json.loads recurses, so depth is checked first

T = TypeVar("T")
# A tuple that stops at its first bad item: a million errors would take a GB.
Many = Annotated[tuple[T, ...], FailFast()]


class Record(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="null"):
    """A frozen value between stages."""


class FileRecord(Record):
    """A record with a file of its own: `kind` and `version` are written into it and checked."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 2  # of all of them so far
    REMAKE: ClassVar[str]  # the command that writes such a file

    def to_json(self) -> str:
        """Return the file's text: indented JSON, `kind` and `version` first."""
        fields = self.model_dump(mode="json")
        return json.dumps({"kind": self.KIND, "version": self.VERSION, **fields}, indent=1) + "\n"

    @classmethod
    def json_schema(cls) -> dict[str, Any]:  # Any: JSON values
        """Return the JSON Schema of the file, `kind` and `version` included."""
        schema = cls.model_json_schema()
        header = {"kind": {"const": cls.KIND}, "version": {"const": cls.VERSION}}
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **schema,
            "properties": {**header, **schema["properties"]},
            "required": [*header, *schema.get("required", [])],
        }

    def save(self, path: Path | str) -> Path:
        """Write the record to `path` atomically and return the path."""
        return write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str | Self) -> Self:
        """Read a record from `path`; a record itself is returned.

        Raises:
            RecordError: it is neither; or the file is missing, too large, not JSON, of another kind
                or version, or has an unknown, missing, doubled or malformed field.
        """
        if isinstance(path, cls):
            return path
        if not isinstance(path, str | os.PathLike):
            has_one = f"; give its .{cls.KIND}" if hasattr(type(path), cls.KIND) else ""
            raise RecordError(
                f"a {cls.KIND} must be one, or the path of its file, but it is a "
                f"{type(path).__name__}{has_one}"
            )
        return cls.from_json(read_text(Path(path), what=cls.KIND), source=str(path))

    @classmethod
    def from_json(cls, text: str, *, source: str = "text") -> Self:
        """Read a record from JSON text; `source` names it in errors."""
        source = one_line(source)
        fields = parse_object(text, source=source)
        kind, version = fields.pop("kind", None), fields.pop("version", None)
        if kind != cls.KIND:
            raise RecordError(
                f"a {cls.KIND} file must say kind={cls.KIND!r}, but {source} says "
                f"{shown_value(kind)}; check which file was given"
            )
        if type(version) is not int or version != cls.VERSION:
            raise RecordError(
                f"this autoprec reads {cls.KIND} version {cls.VERSION}, but {source} says "
                f"{shown_value(version)}; make a new one with {cls.REMAKE}"
            )
        try:
            return cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            raise RecordError(_first_problem(error, source=source, kind=cls.KIND)) from error


def parse_object(text: str, *, source: str) -> dict[str, Any]:  # Any: JSON values
    """Return the JSON object of a text that may be anything; `source` names it in errors.

    Raises:
        RecordError: it is no JSON object, or would take too much time or memory.
    """
    _check_structure(text, source=source)
    try:
        fields = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except ValueError as error:
        raise RecordError(
            f"a record must be complete JSON, but {source} is not ({one_line(str(error))}); "
            "write it again or restore it from a copy"
        ) from error
    if not isinstance(fields, dict):
        raise RecordError(
            f"a record must be a JSON object, but {source} is {type(fields).__name__}; "
            "check which file was given"
        )
    return fields


def _check_structure(text: str, *, source: str) -> None:
    """Bound what json.loads may take in time and memory; brackets inside strings do not count."""
    structure = STRING.sub("", text)
    values = sum(structure.count(mark) for mark in ",[{")
    if values > MAX_VALUES:
        raise RecordError(
            f"a record holds at most {MAX_VALUES:,} values, but {source} holds {values:,}; "
            "it is not one that autoprec wrote"
        )
    depth = 0
    for bracket in BRACKET.finditer(structure):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_NESTING:
            raise RecordError(
                f"a record nests at most {MAX_NESTING} levels, but {source} nests deeper; "
                "it is not one that autoprec wrote"
            )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON values
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has {len(pairs):,} keys, at most {MAX_KEYS:,} are read")
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown_value(twice)} is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _first_problem(error: ValidationError, *, source: str, kind: str) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    where = one_line(".".join(str(part) for part in first["loc"])) or "the record"
    said = one_line(first["msg"].removeprefix("Value error, "), most=300)
    # A rule over an object names the field and the value; a dump of the object would hide it.
    is_told = first["type"] in ("value_error", "missing") and isinstance(first.get("input"), dict)
    got = "" if is_told else f", but it is {shown_value(first.get('input'))}"
    got += f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{kind} file {source}: {where}: {said}{got}; fix that field or write the file again"
