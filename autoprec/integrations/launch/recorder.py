"""A script that runs -> what its first training steps did: the model, its optimizer, its batches.

The script must train one model in the usual order, which is followed call by call; whatever is not
in this order ends the script with the reason:

    output = model(...)     the outermost call in training mode of a module with weights
    loss = f(output, ...)   on a tape
    loss.backward()         ends a batch; several batches make a step (gradient accumulation)
    optimizer.step()        ends a step; after the last one that is wanted, the script is stopped
"""

import copy
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autoprec.integrations.launch.optimizers import OptimizerRecipe, take_apart
from autoprec.integrations.launch.patches import Function, Patch, holds, patch_backward
from autoprec.integrations.launch.script import StopScript
from autoprec.integrations.launch.tape import Program, Tape, Taping, Untaped, copied, tensors_in
from autoprec.runtime.masters import ON_MODEL

MODEL_PY = "write a model.py instead (see the README)"


class RecordedBatch(NamedTuple):
    """One call of the model and the way from its output to the loss; tensors on the CPU."""

    args: tuple[Any, ...]  # Any: whatever the script gives its model
    kwargs: dict[str, Any]
    constants: list[Tensor]
    program: Program


@dataclass(frozen=True)
class FirstCall:
    """What it takes to repeat the first batch exactly, and what came out."""

    device: torch.device
    generators: tuple[Tensor, ...]
    autocast: tuple[bool, torch.dtype]


@dataclass
class OpenCall:
    """A call of the model whose backward has not come yet."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    tape: Tape | None = None
    takes_inputs: bool = False


class Recorder:
    """Follows one script. Open it as a context while the script runs."""

    def __init__(self, steps: int) -> None:
        self.wanted, self.steps, self.micro_steps = steps, 0, 1
        self.model: nn.Module | None = None  # the script's own
        self.template: nn.Module | None = None  # a copy on the CPU from before its first call
        self.optimizer: Optimizer | None = None
        self.recipe: OptimizerRecipe | None = None
        self.batches: list[RecordedBatch] = []
        self.losses: list[float] = []
        self.first: FirstCall | None = None
        self.first_norm = math.nan  # of the first batch's gradient
        self.refusal: str | None = None
        self._call: OpenCall | None = None
        self._batches_before = 0
        self._depth = 0  # above 0: inside of the model's forward, or of backward
        self._mode = Taping()
        self._stack = ExitStack()
        self._is_open = False
        self._process = os.getpid()

    def __enter__(self) -> "Recorder":
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(self._mode)
        for handle in (
            Patch(nn.Module, "__call__", self._watched_call),
            patch_backward(self._before_backward, self._after_backward),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ):
            self._stack.callback(handle.remove)
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._mode.tape = None
        self._stack.close()

    @property
    def is_complete(self) -> bool:
        """Whether as many steps as were wanted have been recorded."""
        return self.steps >= self.wanted

    def refuse(self, reason: str) -> NoReturn:
        """End the script: it cannot be recorded."""
        self.refusal = self.refusal or reason
        self._mode.tape = None
        raise StopScript(self.refusal)

    # --- the model's call ------------------------------------------------------------------------

    def _watched_call(self, original: Function) -> Function:
        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if self._depth or not self._is_training(module):
                return original(module, *args, **kwargs)
            self._before_call(module, args, kwargs)
            self._depth += 1
            try:
                output = original(module, *args, **kwargs)
            finally:
                self._depth -= 1
            self._after_call(output)
            return output

        return __call__

    def _is_training(self, module: nn.Module) -> bool:
        return (
            self._is_open
            and os.getpid() == self._process  # a forked worker has this wrapper too
            and module.training
            and torch.is_grad_enabled()
            and any(parameter.requires_grad for parameter in module.parameters())
        )

    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:  # Any: the user's
        if self.refusal or self.is_complete:
            raise StopScript(self.refusal)
        inner = _inner(module)
        if self.model is None:
            self._take_model(inner)
        elif inner is not self.model:
            names = f"{type(self.model).__name__} and {type(inner).__name__}"
            self.refuse(f"one model must be trained, but the script calls several ({names})")
        if self._call is not None:
            self.refuse(
                "the model must be called once before each backward, but the script calls it twice"
            )
        if any(t.requires_grad and not t.is_leaf for t in tensors_in((args, kwargs))):
            self.refuse(
                "the model's inputs must not depend on other weights, but an input of "
                f"{type(inner).__name__} has a gradient"
            )
        versions = [tensor._version for tensor in tensors_in((args, kwargs))]
        self._call = OpenCall(copied(args), copied(kwargs), versions)
        self._inputs = args, kwargs

    def _after_call(self, output: Any) -> None:  # Any: the user's
        if self._call is None or self.model is None:
            return
        versions = [tensor._version for tensor in tensors_in(self._inputs)]
        self._call.takes_inputs = versions != self._call.versions
        self._call.tape = self._mode.tape = Tape(output, self.model)
        del self._inputs

    def _take_model(self, model: nn.Module) -> None:
        if ON_MODEL in vars(model):
            self.refuse("the script must train plainly, but it applies a plan itself")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            if ranks > 1:
                self.refuse(f"one process must train, but there are {ranks}")
        self.model = model
        device = next(model.parameters()).device
        kind = device.type
        enabled = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.first = FirstCall(device, generator_states(), enabled)
        try:
            self.template = copy.deepcopy(model).to("cpu")
        except (RuntimeError, TypeError, AttributeError, copy.Error) as error:
            reason = " ".join(str(error).split())[:200]
            self.refuse(f"the model must be one that can be copied, but copying it fails: {reason}")
        self.template.zero_grad(set_to_none=True)

    # --- backward --------------------------------------------------------------------------------

    def _before_backward(self, tensors: Any, gradients: Any) -> None:  # Any: torch's
        self._depth += 1  # checkpointing runs layers again, and backward inside of backward
        if self._depth > 1 or not self._is_open:
            return
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if self._call is None or self._call.tape is None:
            self.refuse(
                "each backward must follow a call of the model in training mode, but the script "
                "calls backward without one, or twice"
            )
        if len(roots) != 1 or roots[0].numel() != 1 or _has_gradient(gradients):
            self.refuse("the loss must be one scalar, but backward starts from something else")
        self._end_batch(self._call, self._call.tape, roots[0])

    def _end_batch(self, call: OpenCall, tape: Tape, root: Tensor) -> None:
        self._mode.tape = self._call = None
        try:
            program = tape.finish(root, takes_inputs=call.takes_inputs)
        except Untaped as missing:
            self.refuse(
                "the loss must come from the model's output through torch functions, but it also "
                f"depends on {missing}, which was not seen"
            )
        batch = RecordedBatch(call.args, call.kwargs, tape.constants, program)
        self.batches.append(batch)
        self.losses.append(float(root.detach()))

    def _after_backward(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._is_open and len(self.batches) == 1 and self.model is not None:
            self.first_norm = gradient_norm(self.model)

    # --- the optimizer's step --------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # Any: torch's
        if not self._is_open:
            return
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            self.refuse(
                "optimizer.step() must be called without a closure, but the script gives "
                f"{type(optimizer).__name__} one"
            )
        if self.optimizer is not None and optimizer is not self.optimizer:
            names = f"{type(self.optimizer).__name__} and {type(optimizer).__name__}"
            self.refuse(f"one optimizer must train the model, but the script steps two ({names})")
        if self.model is None or len(self.batches) == self._batches_before:
            self.refuse(
                "optimizer.step() must follow the model's call in training mode and backward, but "
                "none of both was seen before it"
            )
        if self._call is not None:
            self.refuse("each call of the model must have its backward, but one had none")
        if self.optimizer is None:
            self._take_optimizer(optimizer, self.model)

    def _take_optimizer(self, optimizer: Optimizer, model: nn.Module) -> None:
        own = {id(parameter) for parameter in model.parameters()}
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        if not holds(optimizer, model) or any(id(parameter) not in own for parameter in listed):
            self.refuse(
                f"the optimizer must train the weights of {type(model).__name__} alone, but "
                f"{type(optimizer).__name__} has others"
            )
        self.optimizer, self.recipe = optimizer, take_apart(optimizer, model)
        self.micro_steps = len(self.batches)

    def _after_step(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:  # Any: torch's
        if not self._is_open:
            return
        self.steps += 1
        self._batches_before = len(self.batches)
        if self.is_complete:
            raise StopScript


def generator_states() -> tuple[Tensor, ...]:
    """Return the states of torch's generators: the CPU's, then those of all GPUs."""
    states = [torch.get_rng_state()]
    return (*states, *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ()))


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of all gradients together."""
    gradients = [p.grad.detach() for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def _inner(module: nn.Module) -> nn.Module:
    """Return the module inside of torch.compile's and data parallelism's wrappers."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, wrappers):
            module = module.module
        elif isinstance(inner, nn.Module):
            module = inner
        else:
            return module


def _has_gradient(gradients: Any) -> bool:  # Any: torch's
    if gradients is None:
        return False
    listed = [gradients] if isinstance(gradients, Tensor) else list(gradients)
    return any(gradient is not None for gradient in listed)
