"""An optimizer that the user made -> the same optimizer, training FP32 masters.

Hooks around `step` do it, so the optimizer stays the same object with the same groups and
parameters, whatever patched or wraps `step` (LR schedulers, GradScaler). The hook before a step
returns a *shadow optimizer* in its place: an object of the same class, attributes and state whose
groups hold the masters, with FP32 gradients. A step that raises leaves no trace:

    before   shadow.param_groups = groups with m for p,   m.grad = float(p.grad)
    step     shadow.step()                                moments are made for m, so they are FP32
    after    state[p] = shadow.state[m],   p = bf16(m)

Lists and dicts of parameters (or their ids) among its attributes hold masters meanwhile. One that
reaches a parameter in any other way is refused: its master would see nothing.

`state_dict()` is the plain one, and beside each parameter's moments its `master_weight`.
"""

import copy
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoprec.errors import PlanMismatchError
from autoprec.runtime.finite import FIRST, check_first_step
from autoprec.runtime.gathers import check_gathers
from autoprec.runtime.layouts import MASTER, read_from_any_layout
from autoprec.runtime.masters import LIVE, Masters, masters_of
from autoprec.runtime.state_dicts import keep_exact_loads
from autoprec.runtime.stepping import Chunk, Layout, are_same, raw_step
from autoprec.workload.optimizers import (
    FLAG,
    MANY_CLOSURES,
    after_closure,
    closure_of,
    optimizer_refusal,
    trained_by,
    trains,
)

ON_OPTIMIZER = "_autoprec"  # the optimizer's attribute that holds its Attachment
CONTAINERS = frozenset({dict, defaultdict, OrderedDict, list, tuple, set})
STATELESS = "master_weights"  # in state_dict(): masters of parameters that have no state (yet)
HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
APART = frozenset({"param_groups", "state", "defaults", "_optimizer_state_dict_pre_hooks", *HOOKS})
StateDict = dict[str, Any]  # Any: torch's own
Pairs = dict[nn.Parameter, Tensor]


def attach_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Make `optimizer` train FP32 masters of the parameters that a plan stored in BF16, in place.

    Call it after `apply` or `install_options`, for every optimizer of the model, before loading a
    checkpoint into the optimizer. Calling it again does no harm.

    Raises:
        PlanMismatchError: no plan is applied to the model, the optimizer trains none of its
            parameters, or it is of a kind that masters cannot be given to.

    Example:
        >>> import torch, autoprec
        >>> from autoprec.runtime import uniform_plan
        >>> model = torch.nn.Linear(16, 16)
        >>> model, _ = autoprec.apply(uniform_plan(model, "bf16_o2"), model)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> autoprec.attach_optimizer(model, optimizer)
        >>> model(torch.ones(4, 16)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state_dict()["master_weights"][0].dtype  # what SGD trained
        torch.float32
    """
    masters = masters_of(model)
    check_optimizer(model, optimizer)  # before anything is changed
    masters.refresh(model)
    keep_exact_loads(model, masters)
    check_gathers(model)
    attach(masters, optimizer)


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Check that masters can be given to an optimizer of the model, or raise PlanMismatchError."""
    reason = optimizer_refusal(optimizer)
    if not reason and not trains(optimizer, model):
        reason = "it trains no parameter of this model; make it from model.parameters()"
    if reason:
        raise PlanMismatchError(f"the optimizer must be one that trains FP32 masters, but {reason}")


def detach_optimizer(optimizer: Optimizer) -> None:
    """Make it the plain optimizer that it was; its state stays."""
    attachment: Attachment | None = vars(optimizer).pop(ON_OPTIMIZER, None)
    for handle in attachment.handles if attachment else ():
        handle.remove()


def attach(masters: Masters, optimizer: Optimizer) -> None:
    """Make an optimizer that was checked train these masters."""
    _check_moments(masters, optimizer)
    attachment: Attachment = vars(optimizer).get(ON_OPTIMIZER) or Attachment(optimizer)
    vars(optimizer)[ON_OPTIMIZER] = attachment
    others = [store for store in attachment.stores if store is not masters and store.values]
    attachment.stores = [*others, masters]
    for parameter in trained_by(optimizer):
        if parameter in masters.values and MASTER in optimizer.state.get(parameter, {}):  # loaded
            masters.loaded[parameter] = optimizer.state[parameter].pop(MASTER), None
    watch_optimizers()


def _check_moments(masters: Masters, optimizer: Optimizer) -> None:
    """Give FP32 to the moments of parameters that were BF16 before the plan; refuse lost bits."""
    for parameter in (p for p in trained_by(optimizer) if p in masters.values):
        state = optimizer.state.get(parameter, {})
        low = [k for k, v in state.items() if isinstance(v, Tensor) and v.dtype is parameter.dtype]
        if low and masters.values[parameter] is not None:
            raise PlanMismatchError(
                f"moments must be FP32, but {low[0]!r} is bfloat16 already: the optimizer's state "
                "was loaded or made before it was attached; call autoprec.attach_optimizer(model, "
                "optimizer) first, then load its state"
            )
        state.update({key: state[key].float() for key in low})


@cache
def watch_optimizers() -> None:
    """Look at every optimizer before it steps, and before its own hooks run."""
    register_optimizer_step_pre_hook(_look_at)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
def _look_at(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:  # Any: torch's hook
    """Attach an optimizer that was made after `apply`; let the user's hooks at gradients first.

    The first step of a model that is watched is checked as it is now.
    """
    changed = check_first_step(optimizer, args, kwargs) if FIRST else None
    attachment: Attachment | None = vars(optimizer).get(ON_OPTIMIZER)
    if attachment is not None:
        hooks: Any = optimizer._optimizer_step_pre_hooks  # Any: typed as a dict, but ordered
        hooks.move_to_end(attachment.handles[0].id)
        return changed
    for masters in list(LIVE):
        if any(parameter in masters.values for parameter in trained_by(optimizer)):
            attach(masters, optimizer)
    return changed


class Attachment:
    """The hooks of one optimizer. It holds no reference to the optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.stores: list[Masters] = []  # of one model, or of several that share the optimizer
        self.loading: StateDict = {}
        self.looked_up: list[nn.Parameter] = []  # whose states have masters, until the next step
        self.layout: Layout | None = None
        self.stepping: Layout | None = None  # within a step
        self.shadowed: Layout | None = None  # whose masters the shadow holds
        self.shadow: Optimizer = object.__new__(type(optimizer))
        self.handles = (
            optimizer.register_step_pre_hook(self.before_step),
            optimizer.register_step_post_hook(self.after_step),
            optimizer.register_state_dict_post_hook(self.add_masters),
            optimizer.register_load_state_dict_pre_hook(self.before_load),
            optimizer.register_load_state_dict_post_hook(self.after_load),
        )
        hooks: Any = optimizer._optimizer_step_post_hooks  # Any: typed as a dict, but ordered
        hooks.move_to_end(self.handles[1].id, last=False)

    def masters(self, optimizer: Optimizer) -> Pairs:
        """Return the masters of the optimizer's parameters, of those that have one."""
        every = trained_by(optimizer)
        return {p: store.current(p) for store in self.stores for p in every if p in store.values}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:  # Any: torch's hook
        """Put the shadow, with FP32 masters and gradients, in the optimizer's place."""
        while self.looked_up:
            optimizer.state.get(self.looked_up.pop(), {}).pop(MASTER, None)
        step = None if closure_of(args, kwargs) else raw_step(optimizer)
        layout = self.stepping = self.current_layout(optimizer, is_split=step is not None)
        if layout is None:
            return None
        if torch._C._current_graph_task_id() >= 0:
            raise PlanMismatchError(
                f"an optimizer must step after backward, but {type(optimizer).__name__} steps "
                "within it, in hooks at gradients; step it after backward"
            )
        shadow = self.cast_shadow(optimizer, layout)
        # All chunks but the last are stepped here, so that one buffer of gradients serves all.
        for chunk in layout.chunks[:-1]:
            layout.give_gradients(chunk)  # m.grad = float(p.grad)
            with _groups_of(shadow, chunk):
                step(shadow)  # type: ignore[misc]  # where there is none, there is one chunk
        last = layout.chunks[-1]
        layout.give_gradients(last)
        for group, params in zip(shadow.param_groups, last.groups, strict=True):
            group["params"][:] = params

        # A closure runs the model in the middle of the step: the new gradients must be at the
        # masters after it, and what it told the optimizer (a guard, of a bad step) at the shadow.
        def take_over() -> None:
            layout.give_gradients(last)
            vars(shadow).update((k, v) for k, v in vars(optimizer).items() if k == FLAG)

        def refuse() -> None:
            raise PlanMismatchError(f"{type(optimizer).__name__} {MANY_CLOSURES}")

        args = (shadow, *args[1:])
        return after_closure(args, kwargs, take_over, again=refuse) or (args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
    def after_step(self, optimizer: Optimizer, args: Any, _: Any) -> None:  # Any: torch's hook
        """Take over what the shadow made, and round the masters into the model."""
        shadow, layout = args[0], self.stepping
        if shadow is optimizer or layout is None:
            return
        self.stepping = None
        if layout.was_written():
            raise PlanMismatchError(
                "an optimizer must step what its param_groups hold, but "
                f"{type(optimizer).__name__} writes into the model's parameters by another way, "
                "past their FP32 masters; let it take them from self.param_groups, and start again"
            )
        if not are_same(optimizer.state.values(), shadow.state.values()):
            _adopt_state(optimizer, shadow, layout.pairs)
        _adopt_settings(optimizer, shadow, layout.pairs)
        layout.copy_down()
        layout.end_step()

    def current_layout(self, optimizer: Optimizer, *, is_split: bool) -> Layout | None:
        """Return the layout to step, up to date; None where the optimizer has no masters."""
        groups = [group["params"] for group in optimizer.param_groups]
        layout = self.layout
        if layout is None or not layout.fits(groups, self.stores, is_split=is_split):
            layout = self._make_layout(groups, is_split=is_split)
            layout.begin_step()
        elif not layout.begin_step():
            layout = self._make_layout(groups, is_split=is_split)
        return layout if layout.pairs else None

    def _make_layout(self, groups: list[list[nn.Parameter]], *, is_split: bool) -> Layout:
        if self.layout is not None:
            self.layout.release()
        self.layout = Layout(groups, self.stores, is_split=is_split)
        return self.layout

    def cast_shadow(self, optimizer: Optimizer, layout: Layout) -> Optimizer:
        """Return the shadow, which steps the masters of `layout`."""
        shadow, is_known = self.shadow, self.shadowed is layout and "state" in vars(self.shadow)
        is_known = is_known and are_same(optimizer.state.values(), shadow.state.values())
        self.shadowed = layout
        return set_shadow(shadow, optimizer, layout.pairs, has_state=is_known)

    def add_masters(self, optimizer: Optimizer, state_dict: StateDict) -> None:
        """Save the masters beside the moments; apart where a plain load would trip over them."""
        read_from_any_layout()
        masters = self.masters(optimizer)
        states = state_dict["state"] = dict(state_dict["state"])
        apart: dict[int, Tensor] = {}
        for index, parameter in _indexed(optimizer, state_dict["param_groups"]):
            if parameter in masters and states.get(index):
                states[index] = {**states[index], MASTER: masters[parameter]}
            elif parameter in masters:
                apart[index] = masters[parameter]
        if apart:
            state_dict[STATELESS] = apart
        if apart and not any(states.values()) and any(store.stepped for store in self.stores):
            # plain SGD has none; a distributed checkpoint takes states alone, of all or none
            every = (index for group in state_dict["param_groups"] for index in group["params"])
            states.update((i, {MASTER: apart[i]} if i in apart else {}) for i in every)

    def before_load(self, _optimizer: Optimizer, state_dict: StateDict) -> StateDict:
        """Keep the state from torch, which would round it to the parameters' BF16."""
        self.loading = state_dict
        return {**state_dict, "state": {}}

    def after_load(self, optimizer: Optimizer) -> None:
        """Load the state as torch does, into a shadow that has FP32 parameters."""
        # Masters are taken out first: a plain optimizer knows no such state.
        loading, self.loading = self.loading, {}
        states = {k: dict(v) if isinstance(v, dict) else v for k, v in loading["state"].items()}
        saved, groups = dict(loading.get(STATELESS, {})), loading["param_groups"]
        for index, _ in _indexed(optimizer, groups):
            if MASTER in states.get(index, {}):
                saved[index] = states[index].pop(MASTER)
        states = {key: state for key, state in states.items() if state or key not in saved}
        # torch casts loaded moments to the dtype of the parameters that it finds: here to FP32.
        pairs = self.masters(optimizer)
        shadow = set_shadow(object.__new__(type(optimizer)), optimizer, pairs)
        Optimizer.load_state_dict(shadow, {"state": states, "param_groups": groups})
        _adopt_state(optimizer, shadow, pairs)
        for index, parameter in _indexed(optimizer, groups):
            is_own = saved.get(index) is pairs.get(parameter)  # Accelerate loads what it just read
            if index in saved and parameter in pairs and not is_own:
                self._load_master(parameter, saved[index])
        for store in self.stores:
            store.take_loaded()
        # A class of its own `load_state_dict` (pytorch-optimizer's) looks up what was saved again.
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            beside = [(i, p) for i, p in _indexed(optimizer, groups) if p in optimizer.state]
            self.looked_up = [p for i, p in beside if i in saved]
            optimizer.state.update(
                (p, {**optimizer.state[p], MASTER: saved[i]}) for i, p in beside if i in saved
            )

    def _load_master(self, parameter: nn.Parameter, saved: Tensor) -> None:
        if saved.shape != parameter.shape:
            raise PlanMismatchError(
                f"a saved master must have its parameter's shape {tuple(parameter.shape)}, but it "
                f"has {tuple(saved.shape)}; load a checkpoint of this model"
            )
        for store in self.stores:
            if parameter in store.values:
                store.loaded[parameter] = saved.detach().to(torch.float32, copy=True), None


def set_shadow(
    shadow: Optimizer, optimizer: Optimizer, pairs: Mapping[Any, Tensor], *, has_state: bool = False
) -> Optimizer:
    """Give `shadow` the optimizer's attributes and state, but masters for parameters; return it.

    The shadow, its groups and lists stay the same objects, since a compiled `step` guards on them.
    With `has_state` it has the optimizer's state already.
    """
    # Groups that the user added since the last step; the others are filled again below.
    groups: list[dict[str, Any]] = vars(shadow).get("param_groups", [])  # Any: torch's own
    groups += [{"params": []} for _ in optimizer.param_groups[len(groups) :]]
    # Moments are keyed by what the optimizer steps: here by the master, state[m] = state[p]. What
    # is keyed by anything else (so Any) keeps its key.
    state: defaultdict[Tensor, Any] = vars(shadow).get("state", defaultdict(dict))
    if not has_state:
        state.clear()
        state.update((pairs.get(key, key), value) for key, value in optimizer.state.items())
    # All else, settings of a subclass too, is the optimizer's own, so that `step` finds it.
    for name in vars(shadow).keys() - vars(optimizer).keys():  # GradScaler's come and go
        del vars(shadow)[name]
    vars(shadow).update(vars(optimizer), param_groups=groups, state=state)
    vars(shadow).update(_containers(optimizer, pairs.items()))
    attachment: Attachment = vars(shadow).pop(ON_OPTIMIZER)  # would be a reference cycle
    for group, its in zip(groups, optimizer.param_groups, strict=True):
        params = group["params"]
        if not has_state:
            params[:] = [pairs.get(parameter, parameter) for parameter in its["params"]]
        group.update({**its, "params": params})
    # Without our own hooks, which would put a shadow in the shadow's place.
    left_out = {handle.id for handle in attachment.handles}
    for name in HOOKS:
        own_hooks = getattr(optimizer, name).items()
        vars(shadow)[name] = OrderedDict((k, hook) for k, hook in own_hooks if k not in left_out)
    return shadow


@contextmanager
def _groups_of(shadow: Optimizer, chunk: Chunk) -> Iterator[None]:
    """Let the shadow have the chunk's parameters alone."""
    every = shadow.param_groups
    chosen = [(g, params) for g, params in zip(every, chunk.groups, strict=True) if params]
    for group, params in chosen:
        group["params"][:] = params
    shadow.param_groups = [group for group, _ in chosen]
    try:
        yield
    finally:
        shadow.param_groups = every


def _adopt_state(optimizer: Optimizer, shadow: Optimizer, pairs: Pairs) -> None:
    """Give the optimizer the state that the shadow's step, or its loading, made."""
    # The way back: state[p] = state[m]; what is keyed by no master keeps its key.
    back = {id(master): parameter for parameter, master in pairs.items()}
    made = {back.get(id(key), key): value for key, value in shadow.state.items()}
    optimizer.state.clear()
    optimizer.state.update(made)


def _adopt_settings(optimizer: Optimizer, shadow: Optimizer, pairs: Pairs) -> None:
    # A step may write into its groups (a schedule inside of the optimizer) ...
    for group, changed in zip(optimizer.param_groups, shadow.param_groups, strict=True):
        group.update({key: value for key, value in changed.items() if key != "params"})
    # ... and into attributes, where parameters take their places back.
    settings = {k: v for k, v in vars(shadow).items() if k not in APART}
    settings |= _containers(shadow, ((master, parameter) for parameter, master in pairs.items()))
    for name, made in settings.items():
        own = vars(optimizer).get(name)
        if made is not own and isinstance(own, dict) and isinstance(made, dict):
            items = dict(made)  # hooks of the user's may hold the dict itself
            own.clear()
            own.update(items)
        else:
            vars(optimizer)[name] = made


def _containers(
    optimizer: Optimizer, pairs: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Any]:  # Any: whatever a subclass keeps
    """Return a subclass's own lists and dicts, with the second of each pair for the first.

    torch's optimizers have none, and cost nothing by parameter.
    """
    every = vars(optimizer).items()
    held = {k: v for k, v in every if type(v) in CONTAINERS and k not in APART}
    by_id = {id(old): new for old, new in pairs} if held else {}
    return {name: _swapped(value, by_id) for name, value in held.items()}


def _swapped(value: Any, by_id: Mapping[int, Any]) -> Any:  # Any: an optimizer's attribute
    """Return a container with others in it, at any depth; itself where it has none of them."""
    if id(value) in by_id:
        return by_id[id(value)]
    if type(value) is int:
        return id(by_id[value]) if value in by_id else value
    if isinstance(value, dict):
        old = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple | set):
        old = list(value)
    else:
        return value
    new = [_swapped(part, by_id) for part in old]
    if all(map(operator.is_, new, old)):
        return value
    if isinstance(value, dict):
        made = copy.copy(value)  # a defaultdict stays one
        made.clear()
        made.update(zip(new[::2], new[1::2], strict=True))
        return made
    return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)


def _indexed(optimizer: Optimizer, groups: list[StateDict]) -> Iterator[tuple[int, nn.Parameter]]:
    """Yield the index that a state dict's groups give to each parameter."""
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        yield from zip(group["params"], own["params"], strict=True)
