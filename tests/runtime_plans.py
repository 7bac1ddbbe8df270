"""Plans for any model, without a search: every layer one option, some of them another."""

from collections.abc import Mapping

from torch import nn

from autoprec.model.layers import find_layers, layer_kind, model_layers
from autoprec.records import (
    BF16_O2,
    Assignment,
    Basis,
    Constraint,
    Fingerprint,
    LayerKind,
    Option,
    Plan,
)


def plan_for(
    model: nn.Module, option: Option = BF16_O2, others: Mapping[str, Option] | None = None
) -> Plan:
    """Return a plan with `option` wherever it can be, BF16 O2 elsewhere, and `others` by name."""
    layers = []
    for name, layer in find_layers(model).items():
        kind, shapes = layer_kind(layer), [tuple(p.shape) for p in layer.parameters()]
        fits = kind is LayerKind.LINEAR and all(size % 16 == 0 for size in shapes[0])
        chosen = (others or {}).get(name, option if fits or not option.is_fp8 else BF16_O2)
        fields = {f: getattr(chosen, f) for f in ("precision", "recipe", "gemms_hp")}
        layers.append(Assignment(name=name, kind=kind, shapes=tuple(shapes), **fields))
    return Plan(
        layers=tuple(layers),
        uncovered=tuple(model_layers(model).uncovered),
        constraint=Constraint(loss_tolerance=0.001, grad_error_budget=None),
        fingerprint=Fingerprint(
            structure=model_layers(model).structure,
            device="",
            capability="",
            software={},
            compile_mode="eager",
            tokens_per_step=0,
        ),
        grad_error=None,
        grad_error_basis=Basis.UNKNOWN,
        predicted=None,
    )
