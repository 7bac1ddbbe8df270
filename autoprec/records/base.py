"""The base of every record: frozen data, strict when read, atomic when written.

A record is what one stage hands to the next and, byte for byte, a JSON file. Reading is strict
(an unknown field, another version, a truncated or huge file is one `RecordError`); writing goes
through a temporary file in the same folder and `os.replace`, so that a kill leaves the old file or
the new one, never half of one.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from autoprec.errors import RecordError

MAX_RECORD_BYTES = (
    64 * 1024 * 1024
)  # the largest record seen (70B model, all options) is below 8 MB
BRACKET = re.compile(r"[\[\]{}]")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
MAX_NESTING = 32  # no record nests deeper than 8; json.loads recurses, so depth is checked first


class Record(BaseModel):
    """A frozen value between stages."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="null"
    )


class FileRecord(Record):
    """A record with a file of its own: `kind` and `version` are written into it and checked."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int]

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
    def load(cls, path: Path | str) -> Self:
        """Read a record from `path`.

        Raises:
            RecordError: the file is missing, too large, not JSON, of another kind or version, or
                has an unknown, missing or malformed field.
        """
        return cls.from_json(read_text(Path(path), what=cls.KIND), source=str(path))

    @classmethod
    def from_json(cls, text: str, *, source: str = "text") -> Self:
        """Read a record from JSON text; `source` names it in errors."""
        fields = _parse_object(text, source=source)
        _check_header(fields, kind=cls.KIND, version=cls.VERSION, source=source)
        body = {name: value for name, value in fields.items() if name not in ("kind", "version")}
        try:
            return cls.model_validate_json(json.dumps(body))
        except ValidationError as error:
            raise RecordError(_first_problem(error, source=source, kind=cls.KIND)) from error


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` to `path` so that readers see the old file or the new one, never a part.

    Raises:
        RecordError: the folder does not exist or cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RecordError(
            f"an output file must be writable, but {path} is not ({error.strerror}); "
            "choose another folder with --out"
        ) from error
    return path


def read_text(path: Path, *, what: str) -> str:
    """Return the text of a record file, refusing one that is absent or larger than any record."""
    try:
        size = path.stat().st_size
        if size > MAX_RECORD_BYTES:
            raise RecordError(
                f"a {what} file has at most {MAX_RECORD_BYTES:,} bytes, but {path} has {size:,}; "
                "it is not one that autoprec wrote"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecordError(
            f"a {what} file must be readable, but {path} is not ({reason}); check the path"
        ) from error


def _parse_object(text: str, *, source: str) -> dict[str, Any]:  # Any: JSON values
    depth = _nesting(text)
    if depth > MAX_NESTING:
        raise RecordError(
            f"a record nests at most {MAX_NESTING} levels, but {source} nests {depth}; "
            "it is not one that autoprec wrote"
        )
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise RecordError(
            f"a record must be complete JSON, but {source} is not ({error}); "
            "write it again or restore it from a copy"
        ) from error
    if not isinstance(fields, dict):
        raise RecordError(
            f"a record must be a JSON object, but {source} is {type(fields).__name__}"
        )
    return fields


def _nesting(text: str) -> int:
    """Return the nesting depth of JSON text; brackets inside strings do not count."""
    depth = deepest = 0
    for bracket in BRACKET.findall(STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _check_header(fields: dict[str, Any], *, kind: str, version: int, source: str) -> None:
    if fields.get("kind") != kind:
        raise RecordError(
            f"a {kind} file must say kind={kind!r}, but {source} says {fields.get('kind')!r}; "
            "check which file was given"
        )
    if type(fields.get("version")) is not int or fields["version"] != version:
        raise RecordError(
            f"this autoprec reads {kind} version {version}, but {source} says "
            f"{fields.get('version')!r}; write it again with this autoprec"
        )


def _first_problem(error: ValidationError, *, source: str, kind: str) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "the record"
    got = repr(first.get("input"))
    shown = got if len(got) <= 60 else got[:57] + "..."
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return (
        f"{kind} file {source}: {where}: {first['msg']}, but it is {shown}{more}; "
        "mend that field or write the file again"
    )
