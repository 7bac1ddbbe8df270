"""What the branches of one verification share, and the store of those that are finished.

A killed verification goes on from its files:

    STATE_DIR/warmup-SETUP.pt           model and optimizer state where the branches start; of
                                        several ranks a folder warmup-SETUP, to which all write
    STATE_DIR/branch-SETUP-VARIANT-SEED.json

SETUP is a digest of everything the branches share (workload, settings, device, software), VARIANT
one of the options a branch trained with. So nothing made under other conditions is ever picked up,
and plans tried one after the other share the reference and the control. Files are written to the
side and renamed: a kill leaves a whole file or none, and costs at most the branch in flight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoprec.common.files import refusal_to_write
from autoprec.common.text import short_digest
from autoprec.device.ranks import made_on_first_rank, world_size
from autoprec.model.context import Context
from autoprec.records import BF16_O2, Branch, MetricTolerance, Option, Plan, Precision
from autoprec.records.verification import BranchFile
from autoprec.runtime.checkpoint import Checkpoint, read_checkpoint, save_content
from autoprec.runtime.sharded_state import read_shards, write_shards
from autoprec.verification.sequential import Terms
from autoprec.workload.functions import Batch


class BranchStore:
    """Finished branches by the digest of their variant and seed: in memory and, maybe, on disk."""

    def __init__(self, setup: str, folder: Path | None) -> None:
        """Take the digest of what the branches share, and make the folder where there is none.

        Raises:
            RecordError: it cannot be made.
        """
        self.setup = setup
        self.folder = folder
        suffix = ".pt" if world_size() == 1 else ""
        self._warm_up = folder and folder / f"warmup-{setup}{suffix}"
        self._branches: dict[tuple[str, int], Branch] = {}
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refusal_to_write(folder, error) from error

    def branch(self, variant: str, seed: int, train: Callable[[], Branch]) -> Branch:
        """Return the branch of a variant and seed; where it is not finished, train and keep it."""
        key = (variant, seed)
        path = self._path(variant, seed)
        if key not in self._branches and path is not None and made_on_first_rank(path.is_file):
            self._branches[key] = made_on_first_rank(lambda: BranchFile.load(path)).branch
        if key not in self._branches:
            branch = self._branches[key] = train()
            if path is not None:
                made_on_first_rank(lambda: BranchFile(branch=branch).save(path))
        return self._branches[key]

    def has(self, variant: str, seed: int) -> bool:
        """Whether the branch of a variant and seed is finished."""
        path = self._path(variant, seed)
        return (variant, seed) in self._branches or (path is not None and path.is_file())

    def _path(self, variant: str, seed: int) -> Path | None:
        return self.folder and self.folder / f"branch-{self.setup}-{variant}-{seed}.json"

    def find_warm_up(self, like: Callable[[], Checkpoint] | None = None) -> Checkpoint | None:
        """Return the saved warm-up checkpoint, if there is one.

        Several ranks read their parts into a checkpoint of the same model, which `like` makes.
        """
        path = self._warm_up
        if path is None or not made_on_first_rank(path.exists):
            return None
        return read_checkpoint(path) if like is None else read_shards(path, like())

    def add_warm_up(self, checkpoint: Checkpoint) -> None:
        """Keep the warm-up checkpoint."""
        if self._warm_up is None:
            return
        if checkpoint.is_sharded:
            write_shards(self._warm_up, checkpoint)
        else:
            save_content(self._warm_up, vars(checkpoint))


@dataclass(frozen=True)
class Variant:
    """What a branch trains with: an option per layer; without any 16-bit layer, plain FP32.

    One that `is_written` has the user's own dtypes and autocast in their place.
    """

    label: str
    options: Mapping[str, Option]
    fp32_outputs: tuple[str, ...] = ()  # of the plan's islands
    uncovered: tuple[str, ...] = ()  # parameters outside of layers: BF16 where any layer is 16-bit
    is_written: bool = False

    @property
    def is_reference(self) -> bool:
        """Whether nothing is installed: every layer is FP32."""
        is_fp32 = all(option.precision is Precision.FP32 for option in self.options.values())
        return is_fp32 and not self.is_written

    @property
    def digest(self) -> str:
        """A digest of the options; all-FP32 variants are the reference, whatever their label."""
        if self.is_written:  # of the workload's own dtypes, which the setup's digest tells apart
            return self.label
        keys = sorted((name, option.key) for name, option in self.options.items())
        kept = [self.fp32_outputs] if self.fp32_outputs else []
        return "reference" if self.is_reference else short_digest(keys, *kept)


REFERENCE = Variant(label="reference", options={})
WRITTEN = Variant(label="as_written", options={}, is_written=True)


@dataclass(frozen=True)
class Workers:
    """How many branches train at once: in processes here, or as a launcher's jobs.

    `launcher` is a cluster that submitit knows and its parameters, such as
    `("slurm", (("partition", "gpu"),))`.
    """

    count: int = 1
    launcher: tuple[str, tuple[tuple[str, str | int], ...]] | None = None

    @property
    def are_other_processes(self) -> bool:
        """Whether branches leave this process at all."""
        return self.count > 1 or self.launcher is not None


@dataclass
class Session:
    """What all branches of one verification share."""

    context: Context
    terms: Terms
    loss_tolerance: float  # the relative loss gap that is tested
    evaluation: Sequence[Batch]  # the held-out batches
    checkpoint: Checkpoint  # where the branches start, with the curve of the steps that ran to it
    store: BranchStore
    control: dict[str, Option] | None  # None: every layer of the plan in BF16 O2
    checkpoint_path: str  # the user's own checkpoint, or ""
    workers: Workers = Workers()
    metrics: tuple[MetricTolerance, ...] = ()  # those of the user's that are tested
    floor: float | None = None  # the gap between two runs of a reference, once the first has run

    @property
    def has_masters(self) -> bool:
        """Whether the user trains FP32 parameters; of several ranks it is not asked."""
        return world_size() > 1 or not self.context.workload.written.dtypes

    def variants(self, plan: Plan) -> tuple[Variant, Variant, Variant]:
        """Return reference, control and plan."""
        options = {layer.name: layer.option for layer in plan.layers}
        control = dict.fromkeys(options, BF16_O2) if self.control is None else self.control
        return (
            REFERENCE,
            Variant(label="bf16_o2", options=control, uncovered=plan.uncovered),
            Variant("plan", options, plan.fp32_outputs, uncovered=plan.uncovered),
        )
