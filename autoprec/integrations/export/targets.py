"""One entry to every export: a plan and a target's name -> the text to save or paste.

An export says exactly what the plan says about FP8, by exact names, or it is an error: an export
that is nearly right trains the wrong layers in FP8 and tells nobody (torchtitan#4008). What the
target leaves to the trainer (how BF16 and FP32 parameters are stored) is said in its first lines.
"""

from collections.abc import Callable
from enum import StrEnum

from autoprec.errors import RecordError
from autoprec.integrations.export.choices import check_exportable
from autoprec.integrations.export.megatron import megatron_yaml
from autoprec.integrations.export.snippets import accelerate_snippet, torchao_snippet
from autoprec.integrations.export.torchtitan import torchtitan_snippet
from autoprec.integrations.export.transformer_engine import transformer_engine_yaml
from autoprec.records import Plan


class ExportTarget(StrEnum):
    """What a plan can be exported to."""

    TORCHAO = "torchao"
    TORCHTITAN = "torchtitan"
    ACCELERATE = "accelerate"
    MEGATRON = "megatron"
    TRANSFORMER_ENGINE = "transformer-engine"


EXPORTERS: dict[ExportTarget, Callable[[Plan], str]] = {
    ExportTarget.TORCHAO: torchao_snippet,
    ExportTarget.TORCHTITAN: torchtitan_snippet,
    ExportTarget.ACCELERATE: accelerate_snippet,
    ExportTarget.MEGATRON: megatron_yaml,
    ExportTarget.TRANSFORMER_ENGINE: transformer_engine_yaml,
}


def export_plan(plan: Plan, to: str) -> str:
    """Return the plan as `to` reads it: Python to paste, or a YAML file.

    Raises:
        RecordError: there is no such target.
        PlanMismatchError: the target cannot say what the plan says.
    """
    if to not in list(ExportTarget):
        raise RecordError(
            f"--to must be one of {', '.join(ExportTarget)}, but it is {to!r}; choose one of these"
        )
    check_exportable(plan, to)
    return EXPORTERS[ExportTarget(to)](plan)
