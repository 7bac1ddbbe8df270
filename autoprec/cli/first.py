"""`autoprec run --tune-first`: tune the script in a process of its own, say three lines, go on.

A process of its own: the recorded training must leave nothing behind, neither in torch nor in the
modules that the script imports, and its device memory is free again when it ends.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from autoprec.errors import SettingsError
from autoprec.records import Verdict
from autoprec.report import load_run
from autoprec.report.answer import Advice
from autoprec.report.summary import summarise_run


def tune_first(script: str, arguments: Sequence[str], plan: Path) -> int:
    """Tune a script into the plan's folder; return 0 if the plan is proven and worth training with.

    Raises:
        SettingsError: the plan's file is not one that `tune` writes, or many ranks run.
    """
    if plan.name != "plan.json":
        raise SettingsError(
            f"--tune-first writes plan.json, but --plan is {plan}; give FOLDER/plan.json"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError(
            "--tune-first tunes in one process, but torchrun started many; run "
            "`torchrun ... -m autoprec tune --script TRAIN.py` first, then `autoprec run --plan`"
        )
    command = [sys.executable, "-m", "autoprec", "tune", "--script", script, "--json"]
    command += ["--out", str(plan.parent), "--", *arguments]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL)
    if ended.returncode not in (0, 1):  # it has said why
        return ended.returncode
    found = summarise_run(load_run(plan.parent))
    is_worth = found.answer.advice in (Advice.APPLY, Advice.LEAVE)
    is_proven = found.promise.verdict is Verdict.VERIFIED
    same = shlex.join(["autoprec", "run", "--plan", str(plan), script, *arguments])
    anyway = f"not trained; to train with it all the same: {same}"
    print(f"autoprec: {found.answer.headline}", file=sys.stderr)
    print(f"autoprec: report: {plan.parent / 'report.html'}", file=sys.stderr)
    goes_on = is_worth and is_proven
    print(f"autoprec: {'training with it now' if goes_on else anyway}", file=sys.stderr)
    return 0 if goes_on else 1
