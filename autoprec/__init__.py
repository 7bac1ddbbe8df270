"""autoprec: which layers of this model should train in FP8, BF16 or FP32, measured and proven.

apply, undo         a plan in and out of a model and its optimizer
attach_optimizer    FP32 masters for an optimizer that was made after `apply`
master_view         the FP32 master weights as a plain model
verify_applied      proof that what runs is what the plan says
Guard               watches a run and takes layers out of FP8
save_checkpoint     model, optimizer and guard in one file that a kill leaves whole
load_checkpoint     and back
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoprec.guard import Guard
    from autoprec.runtime import apply, attach_optimizer, master_view, undo, verify_applied
    from autoprec.runtime.checkpoint import load_checkpoint, save_checkpoint

__version__ = "0.1.0"

__all__ = [
    "Guard",
    "apply",
    "attach_optimizer",
    "load_checkpoint",
    "master_view",
    "save_checkpoint",
    "undo",
    "verify_applied",
]
HOMES = {
    "Guard": "autoprec.guard",
    "load_checkpoint": "autoprec.runtime.checkpoint",
    "save_checkpoint": "autoprec.runtime.checkpoint",
}


def __getattr__(name: str) -> object:
    """Import what needs torch when it is first asked for: `import autoprec` starts at once."""
    if name not in __all__:
        raise AttributeError(f"module 'autoprec' has no attribute {name!r}")
    return getattr(import_module(HOMES.get(name, "autoprec.runtime")), name)


def __dir__() -> list[str]:
    """Return the public names, imported yet or not."""
    return sorted([*globals(), *__all__])
