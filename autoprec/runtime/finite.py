"""Whether a training step of the whole plan stays finite, and if not, where that begins.

Layers that are fine alone can overflow together. A step whose parameters' gradients are not all
finite poisons the weights, and every checkpoint after it. Hooks note, without waiting for the
device, which layers give an output that is not finite, and in which backward makes such a gradient
first (clipping spreads one NaN over all of them later); all is looked at once, when the optimizer
is about to step. An output may be infinite on purpose (a mask), so it alone is no fault: outputs
only say where a gradient's fault began. Compiled code hides its layers: of it, only gradients are
known.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from autoprec.common.text import first_and_more
from autoprec.device.ranks import Group, gathered, local_part, sharded_tensor
from autoprec.errors import PlanMismatchError
from autoprec.model.layers import find_layers, plain_name, unwrapped
from autoprec.workload.optimizers import FLAG, StepArguments, after_closure, trains
from autoprec.workload.written import is_compiled

K = TypeVar("K")
FIRST: "weakref.WeakKeyDictionary[nn.Module, StepWatch]" = weakref.WeakKeyDictionary()  # to come


class StepWatch:
    """Notes a model's outputs and gradients, layer by layer, from now on until `end`."""

    def __init__(self, model: nn.Module, *, group: Group = None) -> None:
        """Put hooks into a model; `group` are the ranks that hold it, by default all."""
        self.group = group
        self.outputs: dict[str, Tensor] = {}  # by layer in forward order: whether all were finite
        self.gradients: dict[str, Tensor] = {}  # in backward order, as backward made them
        self.handles: dict[_Outputs, RemovableHandle] = {}
        inner = unwrapped(model)
        taps = {p: tap for p, tap in _owners(inner).items() if p.requires_grad and p.is_leaf}
        self.taps = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]  # torch
                _Gradients(self.gradients, name)
            )
            for parameter, name in taps.items()
        ]
        if is_compiled(model):
            return  # compiled code is guarded on hooks: it would compile again without them
        for name, layer in find_layers(inner).items():
            hook = _Outputs(self.outputs, name)
            self.handles[hook] = layer.register_forward_hook(hook)

    def close(self) -> None:
        """Take the hooks out."""
        for handle in (*self.taps, *self.handles.values()):
            handle.remove()

    def end(self, model: nn.Module, *, over_ranks: bool = False) -> tuple[str, ...]:
        """Stop, and return the layers that are at fault in a step, after its backward.

        None if all gradients are finite. Else those with an output that is not, in forward order,
        and then those of which a gradient is not, in the order of backward; a parameter of no layer
        has its own name. `over_ranks` makes it a collective with one answer: each rank may hold
        parts.
        """
        found = self.look(model, over_ranks=over_ranks)
        for handle in self.taps:
            handle.remove()
        for hook, handle in self.handles.items():
            if hook.was_called:
                handle.remove()
            else:  # in compiled code, which is guarded on it and leaves it out
                hook.flags = None
        return found

    def forget(self) -> None:
        """Let go of what was noted; the next step is the first then."""
        self.outputs.clear()
        self.gradients.clear()

    def look(self, model: nn.Module, *, over_ranks: bool = False) -> tuple[str, ...]:
        """Return what `end` does, and go on; waits for the device once."""
        kinds = (self.outputs, self.gradients, _gradients(unwrapped(model)))
        flags = {(kind, name): flag for kind, of in enumerate(kinds) for name, flag in of.items()}
        # only what the optimizer is about to take decides: hooks and clipping came after backward
        bad = _bad(flags)
        own = [[name for of, name in bad if of == kind] for kind in range(len(kinds))]
        # An infinite output does no harm where its own layer's gradients are finite (a mask).
        own[0] = [name for name in own[0] if name in own[1] or name not in self.gradients]
        ranks = gathered(own, group=self.group) if over_ranks else [own]
        outputs, made, taken = (
            list(dict.fromkeys(name for one in ranks for name in one[kind]))
            for kind in range(len(kinds))
        )
        return tuple(dict.fromkeys([*outputs, *(made or taken)])) if taken else ()


def watch_first_step(model: nn.Module, *, group: Group = None) -> None:
    """Check the model's first training step when its optimizer is about to step."""
    leave_first_step(model)
    FIRST[unwrapped(model)] = StepWatch(model, group=group)


def leave_first_step(model: nn.Module) -> None:
    """Watch no more: a guard looks at every step of the model, and says itself what follows."""
    watch = FIRST.pop(unwrapped(model, parallel=True), None)
    if watch is not None:
        watch.close()


def forget_step(model: nn.Module) -> None:
    """Let go of what a step of the model showed that trains nothing."""
    if model in FIRST:
        FIRST[model].forget()


def check_first_step(  # Any: whatever a step is given
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> StepArguments | None:
    """End the watch of the model that an optimizer is about to train, with these arguments.

    Returns:
        Arguments with a closure that is looked at in their place; None where there is none.

    Raises:
        PlanMismatchError: gradients are not finite. Nothing was trained then.
    """
    _check_gradients(optimizer)
    if not FIRST:
        return None
    return after_closure(args, kwargs, lambda: _check_gradients(optimizer))


def _check_gradients(optimizer: Optimizer) -> None:
    for model in [model for model in FIRST if trains(optimizer, model)]:
        parameters = list(model.parameters())
        if all(parameter.grad is None for parameter in parameters):
            continue
        # each rank of a sharded model looks at its own parts, and all stop together
        over_ranks = any(isinstance(each, sharded_tensor()) for each in parameters)
        is_scaled = getattr(optimizer, FLAG, None) is not None
        if is_scaled and FIRST[model].look(model, over_ranks=over_ranks):
            FIRST[model].forget()  # GradScaler lowers its scale, and the optimizer skips this step
            continue
        if layers := FIRST.pop(model).end(model, over_ranks=over_ranks):
            raise PlanMismatchError(
                "the first step of a plan must give finite gradients, but it does not; it begins "
                f"in {first_and_more(map(repr, layers), most=4)}; nothing was trained or saved: "
                "set these layers to bf16_o2 or fp32, or run without the plan to see whether the "
                "model does it"
            )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the floating tensors that hold a NaN or an infinity."""
    flags: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            _note(flags, name, tensor)
    return _bad(flags)


class _Outputs:
    """A hook that notes whether the outputs of one layer are finite."""

    def __init__(self, flags: dict[str, Tensor] | None, name: str) -> None:
        self.flags, self.name = flags, name
        self.was_called = False  # outside of compiled code

    def __reduce__(self) -> Any:  # Any: pickle's own
        """Be copied and saved without effect: nobody ends the watch of a copy."""
        return _Outputs, (None, self.name)

    def __call__(self, _module: nn.Module, _inputs: object, output: object) -> None:
        if torch.compiler.is_compiling() or self.flags is None:
            return
        self.was_called = True
        if not torch.is_grad_enabled():
            return
        leaves = torch.utils._pytree.tree_leaves(output)
        for leaf in (leaf for leaf in leaves if isinstance(leaf, Tensor)):
            if leaf.is_floating_point():
                _note(self.flags, self.name, leaf)


@dataclass(frozen=True)
class _Gradients:
    """A hook that notes whether the gradient of a layer's parameter is finite."""

    flags: dict[str, Tensor]
    name: str

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            _note(self.flags, self.name, parameter.grad)


def _owners(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the layer of each parameter, or its own name where it has none."""
    owners = {p: name for name, layer in find_layers(model).items() for p in layer.parameters()}
    return {p: plain_name(owners.get(p, name)) for name, p in model.named_parameters()}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return whether the gradients of each layer, and of other parameters, are finite."""
    flags: dict[str, Tensor] = {}
    for parameter, name in _owners(model).items():
        if parameter.grad is not None:
            _note(flags, name, parameter.grad)
    return flags


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
@torch.no_grad()
def _note(flags: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Note under a name whether a tensor is finite, on its device.

    Unseen by dispatch modes: selective checkpointing counts a forward's operations, and a second
    forward, whose flag joins the first one's, must have the same.
    """
    with _disable_current_modes():
        local = local_part(tensor.detach())
        # what has no values, or those of a transform such as vmap, says nothing
        if local.is_meta or isinstance(local, FakeTensor) or is_functorch_wrapped_tensor(local):
            return
        if local.is_nested:
            local = local.values()
        elif local.layout is torch.sparse_coo:
            local = local._values()
        flag = local.isfinite().all()
        flags[name] = flags[name] & flag if name in flags else flag


def _bad(flags: Mapping[K, Tensor]) -> list[K]:
    """Return the keys whose flags say that something was not finite; one wait for all."""
    if not flags:
        return []
    first = next(iter(flags.values()))
    values = torch.stack([flag.to(first.device) for flag in flags.values()]).tolist()
    return [key for key, is_good in zip(flags, values, strict=True) if not is_good]
