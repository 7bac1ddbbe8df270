"""Rows of timed FP8 layers -> the same rows with the names of the CUDA kernels that ran.

The names come from CUPTI, which stays attached to the process after its first session and makes
every later launch 10 to 20 % slower for the host (PyTorch issue 144455; TEARDOWN_CUPTI=1 detaches
it, but a session that begins meanwhile sees no kernels, Kineto PR 1554). So this comes last, when
all has been timed in the process, verification's steps too, with the layers built once more. They
run eagerly: a compiled layer calls the same library for its GEMMs.
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from autoprec.model.context import Context
from autoprec.model.recording import Call
from autoprec.profiler.candidates import MakeLayer, make_candidate
from autoprec.profiler.groups import Group, group_layers, record_groups
from autoprec.records import LayerTiming, Option, Profile

log = logging.getLogger(__name__)
LOST_KERNELS = 1000  # a process's k-th profile can lack its first k kernels (PyTorch issue 192021)
UNNAMED = "CUDA kernels have no names in the profile"
SLEEP_KERNEL = "spin_kernel"  # of torch.cuda._sleep: launched first, to be lost
FP8_KERNEL = re.compile(  # cuBLASLt's older and newer names, CUTLASS, Triton, hipBLASLt
    r"(?<!u)e4m3|e5m2|float8|fp8|nvjet_(sm\d+_)?(q[a-z]|[a-z]q)[a-z]{3}_|_scaled_mm"
    r"|_(F8|B8){1,2}[A-Z]",
    re.IGNORECASE,
)


def name_kernels(
    context: Context, profile: Profile, *, options: Sequence[Option] | None = None
) -> Profile:
    """Return the profile, its timed FP8 rows with the names of their CUDA kernels.

    `options` are the FP8 ones that it was made with.
    """
    groups = [own for own in group_layers(profile.model, options) if _timed_fp8(own, profile)]
    recorded = record_groups(context, groups)
    names: dict[tuple[str, Option], tuple[str, ...]] = {}
    asked = ((group, row) for group in groups for row in _timed_fp8(group, profile))
    for group, row in asked:
        kernels = layer_kernels(group.first.name, row.option, *recorded.first_of(group))
        if not kernels:
            log.warning("%s: torch's profiler reports none, so CUPTI does not work here", UNNAMED)
            break
        names[group.first.name, row.option] = kernels
    rows = tuple(
        row.model_copy(
            update={"kernels": (*row.kernels, *names.get((row.names[0], row.option), ()))}
        )
        for row in profile.layers
    )
    return profile.model_copy(update={"layers": rows, "has_kernel_names": True})


def _timed_fp8(group: Group, profile: Profile) -> list[LayerTiming]:
    """Return the rows of a group's FP8 options that were run to be timed."""
    rows = (row for row in profile.layers if row.names[0] == group.first.name)
    return [row for row in rows if row.option.is_fp8 and row.total and row.total.samples]


def layer_kernels(
    name: str, option: Option, calls: Sequence[Call], make_layer: MakeLayer
) -> tuple[str, ...]:
    """Return the CUDA kernels of a layer in an FP8 option; it is logged if none names FP8."""
    candidate = make_candidate(make_layer, calls, option)
    candidate.step()
    names = cuda_kernels(candidate.step)
    if names and not any(map(is_fp8_kernel, names)):
        log.warning("no CUDA kernel of %s in %s names FP8: %s", name, option.key, ", ".join(names))
    return names


def cuda_kernels(fn: Callable[[], object]) -> tuple[str, ...]:
    """Return the names of the CUDA kernels that `fn` launches, each once; none without CUPTI."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as seen:
        for _ in range(LOST_KERNELS):
            torch.cuda._sleep(1)  # type: ignore[no-untyped-call]  # torch's own
        fn()
        torch.cuda.synchronize()
    return kernel_names(seen.events() or ())


def kernel_names(events: Iterable[Any]) -> tuple[str, ...]:  # Any: torch's events
    """Return the names of what ran on a GPU, each once, without the kernels that only wait."""
    names = (event.name for event in events if event.device_type.name == "CUDA")
    return tuple(dict.fromkeys(name for name in names if SLEEP_KERNEL not in name))


def is_fp8_kernel(name: str) -> bool:
    """Whether a CUDA kernel's name says that it multiplies FP8 operands.

    Seen: `sm89_xmma_gemm_e4m3bf16_e4m3f32_...` (sm90 too), `nvjet_qqtst_128x256_...` and since
    CUDA 13 `nvjet_sm90_qqtst_...` of cuBLASLt, and CUTLASS templates over `cutlass::float_e4m3_t`.
    nvjet names five types where operands and result differ (q is e4m3, o is FP4, t is BF16) and
    three where they do not; `ue4m3` is the scale of FP4. Casts to FP8 are not meant, so elementwise
    and reduction kernels do not count.
    """
    is_cast = re.search(r"elementwise_kernel|reduce_kernel|triton_(poi|red|per|spl|for|unk)_", name)
    return not is_cast and FP8_KERNEL.search(name) is not None
