"""FP8 and BF16 GEMMs in FP32 arithmetic against torch's own kernels and FP64."""

import warnings
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoprec.sensitivity import gemm
from autoprec.sensitivity.gemm import fast_gemms, scaled_mm

# operation -> its operands' shapes; sums of 65 to 576 products, so that their order shows
OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((48, 128), (65, 128), (65,))),
    "linear without bias": (F.linear, ((48, 128), (65, 128))),
    "linear of sequences": (F.linear, ((3, 16, 128), (65, 128), (65,))),
    "bmm": (torch.bmm, ((6, 33, 128), (6, 128, 65))),
    "baddbmm": (torch.baddbmm, ((6, 33, 65), (6, 33, 128), (6, 128, 65))),
    "conv1d": (F.conv1d, ((2, 64, 40), (65, 64, 5), (65,))),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        ((2, 64, 9, 9), (65, 64, 3, 3), (65,)),
    ),
    "grouped conv2d": (lambda x, w: F.conv2d(x, w, groups=2), ((2, 128, 9, 9), (66, 64, 3, 3))),
    "conv_transpose2d": (F.conv_transpose2d, ((2, 64, 9, 9), (64, 65, 3, 3), (65,))),
}


def operands(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def run(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of all operands, for a gradient of BF16 values."""
    leaves = [each.detach().clone().requires_grad_() for each in given]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)
    torch.autograd.backward(output, grad)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", OPERATIONS)
def test_bf16_in_fp32_arithmetic_is_as_near_to_fp64_as_torchs_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is FP64's result rounded to BF16, but where the FP32 sum falls on the other neighbour."""
    monkeypatch.setattr(gemm, "has_bf16_gemms", lambda: False)
    function, shapes = OPERATIONS[name]
    given = operands(shapes)
    exact = run(function, [each.double() for each in given])
    own = run(function, given)
    with fast_gemms():
        fast = run(function, given)
    assert len(fast) == len(own) == len(shapes) + 1
    for one, other, best in zip(fast, own, exact, strict=True):
        assert one.dtype is torch.bfloat16
        assert one.shape == other.shape
        assert relative_error(one, best) <= 1.001 * relative_error(other, best)
        assert float((one != best.bfloat16()).float().mean()) < 0.005


def test_a_cpu_with_bf16_instructions_and_fp32_operands_keep_torchs_own_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w = operands(((512, 768), (512, 768)))
    own = x @ w.t(), x.float() @ w.float().t()
    for has_them in (True, False):
        monkeypatch.setattr(gemm, "has_bf16_gemms", lambda has=has_them: has)
        with fast_gemms():
            found = x @ w.t(), x.float() @ w.float().t()
        assert torch.equal(found[1], own[1])
        assert torch.equal(found[0], own[0]) or not has_them


def test_grouped_gemms_take_bf16_as_the_dtype_of_their_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w = operands(((48, 64), (3, 64, 32)))
    ends = torch.tensor([16, 16, 48], dtype=torch.int32)
    monkeypatch.setattr(gemm, "has_bf16_gemms", lambda: False)
    with fast_gemms():
        found = torch._grouped_mm(x, w, offs=ends, out_dtype=torch.bfloat16)
    exact = torch.cat([x[:16].double() @ w[0].double(), x[16:].double() @ w[2].double()])
    assert found.dtype is torch.bfloat16
    assert relative_error(found, exact) < 2**-8


def test_fast_gemms_nest_and_leave_the_real_kernels_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm, "has_bf16_gemms", lambda: False)
    # see conftest: on torch 2.11 tests emulate all the time
    monkeypatch.setattr(gemm, "emulates_gemms", ContextVar("emulates", default=False))
    a = torch.randn(16, 32).to(torch.float8_e4m3fn)
    b = torch.randn(16, 32).to(torch.float8_e4m3fn).t()
    one = torch.tensor(1.0)
    low, calls, of_fp32 = torch.ones(4, 4).bfloat16(), Counter[str](), gemm._in_fp32

    def counted(name: str) -> Callable[..., Tensor]:
        kernel = of_fp32(name)

        def run(*args: Any, **kwargs: Any) -> Tensor:  # Any: torch's own
            calls[name] += args[1].dtype is torch.bfloat16
            found: Tensor = kernel(*args, **kwargs)
            return found

        return run

    monkeypatch.setattr(gemm, "_in_fp32", counted)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # replacing the kernel is not announced
        with fast_gemms():
            with fast_gemms():
                seen.append(torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16))
            seen.append(torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16))
            torch.mm(low, low)
    seen.append(torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16))
    torch.mm(low, low)
    for found in seen:
        assert torch.allclose(found.float(), a.float() @ b.float(), rtol=2**-7, atol=1e-3)
    assert calls == {"mm": 1}


@pytest.mark.parametrize("count", [16, 4])
def test_scaled_mm_takes_a_bias_and_a_result_scale(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the larger operand a part at a time."""
    monkeypatch.setattr(gemm, "SMALLEST_PART", 64)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(count, 32, generator=generator).to(torch.float8_e4m3fn)
    b = torch.randn(8, 32, generator=generator).to(torch.float8_e4m3fn).t()
    rows, columns, bias = (torch.rand(s, generator=generator) for s in ((count, 1), (1, 8), (8,)))
    found = scaled_mm(a, b, rows, columns, bias, torch.tensor(2.0), torch.float32)
    expected = 2 * ((a.double() * rows) @ (b.double() * columns) + bias)
    assert torch.allclose(found.double(), expected, atol=1e-5)
