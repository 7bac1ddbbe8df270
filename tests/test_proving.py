"""Names of CUDA kernels: which say FP8, where they are kept, and that nothing is timed after."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.recording import Call
from autoprec.profiler import profile_model
from autoprec.profiler.groups import Group
from autoprec.profiler.layers import LayerMeter
from autoprec.profiler.proving import (
    SLEEP_KERNEL,
    is_fp8_kernel,
    kernel_names,
    layer_kernels,
    name_kernels,
)
from autoprec.records import BF16_O2, FP32
from tests.constant_clock import CPU, TENSORWISE, ConstantClock, needs_fp8
from tests.models import mlp_workload


@pytest.mark.parametrize(
    ("name", "is_fp8"),
    [
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x128x64_cublas", True),
        ("sm89_xmma_gemm_e5m2bf16_e4m3f32_f32_tn_n", True),
        ("nvjet_qqtst_128x256_128x6_2x1_v_bz_TNT", True),
        ("nvjet_sm90_qqtst_128x128_128x6_1x2_h_bz_ovscale_bias_TNT", True),  # rowwise, CUDA 13
        ("nvjet_sm100_qqtst_128x256_128x6_2x1_2cta_v_bz_TNT", True),
        ("nvjet_sm100_qqsss_128x128_128x8_2x4_2cta_h_bz_Avec32UE8M0_Bvec32UE8M0_TNT", True),
        ("nvjet_sm120_qqtst_mma_128x128x64_6_64x64x64_tmaAB_bz_TNNN", True),
        ("nvjet_qqhsh_128x256_128x6_2x1_v_bz_TNT", True),
        ("void cutlass::device_kernel<GemmUniversal<cutlass::float_e4m3_t, ...>>", True),
        ("triton_tem_fused__scaled_mm_0", True),
        ("Cijk_Alik_Bljk_F8BS_BH_Bias_MT256x256x128", True),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", False),
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_TNT", False),
        ("nvjet_sm120_tst_mma_64x64x128_3_32x32x128_tmaAB_bz_TNNN", False),
        ("nvjet_sm100_ootst_128x128_256x7_4x1_2cta_v_bx_Avec16UE4M3_Bvec16UE4M3_TNT", False),
        ("cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_32x6_nn_align8", False),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", False),
        ("Cijk_Alik_Bljk_BBS_BH_Bias_MT256x256x64", False),
        ("triton_poi_fused__to_copy_clamp_float8_e4m3fn_3", False),  # a cast
        ("triton_red_fused__scaled_mm__to_copy_abs_clamp_max_mul_2", False),  # before a GEMM
        ("triton_unk_fused__scaled_mm_4", False),
        ("void at::native::vectorized_elementwise_kernel<8, float8_copy_kernel_cuda>", False),
    ],
)
def test_names_of_fp8_gemm_kernels_are_known(name: str, is_fp8: bool) -> None:
    assert is_fp8_kernel(name) is is_fp8


def test_names_are_of_what_ran_on_the_gpu_once_each() -> None:
    def event(name: str, device: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device))

    events = [
        *[event(f"at::cuda::{SLEEP_KERNEL}(long)", "CUDA")] * 3,
        event("aten::_scaled_mm", "CPU"),
        *[event("nvjet_qqtst_128x256", "CUDA")] * 2,
        event("Memset (Device)", "CUDA"),
    ]
    assert kernel_names(events) == ("nvjet_qqtst_128x256", "Memset (Device)")


@needs_fp8
@pytest.mark.parametrize("name", ["nvjet_qqtst_128x256_TNT", "nvjet_tst_128x256_TNT"])
def test_kernel_names_of_a_gpu_are_recorded_and_others_than_fp8_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setattr("autoprec.profiler.proving.cuda_kernels", lambda _: (name,))
    call = Call(args=(torch.randn(32, 16),), kwargs={}, gradients=[torch.randn(32, 16)])
    spec = capture_model(Context(mlp_workload(), CPU))
    group = Group((spec.layer("first"),), (FP32, BF16_O2, TENSORWISE))
    rows = LayerMeter(CPU, ConstantClock(), 2.0).time_group(
        group, [call], lambda: nn.Linear(16, 16)
    )
    assert "_scaled_mm float8_e4m3fn" in rows[-1].kernels
    found = layer_kernels("first", TENSORWISE, [call], lambda: nn.Linear(16, 16))
    assert found == (name,)
    assert ("names FP8" in caplog.text) is ("_qq" not in name)


@needs_fp8
def test_without_cupti_one_layer_is_asked_and_one_line_says_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[object] = []

    def none(fn: object) -> tuple[str, ...]:
        asked.append(fn)
        return ()

    monkeypatch.setattr("autoprec.profiler.proving.cuda_kernels", none)
    context = Context(mlp_workload(), CPU, clock=ConstantClock())
    profile = profile_model(context, capture_model(context))
    caplog.clear()
    named = name_kernels(context, profile)
    assert (named.layers, named.has_kernel_names) == (profile.layers, True)
    assert len(asked) == len(caplog.records) == 1
    assert "CUPTI does not work here" in caplog.text


@needs_fp8
def test_naming_kernels_times_nothing_and_keeps_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "autoprec.profiler.proving.cuda_kernels", lambda fn: (fn(), ("nvjet_qq",))[1]
    )
    clock = ConstantClock()
    context = Context(mlp_workload(), CPU, clock=clock)
    spec = capture_model(context)
    profile = profile_model(context, spec)
    before = clock.calls
    named = name_kernels(context, profile)
    assert clock.calls == before
    assert (profile.has_kernel_names, named.has_kernel_names) == (False, True)
    assert [row.model_copy(update={"kernels": ()}) for row in named.layers] == [
        row.model_copy(update={"kernels": ()}) for row in profile.layers
    ]
    timed = [row.option.is_fp8 and row.total is not None for row in named.layers]
    assert [row.kernels[-1:] == ("nvjet_qq",) for row in named.layers] == timed
    assert any(timed)
