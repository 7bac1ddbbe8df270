"""The tables of docs/compatibility.md, from the rows of bench/optimizers.py and bench/scripts.py.

    python bench/compatibility.py [--again]       --again: run both benches first, in full

Rows are kept in bench/data/compatibility.json; each bench replaces its own as it makes them.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA, PAGE = HERE / "data" / "compatibility.json", HERE.parent / "docs" / "compatibility.md"
HEADS = {
    "optimizers": {
        "name": "optimizer",
        "rule": "rule",
        "share": "share",
        "tune": "`tune`",
        "apply": "losses with a plan",
        "resume": "resume",
    },
    "scripts": {
        "name": "script",
        "processes": "processes",
        "tune": "`tune --script`",
        "run": "`run --plan`",
        "numbers": "numbers as by the one-liner",
    },
}
Row = dict[str, Any]  # Any: of JSON


def store(table: str, row: Row) -> None:
    """Put a row in the place of the one of its name and processes, and write the page."""
    tables: dict[str, list[Row]] = json.loads(DATA.read_text())
    rows, key = tables[table], (row["name"], row.get("processes"))
    places = [n for n, old in enumerate(rows) if (old["name"], old.get("processes")) == key]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)
    DATA.write_text(json.dumps(tables, indent=1) + "\n")
    write_page(tables)


def write_page(tables: dict[str, list[Row]]) -> None:
    """Write each table between its markers."""
    text = PAGE.read_text()
    for name, head in HEADS.items():
        begin, end = f"<!-- rows of bench/{name}.py -->\n", f"<!-- end of {name} -->"
        lines = ["| " + " | ".join(head.values()) + " |", "|---" * len(head) + "|"]
        lines += ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in tables[name]]
        before, after = text.split(begin)[0], text.split(end)[1]
        text = before + begin + "\n".join(lines) + "\n" + end + after
    PAGE.write_text(text)


if __name__ == "__main__":
    for bench in ("optimizers", "scripts") if "--again" in sys.argv else ():
        subprocess.run([sys.executable, str(HERE / f"{bench}.py")], check=True)
    write_page(json.loads(DATA.read_text()))
