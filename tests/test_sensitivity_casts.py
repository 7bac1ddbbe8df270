"""The emulated casts and GEMMs against torchao's own and torch's own."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.device.torchao import float8_config, import_torchao
from autoprec.records import Operand, Option, Recipe, fp8_option, with_gemms_hp
from autoprec.sensitivity import gemm
from autoprec.sensitivity.casts import fp8_to_float
from autoprec.sensitivity.emulation import Repair, emulated_layer
from autoprec.sensitivity.gemm import casts_in_parts, fast_gemms
from tests.peaks import tracked_peak

M, K, N = 48, 64, 32
RECIPES = (Recipe.TENSORWISE, Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_MK with an outlier channel, weight_NK, bias and grad_MN of wide range, BF16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator)
    x[:, 3] *= 50
    weight = torch.randn(N, K, generator=generator) / 8
    bias = torch.randn(N, generator=generator)
    grad = torch.randn(M, N, generator=generator) * 10.0 ** -torch.arange(M)[:, None].div(8)
    return x.bfloat16(), weight.bfloat16(), bias.bfloat16(), grad.bfloat16()


def run_torchao(option: Option) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias, grad = operands()
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    cls = import_torchao().float8_linear.Float8Linear
    layer = cls.from_float(linear, float8_config(option))
    x.requires_grad_()
    y: Tensor = layer(x)
    torch.autograd.backward(y, grad)
    assert x.grad is not None
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def run_emulated(
    option: Option, in_range: Operand | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias, grad = (t.float() for t in operands())
    linear = nn.Linear(K, N)
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    with emulated_layer(linear, option, Repair(in_range), chunk=7 * (K + N)):
        y = linear(x.requires_grad_())
    torch.autograd.backward(y, grad)
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert linear.bias.grad is not None
    return y.detach(), x.grad, linear.weight.grad, linear.bias.grad


def test_what_an_emulated_linear_gives_may_be_changed_in_place() -> None:
    linear = nn.Linear(K, N)
    with emulated_layer(linear, fp8_option(Recipe.TENSORWISE), Repair(), chunk=7 * (K + N)):
        for shape in ((M, K), (2, M, K)):
            torch.autograd.backward(F.relu(linear(torch.randn(shape)), inplace=True).sum())


@pytest.mark.parametrize(
    "option", with_gemms_hp(list(map(fp8_option, RECIPES))), ids=lambda option: option.key
)
def test_emulated_linear_is_torchaos_up_to_the_order_of_sums(option: Option) -> None:
    """Sums in another order may round to the neighbouring BF16 value, 2^-8 away."""
    for real, emulated in zip(run_torchao(option), run_emulated(option), strict=True):
        difference = (real.float() - emulated).abs()
        assert bool((difference <= 2.0**-7 * emulated.abs() + 1e-6 * emulated.abs().max()).all())
        assert float((difference > 0).float().mean()) < 0.05  # all others are equal to the bit


@pytest.mark.parametrize("option", list(map(fp8_option, RECIPES)), ids=lambda option: option.key)
@pytest.mark.parametrize("operand", Operand)
def test_more_range_changes_nothing_of_an_operand_that_needs_none(
    option: Option, operand: Operand
) -> None:
    """Values are rounded as they are anyway, but for one in thousands that are next to zero."""
    plain, repaired = run_emulated(option), run_emulated(option, in_range=operand)
    for one, other in zip(plain, repaired, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-3  # another grid: 0.02


@pytest.mark.parametrize(
    "option", with_gemms_hp(list(map(fp8_option, RECIPES))), ids=lambda option: option.key
)
def test_fast_gemms_give_what_the_real_kernel_gives(option: Option) -> None:
    real = run_torchao(option)
    with fast_gemms():
        fast = run_torchao(option)
    for one, other in zip(real, fast, strict=True):
        difference = (one.float() - other.float()).norm() / one.float().norm()
        assert float(difference) < 2e-4


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (2, 20, 24)])
@pytest.mark.parametrize("dim", [None, 0, -1])
def test_casts_in_parts_give_torchaos_bits(
    shape: tuple[int, ...], dim: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "SMALLEST_PART", 8)
    torchao = import_torchao()
    cast = torchao.float8_scaling_utils.hp_tensor_to_float8_dynamic
    granularity = torchao.config.ScalingGranularity
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    kind = granularity.TENSORWISE if dim is None else granularity.AXISWISE
    how = {"scaling_granularity": kind, "axiswise_dim": dim, "round_scales_to_power_of_2": True}
    for laid_out in (x, x.transpose(0, -1), x[:, ::2]):
        expected = cast(laid_out, torch.float8_e4m3fn, None, **how)
        with casts_in_parts():
            found = cast(laid_out, torch.float8_e4m3fn, None, **how)
        assert torch.equal(found._data.view(torch.uint8), expected._data.view(torch.uint8))
        assert found._data.stride() == expected._data.stride()
        assert torch.equal(found._scale, expected._scale)
        assert vars(found).keys() == vars(expected).keys()


def test_a_cast_takes_little_beside_its_result() -> None:
    layer = import_torchao().float8_linear.Float8Linear.from_float(
        nn.Linear(512, 16, dtype=torch.bfloat16), float8_config(fp8_option(Recipe.TENSORWISE))
    )
    x = torch.randn(2048, 512).bfloat16().requires_grad_()
    peaks = []
    for cast in (nullcontext(), casts_in_parts()):
        with fast_gemms(), cast, tracked_peak() as peak:
            torch.autograd.backward(layer(x).square().mean())
        peaks.append(peak.rise_bytes / x.numel())
    whole, in_parts = peaks
    # x again in FP8 and FP32 for grad_weight, and of grad_input its BF16
    assert in_parts < 8.0 < whole


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_the_table_holds_every_fp8_value(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).view(dtype)
    assert torch.equal(fp8_to_float(codes.t()).nan_to_num(7e9), codes.t().float().nan_to_num(7e9))
