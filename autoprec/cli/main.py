"""The command line: every command loads, makes one call, saves and prints.

Results go to stdout, progress and logs to stderr; `--json` prints one JSON object. Exit status: 0
good, 1 the constraint was not met or a check failed, 2 bad input, 130 interrupted. Heavy imports
happen inside the commands, so that `--help` answers at once. The options of a stage are its
settings, see `options.py`.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.exceptions import TyperException

from autoprec.cli.devices import devices_app
from autoprec.cli.ending import (
    drop_output,
    stdout_for_results,
    terminated_as_interrupted,
    told_of,
)
from autoprec.cli.options import with_settings
from autoprec.common.files import write_atomically
from autoprec.common.noise import import_noise_dropped, warned_once
from autoprec.errors import AutoprecError, NoRoomError, RecordError, WorkloadError
from autoprec.tuning.ranks import is_first, is_launched, joined_ranks
from autoprec.tuning.settings import STAGES, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from autoprec.records import Plan, Record
    from autoprec.tuning.run import Run

log = logging.getLogger(__name__)
FIRST_SAYS_S = 5.0  # torchrun looks at its ranks every 0.1 s, but rank 0 may end later than others
T = TypeVar("T")

app = typer.Typer(
    help="Which layers should train in FP8, BF16 or FP32? Measured, searched, proven.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Show, check and export plans.", no_args_is_help=True)
app.add_typer(plan_app, name="plan", rich_help_panel=None)
app.add_typer(devices_app, name="devices", rich_help_panel=None)

Workload = Annotated[
    str, typer.Argument(metavar="MODEL.py", help="The workload: FILE or FILE:NAME.")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL.py | -- ARGS",
        help="The workload: FILE or FILE:NAME. With --script: the script's own arguments.",
    ),
]
RUN_OR_FILE = "A run folder made by tune, or a plan or table."
RunFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A run folder made by tune.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan.")]
Target = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Print layers, steps, loss and notes below the answer.")
]
Given = Any  # texts and values of the settings that a command has


INTERRUPTED = 130  # typer ends a command with it on Ctrl-C


@app.callback(invoke_without_command=True)
def answer_version(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions in use and exit.")
    ] = False,
) -> None:
    """Answer what is asked of the program as a whole."""
    if version:
        from autoprec.common.versions import software_versions

        print(", ".join(f"{name} {own}" for name, own in software_versions().items()))
        raise typer.Exit


@app.command()
@with_settings()
def tune(
    words: Words = None,
    as_json: Json = False,
    verbose: Verbose = False,
    is_dry: Annotated[
        bool,
        typer.Option("--dry-run", help="List the layers and what --keep does; measure nothing."),
    ] = False,
    **given: Given,
) -> None:
    """Find, prove and save the precision plan of a model: every stage, then the report."""
    if given["script"]:
        settings = Settings.of(script_args=tuple(words or ()), **given)
    elif words and len(words) == 1:
        settings = Settings.of(workload=words[0], **given)
    else:
        raise WorkloadError(
            f"tune needs one MODEL.py, or --script TRAIN.py, but got {len(words or ())} files; "
            "only a script takes further arguments, after --"
        )
    if is_dry:
        from rich.console import Console

        from autoprec.cli.dry_run import dry_run
        from autoprec.report.text_table import print_parts

        print_parts(dry_run(settings), Console())
        return
    made = _run(settings, lambda run: run.make())
    _print_run(made.settings.out, as_json=as_json, verbose=verbose)
    leave(made.exit_code)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(metavar="TRAIN.py", help="The training script.")],
    rest: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGS]...", help="The script's own arguments.")
    ] = None,
    plan: Annotated[Path, typer.Option(help="The plan for the model that the script trains.")] = (
        Path("autoprec-out/plan.json")
    ),
    is_module: Annotated[
        bool, typer.Option("-m", help="TRAIN.py is the name of a module, as in `python -m`.")
    ] = False,
    first: Annotated[
        bool, typer.Option("--tune-first", help="Tune the script first, into the plan's folder.")
    ] = False,
    guard: Annotated[
        bool | None,
        typer.Option(
            "--guard/--no-guard", help="Watch the run; by default if the plan has a schedule."
        ),
    ] = None,
) -> None:
    """Run an unmodified training script with a plan; its exit status is the script's."""
    if first:
        from autoprec.cli.first import tune_first

        words = [*(["-m"] if is_module else []), script, *(rest or ())]
        if status := tune_first(words[0], words[1:], plan):
            raise typer.Exit(status)
    loaded = _load_plan(plan)  # refused before torch is imported
    from autoprec.integrations.launch import Script, run_with_plan

    running = Script(script, tuple(rest or ()), is_module)
    outcome = run_with_plan(running, loaded, guard=guard, tell=_say)
    if not outcome.was_applied and not outcome.status:
        print(f"autoprec: {outcome.message}", file=sys.stderr, flush=True)
    raise typer.Exit(outcome.status or (0 if outcome.was_applied else 1))


@app.command()
@with_settings("profile")
def profile(workload: Workload, as_json: Json = False, **given: Given) -> None:
    """Measure (or predict) time and memory of every layer and option: profile.json."""
    settings = Settings.of(workload=workload, **given)
    _finish(_run(settings, lambda run: run.name_kernels(), stages=("profile",)), as_json=as_json)


@app.command()
@with_settings("sensitivity")
def sensitivity(workload: Workload, as_json: Json = False, **given: Given) -> None:
    """Measure what each precision does to the gradient: sensitivity.json."""
    settings = Settings.of(workload=workload, **given)
    _finish(_run(settings, lambda run: run.sensitivity, stages=("sensitivity",)), as_json=as_json)


@app.command()
@with_settings("search")
def search(
    out: RunFolder,
    workload: Annotated[
        str, typer.Option(help="MODEL.py: measure whole plans; without it, use the saved tables.")
    ] = "",
    as_json: Json = False,
    **given: Given,
) -> None:
    """Search the plan again from profile.json and sensitivity.json: search.json, plan.json.

    With --worker, only measure plans for a search that runs elsewhere on the same --storage.
    """
    settings = Settings.of(out=out, workload=workload, **given)
    if settings.worker:
        from autoprec.tuning.searching import make_search

        found = _run(settings, make_search, stages=("search",))
        _finish(found, as_json=as_json)
    _finish(_run(settings, lambda run: run.plan, stages=("search",)), as_json=as_json)


@app.command()
@with_settings("verification", loss_tolerance="")
def verify(workload: Workload, plan: PlanFile, as_json: Json = False, **given: Given) -> None:
    """Train with a plan beside the reference and prove or refute it: verification.json.

    Without --loss-tolerance it is the one that the plan was made for.
    """
    given["loss_tolerance"] = given["loss_tolerance"] or _load_plan(plan).constraint.loss_tolerance
    settings = Settings.of(workload=workload, **given)
    made = _run(settings, lambda run: run.verify(plan), stages=("verification",))
    _finish(made, as_json=as_json, good=made.verdict == "verified")


@app.command()
def report(
    out: RunFolder,
    trace: Annotated[
        Path | None, typer.Option(help="Write the profile to this file, too, for ui.perfetto.dev.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print the layers alone, alike ones in one line.")
    ] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write report.html and layers.csv again from a run folder's records."""
    from autoprec.report import load_run, print_layers
    from autoprec.report.timeline import trace_text
    from autoprec.tuning.run import write_report

    if out.is_file():
        raise RecordError(f"report needs a run folder, but {out} is a file; give {out.parent}")
    if trace is not None:
        write_atomically(trace, trace_text(load_run(out)))
    write_report(out, out / "report.html")
    if layers and not as_json:
        from rich.console import Console

        print_layers(load_run(out), Console())
    else:
        _print_run(out, as_json=as_json, verbose=verbose)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help=RUN_OR_FILE)],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help=RUN_OR_FILE)],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHANGE",
            help="Exit 1 if AFTER shows it beyond noise: slower=2% (the plan's step), speedup=2% "
            "(lower, over a step of its own run), grad-error=10%, verdict (weaker), plan (any "
            "layer decided otherwise). May be repeated.",
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file, too.")] = None,
    as_json: Json = False,
) -> None:
    """Say where two runs differ beyond noise: steps, layers, gradient errors, plan, verdict."""
    from autoprec.report.compare_views import comparison_html, comparison_markdown
    from autoprec.tuning.comparing import compare_paths

    found = compare_paths(before, after, fail_if=fail_if or ())
    if html is not None:
        write_atomically(html, comparison_html(found))
    if markdown:
        print(comparison_markdown(found), end="")
        raise typer.Exit(0 if found.is_good else 1)
    _finish(found, as_json=as_json, good=found.is_good)


@app.command()
def doctor(target: Target = "auto", as_json: Json = False) -> None:
    """Say what this machine can do: versions, device, FP8 with reasons, numeric self-test."""
    from autoprec.tuning.doctor import diagnose

    diagnosis = diagnose(target)
    _finish(diagnosis, as_json=as_json, good=diagnosis.is_healthy)


@plan_app.command("show")
def plan_show(plan: PlanFile, as_json: Json = False) -> None:
    """Print a plan: every layer, its precision and the reason."""
    _finish(_load_plan(plan), as_json=as_json)


@plan_app.command("check")
def plan_check(
    plan: PlanFile,
    model: Annotated[str, typer.Option(help="MODEL.py that the plan should fit.")] = "",
    target: Target = "auto",
    as_json: Json = False,
) -> None:
    """Check a plan's file; with --model also that it fits, and that what runs is what it says."""
    from autoprec.tuning.plan_check import check_plan

    with stdout_for_results():
        checked = check_plan(plan, model=model, target=target)
    _finish(checked, as_json=as_json, good=checked.is_good)


app.command("check", help="The same as `plan check`.")(plan_check)


@plan_app.command("schema")
def plan_schema() -> None:
    """Print the JSON Schema of plan files."""
    from autoprec.records import Plan

    print(json.dumps(Plan.json_schema(), indent=1))


@plan_app.command("export")
def plan_export(
    plan: PlanFile,
    to: Annotated[
        str, typer.Option(help="torchao, torchtitan, accelerate, megatron or transformer-engine.")
    ],
) -> None:
    """Print the plan in another framework's own format."""
    from autoprec.integrations.export import export_plan

    print(export_plan(_load_plan(plan), to))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="autoprec: %(message)s")
    try:
        with import_noise_dropped():
            status = app(args=arguments, prog_name="autoprec", standalone_mode=False)
        if sys.stdout:  # None where it was closed
            sys.stdout.flush()  # a full disk is told here, not by the interpreter when it ends
    except BrokenPipeError:  # `| head` has seen enough
        drop_output()
        status = 1
    except (AutoprecError, TyperException, RuntimeError, OSError) as error:
        message = told_of(error)
        if message is None:
            raise
        if isinstance(error, OSError):
            drop_output()
        _tell(message)
        status = 2
    except KeyboardInterrupt:  # typer catches it inside a command only
        status = INTERRUPTED
    if status == INTERRUPTED:
        _say("interrupted; what is finished is kept; start again to go on (tune: with --resume)")
        # Under `python -m` CPython remembers an interrupt that passed through exec() of a string
        # (dataclasses run some), and would end by SIGINT in place of our status; this forgets it.
        eval("None")
    sys.exit(status or 0)  # a command that returns nothing went well


def _tell(message: str) -> None:
    """Tell what ends the command: rank 0 if all ranks meet it, as torchrun ends the others then."""
    if not is_first():
        time.sleep(FIRST_SAYS_S)
    print(message, file=sys.stderr)


def _load_plan(path: Path) -> "Plan":
    from autoprec.records import Plan

    return Plan.load(path)


def _run(settings: Settings, make: "Callable[[Run], T]", stages: tuple[str, ...] = STAGES) -> T:
    """Return the result of `make` for a run, whose progress is drawn on stderr.

    Under torchrun all ranks run it, and rank 0 alone warns, draws and prints.
    """
    from autoprec.cli.console import drawn_progress
    from autoprec.tuning.run import Run

    if not is_first():
        logging.getLogger().setLevel(logging.ERROR)
    with (
        warned_once(),
        terminated_as_interrupted(),
        joined_ranks(),
        drawn_progress() as progress,
    ):
        run, since = Run(settings, stages=stages, progress=progress), time.time()
        with run.locked():
            try:
                if settings.resume:
                    _say(run.resumes)
                return make(run)
            except (KeyboardInterrupt, NoRoomError) as error:
                made = (run.folder.path / f"{stage}.json" for stage in STAGES)
                kept = [f.name for f in made if f.exists() and f.stat().st_mtime >= since]
                said = f"{settings.out} has {', '.join(kept) or 'nothing new'} of this run"
                if isinstance(error, NoRoomError):
                    raise NoRoomError(f"{error}; {said}") from error
                _say(said)
                raise


def _say(text: str) -> None:
    """Print a line to stderr, once for all ranks."""
    if is_first():
        print(f"autoprec: {text}", file=sys.stderr)


def _print_run(out: Path, *, as_json: bool, verbose: bool) -> None:
    if not is_first():
        return
    from rich.console import Console

    from autoprec.report import load_run, print_summary, summary_object

    run = load_run(out)
    if as_json:
        print(json.dumps(summary_object(run, out)))
    else:
        print_summary(run, Console(), out=out, verbose=verbose)


def _finish(record: "Record", *, as_json: bool, good: bool = True) -> NoReturn:
    """Print a record as one JSON object, or as the report draws its type; exit 1 if not good."""
    if not is_first():
        pass
    elif as_json:
        print(record.model_dump_json())
    else:
        from rich.console import Console

        from autoprec.report import print_record

        print_record(record, Console())
    leave(0 if good else 1)


def leave(status: int) -> NoReturn:
    """End with rank 0's status: where another rank fails torchrun ends all, unprinted."""
    if status and is_first() and is_launched():
        log.warning("exit status %d, of the answer above: torchrun calls that a failure", status)
    raise typer.Exit(status if is_first() else 0)
