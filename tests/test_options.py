"""The rule of what a layer can take, on hand-made shapes; the captured models are elsewhere."""

import pytest

from autoprec.model.options import layer_options, shape_refusal
from autoprec.records import (
    APPLICABLE_RECIPES,
    Gemm,
    GemmShape,
    LayerKind,
    Option,
    fp8_option,
)

FP8 = [fp8_option(recipe) for recipe in APPLICABLE_RECIPES]


def _fp8(*, M: int = 32, tokens: tuple[int, ...] = (), **keywords: str) -> tuple[str, str]:
    options, refusals = layer_options(
        kind=LayerKind.LINEAR,
        gemm=GemmShape(M=M, K=64, N=32),
        tokens=tokens,
        fp8_options=[] if keywords.get("unavailable") else FP8,
        **keywords,
    )
    found = " ".join(option.key.removeprefix("fp8_o1:") for option in options if option.is_fp8)
    return found, refusals[0].reason if refusals else ""


def test_even_tokens_take_every_recipe_as_it_is() -> None:
    assert _fp8(tokens=(16, 32)) == ("tensorwise rowwise rowwise_with_gw_hp", "")


@pytest.mark.parametrize(("M", "tokens"), [(32, (7, 32)), (33, ()), (33, (33,))])
def test_one_uneven_token_count_takes_grad_weight_out_of_fp8(
    M: int, tokens: tuple[int, ...]
) -> None:
    found, reason = _fp8(M=M, tokens=tokens)
    assert found == "tensorwise-grad_weight rowwise-grad_weight rowwise_with_gw_hp"
    assert not reason


def test_an_obstacle_comes_before_the_device() -> None:
    assert _fp8(unavailable="no FP8 here") == ("", "no FP8 here")
    assert _fp8(unavailable="no FP8 here", obstacle="own forward") == ("", "own forward")


@pytest.mark.parametrize(
    ("kind", "says"), [(LayerKind.NORM, "norm layer"), (LayerKind.CONV, "convolution")]
)
def test_what_is_no_linear_says_so(kind: LayerKind, says: str) -> None:
    _, refusals = layer_options(kind=kind, gemm=None, fp8_options=FP8)
    assert says in refusals[0].reason


def test_a_size_is_refused_by_the_gemm_that_needs_it() -> None:
    assert shape_refusal(64, 32, tokens=(16,)) == ""
    assert shape_refusal(65, 32).startswith("K=65 is not a multiple of 16")
    assert shape_refusal(64, 10).startswith("N=10")
    assert shape_refusal(64, 32, tokens=(48, 40, 33)).startswith("M=33")
    assert shape_refusal(64, 32, tokens=(33,), gemms=(Gemm.OUTPUT,)) == ""
    assert shape_refusal(64, 128, multiple=128).startswith("K=64 is not a multiple of 128")


@pytest.mark.parametrize(
    ("key", "gemms"),
    [
        ("fp8_o1:rowwise", tuple(Gemm)),
        ("fp8_o1:tensorwise-grad_input", (Gemm.OUTPUT, Gemm.GRAD_WEIGHT)),
        ("fp8_o1:rowwise_with_gw_hp", (Gemm.OUTPUT, Gemm.GRAD_INPUT)),
        ("bf16_o2", ()),
    ],
)
def test_an_option_knows_its_fp8_gemms(key: str, gemms: tuple[Gemm, ...]) -> None:
    assert Option.parse(key).fp8_gemms == gemms
