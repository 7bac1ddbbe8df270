"""One tuning run: settings in; workload, model, profile, sensitivity, search, plan, proof out.

    capture + profile -> profile.json -> sensitivity.json -> search.json + plan.json
    -> verification.json (+ plan.json with its certificate) -> layers.csv + report.html

Every stage is a property of `Run` that makes its record when it is first asked for, writes it to
the run's folder and keeps it; what a run does not make itself it reads from there. Torch is
imported only by the stages that need it, so that searching and reporting saved records starts at
once.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from autoprec.common.files import write_atomically
from autoprec.common.progress import Progress, report_nothing
from autoprec.errors import RecordError, WorkloadError
from autoprec.records import Certificate, ModelSpec, Profile, Search, Sensitivity
from autoprec.records.verification import Verdict, Verification
from autoprec.tuning.folder import INPUTS, Folder, saved_beside
from autoprec.tuning.plan import Plan
from autoprec.tuning.profiling import make_profile, named_profile, rows_path
from autoprec.tuning.proof import check_evaluate, keeper_of_warm_up, prove_plans
from autoprec.tuning.ranks import check_launch, check_ranks, is_first, made_on_all, made_on_first
from autoprec.tuning.searching import kept_reference, make_search, search_tables
from autoprec.tuning.settings import NEEDS_FILE, STAGES, Settings

if TYPE_CHECKING:
    import torch

    from autoprec.model.context import Context
    from autoprec.sensitivity.reference import Reference
    from autoprec.workload.functions import Workload

logger = logging.getLogger(__name__)

R = TypeVar("R", Profile, Sensitivity, Search, Verification)


class Run:
    """A tuning run and its folder; `autoprec.tune` makes one and runs every stage of it.

    Args:
        settings: what was asked for.
        workload: live functions in the place of a file, see `workload_from`.
        proxy: live functions in the place of the file that `settings.proxy` names.
        stages: those that this run makes; the records of others are read from its folder.
        progress: told how far each stage is.

    Raises:
        AutoprecError: of its settings, what can be checked before any work is wrong.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        workload: "Workload | None" = None,
        proxy: "Workload | None" = None,
        stages: tuple[str, ...] = STAGES,
        progress: Progress = report_nothing,
    ) -> None:
        check_launch(settings)
        self.settings = settings = settings.absolute()
        self.stages = stages
        self.progress = progress if is_first() else report_nothing
        # What the settings name is looked at before any work: it may be read much later.
        self.target = settings.device_profile()
        if settings.sensitivity is not None:
            Sensitivity.load(settings.sensitivity)
        if settings.checkpoint is not None and {"sensitivity", "verification"} & set(stages):
            from autoprec.runtime.checkpoint import read_checkpoint

            read_checkpoint(settings.checkpoint)
        if "search" in stages and (settings.storage or os.path.exists(settings.out / "study.db")):
            from autoprec.search.storage import check_storage, storage_in

            check_storage(settings.storage or storage_in(settings.out))
        self.proves = settings.verify and "verification" in stages  # trains plans, in the end
        self.is_live = workload is not None
        if self.is_live and settings.has_workers:
            raise WorkloadError(NEEDS_FILE.format(given="made of live functions"))
        if workload is not None:
            self.workload = workload
        self.folder = made_on_first(lambda: Folder(self.settings.out))
        self.proxy: Run | None = None  # its own run, in OUT/proxy
        if settings.proxy:
            from autoprec.tuning.proxy import open_proxy

            self.proxy = open_proxy(self.settings, workload=proxy, progress=progress)
            self.proxy.proves = self.proves

    # --- what the stages are made of -----------------------------------------------------------

    @cached_property
    def workload(self) -> "Workload":
        """The user's functions: a file executed, a config read, a script recorded, once."""
        from autoprec.workload.functions import workload_from
        from autoprec.workload.loading import load_workload

        settings = self.settings
        if settings.config and settings.meta:
            from autoprec.workload.hf_config import config_model

            model = config_model(settings.config, batch=settings.batch, sequence=settings.sequence)
            return workload_from(model, name=settings.workload)
        if settings.script:
            from autoprec.integrations.launch import Script, record_workload

            script = Script.of(settings.script, settings.script_args)
            return record_workload(script, steps=settings.script_steps)
        return load_workload(settings.workload)

    @cached_property
    def device(self) -> "torch.device":
        """Where numerics are measured: the target, or the machine at hand for a device profile."""
        from autoprec.device.local import resolve_device
        from autoprec.device.memory import limit_memory

        device = resolve_device(self.settings.target if self.target is None else "auto")
        if self.settings.memory_limit:
            limit_memory(device, self.settings.memory_limit)
        if self.target is None:
            return device
        logger.warning("%s is predicted; what is measured runs on %s", self.target.name, device)
        return device

    @cached_property
    def context(self) -> "Context":
        """What every stage that runs the model is given; of several ranks, this one's part."""
        from autoprec.device.ranks import world_size
        from autoprec.model.context import Context

        workload, device = self.workload, self.device
        if world_size() > 1:
            from autoprec.model.parallel import parallel_workload
            from autoprec.runtime.shards import gather_in_fp32

            check_ranks(self.settings, workload.digest)
            workload = parallel_workload(workload, device, in_fp32=gather_in_fp32)
        return Context(
            workload,
            device,
            self.settings.seed,
            self.progress,
            memory_limit=self.settings.memory_limit,
        )

    @cached_property
    def spec(self) -> ModelSpec:
        """The model as one training step shows it: run here, or without storage."""
        if "profile" not in self.stages and self._path("profile").exists():
            known = self.profile.model
            self.context.workload.written.moving.update(known.moving)
            return known
        if self.settings.meta:
            from autoprec.model.meta import capture_on_meta

            return capture_on_meta(self.workload, seed=self.settings.seed, progress=self.progress)
        from autoprec.model.capture import capture_model

        return made_on_all(lambda: capture_model(self.context, target=self.target))

    @cached_property
    def reference(self) -> "Reference":
        """The FP32 model after its warm-up: sensitivity and search measure against it."""
        from autoprec.profiler import without_ended
        from autoprec.sensitivity.reference import prepare_reference

        checkpoint = self.settings.checkpoint
        spec = self.spec
        if self.target is None and "profile" in self.stages:
            spec = without_ended(spec, self.profile.layers)
        return prepare_reference(
            self.context,
            spec,
            checkpoint=checkpoint,
            kept=kept_reference(self),
            on_warm=keeper_of_warm_up(self),
        )

    # --- the stages ----------------------------------------------------------------------------

    @cached_property
    def profile(self) -> Profile:
        """What each layer costs in each option: measured here, or predicted for the target."""
        return self._staged(Profile, lambda: make_profile(self))

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """What each option does to the gradient: measured, or taken from where it is known."""
        return self._staged(Sensitivity, self._make_sensitivity)

    @cached_property
    def tables(self) -> tuple[Profile, Sensitivity]:
        """What plans are made of: with FP32 between all layers where that helps and pays."""
        return search_tables(self)

    @cached_property
    def search(self) -> Search:
        """The plans that were looked at, and the one that was chosen."""
        return self._staged(Search, lambda: make_search(self))

    @cached_property
    def candidates(self) -> list[Plan]:
        """The plans to verify, best first: the chosen one, then the next on the front."""
        from autoprec.search import build_plan

        points = dict.fromkeys((self.search.chosen, *self.search.ranked))
        constraint = self.settings.constraint
        plans = (build_plan(*self.tables, self.search, p, constraint=constraint) for p in points)
        return [Plan.of(plan) for plan in plans]

    @cached_property
    def verification(self) -> Verification | None:
        """The proof by training; None where nobody asked, or nothing can be run."""
        can_train = self.proxy is not None or not self.settings.meta
        if not self.settings.verify or not can_train or "verification" not in self.stages:
            return None
        return self._staged(Verification, lambda: prove_plans(self, self.candidates, *self.tables))

    @cached_property
    def plan(self) -> Plan:
        """The plan of the search, or the one that was verified, with its certificate."""
        chosen = self.candidates[0]
        self._save_plan(chosen)  # training may take long, and be interrupted
        if self.verification is None:
            return chosen
        proven = next((p for p in self.candidates if p.digest == self.verification.plan), None)
        if proven is None:
            raise RecordError(
                "the verification must be of a plan of this search, but it is of "
                f"{self.verification.plan}; run the search again, then verify"
            )
        return self._certify(proven, self.verification)

    @property
    def exit_code(self) -> int:
        """0 when the constraint was shown to hold (or nobody asked), 1 when it was not."""
        proof = self.verification
        return 0 if proof is None or proof.verdict is Verdict.VERIFIED else 1

    def make(self) -> "Run":
        """Make every stage in order, and the report."""
        check_evaluate(self)
        _ = self.plan
        self.name_kernels()
        self.report()
        return self

    def name_kernels(self) -> Profile:
        """Return the profile with the names of its CUDA kernels; call it when all is timed."""
        self.profile = named_profile(self)
        return self.profile

    def verify(self, plan_path: Path) -> Verification:
        """Prove or refute one plan; write verification.json, and plan.json with its certificate.

        The profile and sensitivity beside the plan give it a step time and a predicted gap.
        """
        from autoprec.runtime.fit import check_fit

        plan, context = Plan.load(plan_path), self.context
        if steps := self.settings.run_steps:
            constraint = plan.constraint.model_copy(update={"run_steps": steps})
            plan = plan.model_copy(update={"constraint": constraint})
        context.workload.written.moving.update(plan.followers)
        made_on_all(lambda: check_fit(plan, context.workload.build_model(seed=context.seed)))
        check_evaluate(self)
        profile = saved_beside(plan_path, plan, Profile)
        sensitivity = saved_beside(plan_path, plan, Sensitivity)
        found = made_on_all(lambda: prove_plans(self, [plan], profile, sensitivity))
        made_on_first(lambda: found.save(self._path("verification")))
        self._certify(plan, found)
        return found

    def report(self, path: Path | str | None = None) -> Path:
        """Write the run's HTML report and return its path; default: report.html in its folder.

        The layers' table goes beside it as layers.csv.
        """
        target = self.settings.out / "report.html" if path is None else Path(path)
        return made_on_first(lambda: write_report(self.settings.out, target))

    def __str__(self) -> str:
        """Return the text that `autoprec tune` prints at its end."""
        from io import StringIO

        from rich.console import Console

        from autoprec.report import load_run, print_summary

        text = StringIO()
        print_summary(
            load_run(self.settings.out), Console(file=text, width=100), out=self.folder.path
        )
        return text.getvalue()

    def _repr_html_(self) -> str:
        from autoprec.report import load_run, run_html

        return run_html(load_run(self.settings.out))

    # --- how each record is made ---------------------------------------------------------------

    def _make_sensitivity(self) -> Sensitivity:
        from autoprec.predict.transfer import transfer_sensitivity, unknown_sensitivity

        if self.settings.sensitivity is not None:
            given = Sensitivity.load(self.settings.sensitivity)
            is_own = given.structure == self.spec.structure
            return given if is_own else transfer_sensitivity(given, self.spec)
        if self.proxy is not None:
            return transfer_sensitivity(self.proxy.sensitivity, self.spec)
        if self.settings.meta:
            return unknown_sensitivity(self.spec)
        from autoprec.search import check_memory
        from autoprec.sensitivity.measure import measure_sensitivity

        settings = self.settings
        if settings.memory and "search" in self.stages:
            check_memory(self.profile, settings.constraint)
        return measure_sensitivity(
            self.reference,
            options=settings.fp8_options,
            gemms_hp=settings.gemms_hp,
            run_tokens=settings.global_batch_tokens,
        )

    def _certify(self, plan: Plan, verification: Verification) -> Plan:
        """Save and return the plan with the verification's certificate in it."""
        certified = plan.model_copy(update={"certificate": Certificate.of(verification)})
        self._save_plan(certified)
        return certified

    # --- files and resuming --------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder while the context is open; rank 0 holds the lock.

        The proxy's too, whose functions are loaded before any work. A worker writes nothing there,
        and is let in beside others.
        """
        with ExitStack() as stack:
            if not self.settings.worker:
                for run in (self, self.proxy):
                    if run is not None:
                        made_on_first(partial(stack.enter_context, run.folder.locked()))
            if self.proxy is not None:
                _ = self.proxy.workload
            yield

    def _save_plan(self, plan: Plan) -> None:
        made_on_first(lambda: plan.save(self._path("plan")))

    def _path(self, stage: str) -> Path:
        return self.settings.out / f"{stage}.json"

    def _staged(self, record: type[R], make: Callable[[], R]) -> R:
        """Return a stage's record: read where this run does not make it, or nothing has changed."""
        stage = record.KIND
        if stage in self.stages:
            for earlier in INPUTS[stage]:
                if earlier in self.stages:
                    getattr(self, earlier)  # its digest is part of this stage's
        known, digest = made_on_first(lambda: self._known(record))
        if known is not None:
            return known
        with ExitStack() as stack:
            if "torch" in sys.modules:  # a saved run is searched again without it
                from autoprec.device.random_state import random_state_kept

                stack.enter_context(random_state_kept())  # the caller's numbers go on as before
            made = made_on_all(make)
        made_on_first(lambda: self.folder.keep(made, digest, script=self.settings.script_line))
        if stage == "profile":
            made_on_first(lambda: rows_path(self.settings).unlink(missing_ok=True))
        return made

    @property
    def resumes(self) -> str:
        """What `--resume` keeps of the folder and what is made again, in a sentence."""
        kept: list[str] = []
        for stage in self.stages:
            if all(name in kept or name not in self.stages for name in INPUTS[stage]):
                kept += [stage] if self.folder.has(stage, self.digest(stage)) else []
        asked = [stage for stage in self.stages if stage != "verification" or self.settings.verify]
        again = [stage for stage in asked if stage not in kept]
        said = f"--resume keeps {', '.join(kept) or 'no finished stage'}"
        if again:
            said += f"; made now: {', '.join(again)}"
        if "profile" in again:
            said += self._moved
        if "profile" in again and rows_path(self.settings).exists():
            said += " (layers that are timed already are kept, if nothing else changed)"
        return said

    @property
    def _moved(self) -> str:
        """What device the folder's profile is of, where that is another one than this run's."""
        with suppress(RecordError):  # one that cannot be read is made again
            before, now = Profile.load(self._path("profile")).device.name, self._device_name()
            if before != now:
                return f" (profile.json was made for {before}, and this is {now})"
        return ""

    def _device_name(self) -> str:
        """Return the name of the device that times are measured on, or predicted for."""
        if self.target is not None:
            return self.target.name
        from autoprec.device.local import device_name

        return device_name(self.device)

    def digest(self, stage: str) -> str:
        """Return a hash of what decides a stage's record; "" where live functions do."""
        if self.is_live or (self.proxy is not None and self.proxy.is_live):
            return ""
        is_measured = self.target is None and stage == "profile"
        device = self._device_name() if is_measured else ""
        return self.folder.digest(stage, self.settings, self.target, device=device)

    def _known(self, record: type[R]) -> tuple[R | None, str]:
        """Return the folder's record, where this run is not to make it, and its inputs' digest.

        Live functions have no name to be known by, and so no digest.
        """
        stage, path = record.KIND, self._path(record.KIND)
        if stage not in self.stages:
            return record.load(path), ""
        digest = self.digest(stage)
        is_known = self.settings.resume and self.folder.has(stage, digest)
        return record.load(path) if is_known else None, digest


def write_report(folder: Path, target: Path) -> Path:
    """Write layers.csv and an HTML report from the records in a run folder."""
    from autoprec.report import layers_frame, load_run, render_html

    run = load_run(folder)
    if run.plan is not None or run.profile is not None:
        write_atomically(target.parent / "layers.csv", layers_frame(run).to_csv(index=False))
    return write_atomically(target, render_html(run))
