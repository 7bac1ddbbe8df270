"""Golden files: what a report printed when a person last looked at it.

AUTOPREC_OVERWRITE_GOLDEN=1 pytest tests/test_report_terminal.py writes them anew; look at the diff.
"""

import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
SWITCH = "AUTOPREC_OVERWRITE_GOLDEN"


def check_golden(name: str, text: str) -> None:
    """Compare `text` with tests/golden/`name`, line ends trimmed."""
    path = GOLDEN / name
    lines = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if os.environ.get(SWITCH):
        path.write_text(lines, encoding="utf-8")
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    assert expected == lines, f"{name} changed; look at it, then set {SWITCH}=1 to accept it"
