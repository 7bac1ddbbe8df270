"""Linears forward and backward in BF16 and FP8, eager and compiled, for bench/gpu.py."""

from typing import Any

import torch
from gpu_run import Deadline, Run, Shape, conditions_of, shape_of
from torch import nn

from autoprec.common.text import first_line
from autoprec.device.fp8 import fp8_support
from autoprec.device.local import release_memory
from autoprec.device.timing import Function
from autoprec.model.recording import Call
from autoprec.profiler import open_compilation
from autoprec.profiler.candidates import Candidate, make_candidate
from autoprec.profiler.proving import cuda_kernels, is_fp8_kernel
from autoprec.records import BF16_O2, Option, fp8_option


def sweep_linears(run: Run, found: dict[str, Any], deadline: Deadline) -> None:
    rows: list[dict[str, Any]] = found.setdefault("rows", [])
    for mode, until in (("eager", Deadline(deadline.seconds / 4)), ("default", deadline)):
        for shape in run.within(run.shapes, until, f"linears, {mode}"):
            try:
                rows += time_linears(run, shape, mode=mode)
            except torch.OutOfMemoryError as error:
                run.skipped.append(f"linears, {mode}, {shape}: {first_line(error)}")
            release_memory(run.device)


def make_call(run: Run, shape: Shape) -> Call:
    M, K, N = shape
    x_MK = torch.randn(M, K, device=run.device, requires_grad=True)
    return Call(args=(x_MK,), kwargs={}, gradients=[torch.randn(M, N, device=run.device)])


def make_linear(run: Run, shape: Shape, call: Call, option: Option) -> Candidate:
    _, K, N = shape
    return make_candidate(lambda: nn.Linear(K, N, bias=False, device=run.device), [call], option)


def time_linears(run: Run, shape: Shape, *, mode: str) -> list[dict[str, Any]]:
    """Time a linear in BF16 and each FP8 recipe, in turns."""
    options = [BF16_O2, *map(fp8_option, fp8_support(run.device).recipes)]
    call = make_call(run, shape)
    steps: dict[str, Function] = {}
    failed: dict[str, str] = {}
    with open_compilation(run.device, mode, backend=run.backend) as compilation:
        for option in options:
            candidate = make_linear(run, shape, call, option)
            try:
                if compilation is not None:
                    candidate.compiled = compilation.compile_layer(candidate.layer)
                    compilation.run_first(candidate.step)
                candidate.step()
                steps[option.key] = candidate.step
            except (RuntimeError, ValueError) as error:
                if option == BF16_O2:
                    raise  # the others are measured against it
                failed[option.key] = first_line(error)
        found = run.sample(steps, budget_ms=400.0)
        base = found[BF16_O2.key].timing().median_ms
    return [
        {
            **shape_of(shape),
            "mode": mode,
            "recipe": option.recipe.value,
            "bf16_ms": base,
            "fp8_ms": found[option.key].timing().median_ms if option.key in found else None,
            "speedup": (
                base / found[option.key].timing().median_ms if option.key in found else None
            ),
            "failed": failed.get(option.key, ""),
            **(conditions_of(found[option.key]) if option.key in found else {}),
        }
        for option in options
        if option.recipe is not None
    ]


def name_all_kernels(run: Run, found: dict[str, Any], deadline: Deadline) -> None:
    """Name the kernels that FP8 linears launch forward and backward; on a CPU nothing does."""
    rows: list[dict[str, Any]] = found.setdefault("rows", [])
    if run.device.type != "cuda":
        return
    options = [fp8_option(recipe) for recipe in fp8_support(run.device).recipes]
    for shape in run.within(run.shapes[:2], deadline, "kernels"):
        call = make_call(run, shape)
        for option in options:
            candidate = make_linear(run, shape, call, option)
            candidate.step()
            names = cuda_kernels(candidate.step)
            row = {
                "fp8 kernels": sum(map(is_fp8_kernel, names)),
                "all": ", ".join(names) or "none reported",
            }
            rows.append({**shape_of(shape), "recipe": option.key, **row})
