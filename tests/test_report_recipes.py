"""What each recipe costs in convergence, and which recipes can be asked for."""

import pytest

from autoprec.errors import SettingsError
from autoprec.records import BF16_O2, Estimate, LayerSensitivity, Option, Recipe, fp8_option
from autoprec.report.tables import recipe_costs
from autoprec.sensitivity.gap import HORIZON_STEPS, predicted_loss_gap
from autoprec.tuning.parsing import parse_recipes
from tests.search_tables import sensitivity_of, spec_of

TENSORWISE, ROWWISE = fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE)


def row(name: str, option: Option, grad_error: float) -> LayerSensitivity:
    return LayerSensitivity(
        name=name,
        option=option,
        grad_error=Estimate(mean=grad_error),
    )


def test_a_recipe_is_summed_over_its_linears_and_bf16_elsewhere() -> None:
    spec = spec_of({name: {BF16_O2: (1.0, 0.0)} for name in ("a", "b", "norm")})
    rows = (
        *(row(name, BF16_O2, 1e-5) for name in ("a", "b", "norm")),
        *(row(name, TENSORWISE, 2e-3) for name in ("a", "b")),
        row("a", ROWWISE, 5e-3),
    )
    curve = tuple((t, 5.0 / t**0.1) for t in range(1, 21))
    sensitivity = sensitivity_of(spec, {}).model_copy(update={"rows": rows, "loss_curve": curve})
    tensorwise, rowwise = recipe_costs(sensitivity)
    grad_error = sensitivity.activation_error.mean + 2 * 2e-3 + 1e-5
    gap = predicted_loss_gap(sensitivity, grad_error, HORIZON_STEPS)
    assert tensorwise[:2] == ("fp8_o1 tensorwise", 2)
    assert tensorwise[2:] == pytest.approx((grad_error, gap))
    assert rowwise[:2] == ("fp8_o1 rowwise", 1)
    assert rowwise[2] == pytest.approx(0.00502, abs=1e-4)


@pytest.mark.parametrize("text", ["tensorwise,delayed", "", "tensorwise,nonsense"])
def test_recipes_need_one_that_a_plan_can_apply(text: str) -> None:
    with pytest.raises(SettingsError, match="--recipes must be among tensorwise, rowwise"):
        parse_recipes(text)
