"""What the study may vary: a base plan, and for each role of layers an option over it.

`base` is the position among the bases: the plans of the exact front and the uniform plans, by
increasing e. A role holds the layers that do the same thing in different blocks (one kind and
shape, names that differ in their numbers only); its value is `base` (as the base plan says) or an
option for all of them. A few dozen decisions describe any depth, and each seed is a base.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprec.records import BF16_O2, FP32, Option
from autoprec.search.problem import Options, Problem, Unit

AS_BASE = "base"
DIGITS = re.compile(r"\d+")

Params = dict[str, int | str]


@dataclass(frozen=True)
class Role:
    """Units that are set together, and the options they may be set to."""

    name: str
    units: tuple[Unit, ...]
    options: Options


@dataclass(frozen=True)
class Space:
    """The decisions of the study."""

    problem: Problem
    bases: tuple[Options, ...]
    roles: tuple[Role, ...]

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Return, for every role, its values."""
        return {
            role.name: (AS_BASE, *(option.key for option in role.options)) for role in self.roles
        }

    def params(self, base: int) -> Params:
        """Return the decisions that give a base as it is."""
        return {"base": base, **{role.name: AS_BASE for role in self.roles}}

    def decode(self, params: Mapping[str, int | str]) -> Options:
        """Return the plan that the decisions stand for."""
        chosen = list(self.bases[int(params["base"])])
        for role in self.roles:
            value = str(params[role.name])
            if value != AS_BASE:
                option = next(option for option in role.options if option.key == value)
                for unit in role.units:
                    _set(chosen, unit, option)
        return self.problem.settle(tuple(chosen))


def make_space(problem: Problem, front: Sequence[Options]) -> Space:
    """Return the decisions over a front."""
    uniform = [problem.uniform(option) for option in (FP32, BF16_O2)]
    plans = dict.fromkeys((*front, *(plan for plan in uniform if problem.fits_memory(plan))))
    costs = problem.costs
    bases = sorted(plans, key=lambda plan: (costs.grad_error(plan), costs.step_ms(plan)))
    return Space(problem, tuple(bases), _roles(problem))


def _roles(problem: Problem) -> tuple[Role, ...]:
    groups: dict[tuple[str, ...], list[Unit]] = {}
    for unit in problem.units:
        if len(unit.choices) > 1:
            groups.setdefault(_role_key(problem, unit), []).append(unit)
    roles: dict[str, Role] = {}
    for key, units in groups.items():
        options = dict.fromkeys(
            option for unit in units for choice in unit.choices for option in choice
        )
        name = key[0] if key[0] not in roles else f"{key[0]} #{len(roles)}"
        offered = tuple(o for o in options if any(uniform_choice(unit, o) for unit in units))
        roles[name] = Role(name, tuple(units), offered)
    return tuple(roles.values())


def _role_key(problem: Problem, unit: Unit) -> tuple[str, ...]:
    layers = [problem.costs.layers[index] for index in unit.layers]
    names = "+".join(DIGITS.sub("*", layer.name) for layer in layers)
    return (names or "(root)", *(f"{layer.kind} {layer.shape_key}" for layer in layers))


def uniform_choice(unit: Unit, option: Option) -> Options | None:
    """Return the unit's choice that is `option`, in BF16 where a tied layer has no such FP8."""
    if len(unit.layers) == 1:
        return (option,) if (option,) in unit.choices else None
    fitting = [c for c in unit.choices if option in c and set(c) <= {option, BF16_O2}]
    return max(fitting, key=lambda choice: choice.count(option), default=None)


def _set(chosen: list[Option], unit: Unit, option: Option) -> None:
    choice = uniform_choice(unit, option)
    if choice is not None:
        for index, value in zip(unit.layers, choice, strict=True):
            chosen[index] = value
