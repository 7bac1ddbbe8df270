"""`tune --dry-run`: which layers there are, what `--keep` and the recipes leave them, what runs.

One training step is run for the shapes (with `--meta` none); nothing is timed, nothing is written.
"""

import tempfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from autoprec.cli.console import drawn_progress
from autoprec.common.grouping import grouped
from autoprec.records import LayerSpec
from autoprec.report.formats import count_of
from autoprec.report.layer_table import fold_names
from autoprec.report.text_table import Line, Part, Table
from autoprec.search import default_trials
from autoprec.search.keep import resolve_keep
from autoprec.search.problem import tied_groups
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings


def dry_run(settings: Settings) -> list[Part]:
    """Return the layers of the workload, alike ones in one line, and what a tune would do."""
    with drawn_progress() as progress, tempfile.TemporaryDirectory() as folder:
        run = Run(replace(settings, out=Path(folder) / "dry"), progress=progress)
        spec, target = run.spec, run.target
    if target is not None:
        from autoprec.predict.parallel import parse_parallel
        from autoprec.predict.predict import retarget_model

        parallel = parse_parallel(settings.parallel)
        spec = retarget_model(spec, target, settings.fp8_options, parallel)
    options, gemms_hp = settings.fp8_options, settings.gemms_hp
    keeps = resolve_keep(settings.keep, spec, options=options, gemms_hp=gemms_hp)
    kept = {name: keep.text for name, keep in keeps.of_layer.items()}
    recipes = {option.recipe for option in options}
    kept |= {name: f"tied to {lead}: {kept[lead]}" for name, lead in _tied(spec.layers, kept)}
    alike: dict[tuple[str, ...], list[str]] = {}
    for layer in spec.layers:
        takes = [o.key for o in layer.options if not o.is_fp8 or o.recipe in recipes]
        weight = layer.parameters[0].shape if layer.parameters else ()
        shape = str(layer.gemm or "x".join(map(str, weight)))
        why = next((refusal.reason for refusal in layer.refusals), "")
        row = (layer.kind.value, shape, kept.get(layer.name) or ", ".join(takes), why)
        alike.setdefault(row, []).append(layer.name)
    rows = [(name, *row[:3]) for row, names in alike.items() for name in fold_names(names)]
    reasons = grouped((why, name) for (*_, why), names in alike.items() for name in names)
    return [
        Table(["layer", "kind", "shape (MxKxN)", "--keep, or what it can take"], rows),
        *(Line(f"no FP8: {', '.join(fold_names(n))}: {why}") for why, n in reasons.items() if why),
        *map(Line, keeps.notes),
        *map(Line, _plans(settings, spec.layers, fixed=len(kept))),
    ]


def _tied(layers: Sequence[LayerSpec], kept: Container[str]) -> list[tuple[str, str]]:
    """Return the layers that share a parameter with a kept one, which they follow, and that one."""
    groups = [[layers[i].name for i in group] for group in tied_groups(layers)]
    leads = [(next((name for name in group if name in kept), ""), group) for group in groups]
    return [(name, lead) for lead, group in leads if lead for name in group if name not in kept]


def _plans(settings: Settings, layers: Sequence[LayerSpec], *, fixed: int) -> Iterator[str]:
    """Yield what the stages would do."""
    kinds = len({(layer.shape_key, layer.options) for layer in layers})
    how = "measure" if settings.is_local else "predict"
    yield f"{count_of(len(layers), 'layer')}, {fixed} fixed by --keep; nothing was timed or written"
    yield f"profile: {how} {count_of(kinds, 'kind')} of layers on {settings.target}"
    trials = default_trials(layers) if settings.trials is None else settings.trials
    yield f"search: up to {count_of(trials, 'plan')} beside the exact and uniform ones"
    least, most = settings.seeds
    length = f"{settings.warmup_steps} + {settings.branch_steps} steps"
    proof = f"{least} to {most} seeds of {length}" if settings.verify else "none (--no-verify)"
    yield f"proof: {proof}; all goes to {settings.out}"
