"""What the user asked for: each setting once, with its help, how its text is read, and its stages.

The command line makes its options of these fields, Python its keyword arguments, and `--resume`
repeats the stages that a changed setting decides. So a new setting is a field here, and the place
that reads it.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from autoprec.common.recipes import APPLICABLE_RECIPES, Recipe
from autoprec.common.text import shown_value
from autoprec.errors import DeviceError, SettingsError, WorkloadError
from autoprec.tuning import parsing
from autoprec.workload.hf_config import config_file

if TYPE_CHECKING:
    from autoprec.records import Constraint, MetricTolerance, Option
    from autoprec.records.devices import DeviceProfile
    from autoprec.verification import Terms

STAGES = ("profile", "sensitivity", "search", "verification")
PROFILE, SENSITIVITY, SEARCH, VERIFICATION = STAGES
NEEDS_FILE = (
    "--workers and --launcher train in other processes, which need the workload as a file "
    "MODEL.py, but it is {given}; leave them out"
)
SEED_MAX = 2**31 - 1  # numpy's end at 2^32 - 1, and stages count on from the seed
LOCAL_TARGET = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Setting:
    """What is known of one setting beside its type and default."""

    about: str  # one line of help
    stages: tuple[str, ...]  # whose records it decides: `--resume` makes these again on a change
    commands: tuple[str, ...]  # the stages that have it as an option; `tune` has all
    parse: Callable[[Any], Any] | None  # Any: a text, or a value from Python; None: as it is
    text: str  # the command line's default, where `parse` reads it
    option: Mapping[str, Any]  # Any: names, least value and looks, as `typer.Option` takes them


def setting(
    default: Any,  # Any: of the field's own type, or a text for `parse`
    about: str,
    stages: tuple[str, ...] = (),
    commands: tuple[str, ...] | None = None,
    *,
    parse: Callable[[Any], Any] | None = None,  # Any: as above
    **option: Any,  # Any: typer's own
) -> Any:  # Any: a field of any type
    """Declare a setting by the fields of `Setting`; default commands: the stages it decides."""
    text = default if isinstance(default, str) else ""
    known = Setting(about, stages, stages if commands is None else commands, parse, text, option)
    value = parse(default) if parse and text else default
    return field(default=value, metadata={"setting": known})


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked as far as it can be without running anything.

    Make one with `Settings.of`, which reads texts as the command line takes them.

    >>> Settings.of(workload="model.py", loss_tolerance="0.5%", recipes="rowwise").loss_tolerance
    0.005

    Raises:
        SettingsError: a value is not one that its setting takes.
        DeviceError: the target does not go with `parallel` or `meta`.
        WorkloadError: `batch` or `sequence` is given for what is no config.
    """

    workload: str = setting("", "The workload: FILE or FILE:NAME.", STAGES, commands=())
    script: str = setting(
        "",
        "Tune what a training script trains instead.",
        STAGES,
        commands=(),
        metavar="TRAIN.py | -m MODULE",
    )
    script_args: tuple[str, ...] = setting(
        (), "The script's arguments.", STAGES, commands=(), parse=tuple
    )
    script_steps: int = setting(
        32, "Training steps of the script to record, then it is stopped.", STAGES, (), min=8
    )
    target: str = setting(
        "auto",
        "auto, cpu, cuda, cuda:N, or a device profile (name or path) that is predicted.",
        (PROFILE, SENSITIVITY, VERIFICATION),
    )
    out: Path = setting(
        "autoprec-out",
        "Folder for what the run writes.",
        commands=(PROFILE, SENSITIVITY, VERIFICATION),
        parse=Path,
    )
    loss_tolerance: float = setting(
        "0.1%",
        "Allowed relative loss gap, e.g. 0.1% or 0.001.",
        (SEARCH, VERIFICATION),
        parse=parsing.parse_fraction,
    )
    metric_tolerance: tuple[str, ...] = setting(
        (),
        "How far a metric of evaluate(model) may differ from FP32's, in its unit: 'accuracy>=-0.2' "
        "(it may fall by 0.2), 'perplexity<=0.1', or NAME=0.2 (either way). May repeat.",
        (VERIFICATION,),
        parse=parsing.parse_metrics,
        metavar="NAME>=-X|NAME<=X|NAME=X",
    )
    run_steps: int | None = setting(
        None,
        "Steps of the run that the plan is for: the tolerance is for its end, and the gap expected "
        "there is told; default: the steps that the proof trains, and the gap expected at the end "
        "of the scheduler, where there is one.",
        (SEARCH, VERIFICATION),
        min=1,
    )
    global_batch_tokens: int | None = setting(
        None,
        "Tokens of an optimizer step of that run, where they are more than of a batch here: larger "
        "batches average out noise, but not what FP8 does to all of them.",
        (SENSITIVITY,),
        min=1,
    )
    memory: int | None = setting(
        None,
        "Largest peak memory of training with the plan on one device, e.g. 40GiB.",
        (SEARCH,),
        parse=parsing.parse_memory,
    )
    memory_limit: int | None = setting(
        None,
        "Most memory that tuning itself may take on the device, e.g. 20GiB; default: what is free.",
        commands=(PROFILE, SENSITIVITY, VERIFICATION),
        parse=partial(parsing.parse_memory, option="--memory-limit"),
    )
    keep: tuple[str, ...] = setting(
        (),
        "GLOB=PRECISION[:RECIPE] to fix layers, e.g. 'head=bf16_o2'. May repeat.",
        (SEARCH,),
        parse=parsing.parse_keeps,
    )
    recipes: tuple[Recipe, ...] = setting(
        ",".join(APPLICABLE_RECIPES),
        "FP8 recipes to consider, separated by commas.",
        (PROFILE, SENSITIVITY),
        parse=parsing.parse_recipes,
    )
    gemms_hp: bool = setting(
        True, "Consider FP8 layers with some GEMMs in BF16.", (PROFILE, SENSITIVITY)
    )
    trials: int | None = setting(
        None,
        "Optuna trials after the exact seeds; default 12, of a small model 36.",
        (SEARCH,),
        min=0,
    )
    time_budget: float | None = setting(
        None,
        "Time limit of the search, e.g. 20m, 90s or 1h.",
        (SEARCH,),
        parse=parsing.parse_duration,
    )
    seed: int = setting(0, "Seed of everything random.", STAGES, min=0, max=SEED_MAX)
    storage: str = setting("", "Optuna storage URL; default OUT/study.db.", (SEARCH,))
    study: str = setting("autoprec", "Name of the Optuna study.", (SEARCH,))
    worker: bool = setting(
        False,
        "Only measure plans for a search on the same --storage (SQLite: on one host).",
        commands=(SEARCH,),
        names=("--worker",),
    )
    checkpoint: Path | None = setting(
        None,
        "Start from this checkpoint (state dict) instead of from scratch.",
        (SENSITIVITY, VERIFICATION),
        parse=parsing.parse_path,
    )
    sensitivity: Path | None = setting(
        None,
        "Use this sensitivity.json instead of measuring.",
        (SENSITIVITY,),
        commands=(),
        parse=parsing.parse_path,
    )
    proxy: str = setting(
        "",
        "A small model of the same family (FILE or FILE:NAME): what FP8 does to the loss is "
        "measured and proven on it.",
        (SENSITIVITY, VERIFICATION),
        commands=(),
        metavar="SMALL.py",
    )
    parallel: str = setting(
        "",
        "With a device profile, parts joined by commas: fsdp=N, tp=N, gather=fp8 (FP8 gathers), "
        "ac=full or ac=selective (recomputation), e.g. fsdp=32,tp=8.",
        (PROFILE,),
        metavar="PARTS",
    )
    compile: bool | None = setting(
        None,
        "Times under torch.compile or eager; default: compiled where the target is a GPU or the "
        "model compiles itself, eager on a CPU.",
        (PROFILE,),
        names=("--compile/--eager",),
    )
    meta: bool = setting(
        False,
        "Capture without weights: for a model too large for here. MODEL.py may then be a "
        "transformers config (the JSON file or its folder).",
        (PROFILE,),
        names=("--meta",),
    )
    batch: int | None = setting(
        None, "Of a config: sequences a step on a device; default 1.", (PROFILE,), min=1
    )
    sequence: int | None = setting(
        None, "Of a config: tokens a sequence; default 4096 or what it can.", (PROFILE,), min=2
    )
    verify: bool = setting(True, "Prove the plan by training.")
    seeds: tuple[int, int] = setting(
        "3:10",
        "Seeds of the proof, LEAST:MOST or one number: it ends as soon as they decide.",
        (VERIFICATION,),
        parse=parsing.parse_seeds,
        metavar="LEAST:MOST",
    )
    warmup_steps: int = setting(
        50, "FP32 steps of the proof before its branches.", (VERIFICATION,), min=0
    )
    branch_steps: int = setting(
        25, "Steps of each branch of the proof: with the plan, and without.", (VERIFICATION,), min=2
    )
    horizons: tuple[int, ...] = setting(
        (),
        "Lengths in steps, e.g. 75,150,300, over which the proven plan's gap is measured too: how "
        "it grows says what to expect of longer runs.",
        (VERIFICATION,),
        parse=parsing.parse_horizons,
        metavar="STEPS,...",
    )
    verify_budget: float | None = setting(
        None,
        "In place of --horizons, double the length as often as this time of the proof allows.",
        (VERIFICATION,),
        parse=partial(parsing.parse_duration, option="--verify-budget"),
        metavar="TIME",
    )
    workers: int = setting(
        1, "Branches of the proof to train at once.", commands=(VERIFICATION,), min=1
    )
    launcher: parsing.Launcher | None = setting(
        None,
        "Train branches as jobs of a cluster, e.g. slurm:partition=gpu,timeout_min=60 (needs "
        "submitit); local tries it out here.",
        commands=(VERIFICATION,),
        parse=parsing.parse_launcher,
        metavar="CLUSTER[:NAME=VALUE,...]",
    )
    resume: bool = setting(False, "Skip stages finished in OUT.", names=("--resume",))

    @classmethod
    def of(cls, **given: Any) -> Self:  # Any: texts, or values of the settings' types
        """Return the settings of texts or values by name."""
        known = all_settings()
        if unknown := [name for name in given if name not in known]:
            raise SettingsError(
                f"a setting must be one of {', '.join(known)}, but {unknown[0]!r} is none; "
                "correct the name"
            )
        types: dict[str, Any] = {each.name: each.type for each in fields(cls)}
        return cls(**{n: _read(n, known[n], types[n], value) for n, value in given.items()})

    def absolute(self) -> Self:
        """Return them with paths that hold wherever the user's code changes to."""
        names = ("out", "sensitivity", "checkpoint")
        paths = {name: path for name in names if (path := getattr(self, name)) is not None}
        return replace(self, **{name: path.absolute() for name, path in paths.items()})

    @property
    def script_line(self) -> str:
        """The script with its arguments, as it was given; "" of other workloads."""
        return shlex.join((self.script, *self.script_args)) if self.script else ""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, or would come to nothing."""
        self._check_worker()
        if (self.batch or self.sequence) and not self.config:
            raise WorkloadError(
                "--batch and --sequence are for a workload that is a transformers config, but it "
                f"is {self.script_line or self.workload!r}, which makes its own batches; "
                "leave them out"
            )
        if self.script and self.meta:
            raise WorkloadError(
                "--meta needs a MODEL.py, since a script is run; leave --script out"
            )
        self._check_proof()
        if self.proxy and self.sensitivity is not None:
            raise SettingsError(
                "--proxy measures a sensitivity of its own, but --sensitivity gives one too "
                f"({self.sensitivity}); leave one of them out"
            )
        if self.parallel and self.is_local:
            raise DeviceError(
                "--parallel needs a device profile as its target, since what is measured here is "
                f"one device, but the target is {self.target!r} and --parallel {self.parallel!r}; "
                "add e.g. --target h100-sxm, or leave --parallel out"
            )
        if self.parallel:
            from autoprec.predict.parallel import parse_parallel

            parse_parallel(self.parallel)  # a malformed text ends the run here
        if self.meta and self.is_local:
            raise DeviceError(
                "--meta needs a device profile as its target, since nothing is run that could be "
                f"timed, but the target is {self.target!r}; add e.g. --target h100-sxm"
            )

    def _check_proof(self) -> None:
        if self.script and self.has_workers:
            raise WorkloadError(NEEDS_FILE.format(given=f"--script {self.script_line}"))
        if self.horizons and self.verify_budget:
            raise SettingsError(
                "--horizons says which lengths are measured, and --verify-budget how long, but got "
                "both; leave one of them out"
            )

    def _check_worker(self) -> None:
        if self.worker and not (self.storage and (self.workload or self.script)):
            raise SettingsError(
                "a worker measures plans for a search in another process, which needs --storage "
                f"and --workload, but they are {self.storage!r} and {self.workload!r}; give both, "
                "as that search has them"
            )

    @property
    def config(self) -> Path | None:
        """The transformers config that is the workload, if it is one."""
        return None if self.script else config_file(self.workload)

    @property
    def of_proof(self) -> tuple[str, ...]:
        """The options that were given and decide nothing but the proof."""
        return tuple(
            f"--{each.name.replace('_', '-')}"
            for each in fields(self)
            if each.metadata["setting"].commands == (VERIFICATION,)
            and getattr(self, each.name) != each.default
        )

    @property
    def has_workers(self) -> bool:
        """Whether branches of the proof train in other processes."""
        return self.workers > 1 or self.launcher is not None

    @property
    def is_local(self) -> bool:
        """Whether the target is the machine at hand rather than a device profile."""
        return LOCAL_TARGET.fullmatch(self.target) is not None

    @property
    def constraint(self) -> "Constraint":
        """What the plan must satisfy."""
        from autoprec.records import Constraint

        return Constraint(
            loss_tolerance=self.loss_tolerance,
            grad_error_budget=None,
            memory_bytes=self.memory,
            keep=self.keep,
            run_steps=self.run_steps,
        )

    @property
    def metric_tolerances(self) -> "tuple[MetricTolerance, ...]":
        """How far the user's metrics may differ."""
        return tuple(map(parsing.parse_metric, self.metric_tolerance))

    @property
    def terms(self) -> "Terms":
        """How far the proof goes."""
        from autoprec.verification import Terms

        least, most = self.seeds
        return Terms(
            seeds_min=least,
            seeds_max=most,
            warmup_steps=self.warmup_steps,
            branch_steps=self.branch_steps,
            horizons=self.horizons,
            budget_s=self.verify_budget,
        )

    @property
    def fp8_options(self) -> "tuple[Option, ...]":
        """The FP8 options of the recipes to consider."""
        from autoprec.records import fp8_option

        return tuple(fp8_option(recipe) for recipe in self.recipes)

    def device_profile(self) -> "DeviceProfile | None":
        """Return the device profile that the target names; None for the machine at hand."""
        from autoprec.predict.registry import load_device_profile

        return None if self.is_local else load_device_profile(self.target)


def all_settings() -> dict[str, Setting]:
    """Return every setting, by name."""
    return {each.name: each.metadata["setting"] for each in fields(Settings)}


def _read(name: str, known: Setting, kind: Any, given: Any) -> Any:  # Any: of any type
    """Return the value of a setting, from a text or a value of its type."""
    try:
        value = known.parse(given) if known.parse else parsing.parse_type(given, kind)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"--{name.replace('_', '-')} cannot be {shown_value(given)}; give a value as the "
            "command line takes it, and True or False where it takes none"
        ) from error
    for end, limit in (("least", known.option.get("min")), ("most", known.option.get("max"))):
        if limit is None or value is None:
            continue
        if value < limit if end == "least" else value > limit:
            raise SettingsError(
                f"--{name.replace('_', '-')} must be at {end} {limit}, but it is "
                f"{shown_value(given)}"
            )
    return value
