"""Rows of layers that were timed, kept in a file while the profile grows, and what is timed now.

Each group's rows are written when they are complete, the file in one step: a run that is cut off
loses the group in flight. Rows made of other inputs (workload, settings, device, versions: a
digest) are another profile's, and are not taken up.

    profile.rows.json      finished rows, and the cells (layer and option) that ended a process
    profile.rows.json.at   the cell in flight; it is left behind where the process did not survive,
                           by a segmentation fault or the kernel's OOM killer, and passed over then
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from autoprec.common.files import refusal_to_write
from autoprec.common.grouping import grouped
from autoprec.common.progress import NOW
from autoprec.device.ranks import made_on_first_rank, rank
from autoprec.errors import RecordError
from autoprec.records import FP32, LayerTiming, ModelSpec, Option, ProfileRows, Refusal
from autoprec.records.cost import ENDED

log = logging.getLogger(__name__)
Cell = tuple[str, str]  # a layer and the key of an option, or STEP and the label of one
STEP = "a whole step"
CELL_BYTES = 4096  # written at once, so that none is read by half


@dataclass
class KeptRows:
    """The rows of finished groups, by the names of their layers; in a file if there is a path."""

    path: Path | None = None
    digest: str = ""
    rows: dict[tuple[str, ...], list[LayerTiming]] = field(default_factory=dict)
    ended: tuple[Cell, ...] = ()
    _at: int | None = None  # the open file of the cell in flight

    @classmethod
    def of(cls, path: Path, digest: str, *, resume: bool) -> Self:
        """Return the rows of a file that was written for the same digest, or none yet.

        Without a digest (live functions have none) nothing is kept.
        """
        if not digest:
            return cls()
        empty = ProfileRows(digest=digest, rows=())
        found = made_on_first_rank(lambda: _read(path, digest) if resume else empty)
        return cls(path, digest, grouped((row.names, row) for row in found.rows), found.ended)

    def add(self, names: tuple[str, ...], rows: list[LayerTiming]) -> None:
        """Keep the rows of a finished group."""
        self.rows[names] = rows
        self._save()

    def begin(self, name: str, option: Option | str) -> None:
        """Note the cell that is measured from now on: for whoever watches, and for a resumed run.

        Its file is in the system's memory at once, which a process that dies leaves behind.
        """
        NOW.measures = f"{name or 'the model'} in {option}"
        if self._at is not None:
            text = json.dumps({"digest": self.digest, "name": name, "option": str(option)})
            os.pwrite(self._at, text.encode().ljust(CELL_BYTES), 0)

    def why_ended(self, name: str, option: Option | str) -> str:
        """Return the reason that a cell is passed over; "" if it did not end a process."""
        if (name, str(option)) not in self.ended:
            return ""
        return (
            f"{ENDED} {name or 'the model'} was measured in {option}, so that is passed over; "
            "tune without --resume to try it again"
        )

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the cell in flight while the context is open, and drop it however this one ends."""
        if self.ended:
            self._save()  # before the file that names the last of them is written anew
        if self.path is None or rank() > 0:
            yield
            return
        file = _in_flight(self.path)
        try:
            self._at = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
            os.pwrite(self._at, b" " * CELL_BYTES, 0)
        except OSError as error:
            raise refusal_to_write(file, error, CELL_BYTES) from error
        try:
            yield
        finally:
            os.close(self._at)
            self._at, NOW.measures = None, ""
            file.unlink(missing_ok=True)

    def _save(self) -> None:
        if self.path is not None:
            every = tuple(row for own in self.rows.values() for row in own)
            record = ProfileRows(digest=self.digest, rows=every, ended=self.ended)
            path = self.path
            made_on_first_rank(lambda: record.save(path))


def without_ended(spec: ModelSpec, rows: Sequence[LayerTiming]) -> ModelSpec:
    """Return the spec without the options that ended a process, so that nothing runs them again.

    Where that was BF16, the layer keeps FP32, and those that share its parameters with it; an FP8
    recipe goes with all its sets of GEMMs.
    """
    own = [row for row in rows if row.infeasible and row.ended_process]
    if not own:
        return spec
    ended = {(name, row.option.recipe): row.infeasible for row in own for name in row.names}
    in_bf16 = {name: why for (name, recipe), why in ended.items() if recipe is None}
    owners = {x.tied_to or x.name: in_bf16[x.name] for x in spec.layers if x.name in in_bf16}
    layers = []
    for layer in spec.layers:
        whole = owners.get(layer.tied_to or layer.name, "")
        why = {o: whole or ended.get((layer.name, o.recipe), "") for o in layer.options}
        left = tuple(o for o in layer.options if o == FP32 or not why[o])
        gone = {o.precision: why[o] for o in why if o not in left}
        gone = {p: reason for p, reason in gone.items() if p not in {o.precision for o in left}}
        refusals = [Refusal(precision=p, reason=reason) for p, reason in gone.items()]
        update = {"options": left, "refusals": (*layer.refusals, *refusals)}
        layers.append(layer.model_copy(update=update))
    return spec.model_copy(update={"layers": tuple(layers)})


def _in_flight(path: Path) -> Path:
    return path.with_name(f"{path.name}.at")


def _read(path: Path, digest: str) -> ProfileRows:
    """Return the rows of a file, and the cells that ended a process, the last one among them."""
    found = ProfileRows(digest=digest, rows=())
    try:
        kept = ProfileRows.load(path) if path.exists() else found
        found = kept if kept.digest == digest else found
    except RecordError as error:
        log.warning("layers are timed anew: %s", error)
    try:
        last = json.loads(_in_flight(path).read_bytes())
        is_ours, cell = last["digest"] == digest, (str(last["name"]), str(last["option"]))
    except (OSError, ValueError, KeyError, TypeError):  # none in flight, or cut off in writing it
        return found
    ended = tuple(dict.fromkeys((*found.ended, cell)))
    return found.model_copy(update={"ended": ended}) if is_ours else found
