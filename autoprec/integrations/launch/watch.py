"""A plan and an unmodified training script -> the script, training with the plan.

A script shows its model when it calls it, and its optimizer when it makes it. So until the plan is
applied three things of torch are wrapped:

    Optimizer.__init__                  notes the optimizers
    Module.__call__                     the first call that trains a model that fits is the moment
    DistributedDataParallel, DataParallel               or just before one of these wraps it

(and `lerp_`, `lerp` and `deepcopy`, by which scripts keep averages of weights, see
runtime/averages.py, `torch.save` and `pickle.dump`, to which they give whole models and parameters,
and `Tensor.numpy`, without BF16).

A model that `fully_shard` or `parallelize_module` has sharded gets the plan at its first call too:
its FP32 shards are the masters (runtime/shards.py).

Then `apply` changes model and optimizers in place, and the wrappers go; the one around
`Module.__call__` stays only while another optimizer waits for its first step, since that may belong
to a second model that the plan is for (an ensemble, cross-validation).
"""

import copy
import gc
import inspect
import logging
import pickle
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.trace_rules import clear_lru_cache, get_tensor_method
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoprec.common.text import first_and_more
from autoprec.errors import AutoprecError, PlanMismatchError
from autoprec.integrations.launch.alive import Part, copies_refusal, find_roots, is_joined, join
from autoprec.integrations.launch.guarding import ScriptGuard
from autoprec.integrations.launch.patches import Function, patched
from autoprec.integrations.launch.script import script_line
from autoprec.integrations.plans import apply_plan, mismatch, remove_autocast
from autoprec.model.layers import find_layers, unwrapped
from autoprec.records import Plan
from autoprec.runtime import attach_optimizer, undo
from autoprec.runtime.attach import ON_OPTIMIZER, STATELESS, StateDict, watch_optimizers
from autoprec.runtime.averages import around_blend, around_clone, around_lerp
from autoprec.runtime.layouts import MASTER
from autoprec.runtime.saving import Files
from autoprec.runtime.shards import whole_again
from autoprec.runtime.state_dicts import exact_parameters, save_exactly
from autoprec.workload.optimizers import trained_by, trains
from autoprec.workload.written import LOW_PRECISION, dtype_name

logger = logging.getLogger(__name__)
R = TypeVar("R")


@dataclass(frozen=True)
class Applied:
    """One model that the plan was applied to; `where` in the script, and why just there."""

    model: "weakref.ref[nn.Module]"
    where: str
    optimizers: list[str]


class Watch:
    """Waits in a running script for what the plan is for."""

    def __init__(self, plan: Plan, *, guard: bool, tell: Callable[[str], None]) -> None:
        # the guard runs the schedule, which `apply` would ask for
        self.plan = plan.model_copy(update={"schedule": ()}) if guard else plan
        self.applied: list[Applied] = []
        self.untold: list[Applied] = []  # of those, the ones of which nothing was said yet
        self.misfits: dict[str, tuple[int, str]] = {}  # by model: see `_measure_misfit`
        self.failure: AutoprecError | None = None
        self._tell = tell
        self._guard = ScriptGuard(plan) if guard else None
        # the optimizers in the order in which they were made; True: its first step is to come
        self._waits: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._files = Files()
        self._calls_untrained = 0  # of models with the plan, while there was no optimizer
        self._joined: list[nn.Module] = []  # nobody else holds them
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that were looked at
        self._untrained: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by the optimizers so far
        self._until_end, self._until_done = ExitStack(), ExitStack()

    def start(self) -> None:
        """Wrap what a script shows itself by."""
        watch_optimizers()  # not later from a hook: torch is iterating over its hooks then
        get_tensor_method()  # dynamo lists torch's own once, `lerp_` among them
        self._until_end.callback(clear_lru_cache)  # and again, where it was told to meanwhile
        parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        functions: list[tuple[object, str, Function]] = [
            (Optimizer, "__init__", self._around_optimizer),
            (Optimizer, "load_state_dict", self._around_load),
            *((cls, "__init__", self._around_parallel) for cls in parallel),
            (Tensor, "lerp_", around_lerp),
            (Tensor, "clone", around_clone),
            (Tensor, "lerp", around_blend),
            (torch, "save", self._files.around_save),
            (pickle, "dump", self._files.around_save),
            (copy, "deepcopy", self._files.around_deepcopy),
            (Tensor, "numpy", self._around_numpy),
            (sys, "excepthook", self._around_error),
            *(self._guard.patches if self._guard is not None else ()),
        ]
        for owner, name, around in functions:
            self._until_end.enter_context(patched(owner, name, around))
        # a compiled step that steps the optimizer would trace it
        before_step = torch.compiler.disable(self._before_step)  # type: ignore[no-untyped-call]
        self._until_end.enter_context(register_optimizer_step_pre_hook(before_step))
        self._search()

    def stop(self) -> None:
        """Put everything back."""
        self._until_done.close()
        self._until_end.close()
        if self._guard is not None:
            self._guard.steps.close()

    def follow(self, function: Callable[..., R], *args: Any) -> R:
        """Call what trains, and return what it returns (AutoprecError: the plan cannot be)."""
        self.start()
        try:
            returned = function(*args)
        finally:
            self.stop()
            self.tell_of(self.untold)
        if self.failure is not None:  # the script went on after it
            raise self.failure
        return returned

    def describe(self) -> str:
        """Say in one line where the plan was applied, or why it was not."""
        if self.applied:
            return "; ".join(map(self._describe, self.applied))
        if not self.misfits:
            return (
                "the plan was not applied: no model was called for training in this process, or in "
                "one that torch.multiprocessing.spawn started; what starts processes otherwise has "
                "to call autoprec.apply, or to be started by torchrun -m autoprec run"
            )
        nearest = min(self.misfits, key=lambda name: self.misfits[name][0])
        return (
            "the plan was not applied: it fits no model that was called for training (seen: "
            f"{first_and_more(self.misfits)}); nearest is {nearest}: {self.misfits[nearest][1]}"
        )

    def _describe(self, applied: Applied) -> str:
        counts = Counter(str(layer.precision) for layer in self.plan.layers)
        layers = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        optimizers = ", ".join(applied.optimizers) or "none"
        return f"plan applied to {applied.where}: layers {layers}; optimizers {optimizers}"

    def tell_of(self, models: Sequence[Applied]) -> None:
        """Say where the plan was applied, once of each model."""
        for applied in models:
            self._tell(self._describe(applied))
        self.untold = [applied for applied in self.untold if applied not in models]

    # --- what the script does --------------------------------------------------------------------

    def _around_call(self, call: Function, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if self.applied and not self._waits:
            self._see_untrained(module)
        # some fine-tune a model in evaluation mode: its optimizer says so
        is_new = torch.is_grad_enabled() and self._is_new(module)
        if is_new and (module.training or any(trains(one, module) for one in self._waits)):
            has_it = self._offer(module, "at its first training call")
            # a method of the model, as Lightning's training_step, calls its parts one by one
            for root in () if has_it else find_roots(module):
                fits = any(_fits(self.plan, part) for part in root.modules())
                if fits and not _is_in_forward(root) and not self._has_run(root, module):
                    has_it = self._offer(root, "at the first training call of a part")
            if not has_it:
                self._offer_joined([module], "at the first training call of one of them")
        return call(module, *args, **kwargs)

    def _see_untrained(self, module: nn.Module) -> None:
        """Warn at the second training call of a model with the plan, if there is no optimizer."""
        is_planned = any(applied.model() is module for applied in self.applied)
        if is_planned and module.training and torch.is_grad_enabled():
            self._calls_untrained += 1
            if self._calls_untrained == 2:
                logger.warning(
                    "no optimizer of torch.optim trains %s: what a script writes into its BF16 "
                    "weights by hand loses small changes; let an optimizer make them",
                    type(module).__name__,
                )

    def _around_parallel(
        self, call: Function, wrapper: nn.Module, /, module: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        self._offer(module, f"before {type(wrapper).__name__} wrapped it")
        call(wrapper, module, *args, **kwargs)

    def _around_optimizer(
        self, call: Function, optimizer: Optimizer, /, *args: Any, **kwargs: Any
    ) -> None:
        call(optimizer, *args, **kwargs)
        # one of a model that has the plan is attached by the runtime at its first step; any other
        # may belong to a model that is still to get it
        planned = self._planned(optimizer)
        self._waits[optimizer] = planned is None
        self._untrained.clear()
        if planned is None:
            self._search()
        else:
            planned[0].optimizers.append(type(optimizer).__name__)
            self._take_back()
            self._end_search_if_done()

    def _around_load(self, call: Function, optimizer: Optimizer, /, state_dict: StateDict) -> None:
        if optimizer not in self._waits:  # the runtime's own, which loads an attached one's state
            call(optimizer, state_dict)
            return
        # an attached optimizer loads its masters; from any other a plain load would drop them
        states = [state_dict, *state_dict.get("state", {}).values()]
        if self._planned(optimizer) is None and any({STATELESS, MASTER} & {*s} for s in states):
            # a run with the plan goes on: it has the plan before an evaluation sees BF16 weights
            self._search_for(optimizer, f"before {type(optimizer).__name__} loads its masters")
        planned = self._planned(optimizer)
        if planned is not None and ON_OPTIMIZER not in vars(optimizer):
            attach_optimizer(planned[1], optimizer)
        call(optimizer, state_dict)
        if planned is None and STATELESS in state_dict:
            # a plain load leaves them out; `apply` will look for them here
            parameters = trained_by(optimizer)
            for index, master in state_dict[STATELESS].items():
                optimizer.state[parameters[index]][MASTER] = master.detach().clone()

    def _around_numpy(self, call: Function, tensor: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """Give FP32 arrays of BF16 tensors, of which numpy has none; what is written is refused."""
        if not self.applied or tensor.dtype is not torch.bfloat16:
            return call(tensor, *args, **kwargs)
        array = call(tensor.float(), *args, **kwargs)
        array.flags.writeable = False  # the script's own array would be the tensor's memory
        return array

    def _around_error(self, show: Function, cls: Any, error: Any, trace: Any, /) -> None:
        """Say after a script's last error what it may have met, where its text has BF16 in it."""
        show(cls, error, trace)
        if self.applied and isinstance(error, RuntimeError) and "BFloat16" in str(error):
            self._tell(
                "the script met BF16 outside of the model's layers, as where it multiplies a "
                "weight itself: keep that layer in FP32 (autoprec tune --keep 'NAME=fp32')"
            )

    def _around_config(self, save: Function, config: Any, /, *args: Any, **kwargs: Any) -> None:
        """Save the dtype that a state dict has; transformers reads that of the parameters."""
        for model in filter(None, (applied.model() for applied in self.applied)):
            parts = (module for module in model.modules() if vars(module).get("config") is config)
            own = (p for part in parts for p in part.parameters() if p.is_floating_point())
            if next(own, None) in exact_parameters(model):
                config.dtype = "float32"  # as transformers writes it
        save(config, *args, **kwargs)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:  # Any: torch's
        if self._waits.get(optimizer):
            if self._planned(optimizer) is None:  # of a second model too: get_state_dict steps it
                self._search_for(optimizer, f"before {type(optimizer).__name__}'s first step")
            self._waits[optimizer] = False
            if not self.applied and self.misfits and not self._may_fit_later(optimizer):
                self.failure = PlanMismatchError(self.describe())
                self.stop()
                raise self.failure
            self._end_search_if_done()
        if self.untold and (planned := self._planned(optimizer)):
            self._take_back()
            self.tell_of([applied for applied in self.untold if applied is planned[0]])
        return None if self._guard is None else self._guard.before_step(optimizer, args, kwargs)

    # --- what it means ---------------------------------------------------------------------------

    def _is_new(self, module: nn.Module) -> bool:
        is_known = module in self._seen or module in self._untrained
        return not is_known and not self._is_done()

    def _has_run(self, root: nn.Module, part: nn.Module) -> bool:
        """Whether another part was called, so that backward may need the weights as they are."""
        return not self._seen.isdisjoint({*root.modules()} - {*part.modules()})

    def _may_train(self, module: nn.Module) -> bool:
        """Whether an optimizer trains a module, or one may that is still to be made."""
        if self._waits:
            return any(trains(optimizer, module) for optimizer in self._waits)
        return any(parameter.requires_grad for parameter in module.parameters())

    def _offer(self, module: nn.Module, moment: str) -> bool:
        """Apply the plan if this module is, or has in it, the model that it is for."""
        if not self._is_new(module) or any(map(is_lazy, module.parameters())):
            return False  # a lazy parameter waits for its first input to get a shape
        self._seen.update(module.modules())
        found = next((part for part in module.modules() if _fits(self.plan, part)), None)
        if found is not None and not self._may_train(found):
            self._seen.difference_update(module.modules())
            self._untrained.update(module.modules())
            self.misfits.setdefault(type(found).__name__, (0, "no optimizer trains it"))
            return False
        if found is not None:
            self._apply(found, moment)
        elif any(parameter.requires_grad for parameter in module.parameters()):
            name = type(unwrapped(module)).__name__
            self.misfits.setdefault(name, _measure_misfit(self.plan, unwrapped(module)))
        return found is not None

    def _offer_joined(self, parts: Sequence[Part], moment: str) -> None:
        """Apply the plan to models that are trained side by side, if it is for all of them."""
        names = {layer.name.partition(".")[0] for layer in self.plan.layers}
        trained = (p for optimizer in self._waits for p in trained_by(optimizer))
        joined = join([*parts, *trained], only=names)
        if joined is None or not _fits(self.plan, joined):
            return
        # `apply` tries out FP8, and so calls layers of its own
        if all([*each.children()] != [*joined.children()] for each in self._joined):
            self._joined.append(joined)
            self._apply(joined, moment)

    def _search_for(self, optimizer: Optimizer, moment: str) -> None:
        """Apply the plan to the model of an optimizer before any call was seen.

        So it is when the step makes the call, in a closure, or a compiled function hides it.
        """
        parameters = trained_by(optimizer)
        # gradients are there already, and a parameter cannot change its dtype under one
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        for root in find_roots(parameters[0]):
            self._offer(root, moment)
        if self._planned(optimizer) is None:
            self._offer_joined(parameters, moment)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None else gradient.to(parameter.dtype)

    def _apply(self, model: nn.Module, moment: str) -> None:
        inner = unwrapped(model)
        whole_again(inner)  # what FSDP has gathered is no parameter of an optimizer
        if any(applied.model() is inner for applied in self.applied):  # and is wrapped since
            return
        owned = [optimizer for optimizer in self._waits if trains(optimizer, inner)]
        remove_autocast(inner)
        low = {p.dtype for p in inner.parameters() if p.requires_grad} & {*LOW_PRECISION}
        for dtype in low:
            held = "%s is held in %s: the plan's FP32 masters start as copies of its weights"
            logger.warning(held, type(inner).__name__, dtype_name(dtype))
        in_fp32 = [part for part in inner.modules() if _holds_fp32(part)]
        self._files.keep_frozen(inner)
        try:
            apply_plan(self.plan, model, *owned, is_guarded=self._guard is not None)
        except AutoprecError as error:
            self.failure = error
            self.stop()
            raise
        self._files.hand_over(inner)
        self._save_exactly(in_fp32)
        names = inner.keys() if isinstance(inner, nn.ModuleDict) and is_joined(inner) else ()
        name = " and ".join(names) or type(inner).__name__
        where = f"{name} at {script_line()} ({moment})"
        applied = Applied(weakref.ref(inner), where, [type(one).__name__ for one in owned])
        self.applied.append(applied)
        self.untold.append(applied)
        if self._guard is not None:
            self._guard.watch(inner)
        for optimizer in owned:
            # `apply` has taken kept masters out of states that hold nothing else
            for parameter in [p for p, state in optimizer.state.items() if not state]:
                del optimizer.state[parameter]
            self._waits[optimizer] = False
        self._end_search_if_done()

    def _save_exactly(self, in_fp32: Sequence[nn.Module]) -> None:
        """Let the script's checkpoints be those of its FP32 model, with their dtype beside them."""
        save_exactly(in_fp32)
        if not self.applied and (transformers := sys.modules.get("transformers")):
            config = (transformers.PretrainedConfig, "save_pretrained", self._around_config)
            self._until_end.enter_context(patched(*config))

    def _planned(self, optimizer: Optimizer) -> tuple[Applied, nn.Module] | None:
        """Return the model with the plan that an optimizer trains, None if there is none."""
        for applied in self.applied:
            model = applied.model()
            if model is not None and trains(optimizer, model):
                return applied, model
        return None

    def _search(self) -> None:
        """Look at every call of a module from now on."""
        self._until_done.close()  # or two wrappers would look
        self._until_done.enter_context(patched(nn.Module, "__call__", self._around_call))

    def _may_fit_later(self, optimizer: Optimizer) -> bool:
        """Whether some model that is alive fits the plan, although others are trained first."""
        fitting = next((name for name, (differing, _) in self.misfits.items() if not differing), "")
        if fitting and (copies := copies_refusal(optimizer)):
            self.misfits[fitting] = 0, copies
            return False
        gc.collect()
        modules = [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]
        return any(_fits(self.plan, module) for module in modules)

    def _is_done(self) -> bool:
        """Whether a trained model has the plan, and no optimizer is left whose model may get it."""
        return any(each.optimizers for each in self.applied) and not any(self._waits.values())

    def _take_back(self) -> None:
        """Make models plain again that got the plan before they were frozen: no one trains them.

        So it is with a teacher that DDP wraps, whose weights an average changes by hand.
        """
        for applied in [applied for applied in self.untold if not applied.optimizers]:
            model = applied.model()
            if model is not None and not any(p.requires_grad for p in model.parameters()):
                undo(model)
                self.applied.remove(applied)
                self.untold.remove(applied)

    def _end_search_if_done(self) -> None:
        if self._is_done():
            self._until_done.close()


def _holds_fp32(module: nn.Module) -> bool:
    return any(p is not None and p.dtype is torch.float32 for p in module._parameters.values())


def _fits(plan: Plan, module: nn.Module) -> bool:
    return len(find_layers(module)) == len(plan.layers) and mismatch(plan, module) is None


def _measure_misfit(plan: Plan, module: nn.Module) -> tuple[int, str]:
    """Return the number of layers that only one of the two has, and the reason of the misfit."""
    differing = find_layers(module).keys() ^ {layer.name for layer in plan.layers}
    return len(differing), mismatch(plan, module) or "it fits"


def _is_in_forward(root: nn.Module) -> bool:
    """Whether this call comes from `root.forward(...)` itself, of which a part has run already."""
    running = {frame.f_code for frame, _ in traceback.walk_stack(None)}
    forwards = [inspect.unwrap(type(module).forward) for module in root.modules()]
    return any(getattr(forward, "__code__", None) in running for forward in forwards)
