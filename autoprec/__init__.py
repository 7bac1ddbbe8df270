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
    NoRoomError,
    PlanMismatchError,
    RecordError,
    SettingsError,
    TrainingStoppedError,
    WorkerError,
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

__all__ = ["Guard", "Limits", "Plan", "Run", "apply", "attach_optimizer", "load_checkpoint"]
__all__ += ["master_view", "save_checkpoint", "tune", "undo", "verify_applied"]
__all__ += ["AutoprecError", "CaptureError", "DeviceError", "InfeasibleError", "NoRoomError"]
__all__ += ["PlanMismatchError", "RecordError", "SettingsError", "TrainingStoppedError"]
__all__ += ["WorkerError", "WorkloadError"]
_HOMES = {  # modules -> what is imported from them when it is first asked for
    "autoprec.guard": ("Guard", "Limits"),
    "autoprec.runtime": ("apply", "attach_optimizer", "master_view", "undo", "verify_applied"),
    "autoprec.runtime.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "autoprec.tuning.api": ("tune",),
    "autoprec.tuning.plan": ("Plan",),
    "autoprec.tuning.run": ("Run",),
}


def __getattr__(name: str) -> object:
    """Import what needs torch when it is first asked for: `import autoprec` starts at once."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'autoprec' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, imported yet or not."""
    return sorted([*globals(), *__all__])
