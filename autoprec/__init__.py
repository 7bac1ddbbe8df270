"""autoprec: which layers of this model should train in FP8, BF16 or FP32, measured and proven.

tune                find, prove and save the plan of a model: a `Run`
Run, Plan           what it found; what is applied
apply, undo         a plan in and out of a model and its optimizer
attach_optimizer    FP32 masters for an optimizer that was made after `apply`
master_view         the FP32 master weights as a plain model
verify_applied      proof that what runs is what the plan says
Guard, Limits       watches a run and takes layers out of FP8; when it does
save_checkpoint     model, optimizer and guard in one file that a kill leaves whole
load_checkpoint     and back
errors              AutoprecError and what it can be: every error class is here too
"""

from importlib import import_module
from typing import TYPE_CHECKING

from autoprec.errors import (
    AutoprecError,
    CaptureError,
    DeviceError,
    InfeasibleError,
    PlanMismatchError,
    RecordError,
    SettingsError,
    TrainingStoppedError,
    WorkloadError,
)

if TYPE_CHECKING:
    from autoprec.guard import Guard, Limits
    from autoprec.runtime.apply import apply, master_view, undo
    from autoprec.runtime.attach import attach_optimizer
    from autoprec.runtime.checkpoint import load_checkpoint, save_checkpoint
    from autoprec.runtime.proof import verify_applied
    from autoprec.tuning.api import tune
    from autoprec.tuning.plan import Plan
    from autoprec.tuning.run import Run

__version__ = "0.2.0"

__all__ = [
    "AutoprecError",
    "CaptureError",
    "DeviceError",
    "Guard",
    "InfeasibleError",
    "Limits",
    "Plan",
    "PlanMismatchError",
    "RecordError",
    "Run",
    "SettingsError",
    "TrainingStoppedError",
    "WorkloadError",
    "apply",
    "attach_optimizer",
    "load_checkpoint",
    "master_view",
    "save_checkpoint",
    "tune",
    "undo",
    "verify_applied",
]
_HOMES = {  # of what is imported when it is first asked for
    "Guard": "autoprec.guard",
    "Limits": "autoprec.guard",
    "Plan": "autoprec.tuning.plan",
    "Run": "autoprec.tuning.run",
    "apply": "autoprec.runtime",
    "attach_optimizer": "autoprec.runtime",
    "load_checkpoint": "autoprec.runtime.checkpoint",
    "master_view": "autoprec.runtime",
    "save_checkpoint": "autoprec.runtime.checkpoint",
    "tune": "autoprec.tuning.api",
    "undo": "autoprec.runtime",
    "verify_applied": "autoprec.runtime",
}


def __getattr__(name: str) -> object:
    """Import what needs torch when it is first asked for: `import autoprec` starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprec' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, imported yet or not."""
    return sorted([*globals(), *__all__])
