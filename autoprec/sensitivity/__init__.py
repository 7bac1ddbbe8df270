"""What each option does to the gradient, per layer: the gradient perturbation e.

measure         the stage: workload -> Sensitivity
tables          the two ways to the table of e, and the choice between them
layerwise       the exact way: one layer x option at a time
probes, rows    the depth-free way: all layers and options from a few sign-coded probes
local           the error an option makes inside one layer
replay          what went through a layer, and the layer run again on it
operands        a linear's operands, their FP8 casts and their ranges
casts           what the recipes do to an operand, in plain arithmetic
history         the amax history of delayed scaling
joint           the measured e of a whole assignment
reference       warmed-up weights, batches and reference gradients
preconditioner  how the optimizer weighs a gradient
projection      short sketches of gradients
gemm            FP8 GEMMs on a CPU, fast
estimates       per-batch numbers -> estimates with standard errors
explain         operand statistics in words

Importing this package imports no torch: `explain` can be had without it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoprec.sensitivity.joint import JointMeter
    from autoprec.sensitivity.measure import measure_sensitivity
    from autoprec.sensitivity.reference import Reference, prepare_reference

__all__ = ["JointMeter", "Reference", "measure_sensitivity", "prepare_reference"]

_HOMES = {
    "JointMeter": "joint",
    "measure_sensitivity": "measure",
    "Reference": "reference",
    "prepare_reference": "reference",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
