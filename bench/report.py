"""How large a report is and how long it takes to render: made-up GPTs, then folders of runs.

    PYTHONPATH=. python bench/report.py [FOLDER ...]

Seconds are of the processor, of the fastest of five.
"""

import sys
import time

from autoprec.report import RunRecords, load_run, render_html
from tests.report_runs import make_run, renamed


def main() -> None:
    runs = {f"GPT, {count} layers": make_run(layers=count) for count in (5, 30, 300)}
    runs["300 layers, no two alike"] = unlike(runs["GPT, 300 layers"])
    runs |= {folder: load_run(folder) for folder in sys.argv[1:]}
    for name, run in runs.items():
        size = len(render_html(run).encode())
        print(f"{name:40} {size / 1e3:6.0f} kB {min(rendered(run) for _ in range(5)):6.2f} s")


def unlike(run: RunRecords) -> RunRecords:
    """Return the run with names that no pattern folds."""
    layers = run.plan.layers if run.plan else ()
    return renamed(run, {layer.name: "x" * n for n, layer in enumerate(layers, start=1)})


def rendered(run: RunRecords) -> float:
    start = time.process_time()
    render_html(run)
    return time.process_time() - start


if __name__ == "__main__":
    main()
