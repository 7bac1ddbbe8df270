"""The profile stage of a run: measured or predicted, kept as it grows, and its kernels named last.

    profile.rows.json   the rows of the layers that were timed so far, gone once profile.json is
                        there; `--resume` goes on from it, if all that decides a profile is the same

The names of CUDA kernels come from CUPTI, which makes every later launch of the process slower. So
they are asked for when nothing is timed any more, verification's steps included.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from autoprec.errors import WorkloadError
from autoprec.model.options import compile_obstacle
from autoprec.predict.family import check_proxy
from autoprec.records import ModelSpec, Option, Profile
from autoprec.tuning.ranks import is_first, made_on_first

if TYPE_CHECKING:
    from autoprec.tuning.run import Run
    from autoprec.tuning.settings import Settings

log = logging.getLogger(__name__)
ROWS = "profile.rows.json"


def make_profile(run: "Run") -> Profile:
    """Return the costs of each layer in each option: measured here, or predicted for the target."""
    settings = run.settings
    options, gemms_hp = settings.fp8_options, settings.gemms_hp
    if run.proxy is not None:
        check_proxy(run.spec, run.proxy.spec)  # before minutes of profiling
    uncompiled = compile_obstacle(run.spec)
    if settings.compile and uncompiled:
        raise WorkloadError(f"--compile must be of what compiles, but {uncompiled}; leave it out")
    _check_sensitivity(run)
    _check_proof(run)
    if run.target is None:
        from autoprec.profiler import KeptRows, profile_model

        asked = kept_fp8(settings, run.spec)  # a wrong one ends the run before minutes of profiling
        digest = made_on_first(lambda: run.digest("profile"))
        rows = KeptRows.of(rows_path(settings), digest, resume=settings.resume)
        return profile_model(
            run.context,
            run.spec,
            options=options,
            gemms_hp=gemms_hp,
            compiled=settings.compile,
            kept=rows,
            asked=asked,
        )
    from autoprec.predict import parse_parallel, predict_profile

    profile = predict_profile(
        run.spec,
        run.target,
        parallel=parse_parallel(settings.parallel),
        compiled=settings.compile is not False and not uncompiled,
        options=options,
        gemms_hp=gemms_hp,
    )
    kept_fp8(settings, profile.model)
    return profile.model_copy(update={"compile_problem": uncompiled})


def _check_sensitivity(run: "Run") -> None:
    """Check that sensitivity, if it will be measured, can keep within --memory-limit."""
    settings, measured = run.settings, run.proxy or run
    is_asked = settings.sensitivity is None and "sensitivity" in measured.stages
    if settings.memory_limit and is_asked and not measured.settings.meta:
        from autoprec.sensitivity.room import check_limit

        check_limit(measured.context, measured.spec)


def _check_proof(run: "Run") -> None:
    """Check that the workers of the proof, if there will be one, fit into memory side by side."""
    settings, proven = run.settings, run.proxy or run
    if settings.of_proof and not settings.verify:
        log.warning(
            "--no-verify leaves out the proof, and %s with it", ", ".join(settings.of_proof)
        )
    if settings.verify and settings.has_workers and "verification" in run.stages:
        from autoprec.verification import Workers, check_room_of_branches

        workers = Workers(settings.workers, settings.launcher)
        check_room_of_branches(proven.context, proven.spec, workers)


def rows_path(settings: "Settings") -> Path:
    """Return the file of the rows that are timed so far."""
    return settings.out / ROWS


def kept_fp8(settings: "Settings", spec: ModelSpec) -> dict[str, tuple[Option, ...]]:
    """Return the FP8 options that `--keep` asks for, by layer."""
    if not settings.keep:
        return {}
    from autoprec.search.keep import resolve_keep

    options, gemms_hp = settings.fp8_options, settings.gemms_hp
    keeps = resolve_keep(settings.keep, spec, options=options, gemms_hp=gemms_hp).of_layer
    layers = (layer for layer in spec.layers if layer.name in keeps)
    return {
        layer.name: tuple(o for o in layer.options if o.is_fp8 and keeps[layer.name].allows(o))
        for layer in layers
    }


def named_profile(run: "Run") -> Profile:
    """Return the run's profile with the names of its FP8 layers' CUDA kernels, and write it.

    Nothing is done where there are no CUDA kernels, or where they have their names.
    """
    profile = run.profile
    is_here = run.target is None and "profile" in run.stages and profile.device.kind == "cuda"
    if not is_here or profile.has_kernel_names:
        return profile
    import torch

    from autoprec.profiler import UNNAMED, name_kernels

    try:
        named = name_kernels(run.context, profile, options=run.settings.fp8_options)
    except torch.OutOfMemoryError:
        log.warning("%s: the memory does not suffice", UNNAMED)
        return profile
    if is_first():
        named.save(run.settings.out / "profile.json")
    return named
