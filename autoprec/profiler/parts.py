"""What a layer's total is made of, and which GEMMs are worth keeping in BF16 by these parts.

    output, grad_input, grad_weight   FP32 and BF16: forward, and backward to inputs or parameters
                                      alone. Parts that share work make their sum exceed `total`.
                                      FP8: the three GEMMs, operation by operation.
    cast                              FP8: every other operation

With torch.compile, an FP8 layer's `cast` is what its GEMMs leave of the compiled total: parts are
the eager layer's, since one compiled backward pass makes all gradients.
"""

import math
from collections.abc import Mapping, Sequence

from autoprec.device.timing import Function, timing_from
from autoprec.profiler.candidates import Candidate
from autoprec.profiler.tracing import Operation
from autoprec.records import BF16_O2, Gemm, LayerTiming, Option, Timing, with_gemms_hp

CAST = "cast"
SUM_ERROR = 1.1  # generous on purpose: parts share work and add up to too much, and timing decides


def part_functions(candidate: Candidate) -> dict[str, Function]:
    """Return what is timed for each part of an FP32 or BF16 layer."""
    functions: dict[str, Function] = {Gemm.OUTPUT: candidate.forward}
    if candidate.inputs:
        functions[Gemm.GRAD_INPUT] = candidate.backward_to(candidate.inputs)
    if candidate.parameters:
        functions[Gemm.GRAD_WEIGHT] = candidate.backward_to(candidate.parameters)
    return functions


def sum_parts(operations: Sequence[Operation]) -> dict[str, float]:
    """Return the ms of each part of an FP8 linear layer; a bias belongs to its GEMM.

    torchao multiplies grad_input first and grad_weight second, whether or not both are needed.
    """
    parts = dict.fromkeys((*(gemm.value for gemm in Gemm), CAST), 0.0)
    backward_gemms = 0
    for operation in operations:
        if operation.is_gemm and operation.is_backward:
            order = (Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT)
            part = order[backward_gemms % 2].value
            backward_gemms += 1
        elif operation.is_gemm or (operation.name == "add" and not operation.is_backward):
            part = Gemm.OUTPUT.value
        elif operation.name == "sum" and operation.is_backward:
            part = Gemm.GRAD_WEIGHT.value  # the bias's gradient
        else:
            part = CAST
        parts[part] += operation.ms
    return parts


def remainder(total: Timing, parts: Mapping[str, Timing]) -> Timing:
    """Return what a compiled FP8 layer takes beyond its GEMMs."""
    gemms = sum(parts[gemm].median_ms for gemm in Gemm if gemm in parts)
    return timing_from([max(total.median_ms - gemms, 0.0)])


def promising_gemms_hp(rows: Sequence[LayerTiming]) -> list[Option]:
    """Return the options with GEMMs kept in BF16 that should beat BF16, by the parts of the others.

    A GEMM kept in BF16 takes BF16's time for it instead of FP8's, and saves its share of the casts.
    What is timed then, decides.
    """
    bf16 = next((row for row in rows if row.option == BF16_O2), None)
    if bf16 is None or bf16.total is None:
        return []
    known = [row.option for row in rows]
    in_fp8 = {row.option.recipe: row for row in rows if row.option.is_fp8 and row.total}
    return [
        option
        for option in with_gemms_hp(known)
        if option not in known
        and option.recipe in in_fp8
        and _guessed_ms(in_fp8[option.recipe], bf16, option) < SUM_ERROR * bf16.total.median_ms
    ]


def _guessed_ms(in_fp8: LayerTiming, bf16: LayerTiming, option: Option) -> float:
    ms = in_fp8.total.median_ms if in_fp8.total else math.inf
    for gemm in option.gemms_hp:
        own, other = getattr(in_fp8, gemm), getattr(bf16, gemm)  # the rows' fields are the GEMMs'
        if own is not None and other is not None:
            ms += other.median_ms - own.median_ms
    casts = in_fp8.cast.median_ms if in_fp8.cast else 0.0
    return ms - casts * len(option.gemms_hp) / len(Gemm)
