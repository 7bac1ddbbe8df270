"""The command line: every command loads, makes one call, saves and prints.

Results go to stdout, progress and logs to stderr; `--json` prints one JSON object. Exit status: 0
good, 1 the constraint was not met or a check failed, 2 bad input, 130 interrupted. Heavy imports
happen inside the commands, so that `--help` answers at once.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar

import typer
from typer.exceptions import TyperException

from autoprec.cli.devices import devices_app
from autoprec.cli.errors import drop_output, one_line_of
from autoprec.common.noise import import_noise_dropped
from autoprec.errors import AutoprecError, WorkloadError
from autoprec.records import APPLICABLE_RECIPES, Plan, Record
from autoprec.tuning import stages as pipeline
from autoprec.tuning.settings import Settings, parse_duration, parse_fraction, parse_recipes

app = typer.Typer(
    help="Which layers should train in FP8, BF16 or FP32? Measured, searched, proven.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Show, compare, check and export plans.", no_args_is_help=True)
app.add_typer(plan_app, name="plan", rich_help_panel=None)
app.add_typer(devices_app, name="devices", rich_help_panel=None)

Workload = Annotated[
    str, typer.Argument(metavar="MODEL.py", help="The workload: FILE or FILE:NAME.")
]
Target = Annotated[
    str, typer.Option(help="auto, cpu, cuda, or a device profile (name or path) that is predicted.")
]
Out = Annotated[Path, typer.Option(help="Folder for what the run writes.")]
Tolerance = Annotated[str, typer.Option(help="Allowed relative loss gap, e.g. 0.1% or 0.001.")]
Keep = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it at run time
    typer.Option(help="GLOB=PRECISION[:RECIPE] to fix layers, e.g. 'head=bf16_o2'. May repeat."),
]
Recipes = Annotated[
    str,
    typer.Option(
        help="FP8 recipes to consider, separated by commas; `delayed` is measured for comparison."
    ),
]
Trials = Annotated[int, typer.Option(min=0, help="Optuna trials after the exact seeds.")]
Budget = Annotated[str, typer.Option(help="Time limit of the search, e.g. 20m, 90s or 1h.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Storage = Annotated[str, typer.Option(help="Optuna storage URL; default OUT/study.db.")]
Study = Annotated[str, typer.Option(help="Name of the Optuna study.")]
Resume = Annotated[bool, typer.Option("--resume", help="Skip stages that are finished in OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Checkpoint = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads it at run time
    typer.Option(help="Start from this checkpoint (state dict) instead of from scratch."),
]
Parallel = Annotated[
    str,
    typer.Option(
        metavar="PARTS",
        help="With a device profile, parts joined by commas: fsdp=N, tp=N, gather=fp8 (FP8 "
        "gathers), ac=full or ac=selective (recomputation), e.g. fsdp=32,tp=8.",
    ),
]
Meta = Annotated[
    bool,
    typer.Option(
        "--meta",
        help="Capture without weights: for a model too large for here. MODEL.py may then be a "
        "transformers config (the JSON file or its folder).",
    ),
]
Batch = Annotated[
    Optional[int],  # noqa: UP045 - typer reads it at run time
    typer.Option(min=1, help="Of a config: sequences a step on a device; default 1."),
]
Sequence = Annotated[
    Optional[int],  # noqa: UP045 - typer reads it at run time
    typer.Option(min=2, help="Of a config: tokens a sequence; default 4096 or what it can."),
]
Compiled = Annotated[
    Optional[bool],  # noqa: UP045 - typer reads it at run time
    typer.Option(
        "--compile/--eager",
        help="Times under torch.compile or eager; default: eager here, compiled on a profile.",
    ),
]
Rest = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it at run time
    typer.Argument(metavar="[-- ARGS]", help="With --script: the script's own arguments."),
]
NoGemmsHp = Annotated[
    bool, typer.Option("--no-gemms-hp", help="Keep the three GEMMs of an FP8 layer together.")
]
RunFolder = Annotated[Path, typer.Argument(help="A run folder made by tune.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan.")]

INTERRUPTED = 130  # typer ends a command with it on Ctrl-C
DEFAULT_RECIPES = ",".join(APPLICABLE_RECIPES)


@app.command()
def tune(
    workload: Annotated[
        str, typer.Argument(metavar="[MODEL.py]", help="The workload: FILE or FILE:NAME.")
    ] = "",
    rest: Rest = None,
    script: Annotated[
        str, typer.Option(metavar="TRAIN.py", help="Tune what a training script trains instead.")
    ] = "",
    script_steps: Annotated[
        int, typer.Option(min=8, help="Training steps of the script to record, then it is stopped.")
    ] = 32,
    target: Target = "auto",
    out: Out = Path("autoprec-out"),
    loss_tolerance: Tolerance = "0.1%",
    keep: Keep = None,
    recipes: Recipes = DEFAULT_RECIPES,
    no_gemms_hp: NoGemmsHp = False,
    trials: Trials = 12,
    time_budget: Budget = "",
    seed: Seed = 0,
    storage: Storage = "",
    study: Study = "autoprec",
    checkpoint: Checkpoint = None,
    sensitivity: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time
        typer.Option(help="Use this sensitivity.json instead of measuring."),
    ] = None,
    parallel: Parallel = "",
    compiled: Compiled = None,
    meta: Meta = False,
    batch: Batch = None,
    sequence: Sequence = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the training proof.")
    ] = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Find, prove and save the precision plan of a model: every stage, then the report."""
    settings = _of_script(_settings(locals()), rest or [])
    outcome = _with_progress(settings, pipeline.tune_workload)
    _print_run(out, as_json=as_json)
    raise typer.Exit(outcome.exit_code)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(metavar="TRAIN.py", help="The training script.")],
    rest: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it at run time
        typer.Argument(metavar="[ARGS]...", help="The script's own arguments."),
    ] = None,
    plan: Annotated[Path, typer.Option(help="The plan for the model that the script trains.")] = (
        Path("autoprec-out/plan.json")
    ),
    is_module: Annotated[
        bool, typer.Option("-m", help="TRAIN.py is the name of a module, as in `python -m`.")
    ] = False,
    guard: Annotated[
        Optional[bool],  # noqa: UP045 - typer reads it at run time
        typer.Option(
            "--guard/--no-guard", help="Watch the run; by default if the plan has a schedule."
        ),
    ] = None,
) -> None:
    """Run an unmodified training script with a plan; its exit status is the script's."""
    loaded = Plan.load(plan)
    from autoprec.integrations.launch import Script, run_with_plan

    outcome = run_with_plan(Script(script, tuple(rest or ()), is_module), loaded, guard=guard)
    if outcome.was_applied or not outcome.status:
        print(f"autoprec: {outcome.message}", file=sys.stderr)
    raise typer.Exit(outcome.status or (0 if outcome.was_applied else 1))


@app.command()
def profile(
    workload: Workload,
    target: Target = "auto",
    out: Out = Path("autoprec-out"),
    recipes: Recipes = DEFAULT_RECIPES,
    no_gemms_hp: NoGemmsHp = False,
    seed: Seed = 0,
    parallel: Parallel = "",
    compiled: Compiled = None,
    meta: Meta = False,
    batch: Batch = None,
    sequence: Sequence = None,
    as_json: Json = False,
) -> None:
    """Measure (or predict) time and memory of every layer and option: profile.json."""
    settings = _settings(locals())
    record = _with_progress(settings, pipeline.profile_stage)
    _print_record(record, as_json=as_json)


@app.command()
def sensitivity(
    workload: Workload,
    target: Target = "auto",
    out: Out = Path("autoprec-out"),
    recipes: Recipes = DEFAULT_RECIPES,
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Measure what each precision does to loss and gradient: sensitivity.json."""
    settings = _settings(locals())
    record = _with_progress(settings, pipeline.sensitivity_stage)
    _print_record(record, as_json=as_json)


@app.command()
def search(
    out: RunFolder,
    workload: Annotated[
        str, typer.Option(help="MODEL.py: measure whole plans; without it, use the saved tables.")
    ] = "",
    loss_tolerance: Tolerance = "0.1%",
    keep: Keep = None,
    trials: Trials = 12,
    time_budget: Budget = "",
    seed: Seed = 0,
    storage: Storage = "",
    study: Study = "autoprec",
    as_json: Json = False,
) -> None:
    """Search the plan again from profile.json and sensitivity.json: search.json, plan.json."""
    settings = _settings(locals())
    record = _with_progress(settings, pipeline.search_stage)
    _print_record(record, as_json=as_json)


@app.command()
def verify(
    workload: Workload,
    plan: PlanFile,
    target: Target = "auto",
    out: Out = Path("autoprec-out"),
    loss_tolerance: Tolerance = "0.1%",
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Train with a plan beside the reference and prove or refute it: verification.json."""
    settings = _settings(locals())
    record = _with_progress(settings, lambda drawn: pipeline.verify_stage(drawn, plan))
    _print_record(record, as_json=as_json)
    raise typer.Exit(0 if record.verdict == "verified" else 1)


@app.command()
def report(out: RunFolder, as_json: Json = False) -> None:
    """Write report.html and layers.csv again from a run folder's records."""
    pipeline.write_report(out)
    _print_run(out, as_json=as_json)


@app.command()
def doctor(target: Target = "auto", as_json: Json = False) -> None:
    """Say what this machine can do: versions, device, FP8 with reasons, numeric self-test."""
    from autoprec.tuning.doctor import diagnose

    diagnosis = diagnose(target)
    _print_record(diagnosis, as_json=as_json)
    raise typer.Exit(0 if diagnosis.is_healthy else 1)


@plan_app.command("show")
def plan_show(plan: PlanFile, as_json: Json = False) -> None:
    """Print a plan: every layer, its precision and the reason."""
    _print_record(Plan.load(plan), as_json=as_json)


@plan_app.command("diff")
def plan_diff(before: PlanFile, after: PlanFile, as_json: Json = False) -> None:
    """Compare two plans, or two sensitivity.json files (drift); exit 1 when they differ."""
    from autoprec.tuning.plan_diff import compare_files

    difference = compare_files(before, after)
    _print_record(difference, as_json=as_json)
    raise typer.Exit(1 if difference.rows else 0)


@plan_app.command("check")
def plan_check(
    plan: PlanFile,
    model: Annotated[str, typer.Option(help="MODEL.py that the plan should fit.")] = "",
    target: Target = "auto",
    as_json: Json = False,
) -> None:
    """Check a plan's file; with --model also that it fits, and that what runs is what it says."""
    from autoprec.tuning.plan_check import check_plan

    checked = check_plan(plan, model=model, target=target)
    _print_record(checked, as_json=as_json)
    raise typer.Exit(0 if checked.is_good else 1)


app.command("check", help="The same as `plan check`.")(plan_check)


@plan_app.command("schema")
def plan_schema() -> None:
    """Print the JSON Schema of plan files."""
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

    print(export_plan(Plan.load(plan), to))


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
        message = one_line_of(error)
        if message is None:
            raise
        if isinstance(error, OSError):
            drop_output()
        print(f"autoprec: error: {message}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # typer catches it inside a command only
        status = INTERRUPTED
    if status == INTERRUPTED:
        print(
            "autoprec: interrupted; finished stages are kept, add --resume to go on",
            file=sys.stderr,
        )
        # Under `python -m` CPython remembers an interrupt that passed through exec() of a string
        # (dataclasses run some), and would end by SIGINT in place of our status; this forgets it.
        eval("None")
    sys.exit(status or 0)  # a command that returns nothing went well


def _settings(given: Mapping[str, Any]) -> Settings:  # Any: a command's own arguments
    """Make settings of a command's arguments; those that are no setting are left out."""
    convert: dict[str, tuple[str, Callable[[Any], Any]]] = {  # Any: as above
        "loss_tolerance": ("loss_tolerance", parse_fraction),
        "keep": ("keep", lambda globs: tuple(globs or ())),
        "recipes": ("recipes", parse_recipes),
        "time_budget": ("time_budget_s", parse_duration),
        "storage": ("storage", lambda url: url or None),
        "no_verify": ("verify", lambda skipped: not skipped),
        "no_gemms_hp": ("gemms_hp", lambda kept: not kept),
    }
    fields = {}
    for name, value in given.items():
        field, function = convert.get(name, (name, lambda same: same))
        if field in Settings.__dataclass_fields__:
            fields[field] = function(value)
    return Settings(**fields)


def _of_script(settings: Settings, rest: list[str]) -> Settings:
    """Give the words after the options to the script, where there is one.

    Raises:
        WorkloadError: there is no workload, or something is left over.
    """
    words = [*filter(None, [settings.workload]), *rest]
    if settings.script and settings.meta:
        raise WorkloadError("--meta needs a MODEL.py, since a script is run; leave --script out")
    if settings.script:
        out = settings.out.absolute()  # the script may change the folder
        return replace(settings, workload="", script_args=tuple(words), out=out)
    if len(words) != 1:
        raise WorkloadError(
            f"tune needs one MODEL.py, or --script TRAIN.py, but got {len(words)} files; "
            "only a script takes further arguments, after --"
        )
    return settings


T = TypeVar("T")


def _with_progress(settings: Settings, stage: Callable[[Settings], T]) -> T:
    """Run a stage with its progress drawn on stderr."""
    from autoprec.cli.console import drawn_progress

    with drawn_progress() as progress:
        return stage(replace(settings, progress=progress))


def _print_run(out: Path, *, as_json: bool) -> None:
    from rich.console import Console

    from autoprec.report import load_run, print_summary, summary_object

    run = load_run(out)
    if as_json:
        print(json.dumps(summary_object(run, out)))
    else:
        print_summary(run, Console(), out=out)


def _print_record(record: Record, *, as_json: bool) -> None:
    """Print a record as one JSON object, or as the report draws its type."""
    if as_json:
        print(record.model_dump_json())
        return
    from rich.console import Console

    from autoprec.report import print_record

    print_record(record, Console())
