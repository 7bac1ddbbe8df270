"""What each FP8 recipe costs in convergence on this model, delayed scaling too where asked for.

Every linear that takes FP8 in one recipe, BF16 elsewhere: the sum of parts and the loss gap that it
predicts. `delayed` is emulated and cannot be applied here; the choice between it and
current scaling is Transformer Engine's, and this is what it means for the loss.
"""

from autoprec.records import APPLICABLE_RECIPES, BF16_O2, Option, Sensitivity
from autoprec.report.formats import shown_option, shown_share
from autoprec.sensitivity.gap import HORIZON_STEPS, predicted_loss_gap


def recipe_rows(sensitivity: Sensitivity) -> list[tuple[str, str, str, str]]:
    """Return (recipe, linears, gradient error, predicted gap) of each whole FP8 recipe."""
    options = dict.fromkeys(row.option for row in sensitivity.rows)
    whole = [option for option in options if option.is_fp8 and not option.gemms_hp]
    return [_row(sensitivity, option) for option in whole]


def _row(sensitivity: Sensitivity, option: Option) -> tuple[str, str, str, str]:
    own = {row.name: row for row in sensitivity.rows if row.option == option}
    others = [r for r in sensitivity.rows if r.option == BF16_O2 and r.name not in own]
    chosen = [*own.values(), *others]
    grad_error = sensitivity.activation_error.mean + sum(
        max(row.grad_error.mean, 0.0) for row in chosen
    )
    gap = predicted_loss_gap(sensitivity, grad_error, HORIZON_STEPS)
    name = shown_option(option)
    if option.recipe not in APPLICABLE_RECIPES:
        name += " (for comparison; no plan applies it)"
    return (
        name,
        str(len(own)),
        shown_share(grad_error),
        shown_share(gap, sign=True),
    )
