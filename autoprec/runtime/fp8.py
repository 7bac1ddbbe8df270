"""FP8 linears: the user's own module object, computing through torchao.

The module's class is changed to one that inherits from it and from torchao's `Float8Linear`, whose
forward then runs on the module's own weight and bias. Object identity, parameters, hooks, name,
`isinstance(module, nn.Linear)` and `state_dict` stay; `torch.compile` sees another type and
compiles again. Torch does the same for parametrizations and `fully_shard`.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.errors import PlanMismatchError
from autoprec.precision import float8_config, import_torchao
from autoprec.records import Option

_ATTRIBUTES = ("config", "linear_mm_config", "fp8_active")


class Fp8Module:
    """Marks a linear that runs in FP8; `base_class` is what it was."""

    base_class: type[nn.Linear]
    fp8_active: bool

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the original class: the class made here has no importable name."""
        return _new_module, (self.base_class,), vars(self)


def make_fp8(module: nn.Linear, option: Option) -> None:
    """Make `module` run in FP8 as `option` says, in place."""
    template = import_torchao().float8_linear.Float8Linear.from_float(
        nn.Linear(1, 1, bias=False, device="meta"), float8_config(option)
    )
    vars(module).update(
        config=template.config,
        linear_mm_config=template.linear_mm_config,
        fp8_active=True,  # a plain flag: torch.compile guards on it
    )
    module.__class__ = fp8_class(type(module))


def unmake_fp8(module: nn.Module) -> None:
    """Give an FP8 linear its own class back.

    Raises:
        PlanMismatchError: something else has changed the module's class since.
    """
    cls = type(module)
    if "base_class" not in vars(cls):
        raise PlanMismatchError(
            f"an FP8 layer must keep the class that apply gave it, but it is {cls.__name__}; "
            "undo first what was applied after the plan"
        )
    module.__class__ = vars(cls)["base_class"]
    for name in _ATTRIBUTES:
        delattr(module, name)


def fp8_class(base: type[nn.Linear]) -> type[nn.Linear]:
    """Return the FP8 version of a linear class; one class per base, so that types compare."""
    if base not in _CLASSES:
        _CLASSES[base] = _make_class(base)
    return _CLASSES[base]


_CLASSES: dict[type[nn.Linear], type[nn.Linear]] = {}


def _make_class(base: type[nn.Linear]) -> type[nn.Linear]:
    float8_linear = import_torchao().float8_linear.Float8Linear

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's own name
        if not self.fp8_active:
            return F.linear(input, self.weight, self.bias)
        output: Tensor = float8_linear.forward(self, input)
        return output

    bases = (Fp8Module, float8_linear) if base is nn.Linear else (Fp8Module, base, float8_linear)
    body = {"base_class": base, "forward": forward, "extra_repr": float8_linear.extra_repr}
    return type(f"Fp8{base.__name__}", bases, body)


def _new_module(base: type[nn.Linear]) -> nn.Linear:
    cls = fp8_class(base)
    return cls.__new__(cls)
