"""Other ways to score a plan without training it, on the same model and batches.

    modelopt       NVIDIA ModelOpt AutoQuantize, method "gradient": sum of (dL/dy)^2 (y_fp8 - y)^2
                   per layer. It knows one FP8 format (a scale per tensor), so recipes and GEMMs
                   kept in BF16 make no difference to it; that is the tool's own limit.
    weight_error   relative squared rounding error of the weight under the option's scaling
    layer_order    1 for the first layer, falling to 0 for the last: "keep the early layers"

A plan's score is the sum over its FP8 layers.
"""

import contextlib
import io
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.records import Gemm, Option, Recipe
from autoprec.sensitivity.casts import cast_operand, gemm_casts
from autoprec.sensitivity.reference import Reference
from autoprec.sensitivity.replay import differentiated_calls, floating_inputs

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Scores:
    """One score per layer name, and what making them took."""

    name: str
    by_layer: Mapping[str, float]
    seconds: float

    def of_plan(self, options: Mapping[str, Option]) -> float:
        return sum(
            self.by_layer.get(name, 0.0) for name, option in options.items() if option.is_fp8
        )


def modelopt_scores(
    model: nn.Module, batches: Sequence[Any], loss_fn: Any, layers: Sequence[str]
) -> Scores:
    """Score every layer by ModelOpt's AutoQuantize on the batches (for calibration and scoring)."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # ModelOpt's own: CUDA extensions, deprecations
        import modelopt.torch.quantization as mtq

        started = time.perf_counter()
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": 12.0},
            quantization_formats=["FP8_DEFAULT_CFG"],
            data_loader=list(batches),
            forward_step=lambda module, batch: loss_fn(module, batch),
            loss_func=lambda output, batch: output,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            method="gradient",
        )
        seconds = time.perf_counter() - started
    return Scores("modelopt", _scores_by_layer(state["candidate_stats"], layers), seconds)


def loss_probe_scores(reference: Reference, names: Sequence[str], option: Option) -> Scores:
    """Score every layer by the loss probe of one option: one pass per batch.

    E[g.dy] + half of the Fisher term, with g = dL/dy from the pass and dy from the option's casts:
    for a loss that is a mean over n tokens, n g_t is the gradient of token t's own loss and
    1/2 dy'F dy = 1/2 n sum_t (g_t . dy_t)^2.
    """
    started = time.perf_counter()
    layers = {name: reference.model.get_submodule(name) for name in names}
    (_, input_cast), (_, weight_cast) = gemm_casts(option)[Gemm.OUTPUT]
    found = dict.fromkeys(names, 0.0)
    for index in range(len(reference.batches)):
        with differentiated_calls(layers) as calls:
            reference.run(index)
        for name, layer in layers.items():
            weight_NK = layer.get_parameter("weight").detach()
            error_NK = cast_operand(weight_NK, weight_cast) - weight_NK
            for call in calls[name]:
                x_MK, g_MN = floating_inputs(call)[0].flatten(0, -2), call.gradients[0]
                if g_MN is not None:
                    cast_MK = cast_operand(x_MK, input_cast)
                    error_MN = cast_MK @ error_NK.t() + (cast_MK - x_MK) @ weight_NK.t()
                    per_token = (g_MN.flatten(0, -2) * error_MN).sum(-1)
                    fisher = 0.5 * len(per_token) * per_token.square().sum(dtype=torch.float64)
                    found[name] += float(per_token.sum(dtype=torch.float64) + fisher)
    return Scores("loss probe", found, time.perf_counter() - started)


def _scores_by_layer(stats: Mapping[str, Any], layers: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, candidate in stats.items():
        names = [name for name in layers if key.removesuffix(".quant_recipe") == name]
        fp8 = [
            score
            for form, score in zip(candidate["formats"], candidate["scores"], strict=True)
            if "FP8" in str(form)
        ]
        for name in names:
            found[name] = float(fp8[0])
    return found


def weight_error_scores(model: nn.Module, options: Mapping[str, Option]) -> Scores:
    """Score every FP8 layer of one plan by its weight's rounding error."""
    started = time.perf_counter()
    errors = {
        name: _weight_error(model.get_submodule(name), option)
        for name, option in options.items()
        if option.is_fp8
    }
    return Scores("weight_error", errors, time.perf_counter() - started)


def _weight_error(layer: nn.Module, option: Option) -> float:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"a linear has a weight tensor, {type(layer).__name__} has none")
    exact = weight.detach()
    whole = option.recipe is Recipe.TENSORWISE
    amax = exact.abs().max() if whole else exact.abs().amax(dim=1, keepdim=True)
    scale = E4M3_MAX / amax.clamp(min=1e-12)
    rounded = (exact * scale).to(torch.float8_e4m3fn).to(exact.dtype) / scale
    return float((rounded - exact).square().sum() / exact.square().sum())


def layer_order_scores(layers: Sequence[str]) -> Scores:
    """Score layers by their place alone."""
    last = max(len(layers) - 1, 1)
    return Scores("layer_order", {name: 1.0 - i / last for i, name in enumerate(layers)}, 0.0)
