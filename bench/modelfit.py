"""The fit: which constants are free, where they start, and on which rows they are decided.

Stages: what all devices share and the best covered device (the 500 W H100) together, then each
other device's GEMM fractions, then the whole-training constants.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from datasheets import BY_NAME, SHEETS, Sheet, sheet_constants
from fitting import Prior, fit_constants, fit_scales, machine_from, soften
from numpy.typing import NDArray
from published import GRID_SOURCE, Kind, Observation
from scipy.optimize import least_squares
from trainings import Training

from autoprec.records.devices import CONSTANTS, Constant, ConstantKind, DeviceProfile
from autoprec.records.model import Basis

BEST_COVERED = "h100-sxm-500w"
SMALLEST_FITTED = 512
CAPS = {"ada": 1.15, "blackwell": 1.15}  # boost clocks pass the data sheet's peak
STEP_EVALUATIONS = 12
SAME_CHIP = {"h100-sxm": ("h800",)}  # whose GEMMs are the same, only links differ
APART, ALIKE = 0.1, 0.02  # how FP8 differs from BF16 on another device; with mma.sync hardly
MMA_SYNC_TILES = 1.05  # its operands come from registers, so 128 x 128 tiles are near the best
UNSTATED, UNSTATED_SIGMA = "h100-sxm", 0.15  # the image grid's H100 is not named: it may be either
COUNTED = "counted in torchao's compiled kernels"
CUBLAS_ROWS = (
    "cuBLASLt's rate with one scale: of rows nothing is published; CUTLASS, before CUDA 12.9: {}"
)
SHARED = {
    "wave_share": Prior(0.6, 0.4, "tiles of a last wave run alone"),
    "small_tile_factor": Prior(1.2, 0.15, "half the reuse"),
    "overlap_share": Prior(0.15, 0.7, "compute and traffic overlap"),
    "bf16_gemm_floor_us": Prior(2.0, 0.1, "torchao's roofline has 2 us a kernel"),
    "tensorwise_gemm_floor_us": Prior(4.0, 0.25, "a small kernel"),
    "rowwise_gemm_floor_us": Prior(3.0, 0.25, "a small kernel"),
    "kernel_floor_us": Prior(2.5, 0.25, "torchao's roofline has 2 us"),
    "tensorwise_cast_bytes": Prior(16.0, 0.4, "torchao's roofline has 9 to 10 at full speed"),
    "amax_bytes": Prior(2.0, 0.5, "one BF16 read"),
    "rowwise_cast_bytes": Prior(18.0, 0.4, "torchao's roofline has 8 to 10 at full speed"),
    "cast_share_input": Prior(1.0, 0.3, "the weight's"),
    "cast_share_grad": Prior(0.7, 0.4, "fused into the kernel that makes it"),
    "direct_cast_share": Prior(0.4, 0.3, "the transposed copy is the slower half"),
    "tensorwise_cast_kernels": Prior(11.0, 0.3, COUNTED),
    "rowwise_cast_kernels": Prior(11.0, 0.3, COUNTED),
    "neighbour_kernels": Prior(5.0, 0.6, "norm and activation, forward and backward"),
}
OF_GRIDS = {  # only a grid of a device's GEMMs decides these
    "tile_us": Prior(1.0, 0.7, "a round trip to memory before, a store behind"),
    "bf16_boost": Prior(0.1, 0.7, "boost clocks over those under the power limit"),
    "fp8_boost": Prior(0.05, 0.7, "the same, at less power for the same work"),
}
HELD = {"tile_us": 0.0, "bf16_boost": 0.1, "fp8_boost": 0.05}  # best covered: PR#940 has no tile_us
GRID_SIGMAS = {  # what a grid decides too -> how far it may lead from the parent's, log units
    "wave_share": 0.5,
    "small_tile_factor": 0.15,
    "overlap_share": 0.7,
    "bf16_gemm_floor_us": 0.3,
    "tensorwise_gemm_floor_us": 0.3,
}
FRACTIONS = {
    "bf16_fraction": Prior(0.70, 0.15, "best of a sweep is 0.80 on an H100 SXM"),
    "fp8_fraction": Prior(0.70, 0.15, "best of a sweep is 0.71 on an H100 SXM"),
    "fp8_slow_fraction": Prior(0.62, 0.15, "full accumulation costs an eighth"),
    "fp8_rowwise_fraction": Prior(0.65, 0.15, "scales per row in the epilogue"),
    "fp8_block_fraction": Prior(0.55, 0.15, "scales per block in the main loop"),
}
FIXED = {  # constant -> (value, kind, source)
    "fp32_fraction": (0.8, "published", "gpu-flops-bench: 47.3 of 60 (H200 NVL), 83.6 of 126"),
    "memory_fraction": (0.92, "published", "torchao roofline_utils.py"),
    "rowwise_swizzle_from": (4096, "published", "pytorch RowwiseScaledMM.cu: large M, N"),
    "eager_host_us": (9.4, "published", "NVIDIA/Fuser #3507, CPU time per eager kernel, DGX H100"),
    "block_cast_bytes": (6.5, "published", "ao blockwise quant kernels: 3 bytes at 85-94 %, twice"),
    "mx_cast_bytes": (
        7.0,
        "published",
        "ao training.md: MXFP8 cast kernels at 5.4-6.5 TB/s, twice",
    ),
    "eager_cast_bytes": (45.0, "published", "PyTorch casts step by step in FP32"),
    "eager_cast_kernels": (45.0, "published", "about fifteen kernels per operand"),
    "optimizer_bytes": (28.0, "published", "AdamW reads p, g, m, v and writes p, m, v in FP32"),
}
ERRORS = {
    "gemm_error_low": -0.15,
    "gemm_error_high": 0.15,
    "speedup_error_low": -0.12,
    "speedup_error_high": 0.12,
    "time_error": 0.25,
    "step_error": 0.10,
}
STEP = {
    "attention_fraction": Prior(0.33, 0.25, "FlashAttention 2, forward and backward"),
    "glue_bytes": Prior(12.0, 0.5, "residuals, rotary embedding, activation, their gradients"),
    "loss_bytes": Prior(24.0, 0.4, "cross entropy in FP32, forward and backward"),
    "step_overhead": Prior(1.2, 0.2, "kernels that compile does not fuse"),
    "communication_overlap": Prior(0.75, 0.15, "FSDP2 prefetches one block ahead"),
    "link_fraction": Prior(0.8, 0.2, "usual for NCCL on large messages"),
}
STEP_CAPS = {"communication_overlap": 1.0, "link_fraction": 1.0, "attention_fraction": 0.8}
OWN_STEP = {  # devices whose whole step is unlike the H100's, by their own rows
    "mi300x": {
        "attention_fraction": Prior(0.27, 0.3, "the H100's"),
        "memory_fraction": Prior(0.8, 0.3, "the H100's, less"),
        "step_overhead": Prior(1.4, 0.3, "the H100's"),
    }
}
SPEEDUP_SIGMA, TOKENS_SIGMA = 0.06, 0.2
POWER_LIMITED = "b200"  # the source says its machine was; its absolute rate is not a B200's
Values = dict[str, float]


def fit_shared(rows: Iterable[Observation]) -> Values:
    """Return the shared constants and the best covered device's fractions."""
    own = [row for row in rows if row.device == BEST_COVERED]
    fixed = {**_fixed_values(BY_NAME[BEST_COVERED]), **HELD}
    return {**HELD, **fit_constants(fixed, {**SHARED, **FRACTIONS}, own)}


def fit_device(sheet: Sheet, parent: Mapping[str, float], rows: Iterable[Observation]) -> Values:
    """Return a device's GEMM constants: how all kernels scale, the form by a grid, each kernel.

    Small GEMMs of single sources are left out: launches and the vendor's choice of kernel decide
    there. Tensor cores with mma.sync run all FP8 kernels alike, at about twice their BF16 rate.
    """
    devices = (sheet.name, *SAME_CHIP.get(sheet.name, ()))
    own = [r for r in rows if r.device in devices and min(r.shapes[0]) >= SMALLEST_FITTED]
    if sheet.name == UNSTATED:
        own += [replace(r, sigma=UNSTATED_SIGMA) for r in rows if "rowwise-perf" in r.source]
    form = inherited(sheet, parent)
    fixed = {**_fixed_values(sheet), **form}
    base = {name: parent[name] for name in FRACTIONS}
    if not sheet.is_wgmma:
        base = dict.fromkeys(FRACTIONS, parent["bf16_fraction"])
    telling = [row for row in own if sheet.is_power_free or not _is_block(row)]
    cap = CAPS.get(sheet.architecture, 0.95)
    scales = fit_scales(fixed, base, telling, cap=cap, apart=APART if sheet.is_wgmma else ALIKE)
    if measured := [row for row in own if row.source == GRID_SOURCE]:
        found = _fit_grid(fixed, {**form, **scales}, measured, cap=cap)
        # What the grid moves the tensorwise rate by, it moves the rates of all FP8 kernels by.
        moved = found["fp8_fraction"] / scales["fp8_fraction"]
        scales = {name: min(value * moved, cap) for name, value in scales.items()}
        scales["bf16_fraction"] = found["bf16_fraction"]
        form |= {name: found[name] for name in (*OF_GRIDS, *GRID_SIGMAS)}
    if not sheet.is_wgmma:
        return {**form, **scales}
    priors = {n: Prior(scales[n], 0.25 if "block" in n else 0.06, "scaled") for n in FRACTIONS}
    return {**form, **fit_constants({**fixed, **form}, priors, own, cap=cap)}


def _fit_grid(fixed: Values, start: Values, rows: Sequence[Observation], *, cap: float) -> Values:
    """Return the form and the two rates that a grid of one device's GEMMs decides."""
    priors = {name: Prior(start[name], sigma, "parent's") for name, sigma in GRID_SIGMAS.items()}
    priors |= {n: Prior(start[n], 0.3, "scaled") for n in ("bf16_fraction", "fp8_fraction")}
    return fit_constants({**fixed, **start}, {**OF_GRIDS, **priors}, rows, cap=cap)


def inherited(sheet: Sheet, parent: Mapping[str, float]) -> Values:
    """Return what a device has of its parent before its own rows speak, tiles of mma.sync apart."""
    shared = {name: parent[name] for name in (*SHARED, *OF_GRIDS)}
    return shared if sheet.is_wgmma else {**shared, "small_tile_factor": MMA_SYNC_TILES}


def _is_block(row: Observation) -> bool:
    return "block" in row.recipe and row.kind is not Kind.BF16_US


def fit_steps(
    fitted: Mapping[str, Values], rows: Sequence[Training], priors: Mapping[str, Prior]
) -> Values:
    """Return the whole-training constants that explain speedups and, loosely, BF16 rates."""
    profiles = {row.device: _bare_profile(BY_NAME[row.device]) for row in rows}
    names = tuple(priors)

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        values = {
            name: min(math.exp(log), STEP_CAPS.get(name, math.inf))
            for name, log in zip(names, logs, strict=True)
        }
        errors = [
            (log - math.log(priors[name].value)) / priors[name].sigma
            for name, log in zip(names, logs, strict=True)
        ]
        for row in rows:
            constants = constants_of(BY_NAME[row.device], {**fitted[row.device], **values}, ERRORS)
            speedup, tokens = row.predict(machine_from(constants), profiles[row.device])
            errors.append(soften((speedup - row.speedup) / SPEEDUP_SIGMA))
            if row.tokens_s and row.device != POWER_LIMITED:
                errors.append(soften(math.log(tokens / row.tokens_s) / TOKENS_SIGMA))
        return np.array(errors)

    start = np.log([prior.value for prior in priors.values()])
    logs = least_squares(residuals, start, max_nfev=STEP_EVALUATIONS).x.tolist()
    return {
        name: min(math.exp(log), STEP_CAPS.get(name, math.inf))
        for name, log in zip(names, logs, strict=True)
    }


def fit_everything(
    rows: Sequence[Observation], runs: Sequence[Training], devices: Iterable[str] = tuple(BY_NAME)
) -> dict[str, Values]:
    """Return the fitted constants of these devices, whole-training constants included.

    Runs of an engine that is not PyTorch, and of devices with constants of their own, are left out
    of the shared ones.
    """
    fitted = fit_all(rows, {*devices, *OWN_STEP, *(run.device for run in runs)})
    shared = [r for r in runs if not r.is_own_engine and r.device not in OWN_STEP]
    steps = fit_steps({n: {**v, **_start(STEP)} for n, v in fitted.items()}, shared, STEP)
    fitted = {name: {**values, **steps} for name, values in fitted.items()}
    for device, priors in OWN_STEP.items():
        own = [run for run in runs if run.device == device]
        if own:
            fitted[device] |= fit_steps(fitted, own, priors)
        else:
            fitted[device] |= _start(priors)
    return fitted


def _start(priors: Mapping[str, Prior]) -> Values:
    return {name: prior.value for name, prior in priors.items()}


def constants_of(sheet: Sheet, values: Mapping[str, float], errors: Mapping[str, float]) -> Values:
    """Return every constant of a device as plain numbers."""
    return {**_fixed_values(sheet), **values, **errors}


def fit_all(
    rows: Sequence[Observation], devices: Iterable[str] = tuple(BY_NAME)
) -> dict[str, Values]:
    """Return the fitted constants of these devices, and of those that they start from."""
    wanted = {name for device in devices for name in _lineage(BY_NAME[device])}
    fitted = {BEST_COVERED: fit_shared(rows)}
    for sheet in sorted(SHEETS, key=_generation):
        if sheet.name != BEST_COVERED and sheet.name in wanted:
            fitted[sheet.name] = fit_device(sheet, fitted[sheet.parent], rows)
    return fitted


def make_profile(
    sheet: Sheet, fitted: Mapping[str, float], rows: Sequence[Observation], errors: Values
) -> DeviceProfile:
    """Return the profile record of a device, every constant with its source."""
    constants = {
        name: Constant(
            value=value, unit=CONSTANTS[name].unit, kind=ConstantKind(kind), source=source
        )
        for name, (value, kind, source) in {**FIXED, **sheet_constants(sheet)}.items()
    }
    for name, value in fitted.items():
        constants[name] = Constant(
            value=_rounded(value),
            unit=CONSTANTS[name].unit,
            kind=ConstantKind.FITTED,
            source=_source(name, sheet, rows),
        )
    if sheet.capability.startswith("9."):  # with the CUDA that a profile assumes
        constants["fp8_rowwise_fraction"] = Constant(
            value=constants["fp8_fraction"].value,
            unit="1",
            kind=ConstantKind.FITTED,
            source=CUBLAS_ROWS.format(_rounded(fitted["fp8_rowwise_fraction"])),
        )
    for name, value in errors.items():
        constants[name] = Constant(
            value=_rounded(value),
            unit=CONSTANTS[name].unit,
            kind=ConstantKind.FITTED,
            source="bench/score_costmodel.py, rows of sources left out of the fit",
        )
    return DeviceProfile(
        name=sheet.name,
        title=sheet.title,
        aliases=sheet.aliases,
        architecture=sheet.architecture,
        capability=sheet.capability,
        fp8_recipes=sheet.recipes,
        fp8_reason=sheet.fp8_reason,
        basis=Basis.PREDICTED,
        constants={name: constants[name] for name in CONSTANTS},
        notes=sheet.notes,
    )


def _bare_profile(sheet: Sheet) -> DeviceProfile:
    """Return the profile with unfitted constants: what a device can run, not how fast."""
    return make_profile(sheet, _start({**SHARED, **OF_GRIDS, **FRACTIONS, **STEP}), (), ERRORS)


def _fixed_values(sheet: Sheet) -> Values:
    known = {**FIXED, **sheet_constants(sheet)}
    return {**_start(STEP), **ERRORS, **{name: value for name, (value, _, _) in known.items()}}


def _generation(sheet: Sheet) -> int:
    return len(_lineage(sheet))


def _lineage(sheet: Sheet) -> list[str]:
    return [sheet.name, *(_lineage(BY_NAME[sheet.parent]) if sheet.parent else ())]


def _source(name: str, sheet: Sheet, rows: Sequence[Observation]) -> str:
    if name in STEP or name in OWN_STEP.get(sheet.name, {}):
        return "bench/data/training.csv, PyTorch runs with batch and parallelism stated"
    if said := _grid_source(name, sheet, rows):
        return said
    if name == "small_tile_factor" and not sheet.is_wgmma:
        return "held at its prior: operands of mma.sync come from registers, not from shared memory"
    devices = (BEST_COVERED,) if name in SHARED else (sheet.name, *SAME_CHIP.get(sheet.name, ()))
    told = [row for row in rows if row.device in devices]
    if sheet.is_wgmma or name in SHARED:
        told = [row for row in told if _tells(row, name)]
    own = sorted({row.source for row in told})
    if own:
        return "; ".join(own)
    if not sheet.is_wgmma:
        return f"no rows of its own; {sheet.parent}'s BF16 fraction, FP8 at twice BF16 (mma.sync)"
    return f"no rows of its own; {sheet.parent}'s, scaled as the device's other kernels"


def _grid_source(name: str, sheet: Sheet, rows: Sequence[Observation]) -> str:
    """Return what a constant that grids decide comes from, or "" where none decides it."""
    is_own_tile = name == "small_tile_factor" and not sheet.is_wgmma
    measured = {row.device for row in rows if row.source == GRID_SOURCE}
    owner = next((device for device in _lineage(sheet) if device in measured), "")
    if name not in OF_GRIDS and (name not in GRID_SIGMAS or not owner):
        return ""
    if owner == sheet.name:
        return GRID_SOURCE
    if owner and not is_own_tile:
        return f"no grid of its own; {owner}'s, of {GRID_SOURCE}"
    return "" if is_own_tile else "held: no grid of its GEMMs is published"


def _tells(row: Observation, name: str) -> bool:
    """Return whether a row says anything about a constant."""
    recipe = row.recipe.value
    if name == "bf16_fraction":
        return row.kind is not Kind.FP8_US
    if row.kind in (Kind.BF16_US, Kind.BF16_LINEAR_US):
        return name in ("wave_share", "small_tile_factor", "overlap_share", "bf16_gemm_floor_us")
    if "rowwise" in name:
        return "rowwise" in recipe
    if "block" in name:
        return recipe in ("blockwise", "mxfp8")
    if name in ("fp8_fraction", "fp8_slow_fraction", "amax_bytes") or "tensorwise" in name:
        return recipe in ("tensorwise", "delayed")
    return True


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
