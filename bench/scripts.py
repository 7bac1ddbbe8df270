"""Scripts as people write them, unmodified, through both commands: a table of compatibility.

    python bench/scripts.py [NAME ...] [--out FOLDER] [--no-store]

Each script of tests/scripts is tuned (`tune --script`, for a device profile, without its proof),
trained under a plan (`run --plan`: what was found, with FP8 in every other linear that can take
it), and trained with the one line that its comment `# one-liner:` has in place. The numbers that
it prints must be the same in both of the last. DDP and FSDP2 are started by torchrun too. The rows
go into bench/data/compatibility.json, and from there into docs/compatibility.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compatibility import store

from autoprec.model.options import shape_refusal
from autoprec.records import LayerKind, Plan, Recipe, fp8_option

HERE = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem: path for path in sorted((HERE / "tests" / "scripts").glob("*.py"))}
ON_RANKS = {"ddp": 2, "fsdp2": 2}  # run by torchrun as well, on so many ranks
NUMBERS = ("loss ", "evaluated ", "validated ", "correct ")  # how lines of numbers begin
TUNE = ["--script-steps=12", "--target=h100-sxm", "--no-verify", "--trials=1"]
TUNE += ["--recipes=tensorwise"]
MARK = "# one-liner: "
TIMEOUT = 900  # seconds


@dataclass(frozen=True)
class Result:
    """What became of one script; an empty text is a pass."""

    tuned: str
    ran: str
    numbers: int  # that were compared


def python(*arguments: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python, on ranks by torchrun, from this checkout."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launch if ranks else []), *arguments]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=TIMEOUT, env=environment
    )


def try_script(path: Path, folder: Path, *, ranks: int = 0) -> Result:
    """Send one script through both commands."""
    folder.mkdir(parents=True, exist_ok=True)
    tune = ["-m", "autoprec", "tune", "--script", str(path), *TUNE, "--out", str(folder)]
    # what many ranks train cannot be recorded: torchrun starts one
    tuned = python(*tune, ranks=min(ranks, 1))
    if tuned.returncode:
        return Result(last_line(tuned.stderr), "no plan", 0)
    plan = folder / "mixed.json"
    with_fp8(Plan.load(folder / "plan.json")).save(plan)
    ran = python("-m", "autoprec", "run", "--plan", str(plan), str(path), ranks=ranks)
    if ran.returncode:
        return Result("", last_line(ran.stderr), 0)
    by_hand = folder / path.name
    by_hand.write_text(path.read_text().replace(MARK, "").replace("PLAN", repr(str(plan))))
    expected, actual = numbers_of(python(str(by_hand), ranks=ranks)), numbers_of(ran)
    same = bool(actual) and actual == expected
    return Result("", "" if same else "other numbers than by hand", len(actual))


def with_fp8(plan: Plan) -> Plan:
    """Return the plan with FP8 in every other linear that can take it."""
    fp8, layers, count = dict(fp8_option(Recipe.TENSORWISE)), [], 0
    for layer in plan.layers:
        is_linear = layer.kind is LayerKind.LINEAR
        is_linear = is_linear and len(layer.shapes[0]) == 2  # a masked weight comes after the bias
        if is_linear and not shape_refusal(layer.shapes[0][1], layer.shapes[0][0]):
            count += 1
            layer = layer.model_copy(update=fp8 if count % 2 else {})
        layers.append(layer)
    return plan.model_copy(update={"layers": tuple(layers)})


def numbers_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith(NUMBERS)]


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", choices=[*SCRIPTS, []])
    options.add_argument("--out", type=Path, default=None)
    options.add_argument("--no-store", action="store_true", help="print the rows alone")
    given = options.parse_args()
    folder = given.out or Path(tempfile.mkdtemp())
    for name in given.names or SCRIPTS:
        for ranks in sorted({0, ON_RANKS.get(name, 0)}):
            found = try_script(SCRIPTS[name], folder / f"{name}-{ranks}", ranks=ranks)
            title = SCRIPTS[name].read_text().splitlines()[0].strip('"').rstrip(".")
            row = {
                "name": f"`{name}.py`: {title}",
                "processes": str(max(ranks, 1)),
                "tune": found.tuned or "yes",
                "run": found.ran or "yes",
                "numbers": str(found.numbers),
            }
            print(" | ".join(row.values()), flush=True)
            if not given.no_store:
                store("scripts", row)


if __name__ == "__main__":
    main()
