"""Modules that a script holds, found among all objects that are alive: what contains what."""

import gc
import traceback
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from autoprec.integrations.launch.script import run_script
from autoprec.model.layers import find_layers, unwrapped
from autoprec.workload.optimizers import trained_by

Part = nn.Module | nn.Parameter
_JOINED = weakref.WeakSet[nn.ModuleDict]()  # made here, of modules that no module of theirs holds


def find_roots(part: Part) -> Iterator[nn.Module]:
    """Yield the outermost modules that contain a part, itself if nothing does."""
    parents = _parents()
    return (found for found in _within(part, parents) if not parents[id(found)])


def copies_refusal(optimizer: Optimizer) -> str:
    """Say that an optimizer trains what no module holds, as under ZeRO; "" if one holds some."""
    parents = _parents()
    if any(parents[id(parameter)] for parameter in trained_by(optimizer)):
        return ""
    return (
        f"{type(optimizer).__name__} trains tensors that no module holds, such as the copies that "
        "DeepSpeed's ZeRO makes: set its stage to 0 (without bf16), or shard by fully_shard"
    )


def apart_refusal(model: nn.Module, other: nn.Module, *, is_late: bool) -> str:
    """Say why another model is not trained as one with `model`; `is_late`: after its first step."""
    name, own = type(model).__name__, type(other).__name__
    if not find_layers(other):
        return f"a layer must hold its own weights, but {own} has them elsewhere, as in Keras"
    if is_late:
        return (
            f"each step must train all models, but {own} is called after a step of {name} alone, "
            "as an actor and its critic or the two of a GAN take turns"
        )
    return (
        "what is trained must be one model, or models that are variables of the script, but it "
        f"calls {name} and {own}"
    )


def smallest_with(parts: Iterable[Part]) -> nn.Module | None:
    """Return the module of the fewest modules that contains all parts, None if none does."""
    parents = _parents()
    around = [{id(found): found for found in _within(part, parents)} for part in parts]
    shared = [found for key, found in around[0].items() if all(key in each for each in around)]
    return min(shared, key=lambda found: sum(1 for _ in found.modules()), default=None)


def join(parts: Iterable[Part], *, only: Collection[str] = ()) -> nn.ModuleDict | None:
    """Return the outermost modules around parts by their variables in the script, in one module.

    `only` are the names to take, all by default. None where it is one module, or one has no name.
    """
    roots = {id(root): root for root in _roots(parts)}
    names = _variables()
    named = {names.get(key, ""): root for key, root in roots.items()}
    named = {name: root for name, root in named.items() if not only or name in only}
    if len(named) < max(len(only) or len(roots), 2) or "" in named:
        return None
    try:
        joined = nn.ModuleDict(dict(sorted(named.items())))
    except KeyError:  # a name that torch has for something else
        return None
    _JOINED.add(joined)
    return joined


def is_joined(module: nn.Module) -> bool:
    """Whether a module was made by `join`."""
    return module in _JOINED


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is no model of the script's, but one around it that hands calls on.

    So are Fabric's and DeepSpeed's engine, which call it `module`, and what a library's function
    makes of a model that its caller knows (a solver's, new at each call).
    """
    inner = getattr(module, "module", None)
    if isinstance(inner, nn.Module) and {*module.parameters()} == {*inner.parameters()}:
        return True
    return _known_inside(module) is not module


def _known_inside(module: nn.Module) -> nn.Module:
    """Return what the outermost function that knows it knows of a module and the one inside it."""
    around = [module]
    while len(children := [*around[-1].children()]) == 1 and not around[-1]._parameters:
        around += children
    for names in map(_held, _frames() if len(around) > 1 else ()):
        if known := [each for each in around if id(each) in names]:
            return known[0]
    return module


def _variables() -> dict[int, str]:
    """Return the script's names of modules, by id: its variables, what its objects and dicts hold.

    Those of the outermost function count: they are the same ones wherever in it they are asked for.
    """
    names: dict[int, str] = {}
    for frame in _frames():
        for key, name in _held(frame).items():
            names.setdefault(key, name)
    return names


def _frames() -> list[FrameType]:
    """Return the functions of the script and its libraries that run, outermost first."""
    frames = []
    for frame, _ in traceback.walk_stack(None):
        if frame.f_code is run_script.__code__:
            break
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in ("autoprec", "torch"):
            frames.append(frame)
    return frames[::-1]


def _held(frame: FrameType) -> dict[int, str]:
    """Return the names of modules in a running function, by id."""
    names: dict[int, str] = {}
    for name, value in frame.f_locals.items():
        is_module = issubclass(type(value), nn.Module)  # isinstance would wake lazy proxies
        held = value if type(value) is dict else getattr(value, "__dict__", {})
        inner: dict[str, Any] = {name: value} if is_module else held
        for own, module in inner.items() if type(inner) is dict else ():
            if issubclass(type(module), nn.Module):
                names.setdefault(id(unwrapped(module, parallel=True)), str(own))
    return names


def _roots(parts: Iterable[Part]) -> Iterator[nn.Module]:
    """Yield the outermost modules around parts, out of their wrappers and of what was joined."""
    parents = _parents()
    for part in parts:
        held = part.children() if isinstance(part, nn.Module) and is_joined(part) else [part]
        for found in (found for own in held for found in _within(own, parents)):
            if not is_joined(found) and all(map(is_joined, parents[id(found)])):
                yield _known_inside(unwrapped(found, parallel=True))


def _parents() -> defaultdict[int, list[nn.Module]]:
    """Return which modules hold a module or parameter themselves, by its id."""
    parents: defaultdict[int, list[nn.Module]] = defaultdict(list)
    for found in gc.get_objects():
        if issubclass(type(found), nn.Module):  # isinstance would wake lazy proxies
            own = vars(found)
            for child in (*own.get("_modules", {}).values(), *own.get("_parameters", {}).values()):
                parents[id(child)].append(found)
    return parents


def _within(part: Part, parents: defaultdict[int, list[nn.Module]]) -> Iterator[nn.Module]:
    """Yield the part, if it is a module, and every module that it is in."""
    waiting, done = [part], {id(part)}
    while waiting:
        part = waiting.pop()
        above = [parent for parent in parents[id(part)] if id(parent) not in done]
        done.update(map(id, above))
        waiting += above
        if isinstance(part, nn.Module):
            yield part
