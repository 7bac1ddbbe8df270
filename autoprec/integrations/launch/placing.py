"""A plan and a module that a script calls -> the module inside it that the plan is for."""

import gc
from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from autoprec.errors import PlanMismatchError
from autoprec.model.layers import find_layers, plain_name, unwrapped
from autoprec.records import Plan
from autoprec.runtime.fit import check_fit


def find_fitting(plan: Plan, module: nn.Module) -> nn.Module | None:
    """Return `module`, or the first module within it, whose layers are those of the plan."""
    for part in module.modules():
        if len(find_layers(part)) == len(plan.layers) and _mismatch(plan, part) is None:
            return part
    return None


def measure_misfit(plan: Plan, module: nn.Module) -> tuple[int, str]:
    """Return the number of layers that only one of the two has, and the reason of the misfit."""
    names = {plain_name(name) for name in find_layers(module)}
    return len(names ^ {layer.name for layer in plan.layers}), _mismatch(plan, module) or "it fits"


def find_roots(part: nn.Module | nn.Parameter) -> Iterator[nn.Module]:
    """Yield the outermost modules that contain a module or parameter, among all that are alive."""
    parents: defaultdict[int, list[nn.Module]] = defaultdict(list)
    for found in gc.get_objects():
        if issubclass(type(found), nn.Module):  # isinstance would wake lazy proxies
            own = vars(found)
            for child in (*own.get("_modules", {}).values(), *own.get("_parameters", {}).values()):
                parents[id(child)].append(found)
    waiting, done = [part], {id(part)}
    while waiting:
        part = waiting.pop()
        above = [parent for parent in parents[id(part)] if id(parent) not in done]
        done.update(map(id, above))
        waiting += above
        if isinstance(part, nn.Module) and not parents[id(part)]:
            yield part


def _mismatch(plan: Plan, module: nn.Module) -> str | None:
    try:
        check_fit(plan, unwrapped(module))
    except PlanMismatchError as error:
        return str(error)
    return None
