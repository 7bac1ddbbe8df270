"""The error that an option makes inside one layer, on the reference's own inputs and gradients.

With x_MK, weight_NK and grad_MN as the reference pass had them, and D for "cast minus exact":

    output        Dy  = Dx w' + x Dw'         carried on by the rest of the model
    grad_input    Dgx = Dg w  + g Dw          carried on by the layers before
    grad_weight   Dgw = cast(g)' cast(x) - g' x     stays where it is

The third is known to the last bit. What the first two do to the gradient of the whole model is for
the probes to say (see probes.py), which need the operand errors Dx, Dw, Dg only (see linear.py);
options share them where their recipes cast alike. Errors of any other layer in BF16 are taken at
its outputs, input gradients and parameters instead, from a replay in BF16 against one in FP32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprec.common.grouping import grouped
from autoprec.model.recording import Call
from autoprec.records import BF16_O2, FP32, Gemm, ModelSpec, Operand, Option, with_gemms_hp
from autoprec.runtime import install_options
from autoprec.sensitivity.casts import Cast, gemm_casts
from autoprec.sensitivity.gemm import fast_gemms
from autoprec.sensitivity.replay import replay

CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


@dataclass(frozen=True)
class Component:
    """One source of error. `cast` None is the whole layer in BF16 (`operand` is then None)."""

    gemm: Gemm
    operand: Operand | None = None
    cast: Cast | None = None


BF16_OUTPUT = Component(Gemm.OUTPUT)
BF16_GRAD_INPUT = Component(Gemm.GRAD_INPUT)
Cell = tuple[str, Option]  # a layer's name and an option of it other than FP32
Norm = Callable[[Mapping[Tensor, Tensor]], float]  # of errors by parameter: d'Pd


def components_of(option: Option) -> dict[Gemm, list[Component]]:
    """Return the sources of error of the two GEMMs whose error spreads.

    Beside the casts it is what BF16 has, as of the bias and of the result.
    """
    casts = gemm_casts(option)
    return {
        bf16.gemm: [*(Component(bf16.gemm, *side) for side in casts.get(bf16.gemm, ())), bf16]
        for bf16 in (BF16_OUTPUT, BF16_GRAD_INPUT)
    }


def replayed_errors(
    layer: nn.Module, calls: Sequence[Call], norm: Norm, *, seed: int
) -> tuple[dict[Component, list[Tensor]], float]:
    """Return a layer's errors in BF16, from a replay in FP32 and one in BF16.

    The components' have a tensor per call; with them d'Pd of the layer's own parameters' gradients.
    """
    exact = replay(layer, calls, seed=seed)
    with in_bf16(layer):
        rounded = replay(layer, calls, seed=seed, exact=exact)
    own = exact.parameter_gradients  # the sign of a difference does not matter
    for p, g in rounded.parameter_gradients.items():
        own[p] = own[p].sub_(g) if type(g) is Tensor else own[p] - g  # DTensors may be partial sums
    return {BF16_OUTPUT: rounded.outputs, BF16_GRAD_INPUT: rounded.input_gradients}, norm(own)


@contextmanager
def in_bf16(layer: nn.Module) -> Iterator[None]:
    """Run one layer in BF16 among FP32 activations inside; the rest of its model is not touched."""
    among_fp32 = install_options(layer, {"": BF16_O2}, activation_dtype=torch.float32, root=False)
    with fast_gemms(), among_fp32:
        yield


def list_cells(
    spec: ModelSpec, options: Sequence[Option] | None, *, gemms_hp: bool = False
) -> list[Cell]:
    """Return the cells to measure: every layer in each of its options but FP32.

    `options` limits the FP8 recipes. `gemms_hp` adds each whole recipe with GEMMs in BF16, all of
    them: which of those a profile has is decided by times, and what is measured here must not be.
    """
    cells: list[Cell] = []
    recipes = None if options is None else {None, *(option.recipe for option in options)}
    for layer in spec.layers:
        own = [o for o in layer.options if recipes is None or o.recipe in recipes]
        timed = partly_fp8((layer.name, option) for option in own)
        chosen = [option for option in own if (layer.name, option) not in timed]
        added = with_gemms_hp(chosen) if gemms_hp else chosen
        cells += [(layer.name, option) for option in added if option != FP32]
    return cells


def partly_fp8(cells: Iterable[Cell]) -> set[Cell]:
    """Return the cells that keep GEMMs in BF16 of a recipe which is there as a whole."""
    own = list(cells)
    whole = {(name, option.recipe) for name, option in own if option.is_whole_fp8}
    return {(n, o) for n, o in own if o.gemms_hp and (n, o.recipe) in whole}


def fp8_options(cells: Iterable[Cell]) -> dict[str, list[Option]]:
    """Return the FP8 options among cells by layer name; only names that have any."""
    return grouped((name, option) for name, option in cells if option.is_fp8)


def by_channel(
    layer: nn.Module, changes: Iterable[Tensor | None], errors: Sequence[Tensor]
) -> Tensor:
    """Return the products of changes and errors, summed over all but the channels."""
    totals: dict[int, Tensor] = {}
    for change, error in zip(changes, errors, strict=True):
        if change is None or error.shape != change.shape or change.dim() == 0:
            continue
        is_second = isinstance(layer, CHANNELS_SECOND) and change.dim() > 2
        channel = 1 if is_second else change.dim() - 1
        others = [dim for dim in range(change.dim()) if dim != channel]
        # a DTensor may be a partial sum
        product = change.mul_(error) if type(change) is Tensor else change * error
        part = product.sum(others) if others else product
        totals[len(part)] = totals.get(len(part), 0.0) + part
    return torch.cat(list(totals.values())) if totals else torch.zeros(1)
