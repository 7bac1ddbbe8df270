"""A script that runs -> what its first training steps did: the model, its optimizer, its batches.

The script must train one model, or several side by side, in the usual order, which is followed call
by call; whatever is not in this order ends the script with the reason:

    output = model(...)     outermost calls in training mode: of a module with weights or, where
                            its own methods call them, of its parts
    loss = f(output, ...)   on a tape; calls that it does not depend on were on trial
    loss.backward()         ends a batch; several batches make a step (gradient accumulation)
    optimizer.step()        ends a step; after the last one that is wanted, the script is stopped
"""

import inspect
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.optim import optimizer as step_hooks

from autoprec.common.text import error_line
from autoprec.device.ranks import world_size
from autoprec.errors import WorkloadError
from autoprec.integrations.launch.alive import (
    apart_refusal,
    copies_refusal,
    is_joined,
    is_wrapper,
    join,
    smallest_with,
)
from autoprec.integrations.launch.calls import Attributes, FirstCall, RecordedBatch, SeenCall
from autoprec.integrations.launch.optimizers import SeenOptimizer
from autoprec.integrations.launch.patches import Function, patched
from autoprec.integrations.launch.script import StopScript
from autoprec.integrations.launch.sharded import Policy, copy_sharded
from autoprec.integrations.launch.tape import Tape, Taping
from autoprec.integrations.launch.weights import (
    gradient_norm,
    gradient_norms,
    norm_taken,
    sum_of_weights,
)
from autoprec.model.layers import unwrapped
from autoprec.model.local_copy import REFUSALS, copy_model, is_divided
from autoprec.runtime.masters import ON_MODEL
from autoprec.runtime.shards import kept_gradients
from autoprec.workload.functions import tensors_in
from autoprec.workload.optimizers import StepArguments, after_closure, trained_by, trains
from autoprec.workload.written import is_compiled, take_off_compiled_forwards

CLIP = inspect.signature(nn.utils.clip_grad_norm_)
MOST_CALLS = 16  # on inputs of their own before one backward: outputs of all are kept until then
MODEL_PY = "write a model.py instead (see the README)"


class Recorder:
    """Follows one script."""

    def __init__(self, steps: int) -> None:
        self.wanted, self.steps, self.micro_steps = steps, 0, 1
        self.model: nn.Module | None = None  # the script's own
        self.first: FirstCall | None = None
        self.optimizers: dict[Optimizer, SeenOptimizer] = {}  # the script's own
        self.clip_norm: float | None = None
        self.takes_of_norm: float | None = None  # a step whose gradient is not just scaled
        self.batches: list[tuple[dict[int, SeenCall], Tape]] = []
        self.losses: list[float] = []
        self.first_norm = math.nan  # of the first batch's gradient
        self.refusal: str | None = None
        self._calls: dict[int, SeenCall] = {}  # their backward is still to come
        self._firsts: dict[int, FirstCall | None] = {}  # of those on inputs of their own
        self._batches_before = 0  # the last step, or the first gradient that came to it
        self._norms: dict[nn.Parameter, float] = {}  # of gradients, at the last backward of it
        self._weights = math.nan  # their sum at the last backward of the first step
        self._dropped = 0  # times since then that gradients were gone before a backward
        self._was_lazy = False
        self._foreign = ""  # why the last call that was not recorded cannot be
        self._stepped: list[Optimizer] = []  # since the last gradient
        self._stepping: Optimizer | None = None
        self._depth = 0  # above 0: inside of the model's forward, or of backward
        self._mode, self._thread = Taping(), threading.get_ident()
        self._attributes = Attributes()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow what runs in this context."""
        with (
            torch.compiler.set_stance("force_eager"),  # a tape sees no call of a compiled graph
            self._mode.everywhere(),
            patched(nn.Module, "__call__", self._around_call),
            patched(torch.autograd, "backward", self._around_backward),
            patched(nn.utils, "clip_grad_norm_", self._around_clip),
            patched(nn.utils.clip_grad, "clip_grad_norm_", self._around_clip),
            step_hooks.register_optimizer_step_pre_hook(self._before_step),
            step_hooks.register_optimizer_step_post_hook(self._after_step),
        ):
            yield

    def refuse(self, reason: str) -> NoReturn:
        """End the script: it cannot be recorded."""
        self.refusal = self.refusal or reason
        self._mode.tape = None
        raise StopScript

    # --- the model's call ------------------------------------------------------------------------

    def _around_call(self, call: Function, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        is_training = self._depth == 0 and module.training and torch.is_grad_enabled()
        # a parametrized weight is made where it is read, as at its registration
        if not is_training or isinstance(module, ParametrizationList):
            return call(module, *args, **kwargs)
        is_trained = any(p.requires_grad for p in module.parameters())
        if is_wrapper(unwrapped(module, parallel=True)) or not is_trained:
            return call(module, *args, **kwargs)
        if any(map(is_lazy, module.parameters())):
            self._was_lazy = True  # this call gives it its shapes
            with self._inside():
                return call(module, *args, **kwargs)
        return self._record_call(call, module, args, kwargs)

    def _record_call(self, call: Function, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.refusal or self.steps >= self.wanted:
            raise StopScript  # again: the script caught the first one
        if threading.get_ident() != self._thread:  # the tape is this thread's
            self.refuse("training must run in the script's main thread, but runs in another")
        model = unwrapped(module, parallel=True)
        unknown = [t for t in tensors_in((args, kwargs)) if t.requires_grad and not t.is_leaf]
        if not all(self._mode.tape and self._mode.tape.has_made(tensor) for tensor in unknown):
            self._foreign = (  # on trial, it may be, of a part whose siblings evaluate
                "the model's inputs must not depend on other weights, or on a call before the last "
                f"backward, but an input of {type(model).__name__} has a gradient"
            )
            with self._inside():
                return call(module, *args, **kwargs)
        with self._inside():  # copies are no part of a step
            self._check_model(model)
        # the model may write into its inputs, so they are copied before it runs
        inputs = tensors_in((args, kwargs))
        versions = [tensor._version for tensor in inputs]
        tape = self._mode.tape = self._mode.tape or Tape(next(model.parameters()).device)
        (before, named), nodes = self._take(tape, (args, kwargs))
        if all(node.op == "placeholder" for node in nodes):
            with self._inside():
                self._begin_calls(tape.calls, is_compiled(module))
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        drawn, whole = torch.get_rng_state(), self.model or model
        with self._inside(), self._attributes.around(whole) as state:
            output = call(module, *args, **kwargs)
        writes_inputs = versions != [tensor._version for tensor in inputs]
        # from here on, what happens to the output is on the tape
        number = tape.add(nodes, output, whole, part=model)
        self._calls[number] = SeenCall(model, before, named, writes_inputs, drawn, gpus, state)
        return output

    def _take(self, tape: Tape, inputs: Any) -> tuple[Any, list[fx.Node]]:
        try:
            return tape.take(inputs)
        except REFUSALS as error:
            reason = error_line(error)
            self.refuse(f"a batch must be one that can be copied, but copying it fails: {reason}")

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Take no part in what a call does itself."""
        tape, self._mode.tape = self._mode.tape, None
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._mode.tape = tape

    def _check_model(self, model: nn.Module) -> None:
        """Take the first model that is called; others must be parts of it, or it of them."""
        if self.model is None:
            self.model = model
            return
        is_part = any(part is model for part in self.model.modules())
        if not is_part and not self._widen([model]):
            if type(model) is type(self.model) and self.steps > 1:
                raise StopScript  # the next fold, or the same run resumed: the first has ended
            self.refuse(apart_refusal(self.model, model, is_late=bool(self.optimizers)))

    def _begin_calls(self, number: int, is_compiled: bool) -> None:
        """See to a call on inputs of its own: all before it may have been on trial."""
        if len(self._firsts) == MOST_CALLS:
            oldest = min(self._firsts)
            del self._calls[oldest], self._firsts[oldest]
        model = None if self.batches else self.model  # only the first batch is repeated
        self._firsts[number] = self._first_call(model, is_compiled) if model else None

    def _widen(self, parts: Sequence[nn.Module | nn.Parameter]) -> bool:
        """Take the smallest module that these parts are in, too, for the model, or join them."""
        narrow, wide = self.model, None
        if narrow is not None and not self.optimizers:
            wide = smallest_with([narrow, *parts]) or join([narrow, *parts])
        if narrow is None or wide is None:
            return False
        self.model = wide
        names = (f"{name}." for name, part in wide.named_modules() if part is narrow)
        prefix = "" if is_joined(narrow) else next(names)

        def widened(first: FirstCall) -> FirstCall:
            whole = self._first_call(wide, first.is_compiled)
            values = {f"{prefix}{name}": v for name, v in first.model.state_dict().items()}
            whole.model.load_state_dict(values, strict=False)
            return replace(first, model=whole.model, policy=whole.policy)

        self.first = widened(self.first) if self.first else None
        self._firsts = {n: widened(first) if first else None for n, first in self._firsts.items()}
        return True

    def _first_call(self, model: nn.Module, is_compiled: bool) -> FirstCall:
        if ON_MODEL in vars(model):
            self.refuse("the script must train plainly, but it applies a plan itself")
        if world_size() > 1:
            self.refuse(f"one process must train, but there are {world_size()}")
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            self.refuse("a plan must be able to change the model, but torch.jit has scripted it")
        device = next(model.parameters()).device
        dtype = torch.get_autocast_dtype(device.type)
        autocast = torch.autocast(device.type, dtype, torch.is_autocast_enabled(device.type))
        policy = Policy()
        try:
            if is_divided(model):
                template, policy = copy_sharded(model)
            else:
                template = copy_model(model).to("cpu")
        except (RuntimeError, WorkloadError, *REFUSALS) as error:
            reason = error_line(error)
            self.refuse(f"the model must be one that can be copied, but copying it fails: {reason}")
        template.zero_grad(set_to_none=True)
        take_off_compiled_forwards(template)
        return FirstCall(template, device, autocast, is_compiled, policy)

    # --- backward --------------------------------------------------------------------------------

    def _around_backward(self, call: Function, /, *args: Any, **kwargs: Any) -> None:
        tape = self._mode.tape
        if self._depth == 0:
            self._end_batch(*args, **kwargs)
        with self._inside():  # checkpointing runs layers again, and backward inside of backward
            call(*args, **kwargs)
        if self._depth == 0 and tape is not None and tape.has_changed_gradient:
            self.refuse("gradients must come from the loss alone, but a gradient hook changes one")
        if self._depth == 0 and len(self.batches) == 1 and self.model is not None:
            self.first_norm = gradient_norm(self.model)
        if self._depth == 0 and self.model is not None:
            self._norms = gradient_norms(self.model)

    def _end_batch(self, tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
        tape = self._mode.tape
        if not self._calls and self._was_lazy and not self.batches:
            self.refuse(
                "a model must have its shapes before it is trained, but its lazy layers get them "
                "in the first training call; run a batch through it before that"
            )
        if not self._calls or tape is None:
            self.refuse(
                self._foreign
                or "each backward must follow a call of the model in training mode, with gradients "
                "(an adjoint solver has none), but the script calls backward without one, or twice"
            )
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        given = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors or ()
        if len(roots) != 1 or roots[0].numel() != 1 or any(g is not None for g in given):
            self.refuse("the loss must be one scalar, but backward starts from something else")
        self._mode.tape = None
        self._count_dropped()
        self._check_tape(tape, roots[0])
        used = tape.used_calls() or {*self._calls}
        if not used <= {*self._calls}:
            self.refuse(
                f"the model must be called at most {MOST_CALLS} times before a backward, but the "
                "script calls it more often"
            )
        if not self.batches:
            self.first = self._firsts[min(used)]
        self.batches.append(({number: self._calls[number] for number in sorted(used)}, tape))
        self._calls, self._firsts, self._foreign = {}, {}, ""
        self.losses.append(float(roots[0].detach()))
        if not self.optimizers and self.model is not None:
            self._weights = sum_of_weights(self.model)

    def _check_tape(self, tape: Tape, root: Tensor) -> None:
        """Let a tape end at the loss, and take weights on it for the model's where they can be."""
        unseen = tape.finish(root)
        others = {*tape.parameters()} - {*(self.model.parameters() if self.model else ())}
        if unseen is None and others and not self._widen(list(others)):
            unseen = tape.describe(others.pop())
        if unseen is not None:
            rule = "the loss must come from the model's output through torch functions, but it also"
            self.refuse(self._foreign or f"{rule} depends on {unseen}")

    def _count_dropped(self) -> None:
        """See to gradients that no optimizer has seen: the script dropped them.

        Where a scaler skips its first steps, their batches are no part of the one that it takes.
        """
        model, is_first = self.model, not self.optimizers and bool(self.batches)
        if model is None or [*kept_gradients(model)]:
            return
        has_any = any(parameter.grad is not None for parameter in model.parameters())
        if has_any and not (is_first and gradient_norm(model) == 0):
            return
        self._dropped += 1  # or the first one of all
        if self._dropped > self.wanted:
            reason = "an optimizer of torch.optim must step, but none did in %d batches"
            self.refuse(reason % self.wanted)
        if is_first:
            self._batches_before = len(self.batches)
            if sum_of_weights(model) != self._weights:
                self.refuse(
                    "an optimizer of torch.optim alone must change weights, but the script drops a "
                    "gradient and takes the next at other weights (steps by hand, or SAM)"
                )

    def _around_clip(self, call: Function, parameters: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        bound = CLIP.bind(given, *args, **kwargs).arguments
        every = self.model.parameters() if self.model is not None else ()
        trained = {parameter for parameter in every if parameter.grad is not None}
        if trained and bound.get("norm_type", 2.0) == 2.0 and trained <= set(given):
            self.clip_norm = float(bound["max_norm"])
        norm: Tensor = call(given, *args, **kwargs)
        return norm

    # --- the optimizer's step --------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> StepArguments | None:
        """Follow a closure too: forward and backward happen in it, the step after it."""
        if self._stepping is not None:
            return None  # an optimizer of optimizers steps the inner ones
        if self._depth > 0:
            name = type(optimizer).__name__
            self.refuse(f"an optimizer must step after backward, but {name} steps within it")
        self._stepping = optimizer

        def begin() -> None:
            is_first = len(self.batches) > self._batches_before  # that steps after this gradient
            if is_first and self.model is not None and self.takes_of_norm is None:
                self.takes_of_norm = norm_taken(self._norms, gradient_norms(self.model))
            self._begin_step(optimizer, is_first=is_first)

        def refuse() -> None:
            name = type(optimizer).__name__
            self.refuse(
                f"a step must take one gradient, but {name} calls its closure again and again"
            )

        changed = after_closure(args, kwargs, begin, again=refuse)
        if changed is None:
            begin()
        return changed

    def _begin_step(self, optimizer: Optimizer, *, is_first: bool) -> None:
        if optimizer not in self.optimizers and (copies := copies_refusal(optimizer)):
            self.refuse(f"an optimizer must train the model's weights, but {copies}")
        if not is_first and (not self._stepped or optimizer in self._stepped):
            self.refuse(
                "optimizer.step() must follow the model's call in training mode and backward, but "
                "neither was seen before it"
            )
        if self._calls:
            self.refuse("each call of the model must have its backward, but one had none")
        if is_first and self.steps == 1:
            self._check_joined()
        lacks = is_first and len(self._stepped) < len(self.optimizers)
        is_late = bool(self.optimizers) and (is_first or self.steps > 1)
        is_other = is_late and optimizer not in self.optimizers
        if is_other and not lacks and self.steps > 1:
            self._check_successor(optimizer)
        if lacks or is_other:
            names = " and ".join(type(each).__name__ for each in {**self.optimizers, optimizer: 0})
            self.refuse(f"every optimizer must step after each gradient, but not so {names}")
        self._stepped = [optimizer] if is_first else [*self._stepped, optimizer]
        if optimizer not in self.optimizers:
            self._add(optimizer)
        self.optimizers[optimizer].see_rates(optimizer)

    def _check_successor(self, optimizer: Optimizer) -> None:
        """Say so where another phase of training begins, as a fine-tuning's second one."""
        own = set(trained_by(optimizer))
        for other in self.optimizers:
            if not own.isdisjoint(trained_by(other)):
                name, before = type(optimizer).__name__, type(other).__name__
                self.refuse(
                    f"the optimizers must stay, but a new {name} takes over weights of {before} "
                    f"after {self.steps} steps (--script-steps {self.steps} tunes what is before)"
                )

    def _add(self, optimizer: Optimizer) -> None:
        """Copy an optimizer as it is before its first step."""
        own, name = set(trained_by(optimizer)), type(optimizer).__name__
        others = own - set(self.model.parameters() if self.model else ())
        if others and not self._widen(list(others)):
            of = type(self.model).__name__
            self.refuse(f"an optimizer must train the weights of {of} alone, but {name} has others")
        if other := next((o for o in self.optimizers if not own.isdisjoint(trained_by(o))), None):
            names = f"{type(other).__name__} and {name}"
            self.refuse(f"each weight must have one optimizer, but the script steps two ({names})")
        if not self.optimizers:
            self.micro_steps = len(self.batches) - self._batches_before
        if self.model is not None and self.first is not None:
            self.optimizers[optimizer] = SeenOptimizer(optimizer, self.model, self.first.model)

    def _check_joined(self) -> None:
        """Check that of several modules all are trained: `run` finds them by their optimizers."""
        joined = self.model if self.model is not None and is_joined(self.model) else None
        for part in joined.children() if joined is not None else ():
            if not any(trains(optimizer, part) for optimizer in self.optimizers):
                name = type(part).__name__
                self.refuse(
                    "models that are called with gradients must all be trained, but no optimizer "
                    f"has the weights of {name}: call it under torch.no_grad()"
                )

    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:  # Any: torch's
        if optimizer is not self._stepping:
            return
        self._stepping = None
        if len(self._stepped) > 1:
            return  # the others of a step follow its first one
        self.steps += 1
        self._batches_before, self._dropped = len(self.batches), 0
        if self.steps >= self.wanted:
            raise StopScript

    def recorded(self) -> list[RecordedBatch]:
        """Return the batches once the model is known."""
        model = self.model
        if model is None:
            return []
        path = {id(part): name for name, part in model.named_modules()}
        return [
            RecordedBatch(
                {number: call.kept(path) for number, call in calls.items()},
                tape.constants,
                tape.named_graph(model),
            )
            for calls, tape in self.batches
        ]
