"""Modules that a script holds, found among all objects that are alive: what contains what."""

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

Part = nn.Module | nn.Parameter


def find_roots(part: Part) -> Iterator[nn.Module]:
    """Yield the outermost modules that contain a part, itself if nothing does."""
    parents = _parents()
    return (found for found in _within(part, parents) if not parents[id(found)])


def smallest_with(parts: Iterable[Part]) -> nn.Module | None:
    """Return the module of the fewest modules that contains all parts, None if none does."""
    parents = _parents()
    around = [{id(found): found for found in _within(part, parents)} for part in parts]
    shared = [found for key, found in around[0].items() if all(key in each for each in around)]
    return min(shared, key=lambda found: sum(1 for _ in found.modules()), default=None)


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
