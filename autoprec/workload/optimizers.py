"""What a user's optimizer is made of, and whether it is one that autoprec can train with.

Optimizers inside it, the tensors of all their states, and the one rule by which `tune` and `apply`
take an optimizer or refuse it.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import GeneratorType, MethodType
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from autoprec.errors import WorkloadError

Closure = Callable[[], Any]  # Any: the user's loss
StepArguments = tuple[tuple[Any, ...], dict[str, Any]]  # Any: whatever a step is given
_BY_ROW = ("crow_indices", "col_indices", "values")
_BY_COLUMN = ("ccol_indices", "row_indices", "values")
SPARSE = {  # the methods that return the tensors of a sparse one
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROW,
    torch.sparse_bsr: _BY_ROW,
    torch.sparse_csc: _BY_COLUMN,
    torch.sparse_bsc: _BY_COLUMN,
}
REMADE = ("_optimizer_", "_zero_grad_profile_name")  # what attributes begin with that are remade
FLAG = "found_inf"  # the attribute by which torch's fused optimizers leave a step out
MANY_CLOSURES = (
    "must call the closure that it is given once, but it calls it again and again, each time at "
    "other weights, which neither tune nor a plan can follow; use a first-order optimizer"
)


def trained_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer has a parameter of a model."""
    return not set(model.parameters()).isdisjoint(trained_by(optimizer))


def is_patch(optimizer: Optimizer, name: str) -> bool:
    """Whether an attribute is a method of somebody's (a scheduler's `step`), which no copy has.

    A function that the optimizer itself holds (ADOPT's clipping) is none.
    """
    value = vars(optimizer)[name]
    is_other = hasattr(type(optimizer), name) or isinstance(value, MethodType | nn.Module)
    return callable(value) and is_other


def twin_of(optimizer: Optimizer, memo: dict[int, Any], **instead: Any) -> Optimizer:
    """Return a copy of an optimizer, without hooks and patched methods.

    Any subclass of `Optimizer` works, whatever its constructor wants: its attributes are copied,
    but those that are given `instead` and generators, which nothing can copy (the parameters that
    its constructor was handed). What `memo` has under an object's id is that object's copy.
    """
    own = {
        name: value
        for name, value in vars(optimizer).items()
        if not name.startswith(REMADE) and name not in instead and not is_patch(optimizer, name)
    }
    memo.update({id(value): value for value in own.values() if isinstance(value, GeneratorType)})
    twin: Optimizer = object.__new__(type(optimizer))
    vars(twin).update(copy.deepcopy(own, memo), **instead)
    twin.__setstate__({})  # makes hooks and the profiled step, as after unpickling
    return twin


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """Return the closure that an optimizer's step is given; the arguments are its hooks'."""
    return next((value for value in (*args[1:], *kwargs.values()) if callable(value)), None)


def after_closure(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    then: Callable[[], object],
    *,
    again: Callable[[], object] = lambda: None,
) -> StepArguments | None:
    """Return a step's arguments with a closure that calls `then` when it is done, for a hook.

    None where it has no closure. `again` is called before the closure is called once more.
    """
    closure, calls = closure_of(args, kwargs), itertools.count()
    if closure is None:
        return None

    def followed() -> Any:  # Any: the user's loss
        if next(calls):
            again()
        loss = closure()
        then()
        return loss

    first, *others = args
    swapped = [followed if callable(value) else value for value in others]
    named = {name: followed if callable(value) else value for name, value in kwargs.items()}
    return (first, *swapped), named


class SeveralOptimizers(Optimizer):
    """Optimizers of different weights as one, which steps them in turn.

    It has their groups, and its state is that of all.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """Take them over: from here on they share a state."""
        self.optimizers = list(optimizers)
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        for each in optimizers:
            self.state.update(each.state)
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:  # Any: torch's own
        """Take what was loaded, for all of them."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # the base's returns
        """Step them, in turn."""
        for each in self.optimizers:
            each.step()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for each in self.optimizers:
            each.state, each.param_groups = (
                self.state,
                [*itertools.islice(groups, len(each.param_groups))],
            )


def name_of(optimizer: Optimizer) -> str:
    """Return the class's name, or those of several that `in_turn` has made one."""
    several = optimizer.optimizers if isinstance(optimizer, SeveralOptimizers) else [optimizer]
    return " and ".join(type(each).__name__ for each in several)


def in_turn(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return optimizers of different weights as one, if there are several."""
    return optimizers[0] if len(optimizers) == 1 else SeveralOptimizers(optimizers)


def checked_optimizer(built: object, model: nn.Module, call: str, wanted: str) -> Optimizer:
    """Return as one, ready to step, what the user's `call` built for a model (or WorkloadError)."""
    found = built if isinstance(built, list | tuple) else (built,)
    several = [each for each in found if isinstance(each, Optimizer)]
    if not several or len(several) < len(found):
        got = type(built).__name__
        raise WorkloadError(f"{call} must return {wanted}, but it returned {got}; fix it")
    if reason := next(filter(None, map(optimizer_refusal, several)), ""):
        raise WorkloadError(f"{call} must return one that a plan can train, but {reason}")
    if any(group.get("maximize") for each in several for group in each.param_groups):
        raise WorkloadError(
            f"{call} must return one that minimises the loss, by which plans are judged, but it "
            "has maximize=True; leave that out, and let loss_fn return the negative"
        )
    own = [set(trained_by(each)) for each in several]
    if not set().union(*own) <= set(model.parameters()):
        raise WorkloadError(
            f"{call} must optimise parameters of the model it is given, but it lists others; "
            "pass model.parameters()"
        )
    if sum(map(len, own)) > len(set().union(*own)):
        raise WorkloadError(f"{call} must give each parameter one optimizer, but some have two")
    for each in several:
        if callable(train := getattr(each, "train", None)):
            train()  # schedule-free ones refuse to step before that
    return in_turn(several)


def checked_schedule(scheduler: LRScheduler, optimizer: Optimizer, call: str) -> LRScheduler:
    """Return what the user's `call` built for an optimizer (or WorkloadError)."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise WorkloadError(
            f"{call} must return a schedule by steps, but ReduceLROnPlateau follows a loss; "
            "leave it out: within the few steps that are trained it does nothing"
        )
    groups = [group for each in optimizers_in(optimizer) for group in each.param_groups]
    if not any(own is group for own in scheduler.optimizer.param_groups for group in groups):
        raise WorkloadError(
            f"{call} must return a schedule of the optimizer that it is given, but its "
            f"{type(scheduler).__name__} is of another one; pass `optimizer` on"
        )
    return scheduler


def optimizer_refusal(optimizer: object) -> str:
    """Return why neither `tune` nor `apply` takes an optimizer, as a clause; empty if they do."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        way_out = "give one, and the others to autoprec.attach_optimizer"
        of_many = f"; {way_out}" if isinstance(optimizer, list | tuple) else ""
        return f"it is a {name}, not a torch.optim.Optimizer{of_many}"
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        wrapped = vars(optimizer).get("optimizer")  # as Accelerate's prepare wraps one
        way_out = "use another" if wrapped is None else f"give it {type(wrapped).__name__} itself"
        return f"{name} did not call Optimizer.__init__, so its steps have no hooks; {way_out}"
    if type(optimizer).__module__.startswith("torch.distributed."):
        return f"{name} keeps optimizers of its own; use a plain one"
    if any(group.get("differentiable", False) for group in optimizer.param_groups):
        return "differentiable=True needs a graph through the parameters; turn it off"
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        return f"{name} {MANY_CLOSURES}"
    own = set(trained_by(optimizer))
    for attribute, value in vars(optimizer).items():
        if isinstance(value, nn.Module) and not own.isdisjoint(value.parameters()):
            return (
                f"{name} holds the model itself (.{attribute}), by which it would reach past FP32 "
                "masters; give it model.parameters()"
            )
    return ""


def optimizers_in(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it holds in its attributes, innermost first."""
    found: list[Optimizer] = []
    _collect(optimizer, found)
    return found


def _collect(optimizer: Optimizer, found: list[Optimizer]) -> None:
    for value in vars(optimizer).values():
        held = value.values() if isinstance(value, dict) else value
        for other in held if isinstance(value, dict | list | tuple) else (value,):
            if isinstance(other, Optimizer) and other is not optimizer and other not in found:
                _collect(other, found)
    found.append(optimizer)


def rated_groups(optimizer: Optimizer) -> list[dict[str, Any]]:  # Any: torch's own
    """Return the parameter groups with a learning rate, of the optimizers inside as well.

    One without sets its own, as Adafactor does with relative steps.
    """
    groups = (group for each in optimizers_in(optimizer) for group in each.param_groups)
    every = {id(group): group for group in groups}.values()
    return [group for group in every if group.get("lr") is not None]


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Return every tensor in the states of an optimizer and of those inside it, each once."""
    states = [list(each.state.values()) for each in optimizers_in(optimizer)]
    leaves = (leaf for leaf in tree_leaves(states) if isinstance(leaf, Tensor))
    return list({id(leaf): leaf for leaf in leaves}.values())


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that have the memory of one: itself, or the parts of one that wraps them.

    Quantised tensors and DTensors do; these name their mesh as well. Sparse ones are indices and
    values.
    """
    if tensor.layout in SPARSE:
        yield from (getattr(tensor, name)() for name in SPARSE[tensor.layout])
        return
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), Tensor):
            yield from plain_parts(part)


def storages(tensor: Tensor) -> Iterator[UntypedStorage]:
    """Yield the memory that this process holds of a tensor; of a sparse one indices and values."""
    parts = (part for part in plain_parts(tensor) if torch._C._has_storage(part))
    yield from (part.untyped_storage() for part in parts)
