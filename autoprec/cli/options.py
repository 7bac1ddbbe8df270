"""Settings -> options of a command: their names, types and help are said once, in `Settings`."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from autoprec.tuning.settings import Setting, Settings, all_settings

F = TypeVar("F", bound=Callable[..., None])


def with_settings(stage: str = "", **defaults: object) -> Callable[[F], F]:
    """Give a command, whose last parameter is `**given`, the options of its settings.

    Args:
        stage: whose settings the command has; empty: all of them, as `tune`.
        defaults: of options that the command has in its own way.
    """

    def change(command: F) -> F:
        own = list(inspect.signature(command).parameters.values())[:-1]
        taken = {parameter.name for parameter in own} | {"workload", "script_args"}
        options = [
            _option(name, setting, defaults.get(name))
            for name, setting in all_settings().items()
            if name not in taken and (not stage or stage in setting.commands)
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *options)]
        signature = inspect.Signature(parameters)
        command.__signature__ = signature  # type: ignore[attr-defined]  # typer reads it
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return change


def _option(name: str, setting: Setting, default: object) -> inspect.Parameter:
    """Return a setting as a parameter; where its text is parsed, the option is a text."""
    kind: Any = get_type_hints(Settings)[name]  # Any: a type
    if kind == tuple[str, ...]:
        kind, text = list[str] | None, None
    elif setting.parse:
        kind, text = str, setting.text
    else:
        text = getattr(Settings, name)
    looks = dict(setting.option)
    option = typer.Option(*looks.pop("names", ()), help=setting.about, **looks)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=text if default is None else default,
        annotation=Annotated[kind, option],
    )
