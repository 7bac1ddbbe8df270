"""What the user asked for, and how its texts are read."""

from dataclasses import dataclass, field
from pathlib import Path

from autoprec.common.progress import Progress, report_nothing
from autoprec.errors import DeviceError, RecordError, WorkloadError
from autoprec.predict.parallel import parse_parallel
from autoprec.records import APPLICABLE_RECIPES, Constraint, Option, Recipe, fp8_option
from autoprec.workload.hf_config import config_file

LOCAL_TARGETS = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """What the user asked for. Times in seconds, `loss_tolerance` relative (0.001 = 0.1 %).

    `script`, if given, is a training script to record for `script_steps` steps in the place of a
    workload file. `meta`: the model is captured without storage, so nothing of it can be measured.
    `parallel` holds the degrees of a device profile's run, checked before anything is captured.
    `batch` sequences of `sequence` tokens are a step of a workload that is a transformers config.

    Raises:
        DeviceError: `parallel` cannot be read, or the target is the machine at hand.
        WorkloadError: `batch` or `sequence` is given for what is no config.
    """

    workload: str = ""
    script: str = ""
    script_args: tuple[str, ...] = ()
    script_steps: int = 32
    target: str = "auto"
    out: Path = Path("autoprec-out")
    loss_tolerance: float = 1e-3
    keep: tuple[str, ...] = ()
    recipes: tuple[Recipe, ...] = APPLICABLE_RECIPES
    trials: int = 12
    time_budget_s: float | None = None
    seed: int = 0
    storage: str | None = None
    study: str = "autoprec"
    checkpoint: Path | None = None
    sensitivity: Path | None = None
    parallel: str = ""
    compiled: bool | None = None
    meta: bool = False
    batch: int | None = None
    sequence: int | None = None
    gemms_hp: bool = True
    verify: bool = True
    resume: bool = False
    progress: Progress = field(default=report_nothing, compare=False)

    def __post_init__(self) -> None:
        """Refuse a `parallel`, `batch` or `sequence` that would come to nothing."""
        if (self.batch or self.sequence) and not self.config:
            raise WorkloadError(
                "--batch and --sequence are for a workload that is a transformers config, but it "
                f"is {self.script or self.workload!r}, which makes its own batches; "
                "leave them out"
            )
        if not self.parallel:
            return
        if self.is_local:
            raise DeviceError(
                "--parallel needs a device profile as its target, since what is measured here is "
                f"one device, but the target is {self.target!r} and --parallel {self.parallel!r}; "
                "add e.g. --target h100-sxm, or leave --parallel out"
            )
        parse_parallel(self.parallel)

    @property
    def config(self) -> Path | None:
        """The transformers config that is the workload, if it is one."""
        return None if self.script else config_file(self.workload)

    @property
    def is_local(self) -> bool:
        """Whether the target is the machine at hand rather than a device profile."""
        return self.target in LOCAL_TARGETS

    @property
    def is_compiled(self) -> bool:
        """Whether times are those of torch.compile: by default only for a device profile."""
        return not self.is_local if self.compiled is None else self.compiled


def constraint_of(settings: Settings) -> Constraint:
    """Return the constraint that the settings ask for."""
    return Constraint(
        loss_tolerance=settings.loss_tolerance, grad_error_budget=None, keep=settings.keep
    )


def fp8_options(settings: Settings) -> tuple[Option, ...]:
    """Return the FP8 options of the chosen recipes that a plan can apply: timed and searched."""
    return tuple(fp8_option(recipe) for recipe in settings.recipes if recipe in APPLICABLE_RECIPES)


def measured_options(settings: Settings) -> tuple[Option, ...]:
    """Return the FP8 options whose effect is measured: delayed scaling too, where asked for."""
    return tuple(fp8_option(recipe) for recipe in settings.recipes)


def parse_recipes(text: str) -> tuple[Recipe, ...]:
    """Return the recipes of a comma-separated list.

    Raises:
        RecordError: a name is no recipe, or none of them can be applied.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in tuple(Recipe)]
    if wrong or not set(names) & set(APPLICABLE_RECIPES):
        raise RecordError(
            f"--recipes must be among {', '.join(APPLICABLE_RECIPES)} (and {Recipe.DELAYED} beside "
            f"these, for comparison: no plan applies it), but it is {text!r}; "
            "separate several with commas"
        )
    return tuple(Recipe(name) for name in dict.fromkeys(names))


def parse_fraction(text: str) -> float:
    """Return 0.001 for `0.1%` or `0.001`.

    Raises:
        RecordError: it is not a number between 0 and 1.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise RecordError(
            f"--loss-tolerance must be a share above 0 and below 1, but it is {text!r}; "
            "write e.g. 0.1% or 0.001"
        )
    return value


def parse_duration(text: str) -> float | None:
    """Return seconds for `20m`, `90s` or `1h`; None for an empty text.

    Raises:
        RecordError: it is not a positive number with s, m or h.
    """
    if not text:
        return None
    factors = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        seconds = float(text[:-1]) * factors[text[-1]]
    except (ValueError, KeyError):
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise RecordError(
            f"--time-budget must be a number with s, m or h, but it is {text!r}; write e.g. 20m"
        )
    return seconds
