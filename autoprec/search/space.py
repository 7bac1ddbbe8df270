"""What the study may vary: a base plan, and for each role of layers an option over it.

`base` is the position among the bases: the plans of the exact front and the uniform plans, by
increasing error. A role holds the layers that do the same thing in different blocks (one kind and
shape, names that differ in their numbers only); its value is `base` (as the base plan says) or an
option for all of them. A few dozen decisions describe any depth, and each seed is a base.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autoprec.records import BF16_O2, LayerSpec, Option
from autoprec.search.problem import Group, Options, Problem

AS_BASE = "base"
DIGITS = re.compile(r"\d+")

Params = dict[str, int | str]


@dataclass(frozen=True)
class Role:
    """Groups that are set together, and the options they may be set to."""

    name: str
    groups: tuple[Group, ...]
    options: Options


@dataclass(frozen=True)
class Space:
    """The decisions of the study."""

    problem: Problem
    bases: tuple[Options, ...]
    roles: tuple[Role, ...]

    def params(self, base: int) -> Params:
        """Return the decisions that give a base as it is."""
        return {"base": base, **{role.name: AS_BASE for role in self.roles}}

    def decode(self, params: Mapping[str, int | str]) -> Options:
        """Return the plan that the decisions stand for."""
        chosen = list(self.bases[int(params["base"])])
        for role in self.roles:
            if params[role.name] == AS_BASE:
                continue
            option = next(o for o in role.options if o.key == params[role.name])
            for group in role.groups:
                if choice := uniform_choice(group, option):
                    for index, value in zip(group.layers, choice, strict=True):
                        chosen[index] = value
        return self.problem.follow_uncalled(tuple(chosen))


def make_space(problem: Problem, front: Iterable[Options]) -> Space:
    """Return the decisions over a front."""
    plans = dict.fromkeys((*front, *filter(problem.fits_memory, problem.uniform_plans)))
    costs = problem.costs
    bases = sorted(plans, key=lambda plan: (costs.grad_error(plan), costs.step_ms(plan)))
    return Space(problem, tuple(bases), _roles(problem))


def uniform_choice(group: Group, option: Option) -> Options | None:
    """Return the group's choice that is `option`, in BF16 where a tied layer has no such FP8."""
    fitting = [c for c in group.choices if option in c and set(c) <= {option, BF16_O2}]
    return max(fitting, key=lambda choice: choice.count(option), default=None)


def alike_key(layer: LayerSpec) -> str:
    """Return what layers that do the same thing in different blocks have in common."""
    return f"{DIGITS.sub('*', layer.name)} {layer.kind} {layer.shape_key}"


def _roles(problem: Problem) -> tuple[Role, ...]:
    alike: dict[tuple[str, ...], list[Group]] = {}
    for group in problem.groups:
        if len(group.choices) > 1:
            layers = [problem.costs.layers[index] for index in group.layers]
            alike.setdefault(tuple(map(alike_key, layers)), []).append(group)
    roles: dict[str, Role] = {}
    for groups in alike.values():
        layers = [problem.costs.layers[index] for index in groups[0].layers]
        own = "+".join(DIGITS.sub("*", layer.name) for layer in layers) or "(root)"
        name = own if own not in roles else f"{own} #{len(roles)}"
        options = dict.fromkeys(o for group in groups for choice in group.choices for o in choice)
        offered = tuple(o for o in options if any(uniform_choice(group, o) for group in groups))
        roles[name] = Role(name, tuple(groups), offered)
    return tuple(roles.values())
