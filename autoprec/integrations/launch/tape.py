"""The operations between a model's output and its loss -> a program that runs on other outputs.

While a `Tape` is open, every call of a torch function that has the model's output in its arguments,
or a result of such a call, becomes one step: the function, and its arguments with references in the
place of tensors:

    output      a tensor in what the model returned
    value       a result of an earlier step
    parameter   a parameter of the model (a penalty on the weights, a tied head)
    constant    any other tensor (targets, masks), copied when it is first used

What is computed without the output is a constant. Numbers that a script takes out of tensors
(`.item()`) stay the numbers that they were.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from autoprec.errors import WorkloadError

Value = Any  # Any: whatever a script hands to torch or a model returns
_READ_GRADIENT = getattr(Tensor.grad, "__get__", None)  # a getter in C, which has no type
NO_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)


class Source(StrEnum):
    """Where a tensor of a program comes from."""

    OUTPUT = "output"
    VALUE = "value"
    PARAMETER = "parameter"
    CONSTANT = "constant"
    DEVICE = "device"  # no tensor: the device that the model is on
    UNKNOWN = "unknown"  # depends on weights in a way that was not seen; `name` says what it is


@dataclass(frozen=True)
class Ref:
    """A place in a program where a tensor is put in; `leaf` counts the tensors of one result."""

    source: Source
    index: int = 0
    leaf: int = 0
    name: str = ""


@dataclass(frozen=True)
class Step:
    """One call of a torch function; `writes` are the references that it changed in place."""

    function: Callable[..., Value]
    args: Value
    kwargs: Value
    has_grad: bool
    writes: tuple[Ref, ...]


@dataclass(frozen=True)
class Program:
    """The steps from a model's output to its loss."""

    steps: Mapping[int, Step]
    root: Ref
    changed: frozenset[int]  # constants that steps write into
    writes_inputs: bool = False  # whether the model writes into its own arguments


@dataclass(frozen=True)
class Known:
    """What a tape knows of a tensor, as it was when the tape last saw it."""

    ref: Ref
    version: int
    requires_grad: bool

    def is_still(self, tensor: Tensor) -> bool:
        """Whether nothing unseen happened to it since: another value, or a graph of its own."""
        if self.ref.source is Source.CONSTANT and tensor._version != self.version:
            return False
        return self.requires_grad or not tensor.requires_grad  # a custom autograd.Function's result


class Taping(TorchFunctionMode):
    """Hands every call of a torch function to the tape that is open, if one is."""

    tape: "Tape | None" = None

    def __torch_function__(
        self,
        func: Callable[..., Value],
        types: Sequence[type],
        args: tuple[Value, ...] = (),
        kwargs: dict[str, Value] | None = None,
    ) -> Value:
        """Run the function, taped or not."""
        if self.tape is None:
            return func(*args, **(kwargs or {}))
        return self.tape.run(func, args, kwargs or {})


class Tape:
    """Records what happens to one output of a model."""

    def __init__(self, output: Value, model: nn.Module) -> None:
        self.constants: list[Tensor] = []
        self._steps: list[Step] = []
        self._refs: dict[int, Known] = {}  # by id
        self._kept: list[Tensor] = []  # alive, so that no other tensor gets an id of these
        self._device = next(model.parameters()).device
        for index, parameter in enumerate(model.parameters()):
            self._name(parameter, Ref(Source.PARAMETER, index))
        for leaf, tensor in enumerate(tensors_in(output)):
            self._name(tensor, Ref(Source.OUTPUT, leaf=leaf))

    def run(
        self, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> Value:
        """Run a function and record it if the output plays a part in it."""
        tensors = list(tensors_in((args, kwargs)))
        is_live = any(id(tensor) in self._refs for tensor in tensors)
        if not is_live or function is _READ_GRADIENT:
            return function(*args, **kwargs)
        # the references are taken before the call, which may write into its arguments: a constant
        # is copied as it was, and torch counts the writes in `_version`
        taken_args, taken_kwargs = mapped((args, kwargs), self._ref)
        versions = [tensor._version for tensor in tensors]
        has_grad = torch.is_grad_enabled()
        result = function(*args, **kwargs)
        written = [t for t, v in zip(tensors, versions, strict=True) if t._version != v]
        step = Step(function, taken_args, taken_kwargs, has_grad, writes=())
        self._record(step, made=list(tensors_in(result)), written=written)
        return result

    def _record(self, step: Step, *, made: list[Tensor], written: list[Tensor]) -> None:
        """Append a step, and name the tensors that it made or changed."""
        if step.function in NO_HOOKS:
            # a hook changes gradients in a way that no replay repeats
            writes: tuple[Ref, ...] = (Ref(Source.UNKNOWN, name="a gradient hook"),)
        elif made or written:
            # tensors changed in place keep their references, and the step is known to write to
            # them; those that are views of the same storage changed as well
            written = self._sharing(written)
            writes = tuple(self._refs[id(tensor)].ref for tensor in written)
        else:
            return  # such as .item() or a shape
        self._steps.append(dataclasses.replace(step, writes=writes))
        for tensor in written:
            self._name(tensor, self._refs[id(tensor)].ref)
        for leaf, tensor in enumerate(made):
            self._name(tensor, Ref(Source.VALUE, len(self._steps) - 1, leaf))

    def finish(self, root: Tensor, *, writes_inputs: bool) -> Program:
        """Return the program that leads to `root`, without the steps that do not matter to it.

        Raises:
            Untaped: a step that matters has an operand of which the origin was not seen.
        """
        ref = self._ref(root)
        needed, steps = {(ref.source, ref.index)}, {}
        unknown = [ref] if ref.source is Source.UNKNOWN else []
        # backwards, so that all that a step needs is known when its turn comes; a step that writes
        # in place is always kept, since a later one may read what it wrote
        for index in reversed(range(len(self._steps))):
            step = self._steps[index]
            if (Source.VALUE, index) not in needed and not step.writes:
                continue
            steps[index] = step
            refs = [*refs_in((step.args, step.kwargs)), *step.writes]
            needed |= {(each.source, each.index) for each in refs}
            unknown += [each for each in refs if each.source is Source.UNKNOWN]
        if unknown:
            raise Untaped(unknown[0].name)
        changed = {w.index for s in steps.values() for w in s.writes if w.source is Source.CONSTANT}
        ordered = dict(sorted(steps.items()))
        return Program(ordered, ref, frozenset(changed), writes_inputs=writes_inputs)

    def _sharing(self, written: list[Tensor]) -> list[Tensor]:
        """Return all known tensors that a write in place changed: also those it was a view of."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in written}
        known = {id(tensor): tensor for tensor in self._kept} if storages else {}
        return [t for t in known.values() if t.untyped_storage().data_ptr() in storages]

    def _name(self, tensor: Tensor, ref: Ref) -> None:
        self._refs[id(tensor)] = Known(ref, tensor._version, tensor.requires_grad)
        self._kept.append(tensor)

    def _ref(self, value: Value) -> Value:
        """Return the reference that stands for an argument, or the argument if it is no tensor."""
        if isinstance(value, torch.device):
            is_own = value.type == self._device.type
            return Ref(Source.DEVICE) if is_own else value
        if not isinstance(value, Tensor):
            return value
        known = self._refs.get(id(value))
        if known is not None and known.is_still(value):
            return known.ref
        if value.requires_grad:  # it hangs on weights, and no step that was seen made it
            name = value.grad_fn.name() if value.grad_fn is not None else "another parameter"
            return Ref(Source.UNKNOWN, name=name)
        ref = Ref(Source.CONSTANT, len(self.constants))
        self.constants.append(copied(value))
        self._name(value, ref)
        return ref


class Untaped(Exception):  # noqa: N818 - the tape's answer to its caller, no user sees it
    """The loss depends on something that no step made; the message names it."""


def replay(
    program: Program, model: nn.Module, output: Value, constants: Sequence[Tensor]
) -> Tensor:
    """Run a program on what the model returned, and return the loss.

    Raises:
        WorkloadError: the model returns something else than when it was recorded.
    """
    parameters = list(model.parameters())
    values: dict[Ref, Value] = {Ref(Source.DEVICE): parameters[0].device}
    values |= {Ref(Source.PARAMETER, index): tensor for index, tensor in enumerate(parameters)}
    values |= {Ref(Source.OUTPUT, leaf=leaf): t for leaf, t in enumerate(tensors_in(output))}
    for index, constant in enumerate(constants):  # those that steps write into start afresh
        is_changed = index in program.changed
        values[Ref(Source.CONSTANT, index)] = constant.clone() if is_changed else constant

    def value_of(leaf: Value) -> Value:
        if not isinstance(leaf, Ref):
            return leaf
        if leaf not in values:
            raise WorkloadError(
                "a recorded model must return what it returned in the script, but the loss needs "
                "a tensor that is not in it now; write a model.py (see the README)"
            )
        return values[leaf]

    for index, step in program.steps.items():
        args, kwargs = mapped((step.args, step.kwargs), value_of)
        with torch.set_grad_enabled(step.has_grad and torch.is_grad_enabled()):
            result = step.function(*args, **kwargs)
        for leaf, tensor in enumerate(tensors_in(result)):
            values[Ref(Source.VALUE, index, leaf)] = tensor
    loss: Tensor = value_of(program.root)
    return loss


def without_scale(program: Program, constants: Sequence[Tensor], *, micro_steps: int) -> Program:
    """Return a program without the loss's last factors: accumulation's 1/n, GradScaler's scale."""
    while program.root.source is Source.VALUE:
        # the root is a product or quotient of one tensor of the program and one factor: step over
        step = program.steps[program.root.index]
        if _name_of(step.function) not in ("mul", "__mul__", "__rmul__", "div", "__truediv__"):
            break
        sides = [value for value in step.args if not _is_factor(value, constants, micro_steps)]
        if len(step.args) != 2 or len(sides) != 1 or not isinstance(sides[0], Ref):
            break
        program = dataclasses.replace(program, root=sides[0])
    return program


def tensors_in(value: Value) -> Iterator[Tensor]:
    """Yield the tensors in a model's output or a function's arguments, always in one order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, f.name) for f in dataclasses.fields(value)])


def refs_in(value: Value) -> list[Ref]:
    """Return the references in a step's arguments."""
    leaves: list[Value] = []
    mapped(value, leaves.append)
    return [leaf for leaf in leaves if isinstance(leaf, Ref)]


def mapped(value: Value, function: Callable[[Value], Value]) -> Value:
    """Return the same nesting of dicts, lists, tuples and slices with `function` of every leaf."""
    if type(value) is dict:
        return {key: mapped(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function) for item in value))
    if isinstance(value, slice):
        ends = (value.start, value.stop, value.step)
        return slice(*(mapped(item, function) for item in ends))
    if type(value) in (list, tuple, torch.Size):
        return type(value)([mapped(item, function) for item in value])
    return function(value)


def copied(value: Value) -> Value:
    """Return a copy on the CPU that shares no storage, without its graph."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).requires_grad_(value.requires_grad)
    if type(value) in (dict, list, tuple) or hasattr(value, "_fields"):
        return mapped(value, copied)
    other = copy.deepcopy(value)
    return other.to("cpu") if hasattr(other, "to") else other


def _name_of(function: Callable[..., Value]) -> str:
    return (resolve_name(function) or "").rpartition(".")[2]


def _is_factor(value: Value, constants: Sequence[Tensor], micro_steps: int) -> bool:
    if isinstance(value, Ref):
        if value.source is not Source.CONSTANT or constants[value.index].numel() != 1:
            return False
        scale = float(constants[value.index])
        return scale > 1 and scale.hex().startswith("0x1.0000000000000p")  # GradScaler's are 2^k
    return (
        micro_steps > 1
        and not isinstance(value, Tensor)
        and value in (micro_steps, 1 / micro_steps)
    )
