"""Why each layer has its precision, in one sentence for people."""

from dataclasses import dataclass

from autoprec.common.recipes import Precision
from autoprec.common.text import compared, percent
from autoprec.model.options import USED_UNCALLED
from autoprec.predict import parse_parallel
from autoprec.predict.parallel import shard_gemm
from autoprec.records.model import BF16_O2, FP32, Basis, Option
from autoprec.records.plan import KEPT, Search
from autoprec.records.sensitivity import Sensitivity
from autoprec.search.costs import Costs, Price, is_all_fp32
from autoprec.search.problem import Options, Problem, tied_groups
from autoprec.sensitivity.causes import FAR, explain_statistics, offset_of

UNSURE = "a gain within its uncertainty"
DOMINATES = 0.25  # of the error budget: a layer with more dominates the gradient error


@dataclass(frozen=True)
class Why:
    """All that a reason may speak of."""

    problem: Problem
    search: Search
    options: Options
    sensitivity: Sensitivity
    parallel: str = ""

    @property
    def costs(self) -> Costs:
        """The prices of all layers."""
        return self.problem.costs

    def shape(self, index: int) -> str:
        """Return ` at M=2048 K=256 N=768`, on one device; "" where there is no GEMM."""
        layer = self.costs.layers[index]
        gemm = layer.gemm
        if gemm is not None and self.parallel:
            gemm = shard_gemm(layer, parse_parallel(self.parallel))
        return "" if gemm is None else f" at M={gemm.M} K={gemm.K} N={gemm.N}"

    def ms(self, index: int, option: Option) -> float:
        """Return the time of an option beside the plan's activations."""
        price = self.costs.prices[index][option]
        return price.ms if is_all_fp32(self.options) else price.with_casts_ms


def reasons(why: Why) -> list[str]:
    """Return the reason of every layer, in model order."""
    found = [_reason(why, index) for index in range(len(why.options))]
    for first, *others in tied_groups(why.costs.layers):
        owner = why.costs.layers[first].name
        for index in others:
            parameters = why.costs.layers[index].parameters
            shared = next((p.shared_with for p in parameters if p.shared_with), owner)
            found[index] += f"; tied to {shared}"
        if others:
            names = ", ".join(why.costs.layers[index].name for index in others)
            found[first] += f"; shares its parameter with {names}"
    return found


def _reason(why: Why, index: int) -> str:
    layer, option = why.costs.layers[index], why.options[index]
    if keep := why.problem.keeps.of_layer.get(layer.name):
        recipe = "" if keep.option else f"; {_why_fp8(why, index)}"
        return f"{KEPT} {keep.text!r}{recipe}"
    if not layer.calls:
        others = "FP32" if is_all_fp32(why.options) else "BF16"
        why_not = USED_UNCALLED if layer.is_used_uncalled else "no call with gradients in the step"
        return f"{why_not}; follows the {others} layers"
    if option.is_fp8:
        return _why_fp8(why, index)
    if option == BF16_O2:
        parts = [_why_not_fp8(why, index)]
        if FP32 in why.costs.prices[index]:
            has_fp8 = any(other.is_fp8 for other in why.costs.prices[index])
            parts.insert(1 if has_fp8 else 0, _bf16_to_fp32(why, index))
        return "; ".join(parts)
    return _why_not_16_bit(why, index)


def _why_fp8(why: Why, index: int) -> str:
    option, prices = why.options[index], why.costs.prices[index]
    base = BF16_O2 if BF16_O2 in prices else FP32
    error = f"gradient {_error_of(prices[option])}"
    if base not in prices:
        return f"{short(option)}, {error}"
    speed = compared(why.ms(index, option), why.ms(index, base))
    text = f"{short(option)} {speed} than {short(base)}{why.shape(index)}, {error}"
    faster = [o for o in prices if o.is_fp8 and prices[o].ms < prices[option].ms]
    if faster:
        best = min(faster, key=lambda o: prices[o].ms)
        text += f"; {short(best)} is faster still, but has gradient {_error_of(prices[best])}"
        if prices[best].grad_error >= DOMINATES * why.search.grad_error_budget:
            text += _cause(why, index, best)
    return text


def _error_of(price: Price) -> str:
    """Return `error 0.1 %`, with its basis where it was not measured on this model."""
    if price.grad_error_basis is Basis.UNKNOWN:
        return "error unknown"
    basis = " (transferred)" if price.grad_error_basis is Basis.TRANSFERRED else ""
    return f"error {percent(price.grad_error)}{basis}"


def _why_not_fp8(why: Why, index: int) -> str:
    layer, prices = why.costs.layers[index], why.costs.prices[index]
    fp8 = [option for option in prices if option.is_fp8]
    if not fp8:
        return _missing(why, index, Precision.FP8_O1)
    if lock := why.costs.locks.get(layer.name):
        return lock
    best = min(fp8, key=lambda option: prices[option].ms)
    own = why.ms(index, why.options[index])
    if prices[best].ms >= own:
        speed = compared(prices[best].ms, own)
        return f"{short(best)} {_than(speed, why.options[index])}{why.shape(index)}"
    if prices[best].counted_ms >= own and not is_all_fp32(why.options):
        return f"{short(best)} {compared(prices[best].ms, own)}{why.shape(index)}, {UNSURE}"
    if layer.name in why.search.interacting:
        return (
            f"{short(best)} {compared(prices[best].ms, own)}, but together with the other layers "
            f"it adds more error than alone (found by bisection){_cause(why, index, best)}"
        )
    return _too_harmful(why, index, best, own)


def _too_harmful(why: Why, index: int, best: Option, own_ms: float) -> str:
    """Say that an option is faster and yet not worth its error, and where the error is from."""
    price, budget = why.costs.prices[index][best], why.search.grad_error_budget
    gain = f"{short(best)} {compared(price.with_casts_ms, own_ms)}"
    if best == BF16_O2:
        gain = _bf16_to_fp32(why, index)
    cost = f"{_error_of(price)}, budget {percent(budget)}"
    if price.grad_error < DOMINATES * budget:
        lost_ms = why.costs.taken_ms(why.options, {index: best})
        taken = ""
        if lost_ms > 0.0:
            share = percent(lost_ms / (own_ms - price.with_casts_ms))
            taken = f", less the {share} that FSDP's communication takes,"
        return f"{gain}, but what it saves{taken} is not worth its error ({cost})"
    is_over = price.grad_error > budget
    verb = "alone is over the budget" if is_over else "dominates the gradient error"
    return f"{gain}, but {verb} ({cost}){_cause(why, index, best)}"


def _cause(why: Why, index: int, option: Option) -> str:
    """Return what causes the error of a layer's option; of BF16's a mean far from zero alone."""
    name = why.costs.layers[index].name
    rows = [row for row in why.sensitivity.statistics if row.name == name]
    if option.is_fp8:
        causes = [explain_statistics(rows, recipe=str(option.recipe))]
    else:
        causes = [offset_of(row, least=FAR) for row in rows]
    return "".join(f"; {cause}" for cause in causes if cause)


def _bf16_to_fp32(why: Why, index: int, where: str = "") -> str:
    """Compare BF16 to FP32: alone, as the report's tables do, and with casts, as the choice did."""
    prices = why.costs.prices[index]
    if unknown := prices[BF16_O2].unknown:
        return f"its time is not known ({unknown})"
    alone = compared(prices[BF16_O2].ms, prices[FP32].ms)
    text = f"BF16 {_than(alone, FP32)}{where}"
    with_casts = compared(prices[BF16_O2].ms, why.ms(index, FP32))
    if with_casts != alone:
        text += f" ({with_casts} with the casts around FP32)"
    is_unsure = why.ms(index, FP32) < prices[BF16_O2].ms <= prices[FP32].counted_ms
    is_bf16 = why.options[index] == BF16_O2
    return f"{text}: {UNSURE}" if is_unsure and is_bf16 else text


def _why_not_16_bit(why: Why, index: int) -> str:
    prices = why.costs.prices[index]
    if BF16_O2 not in prices:
        return _missing(why, index, Precision.BF16_O2)
    own = why.ms(index, FP32)
    if not is_all_fp32(why.options) and (island := _island(why, index)):
        return island
    if prices[BF16_O2].unknown and not is_all_fp32(why.options):
        return _too_harmful(why, index, BF16_O2, own)
    if prices[BF16_O2].ms >= own:
        return _bf16_to_fp32(why, index, why.shape(index))
    if is_all_fp32(why.options):
        speed = compared(prices[BF16_O2].ms, own)
        return f"BF16 {speed} here, but the plan as a whole is FP32 (see its notes)"
    return _too_harmful(why, index, BF16_O2, own)


def _island(why: Why, index: int) -> str:
    """Say that BF16 is too coarse between a layer and others; "" where rows tell all of it."""
    own = why.costs.layers[index].name
    options = dict(zip((x.name for x in why.costs.layers), why.options, strict=True))
    for island in why.sensitivity.islands:
        is_held = is_all_fp32([options[name] for name in island.names])
        if is_held and own in island.names and island.grad_error > 0.0:
            names = (*island.names, *island.outputs)
            others = [name for name in names if name != own]
            beside = f" and {', '.join(others)}" if others else ""
            rows = (row for row in why.sensitivity.statistics if row.name in names)
            far = ((row.name, offset_of(row, least=FAR)) for row in rows)
            cause = "; ".join(f"{name} {offset}" for name, offset in far if offset)
            error = percent(island.grad_error)
            return (
                f"BF16 between it{beside} alone has gradient error {error}, budget "
                f"{percent(why.search.grad_error_budget)}: an island in FP32"
                f"{f' ({cause})' if cause else ''}"
            )
    return ""


def _missing(why: Why, index: int, precision: Precision) -> str:
    """Return the reason that a layer has no option of that precision."""
    layer, name = why.costs.layers[index], "FP8" if precision is Precision.FP8_O1 else "BF16"
    if refusal := layer.refusal(precision):
        return refusal
    gaps = why.costs.missing[index].items()
    found = next((text for option, text in gaps if option.precision is precision), "")
    return f"no {name}: {found}" if found else f"no {name} option was profiled"


def short(option: Option) -> str:
    """Return `FP8 rowwise`, `FP8 tensorwise (grad_input in BF16)`, `BF16` or `FP32`."""
    if not option.is_fp8:
        return "BF16" if option == BF16_O2 else "FP32"
    masked = f" ({', '.join(option.gemms_hp)} in BF16)" if option.gemms_hp else ""
    return f"FP8 {option.recipe}{masked}"


def _than(speed: str, other: Option) -> str:
    return f"{speed} as {short(other)}" if speed == "as fast" else f"{speed} than {short(other)}"
