"""Whether a training step of the whole plan stays finite, and if not, where that begins.

Layers that are fine alone can overflow together. A step whose parameters' gradients are not all
finite poisons the weights, and every checkpoint after it. Hooks note, without waiting for the
device, which layers give an output that is not finite; the gradients are looked at once, when the
optimizer is about to step. An output may be infinite on purpose (a mask), so it alone is no fault:
outputs only say where a gradient's fault began. Compiled code hides its layers: of it, only
gradients are known.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from autoprec.common.text import first_and_more
from autoprec.device.ranks import local_part, sum_over_ranks
from autoprec.errors import PlanMismatchError
from autoprec.model.layers import find_layers, plain_name, unwrapped

FIRST: "weakref.WeakKeyDictionary[nn.Module, StepWatch]" = weakref.WeakKeyDictionary()  # to come


class StepWatch:
    """Notes the outputs of a model's layers from now on, until `end`."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, Tensor] = {}  # by layer in forward order: whether all were finite
        self.handles: list[RemovableHandle] = []
        if any(isinstance(m, OptimizedModule) or m._compiled_call_impl for m in model.modules()):
            return  # compiled code is guarded on hooks: it would compile again without them
        for name, layer in find_layers(unwrapped(model)).items():
            note = _Outputs(self.outputs, plain_name(name))
            self.handles.append(layer.register_forward_hook(note))

    def close(self) -> None:
        """Take the hooks out."""
        for handle in self.handles:
            handle.remove()

    def end(self, model: nn.Module, *, over_ranks: bool = False) -> tuple[str, ...]:
        """Stop, and return the layers that are at fault in a step, after its backward.

        None if all gradients are finite. Else those with an output that is not, in forward order,
        and then those of which a gradient is not; a parameter of no layer has its own name.
        `over_ranks` makes it a collective with one answer: each rank may hold parts.
        """
        self.close()
        gradients = _gradients(unwrapped(model))
        names = list(dict.fromkeys([*self.outputs, *gradients]))
        bad = [_count_bad(found, names) for found in (self.outputs, gradients)]
        counts = bad[0] + bad[1]
        if over_ranks:
            counts = sum_over_ranks(counts)
        outputs, grads = counts[: len(names)], counts[len(names) :]
        if not any(grads):
            return ()
        at_fault = [name for name, count in zip(names, outputs, strict=True) if count]
        also = [name for name, count in zip(names, grads, strict=True) if count]
        return tuple(dict.fromkeys([*at_fault, *also]))


def watch_first_step(model: nn.Module) -> None:
    """Check the model's first training step when its optimizer is about to step."""
    FIRST[unwrapped(model)] = StepWatch(model)


def leave_first_step(model: nn.Module) -> None:
    """Watch no more: a guard looks at every step of the model, and says itself what follows."""
    watch = FIRST.pop(unwrapped(model, parallel=True), None)
    if watch is not None:
        watch.close()


def check_first_step(optimizer: Optimizer) -> None:
    """End the watch of the model that an optimizer is about to train.

    Raises:
        PlanMismatchError: gradients are not finite. Nothing was trained then.
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in [m for m in FIRST if any(id(p) in owned for p in m.parameters())]:
        refuse_bad_step(FIRST.pop(model).end(model))


def refuse_bad_step(layers: Sequence[str]) -> None:
    """Raise PlanMismatchError if there are layers at fault."""
    if layers:
        raise PlanMismatchError(
            "the first step of a plan must give finite gradients, but it does not; it begins in "
            f"{first_and_more(map(repr, layers), most=4)}; nothing was trained or saved: set these "
            "layers to bf16_o2 or fp32, or run without the plan to see whether the model does it"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the floating tensors that hold a NaN or an infinity."""
    flags: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            _note(flags, name, tensor)
    counts = _count_bad(flags, flags)
    return [name for name, count in zip(flags, counts, strict=True) if count]


class _Outputs:
    """A hook that notes whether the outputs of one layer are finite."""

    def __init__(self, flags: dict[str, Tensor] | None, name: str) -> None:
        self.flags, self.name = flags, name

    def __reduce__(self) -> Any:  # Any: pickle's own
        """Be copied and saved without effect: nobody ends the watch of a copy."""
        return _Outputs, (None, self.name)

    def __call__(self, _module: nn.Module, _inputs: object, output: object) -> None:
        if torch.compiler.is_compiling() or self.flags is None or not torch.is_grad_enabled():
            return
        leaves = torch.utils._pytree.tree_leaves(output)
        for leaf in (leaf for leaf in leaves if isinstance(leaf, Tensor)):
            if leaf.is_floating_point():
                _note(self.flags, self.name, leaf)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return whether the gradients of each layer, and of other parameters, are finite."""
    owners = {p: name for name, layer in find_layers(model).items() for p in layer.parameters()}
    flags: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            _note(flags, plain_name(owners.get(parameter, name)), gradient)
    return flags


@torch.no_grad()
def _note(flags: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Note under a name whether a tensor is finite, on its device."""
    flag = local_part(tensor.detach()).isfinite().all()
    flags[name] = flags[name] & flag if name in flags else flag


def _count_bad(flags: Mapping[str, Tensor], names: Iterable[str]) -> list[float]:
    """Return 1.0 for each name whose flag says that something was not finite; one wait for all."""
    if not flags:
        return [0.0 for _ in names]
    first = next(iter(flags.values()))
    values = torch.stack([flag.to(first.device) for flag in flags.values()]).tolist()
    bad = {name for name, is_good in zip(flags, values, strict=True) if not is_good}
    return [float(name in bad) for name in names]
