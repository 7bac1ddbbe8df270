"""Averages of weights (EMA) that a script keeps itself -> averages of the FP32 masters.

An average in FP32 that is older than the plan meets BF16 parameters, of which `lerp_` takes none;
one that is a copy of a model with a plan is BF16 itself, where small changes are lost. So from the
first plan on `torch._foreach_lerp_` (as torch.optim.swa_utils calls it) takes the masters of BF16
parameters, and of what shares their storage, in their place, and so does the `avg_fn` of an
`AveragedModel`; and `lerp_` and `lerp` do in scripts that run with a plan (integrations/launch),
until they end:

    a <- a + weight (m - a)      a the FP32 average, or the average's own master, then rounded

There `Tensor.clone` of such weights, with which averages by other arithmetic begin, is FP32 too.
Code that torch.compile traces, what has a graph, and other dtypes see torch's own.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from autoprec.runtime.activations import is_mode_active
from autoprec.runtime.masters import LIVE, Masters

logger = logging.getLogger(__name__)
Function = Callable[..., Any]  # Any, here and below: as torch's functions take it
Planned = tuple[Masters, nn.Parameter]
PLAIN = (Tensor, nn.Parameter)  # shards are their own masters


@functools.cache
def follow_averages() -> None:
    """Let averages that are taken from now on follow masters."""
    original = torch._foreach_lerp_

    @functools.wraps(original)
    def wrapper(self: Any, tensors1: Any, *args: Any, **kwargs: Any) -> Any:  # by torch's names
        if torch.compiler.is_compiling():
            return original(self, tensors1, *args, **kwargs)
        return _follow(original, self, tensors1, *args, **kwargs)

    torch._foreach_lerp_ = wrapper
    updates = AveragedModel.update_parameters

    @functools.wraps(updates)
    def update_parameters(self: Any, model: nn.Module) -> None:
        _update_average(updates, self, model)

    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]


@torch.no_grad()
def _update_average(updates: Function, average: Any, model: nn.Module) -> None:
    """Update an AveragedModel: an `avg_fn` and the first copy know no masters by themselves."""
    pairs = list(zip(average.module.parameters(), model.parameters(), strict=False))  # as torch
    met = [pair for pair in pairs if _meets_bf16(*pair)]
    if not met:
        updates(average, model)
        return
    low = [pair for pair in met if pair[0].dtype is torch.bfloat16]
    found = _planned(weight for _, weight in met)
    exact = {id(w): _exact(w, found).to(a.dtype) for a, w in met if a.dtype is not torch.bfloat16}
    own_weights = [exact.get(id(w), w) for _, w in pairs]
    weights = SimpleNamespace(parameters=lambda: iter(own_weights), buffers=model.buffers)
    is_first, own = bool(average.n_averaged == 0), average.multi_avg_fn
    if low and own is None:
        by_one = average.avg_fn and functools.partial(_average_each, average.avg_fn)
        average.multi_avg_fn = by_one or get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
    try:
        updates(average, weights)
    finally:
        average.multi_avg_fn = own
    if low and is_first:
        _follow(torch._foreach_copy_, *map(list, zip(*low, strict=True)))


def _average_each(own: Function, averages: Any, ends: Any, count: Tensor) -> None:
    def call(averages: Sequence[Tensor], ends: Sequence[Tensor]) -> None:
        for average, end in zip(averages, ends, strict=True):
            average.copy_(own(average, end, count))

    _follow(call, averages, ends)


def around_lerp(original: Function, average: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call `Tensor.lerp_`, with masters in the place of BF16 parameters."""
    end = args[0] if args else kwargs.get("end")
    if not _meets_bf16(average, end):
        return original(average, *args, **kwargs)
    rest = {k: v for k, v in kwargs.items() if k != "end"}

    def call(averages: Sequence[Tensor], ends: Sequence[Tensor]) -> None:
        original(averages[0], ends[0], *args[1:], **rest)

    _follow(call, [average], [end])
    return average


def around_blend(original: Function, /, *args: Any, **kwargs: Any) -> Any:
    """Call `lerp` that returns an average, with masters in the place of BF16 parameters."""
    given = [x for x in (*args, *kwargs.values()) if type(x) in PLAIN]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return original(*args, **kwargs)
    found = {} if is_mode_active() else _planned(given)
    exact = {name: _exact(value, found) for name, value in kwargs.items()}
    return original(*(_exact(value, found) for value in args), **exact)


def around_clone(original: Function, tensor: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call `Tensor.clone`, and return FP32 values of BF16 parameters, unless forward asks."""
    copied = original(tensor, *args, **kwargs)
    if tensor.dtype is not torch.bfloat16 or kwargs or is_mode_active():  # deepcopy gives a format
        return copied
    return copied.float() if _planned([tensor]) else copied


def _follow(original: Function, averages: Any, ends: Any, /, *args: Any, **kwargs: Any) -> None:
    if not any(map(_meets_bf16, averages, ends)):
        original(averages, ends, *args, **kwargs)
        return
    found = _planned([*averages, *ends])
    taken = [_exact(average, found) for average in averages]
    # BF16 weights without a master here (a copy on another device) are taken as they are
    given = [
        _exact(end, found).to(average.dtype) if end.dtype is torch.bfloat16 else end
        for average, end in zip(taken, ends, strict=True)
    ]
    original(taken, given, *args, **kwargs)
    for average in averages:
        if id(average) in found:
            store, parameter = found[id(average)]
            store.round_down(parameter)
        elif average.dtype is torch.bfloat16 and found:
            _warn_of_average()


def _planned(tensors: Iterable[Tensor]) -> dict[int, Planned]:
    """Return the parameters with masters that tensors are or share storage with, by their id."""
    low = [tensor for tensor in tensors if tensor.dtype is torch.bfloat16]
    found = {id(t): (store, t) for t in low for store in LIVE if t in store.values}
    if rest := [tensor for tensor in low if id(tensor) not in found]:  # `p.data`, `p.detach()`
        every = [(store, p) for store in LIVE for p in store.values if type(p) in PLAIN]
        places = {(p.data_ptr(), p.shape): (store, p) for store, p in every if p.data_ptr()}
        at = {id(tensor): (tensor.data_ptr(), tensor.shape) for tensor in rest}
        found |= {key: places[place] for key, place in at.items() if place in places}
    return found  # type: ignore[return-value]  # what is among the values is a parameter


@functools.cache
def _warn_of_average() -> None:
    logger.warning(
        "an average of a plan's weights is kept in BF16, where it loses small changes; start it "
        "from FP32 ones (weight.float(), or autoprec.master_view(model))"
    )


def _exact(tensor: Any, found: Mapping[int, Planned]) -> Any:
    if id(tensor) not in found:
        return tensor
    store, parameter = found[id(tensor)]
    return store.current(parameter, looks_closer=False)


def _meets_bf16(average: Any, end: Any) -> bool:
    """Whether an average without a graph has BF16, or is updated from it."""
    if type(average) not in PLAIN or type(end) not in PLAIN:
        return False
    if torch.bfloat16 not in (average.dtype, end.dtype):
        return False
    return not (torch.is_grad_enabled() and (average.requires_grad or end.requires_grad))
