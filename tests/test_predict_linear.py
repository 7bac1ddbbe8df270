"""GEMMs, casts and linears: what holds for any constants, and what the shipped ones must say."""

import csv
import math
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.common.recipes import Gemm, Recipe
from autoprec.errors import DeviceError
from autoprec.predict import (
    list_device_profiles,
    load_device_profile,
    predict_linear,
)
from autoprec.predict.casts import RECIPE_COSTS, cast_us, rescale_us
from autoprec.predict.gemm import Kernel, gemm_us
from autoprec.predict.linear import linear_times
from autoprec.records.devices import DeviceProfile, LinearPrediction, Prediction, Software
from autoprec.records.model import BF16_O2, Basis, fp8_option

SIZES = st.integers(min_value=1, max_value=4096).map(lambda n: 16 * n)
BLOCKS = st.integers(min_value=1, max_value=512).map(lambda n: 128 * n)
H100 = load_device_profile("h100-sxm")
FP8_DEVICES = [profile for profile in list_device_profiles() if profile.has_fp8]
GRID = Path(__file__).parent.parent / "bench" / "data" / "linear_layers.csv"


def speedup(prediction: LinearPrediction) -> Prediction:
    assert prediction.speedup is not None
    return prediction.speedup


@given(M=BLOCKS, K=BLOCKS, N=BLOCKS, recipe=st.sampled_from(list(Recipe)))
def test_a_linear_is_its_three_gemms_and_its_casts(M: int, K: int, N: int, recipe: Recipe) -> None:
    profile = load_device_profile("b200")
    found = predict_linear(profile, M, K, N, recipe=recipe)
    assert found.fp8 is not None
    shapes = {"output_ms": (M, K, N), "grad_input_ms": (M, N, K), "grad_weight_ms": (K, M, N)}
    for part, shape in shapes.items():
        us = gemm_us(profile.machine, *shape, Kernel.BF16)
        assert getattr(found.bf16, part) == pytest.approx(us / 1e3)
    assert found.bf16.cast_ms == 0
    # The weight alone is written twice in FP8, as it lies and transposed.
    assert found.fp8.cast_ms > 2 * K * N / (profile.machine.memory_bandwidth_tbs * 1e9)
    for arm in (found.bf16, found.fp8):
        gemms = arm.output_ms + arm.grad_input_ms + arm.grad_weight_ms
        assert arm.total_ms == pytest.approx(gemms + arm.cast_ms + arm.neighbours_ms)
        assert 0 < arm.total_low_ms < arm.total_ms < arm.total_high_ms
    assert speedup(found).value == pytest.approx(found.bf16.total_ms / found.fp8.total_ms)
    assert speedup(found).low < speedup(found).value < speedup(found).high
    assert found.basis is Basis.PREDICTED


@given(M=SIZES, K=SIZES, N=SIZES, kernel=st.sampled_from(list(Kernel)))
def test_no_gemm_beats_the_peak_or_the_memory(M: int, K: int, N: int, kernel: Kernel) -> None:
    machine = H100.machine
    us = gemm_us(machine, M, K, N, kernel)
    peak = {Kernel.FP32: machine.fp32_peak_tflops, Kernel.BF16: machine.bf16_peak_tflops}
    assert us > 2 * M * K * N / (peak.get(kernel, machine.fp8_peak_tflops) * 1e6)
    assert us > 2 * M * N / (machine.memory_bandwidth_tbs * 1e6)


@given(M=SIZES, K=SIZES, N=SIZES)
def test_twice_the_tokens_never_cost_less(M: int, K: int, N: int) -> None:
    once = predict_linear(H100, M, K, N, recipe="rowwise")
    twice = predict_linear(H100, 2 * M, K, N, recipe="rowwise")
    assert once.fp8 is not None
    assert twice.fp8 is not None
    assert twice.bf16.total_ms >= once.bf16.total_ms
    assert twice.fp8.total_ms >= once.fp8.total_ms


def test_the_gain_grows_with_the_matrix() -> None:
    sizes = (512, 1024, 2048, 4096, 8192, 16384)
    for recipe in ("tensorwise", "rowwise"):
        gains = [speedup(predict_linear(H100, n, n, n, recipe=recipe)).value for n in sizes]
        assert gains == sorted(gains)
        assert gains[0] < 1 < gains[-1]


def test_a_rowwise_kernel_without_swizzle_reads_a_large_operand_again() -> None:
    machine = replace(load_device_profile("h100-sxm-500w").machine, rowwise_is_cublas=0.0)
    plain = replace(machine, rowwise_swizzle_from=math.inf)
    for K, reads_again in ((2048, False), (32768, True)):
        swizzled = gemm_us(machine, 16384, K, 16384, Kernel.FP8_ROWWISE)
        in_order = gemm_us(plain, 16384, K, 16384, Kernel.FP8_ROWWISE)
        assert (in_order > 1.2 * swizzled) == reads_again
        assert in_order >= swizzled
    turned = gemm_us(plain, 16384, 32768, 8192, Kernel.FP8_ROWWISE)
    assert gemm_us(plain, 8192, 32768, 16384, Kernel.FP8_ROWWISE) == pytest.approx(turned)


def test_without_transposed_activations_rowwise_casts_cost_less() -> None:
    machine = H100.machine
    for size in (256, 8192):
        rowwise, high_precision = (
            cast_us(
                machine,
                *(size, size, size),
                recipe=recipe,
                gemms=fp8_option(recipe).fp8_gemms,
                compiled=True,
            )
            for recipe in (Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP)
        )
        assert 0 < high_precision < rowwise
    assert RECIPE_COSTS[Recipe.ROWWISE_WITH_GW_HP].fixed_kernels < machine.rowwise_cast_kernels


@pytest.mark.parametrize("device", FP8_DEVICES, ids=lambda device: device.name)
def test_the_gain_grows_with_the_matrix_on_every_device(device: DeviceProfile) -> None:
    for recipe in ("tensorwise", "rowwise"):
        gains = [
            speedup(predict_linear(device, n, n, n, recipe=recipe)).value
            for n in (2048, 4096, 8192, 16384)
        ]
        assert gains == sorted(gains)


@pytest.mark.parametrize("device", FP8_DEVICES, ids=lambda device: device.name)
def test_delayed_scaling_is_near_current(device: DeviceProfile) -> None:
    for n in (1024, 4096, 16384):
        current = speedup(predict_linear(device, n, n, n)).value
        delayed = speedup(predict_linear(device, n, n, n, recipe="delayed")).value
        assert current <= delayed < 1.12 * current


def test_eager_casts_cost_more_than_compiled_ones() -> None:
    compiled = predict_linear(H100, 8192, 4096, 4096)
    eager = predict_linear(H100, 8192, 4096, 4096, compiled=False)
    assert speedup(eager).value < speedup(compiled).value
    assert eager.bf16.neighbours_ms == 0


def test_a_gemm_kept_in_bf16_costs_what_bf16_costs() -> None:
    option = fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT)
    kept, bf16 = (linear_times(H100.machine, 8192, 4096, 4096, o) for o in (option, BF16_O2))
    assert kept.grad_weight == bf16.grad_weight
    assert kept.output < bf16.output


def test_casts_for_fewer_gemms_cost_less() -> None:
    machine, recipe = H100.machine, Recipe.ROWWISE
    costs = [
        cast_us(machine, 8192, 4096, 4096, recipe=recipe, gemms=gemms, compiled=True)
        for gemms in ((), (Gemm.OUTPUT,), (Gemm.OUTPUT, Gemm.GRAD_INPUT), tuple(Gemm))
    ]
    assert costs[0] == 0
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs)


@pytest.mark.parametrize(
    ("shape", "recipe", "words"),
    [
        ((8192, 4095, 4096), "tensorwise", "K=4095 is not a multiple of 16"),
        ((8192, 4096, 10), "tensorwise", "N=10 is not a multiple of 16"),
        ((8191, 4096, 4096), "rowwise", "M=8191 is not a multiple of 16"),
        ((8192, 4096, 4096), "mxfp8", "does not run mxfp8"),
    ],
)
def test_what_fp8_cannot_run_has_bf16_and_a_reason(
    shape: tuple[int, int, int], recipe: str, words: str
) -> None:
    found = predict_linear(H100, *shape, recipe=recipe)
    assert words in found.refusal
    assert found.bf16.total_ms > 0
    assert found.fp8 is None
    assert found.speedup is None
    assert found.gemm_speedup is None


@pytest.mark.parametrize(
    ("device", "recipe", "size", "block"),
    [("b200", "mxfp8", 4112, 32), ("h100-sxm", "blockwise", 4112, 128)],
)
def test_block_scales_need_whole_blocks(device: str, recipe: str, size: int, block: int) -> None:
    profile = load_device_profile(device)
    for axis in "MKN":
        M, K, N = (size if axis == other else 4096 for other in "MKN")
        found = predict_linear(profile, M, K, N, recipe=recipe)
        assert found.fp8 is None
        assert f"{axis}={size} is not a multiple of {block}" in found.refusal
    assert predict_linear(profile, 8192, 4096, 4096, recipe=recipe).fp8 is not None


def test_odd_tokens_run_when_grad_weight_stays_in_bf16() -> None:
    assert not predict_linear(H100, 8191, 4096, 4096, recipe="rowwise_with_gw_hp").refusal


def test_an_a100_predicts_bf16_and_says_why_no_fp8() -> None:
    found = predict_linear(load_device_profile("a100"), 8192, 4096, 4096)
    assert "no FP8" in found.refusal
    assert found.bf16.total_ms > 0


@pytest.mark.parametrize("shape", [(0, 16, 16), (16, -16, 16), (16, 16, 2**31)])
def test_a_size_that_is_none_is_an_error(shape: tuple[int, int, int]) -> None:
    with pytest.raises(DeviceError, match="must be between 1 and"):
        predict_linear(H100, *shape)


def test_every_recipe_has_its_row_and_some_device_that_runs_it() -> None:
    assert set(RECIPE_COSTS) == set(Recipe)
    assert {recipe for profile in FP8_DEVICES for recipe in profile.fp8_recipes} == set(Recipe)


def test_every_profile_predicts_every_recipe_it_has() -> None:
    for profile in list_device_profiles():
        for recipe in profile.fp8_recipes:
            found = predict_linear(profile, 16384, 8192, 8192, recipe=recipe)
            assert 0.8 < speedup(found).value < 3, (profile.name, recipe)


@pytest.mark.parametrize(("name", "error"), [("h100-sxm-500w", 0.06), ("h100-sxm", 0.075)])
def test_the_fit_reproduces_the_grid_that_it_was_fitted_to(name: str, error: float) -> None:
    profile, errors, sides = load_device_profile(name), [], []
    with GRID.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if "rowwise-perf.png" in row["source"]]
    for row in rows:
        shape = (int(row["M"]), int(row["K"]), int(row["N"]))
        found = speedup(predict_linear(profile, *shape, recipe="rowwise")).value
        errors.append(abs(found / float(row["speedup"]) - 1))
        sides.append((found >= 1) == (float(row["speedup"]) >= 1))
    assert len(rows) > 100
    assert math.fsum(errors) / len(errors) < error
    assert sum(sides) / len(sides) > 0.95


def test_rowwise_gradients_are_tensorwise_gemms_that_are_rescaled() -> None:
    machine, (M, K, N) = H100.machine, (8192, 4096, 14336)
    tensorwise, rowwise = (
        linear_times(machine, M, K, N, fp8_option(recipe))
        for recipe in (Recipe.TENSORWISE, Recipe.ROWWISE)
    )
    assert rowwise.grad_input == tensorwise.grad_input
    assert rowwise.grad_weight == tensorwise.grad_weight
    three = tuple(Gemm)
    casts = cast_us(machine, M, K, N, recipe=Recipe.ROWWISE, gemms=three, compiled=True)
    moved = 4 * (M * K + K * N) / machine.bytes_per_us
    assert rowwise.cast - casts == pytest.approx(moved + 2 * machine.kernel_floor_us)
    assert rescale_us(machine, M, K, N, Recipe.ROWWISE, (Gemm.OUTPUT,), compiled=True) == 0
    # eager: the outer product of the scales is written and read in FP32
    eager = rescale_us(machine, M, K, N, Recipe.ROWWISE, three, compiled=False)
    assert eager > 2.9 * (rowwise.cast - casts)


def test_torchao_before_0_8_ran_three_rowwise_gemms() -> None:
    software = Software(torchao="0.7")
    machine = H100.model_copy(update={"software": software}).machine
    times = linear_times(machine, 8192, 8192, 8192, fp8_option(Recipe.ROWWISE))
    assert times.output == times.grad_input == times.grad_weight


@pytest.mark.parametrize(
    ("device", "cuda", "is_cublas"),
    [
        ("h100-sxm", "13.0", True),
        ("h100-sxm", "12.9", True),
        ("h100-sxm", "12.8", False),
        ("b200", "13.0", False),
        ("rtx-pro-6000", "13.0", False),
        ("l40s", "13.0", False),
    ],
)
def test_row_scales_run_in_cublas_on_hopper_from_cuda_12_9_on(
    device: str, cuda: str, is_cublas: bool
) -> None:
    profile = load_device_profile(device)
    machine = profile.model_copy(update={"software": Software(cuda=cuda)}).machine
    assert machine.rowwise_is_cublas == is_cublas
    # few tiles and a long sum: cuBLASLt splits it, CUTLASS's kernel does not
    rowwise = gemm_us(machine, 512, 65536, 512, Kernel.FP8_ROWWISE)
    splits = rowwise < 1.5 * gemm_us(machine, 512, 65536, 512, Kernel.FP8_FAST)
    assert splits == is_cublas
    # as it does in FP32: a sum that one processor takes alone lasts longer by their number
    ratio = machine.fp32_peak_tflops * machine.fp32_fraction
    ratio /= machine.bf16_peak_tflops * machine.bf16_fraction
    fp32, bf16 = (gemm_us(machine, 512, 65536, 512, k) for k in (Kernel.FP32, Kernel.BF16))
    assert fp32 < 1.5 * bf16 / ratio


def test_a_prediction_says_which_software_it_assumes() -> None:
    assert predict_linear(H100, 8192, 4096, 4096).software == "torch 2.11, CUDA 13.0, torchao 0.18"


def test_short_gemms_run_at_higher_clocks_and_short_sums_do_not_hide_a_tile() -> None:
    plain = replace(H100.machine, tile_us=0.0, bf16_boost=0.0, fp8_boost=0.0)
    boosted = replace(plain, bf16_boost=0.3)
    long, short = (32768, 16384, 16384), (4096, 4096, 4096)
    gains = {
        shape: gemm_us(plain, *shape, Kernel.BF16) / gemm_us(boosted, *shape, Kernel.BF16)
        for shape in (long, short)
    }
    assert 1 < gains[long] < 1.05 < gains[short] < 1.3
    tiled = replace(plain, tile_us=2.0)
    lost = {
        K: gemm_us(tiled, 16384, K, 8192, Kernel.FP8_FAST)
        / gemm_us(plain, 16384, K, 8192, Kernel.FP8_FAST)
        for K in (1024, 16384)
    }
    assert 1 < lost[16384] < 1.05 < lost[1024]


def test_gemms_of_six_devices_are_as_nvidia_measured_them() -> None:
    errors: dict[str, list[float]] = defaultdict(list)
    sides = []
    with GRID.with_name("aic_gemm.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            machine = load_device_profile(row["device"]).machine
            M, K, N = (int(row[axis]) for axis in "MKN")
            bf16, fp8 = (gemm_us(machine, M, K, N, k) for k in (Kernel.BF16, Kernel.FP8_FAST))
            measured = float(row["bf16_ms"]) / float(row["fp8_kernel_ms"])
            errors[row["device"]].append(abs(bf16 / fp8 / measured - 1))
            sides.append((bf16 >= fp8) == (measured >= 1))
    assert len(errors) == 6
    assert all(statistics.median(found) < 0.08 for found in errors.values())
    assert statistics.fmean(sides) > 0.97


@pytest.mark.parametrize(
    ("device", "size", "measured"),  # gpu-flops-bench's rates of TF32 over BF16, 2026-08
    [
        ("rtx-4090", 4096, 86.5 / 174.3),
        ("rtx-4090", 8192, 87.7 / 168.6),
        ("rtx-5090", 4096, 112.6 / 234.2),
        ("rtx-5090", 8192, 122.8 / 247.8),
        ("rtx-pro-6000", 4096, 193.9 / 385.0),
        ("rtx-pro-6000", 8192, 224.7 / 439.4),
    ],
)
def test_tf32_is_as_much_slower_than_bf16_as_published(
    device: str, size: int, measured: float
) -> None:
    machine = load_device_profile(device).machine
    bf16, tf32 = (gemm_us(machine, size, size, size, k) for k in (Kernel.BF16, Kernel.TF32))
    assert bf16 / tf32 == pytest.approx(measured, rel=0.08)
