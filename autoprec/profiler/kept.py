"""Rows of layers that were timed, kept in a file while the profile grows.

Each group's rows are written when they are complete, the file in one step: a run that is cut off
loses the group in flight. Rows made of other inputs (workload, settings, device, versions: a
digest) are another profile's, and are not taken up.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from autoprec.device.ranks import made_on_first_rank
from autoprec.errors import RecordError
from autoprec.records import LayerTiming, ProfileRows

log = logging.getLogger(__name__)


@dataclass
class KeptRows:
    """The rows of finished groups, by the names of their layers; in a file if there is a path."""

    path: Path | None = None
    digest: str = ""
    rows: dict[tuple[str, ...], tuple[LayerTiming, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, digest: str, *, resume: bool) -> Self:
        """Return the rows of a file that was written for the same digest, or none yet.

        Without a digest (live functions have none) nothing is kept.
        """
        if not digest:
            return cls()
        found = made_on_first_rank(lambda: _read(path, digest) if resume else ())
        rows: dict[tuple[str, ...], tuple[LayerTiming, ...]] = {}
        for row in found:
            rows[row.names] = (*rows.get(row.names, ()), row)
        if rows:
            log.info("%d kinds of layers are timed already; the profile goes on", len(rows))
        return cls(path, digest, rows)

    def find(self, names: tuple[str, ...]) -> tuple[LayerTiming, ...] | None:
        """Return the rows of a group that is finished, else None."""
        return self.rows.get(names)

    def add(self, names: tuple[str, ...], rows: Sequence[LayerTiming]) -> None:
        """Keep the rows of a finished group."""
        self.rows[names] = tuple(rows)
        if self.path is not None:
            every = tuple(row for own in self.rows.values() for row in own)
            record, path = ProfileRows(digest=self.digest, rows=every), self.path
            made_on_first_rank(lambda: record.save(path))


def _read(path: Path, digest: str) -> tuple[LayerTiming, ...]:
    if not path.exists():
        return ()
    try:
        found = ProfileRows.load(path)
    except RecordError as error:
        log.warning("layers are timed anew: %s", error)
        return ()
    return found.rows if found.digest == digest else ()
