"""Sections in processes of their own, and the rows that they leave on disk at once.

A section is a list of items. The child that runs it notes each item before it begins and each row
when it is there, in one file of JSON lines. A child that dies or hangs costs the item that it was
at: another child goes on behind it while the section has time left.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprec.common.text import one_line

ROWS = "rows.jsonl"
LOG = "log.txt"
LEAST_S = 5.0  # what a child needs to import torch; with less left none is started
PATIENCE = 0.6  # of a section's time: an item that takes longer hangs
LEAST_PATIENCE_S = 30.0  # a first import from a slow disk
POLL_S = 0.1
BROKEN = 3  # a child's status when its device answers no more; another may go on
Row = dict[str, Any]  # Any: numbers, texts and None


@dataclass(frozen=True)
class Child:
    """What runs one section: a command that takes its name, and the folder of the rows."""

    command: Sequence[str]
    out: Path

    def run(self, section: str, *, seconds: float) -> str:
        """Run a section for at most so long; return what became of it in a few words."""
        started = time.monotonic()
        write_row(self.out, {"section": section, "seconds_allowed": round(seconds, 1)})
        left, outcome = seconds, "done"
        patience = max(PATIENCE * seconds, LEAST_PATIENCE_S)
        while left > LEAST_S:
            tried = begun(self.out, section)
            status = self._run_once(section, left, patience=patience)
            left = seconds - (time.monotonic() - started)
            if status == 0:
                return outcome
            at = begun(self.out, section)[len(tried) :]
            outcome = f"{at[-1] if at else 'the start'}: {_why(status)}"
            write_row(self.out, {"section": section, "failed": outcome})
            if not at:
                return outcome  # it failed before its first item, and would again
        return outcome

    def _run_once(self, section: str, seconds: float, *, patience: float) -> int | None:
        """Run one child; return its status, None where it had to be ended."""
        deadline = time.monotonic() + seconds
        command = [*self.command, "--section", section]
        with open(self.out / LOG, "a") as log:
            child = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                while child.poll() is None:
                    time.sleep(POLL_S)
                    age = time.time() - (self.out / ROWS).stat().st_mtime
                    if time.monotonic() > deadline or age > patience:
                        return None
                return child.returncode
            finally:
                _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child with all that it started, such as a compiler's workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _why(status: int | None) -> str:
    if status is None:
        return "out of time, ended"
    if status == BROKEN:
        return "the device answered no more"
    return f"died of signal {-status}" if status < 0 else f"ended with status {status} ({LOG})"


def write_row(out: Path, row: Mapping[str, Any]) -> None:
    """Add a row; it is on the disk when this returns."""
    text = json.dumps(row, default=str)
    with open(out / ROWS, "a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    shown = " ".join(f"{name}={_short(value)}" for name, value in row.items() if name != "at")
    print(one_line(shown, most=400), file=sys.stderr, flush=True)


def read_rows(out: Path) -> list[Row]:
    """Return all whole rows; a line that a crash cut off is none."""
    path, found = out / ROWS, []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def begun(out: Path, section: str) -> list[str]:
    """Return the items that a section began, in order."""
    return [row["begun"] for row in _latest(read_rows(out), section) if "begun" in row]


def results(rows: Sequence[Row], section: str) -> list[Row]:
    """Return a section's results: what is neither a beginning nor a failure."""
    return [row for row in _latest(rows, section) if not row.keys() & {"begun", "failed"}]


def failures(rows: Sequence[Row]) -> list[Row]:
    """Return what failed, of all sections."""
    sections = dict.fromkeys(row["section"] for row in rows)
    return [row for name in sections for row in _latest(rows, name) if "failed" in row]


def _latest(rows: Sequence[Row], section: str) -> list[Row]:
    """Return the rows of a section's last run: it may be run again in the same folder."""
    own = [row for row in rows if row["section"] == section]
    starts = [position for position, row in enumerate(own) if "seconds_allowed" in row]
    return own[starts[-1] + 1 :] if starts else own


def share_out(left: float, shares: Sequence[float]) -> float:
    """Return the seconds of the first of these sections, so that what it leaves is the others'."""
    return left * shares[0] / sum(shares)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
