"""What an export has to say: which layers run which FP8 option, and what the target cannot know."""

from collections.abc import Iterable, Sequence

from autoprec.errors import PlanMismatchError
from autoprec.records import Assignment, LayerKind, Option, Plan, Precision

MOST_NAMED = 4  # layers in one message
GEMM_KINDS = (LayerKind.LINEAR, LayerKind.CONV, LayerKind.ATTENTION, LayerKind.RECURRENT)


def check_exportable(plan: Plan, to: str) -> None:
    """Refuse what no target can say.

    Raises:
        PlanMismatchError: the plan has no FP8 layer, one that is not linear, or a schedule.
    """
    if not plan.count(Precision.FP8_O1):
        raise PlanMismatchError(
            f"an export to {to} says which layers run in FP8, but this plan has none; "
            "there is nothing to export: train with BF16 as you would without FP8"
        )
    others = [x.name for x in plan.layers if x.option.is_fp8 and x.kind is not LayerKind.LINEAR]
    if others:
        raise PlanMismatchError(
            f"only linear layers run in FP8, but the plan has {named(others)} in fp8_o1; set "
            "these to bf16_o2 in the plan"
        )
    if plan.schedule:
        raise PlanMismatchError(
            f"an export to {to} holds for a whole run, but this plan switches FP8 on and off at "
            f"{len(plan.schedule)} steps; use autoprec.Guard, or remove `schedule` from the plan"
        )


def fp8_choices(plan: Plan) -> dict[Option, list[str]]:
    """Return the names of the FP8 layers by option, in plan order."""
    found: dict[Option, list[str]] = {}
    for layer in plan.layers:
        if layer.option.is_fp8:
            found.setdefault(layer.option, []).append(layer.name)
    return found


def linears(plan: Plan) -> list[Assignment]:
    """Return the linear layers, in plan order."""
    return [layer for layer in plan.layers if layer.kind is LayerKind.LINEAR]


def require_recipes(plan: Plan, to: str, allowed: Sequence[str], *, with_gemms_hp: bool) -> None:
    """Refuse options that the target does not have.

    Raises:
        PlanMismatchError: a layer has another recipe, or GEMMs in BF16 that the target cannot name.
    """
    for option, names in fp8_choices(plan).items():
        if option.recipe not in allowed:
            raise PlanMismatchError(
                f"{to} has the FP8 recipes {', '.join(allowed)}, but {named(names)} "
                f"{'has' if len(names) == 1 else 'have'} {option.recipe}; tune again with "
                f"--recipes {','.join(allowed)}, or export to torchao"
            )
        if option.gemms_hp and not with_gemms_hp:
            raise PlanMismatchError(
                f"{to} switches a layer's three GEMMs together, but {named(names)} "
                f"{'keeps' if len(names) == 1 else 'keep'} {', '.join(option.gemms_hp)} in BF16; "
                "export to torchao or transformer-engine"
            )


def require_one_option(plan: Plan, to: str) -> Option:
    """Return the only FP8 option of the plan.

    Raises:
        PlanMismatchError: there are several.
    """
    choices = fp8_choices(plan)
    if len(choices) > 1:
        counts = ", ".join(f"{option} on {len(names)}" for option, names in choices.items())
        raise PlanMismatchError(
            f"{to} runs one FP8 recipe, but this plan has several ({counts}); tune again with one "
            "recipe in --recipes, or export to torchao"
        )
    return next(iter(choices))


def require_no_fp32_gemm(plan: Plan, to: str, why: str) -> None:
    """Refuse FP32 layers that the target would run in BF16.

    Raises:
        PlanMismatchError: a layer with a GEMM is FP32 in the plan.
    """
    names = [
        layer.name
        for layer in plan.layers
        if layer.precision is Precision.FP32 and layer.kind in GEMM_KINDS
    ]
    if names:
        raise PlanMismatchError(
            f"{to} {why}, but the plan has {named(names)} in fp32; set "
            "these to bf16_o2 in the plan, or use autoprec.apply"
        )


def require_no_all_gather(plan: Plan, to: str) -> None:
    """Refuse FP8 weights in FSDP's all-gather where the target has no word for them.

    Raises:
        PlanMismatchError: the plan asks for it.
    """
    if plan.fp8_all_gather:
        raise PlanMismatchError(
            f"{to} cannot be told to gather FP8 weights, but this plan says fp8_all_gather; "
            "export to torchao or accelerate, or set it to false in the plan"
        )


def header(plan: Plan, *lines: str) -> str:
    """Return comment lines: what this is, how to use it, and what is not in it."""
    counts = ", ".join(f"{plan.count(p)} {p.value}" for p in Precision if plan.count(p))
    told = [f"autoprec plan {plan.digest} ({counts}), made for {plan.fingerprint.device}", *lines]
    return "".join(f"# {ascii_line(line)}\n" for line in told)


def left_to_trainer(plan: Plan) -> str:
    """Return the line that says what an FP8 export does not set."""
    fp32 = [layer.name for layer in plan.layers if layer.precision is Precision.FP32]
    return (
        f"Not in here, set it in your trainer: {plan.count(Precision.BF16_O2)} x bf16_o2 (BF16 "
        f"parameters, FP32 masters), {len(fp32)} x fp32{f' ({named(fp32)})' if fp32 else ''}."
    )


def named(names: Sequence[str]) -> str:
    """Return the first names and how many more there are, on one line."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(ascii_line(name) for name in names[:MOST_NAMED]) + more


def ascii_line(text: str) -> str:
    """Return `text` as one line of visible ASCII; the rest is escaped."""
    return ascii(text)[1:-1].replace("\\'", "'")


def quoted(names: Iterable[str], *, indent: int) -> str:
    """Return names as Python string literals, one a line."""
    space = " " * indent
    return "".join(f"{space}{name!a},\n" for name in names)
