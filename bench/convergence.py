"""Loss gaps of plans over runs of 75, 300 and 2000 steps, and their gradient errors on the way.

    python bench/convergence.py [--out FILE]      measure; a killed run goes on where it was
    python bench/convergence_fit.py [--out FILE]  fit, and write docs/convergence.md

Every run of a family (`convergence_families`) has the plan from its first step, as the user's run
would: the same weights, batches and learning rates as the reference of its seed (ten steps of
warm-up, then a cosine to zero at the horizon, so that the end is the floor of a basin). Evaluation
is on fixed held-out batches, once in FP32 and once through the plan's own forward.

All plans and seeds of a family train side by side under `torch.func.vmap`, which makes half a
million steps of tiny models possible on one core. So linears are computed here: operands cast to
BF16 or FP8 as the runtime's are (compared bit by bit with `sensitivity.casts` first), products
summed in FP32; what is between linears stays FP32.

FP8's own errors are small beside what two runs of a tiny model differ by. So some plans are
coarser: rowwise FP8 of which the GEMMs named keep one or two bits of mantissa, not three; with one
bit the error is an FP4's.

Along the reference's run the gradient error of every plan is measured on the same four batches, as
sums that the fit needs: in the product's norm, in the plain one and in one of second moments of the
bench's own, each of single batches and of their mean.
"""

import argparse
import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from convergence_families import FAMILIES, HELD_BACK, Family
from torch import Tensor, nn
from torch.func import functional_call, vmap

from autoprec.common.recipes import Gemm, Recipe
from autoprec.records import fp8_option
from autoprec.sensitivity.casts import cast_scaled, gemm_casts, largest_of, scale_from
from autoprec.sensitivity.preconditioner import read_preconditioner

SEEDS = {75: 6, 300: 4, 2000: 2}  # by horizon; they train side by side
POINTS = (10, 50, 150, 500, 1500)  # steps of the reference after which errors are measured
ERROR_BATCHES = 4
ERROR_SEED = 90_001
LR_WARMUP = 10
LAST_THIRD = (75, 50)  # what a verification trains: steps, and from which on with the plan
ROUNDS = 4  # of all seeds
Row = dict[str, Any]  # Any: one line of the file
UNIT = ("family", "steps", "start", "seed")
E4M3, E5M2 = (3, 2.0**-9, 448.0), (2, 2.0**-16, 57344.0)  # bits, smallest step, largest value


# --- casts ---------------------------------------------------------------------------------------

# a cast: (2^-bits of mantissa, smallest step, largest value or 0 for no scale, rows, power of 2)
Cast = tuple[float, float, float, float, float]
EXACT: Cast = (2.0**-23, 2.0**-149, 0.0, 0.0, 0.0)
BF16: Cast = (2.0**-7, 2.0**-133, 0.0, 0.0, 0.0)
SIDES = [(gemm, side) for gemm in Gemm for side in (0, 1)]  # a linear's six operands


def fp8(kind: tuple[int, float, float], *, rows: bool, drop: int = 0) -> Cast:
    """Return an FP8 cast; `drop` bits of mantissa are left out."""
    bits, step, largest = kind
    return (2.0 ** (drop - bits), step * 2**drop, largest, float(rows), float(rows))


def quantize(x: Tensor, cast: Tensor, dim: int) -> Tensor:
    """Return x [R, M, K] after the cast [R, 5] of each replica, scaled along `dim` or whole."""
    relative, step, largest, rows, power = cast[:, :, None, None].unbind(1)
    along = x.abs().amax(dim, keepdim=True)
    amax = torch.where(rows > 0, along, along.amax((1, 2), keepdim=True)).clamp_(min=1e-12)
    scale = torch.where(largest > 0, largest / amax, 1.0)
    scale = torch.where(power > 0, torch.exp2(torch.floor(torch.log2(scale))), scale)
    scaled = x * scale
    power_of_2 = (scaled.view(torch.int32) & 0x7F800000).view(torch.float32)
    grid = torch.maximum(power_of_2.mul_(relative), step)
    return scaled.div_(grid).round_().mul_(grid).div_(scale)


class Product(torch.autograd.Function):
    """y = x w' of R replicas, each of the six operands cast first."""

    @staticmethod
    def forward(ctx: Any, x_RMK: Tensor, w_RNK: Tensor, casts: Tensor) -> Tensor:  # Any: torch's
        ctx.save_for_backward(x_RMK, w_RNK, casts)
        x, w = quantize(x_RMK, casts[:, 0], 2), quantize(w_RNK, casts[:, 1], 2)
        return x @ w.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # Any: torch's own
        (g_RMN,) = grads
        x_RMK, w_RNK, casts = ctx.saved_tensors
        grad_x = quantize(g_RMN, casts[:, 2], 2) @ quantize(w_RNK, casts[:, 3], 1)
        grad_w = quantize(g_RMN, casts[:, 4], 1).transpose(1, 2) @ quantize(x_RMK, casts[:, 5], 1)
        return grad_x, grad_w, None


class Replicated(torch.autograd.Function):
    """The door from inside `vmap` to Product, which is given all replicas at once."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, casts: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # Any: torch's own
        raise NotImplementedError

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int, int, int], x: Tensor, weight: Tensor, casts: Tensor
    ) -> tuple[Tensor, int]:  # Any: torch's own
        x, weight, casts = (t.movedim(d, 0) for t, d in zip((x, weight, casts), dims, strict=True))
        out: Tensor = Product.apply(x.flatten(1, -2), weight, casts)  # type: ignore[no-untyped-call]
        return out.view(len(x), *x.shape[1:-1], -1), 0


class CastLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        out: Tensor = Replicated.apply(input, self.weight, self.casts)  # type: ignore[no-untyped-call]
        return out + self.bias


def check_casts() -> None:
    """Refuse to run if the casts here are not the product's."""
    x = torch.randn(48, 64) * torch.randn(48, 1).mul(3).exp()
    x = x.to(torch.bfloat16).float()  # as operands come
    for recipe in (Recipe.ROWWISE, Recipe.TENSORWISE):
        here = make_plans(["layer"], "other")[recipe]["layer"]
        for gemm, sides in gemm_casts(fp8_option(recipe)).items():
            for side, (_, cast) in enumerate(sides):
                own = torch.tensor(here[SIDES.index((gemm, side))])[None]
                found = quantize(x[None], own, 2 if cast.dim is None else cast.dim + 1)[0]
                scale = scale_from(largest_of(x, cast), cast)
                if not torch.equal(found, cast_scaled(x, cast, scale)):
                    raise SystemExit(f"{recipe} casts {gemm} otherwise than the bench does")


# --- plans ---------------------------------------------------------------------------------------


def make_plans(linears: Sequence[str], fault: str) -> dict[str, dict[str, list[Cast]]]:
    """Return the casts of every linear that is not in BF16, by plan."""
    rowwise = [fp8(E4M3, rows=True)] * 6
    backward = fp8(E5M2, rows=False)
    plain = fp8(E4M3, rows=False)
    tensorwise = [plain, plain, backward, plain, backward, plain]
    two, one = ([fp8(E4M3, rows=True, drop=bits)] * 6 for bits in (1, 2))
    only = {
        kept: [c if gemm is kept else BF16 for c, (gemm, _) in zip(one, SIDES, strict=True)]
        for kept in Gemm
    }
    return {
        "bf16": {},
        "rowwise": dict.fromkeys(linears, rowwise),
        "tensorwise": dict.fromkeys([n for n in linears if n != f"{fault}.0"], tensorwise),
        "fault alone": {f"{fault}.0": tensorwise},
        "two bits": dict.fromkeys(linears, two),
        "one bit, half": dict.fromkeys(linears[::2], one),
        **{f"one bit, {kept}": dict.fromkeys(linears, casts) for kept, casts in only.items()},
    }


@dataclass
class Replicas:
    """Models of one family, a seed after another: the reference, then every plan."""

    family: Family
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        models = []
        for seed in self.seeds:
            torch.manual_seed(seed)
            models.append(self.family.build_model())
        self.base = copy.deepcopy(models[0])
        linears = {n: m for n, m in self.base.named_modules() if isinstance(m, nn.Linear)}
        fitting = [n for n, m in linears.items() if not (m.in_features % 16 or m.out_features % 16)]
        plans = make_plans(fitting, self.family.fault[0])
        self.labels = ["reference", *plans]
        self.count = len(self.labels) * len(self.seeds)
        self.of_reference = torch.arange(self.count) // len(self.labels) * len(self.labels)
        # parameters of every seed, repeated for its plans
        self.parameters = {}
        for name, _ in self.base.named_parameters():
            seeds = torch.stack([model.get_parameter(name).detach() for model in models])
            self.parameters[name] = nn.Parameter(seeds.repeat_interleave(len(self.labels), 0))
        self.casts, self.exact = {}, {}
        for name, layer in linears.items():
            layer.__class__ = CastLinear
            layer.register_buffer("casts", torch.zeros(6, 5))
            rows = [[EXACT] * 6] + [plan.get(name, [BF16] * 6) for plan in plans.values()]
            self.casts[f"{name}.casts"] = torch.tensor(rows).repeat(len(self.seeds), 1, 1)
            self.exact[f"{name}.casts"] = torch.tensor([[EXACT] * 6] * self.count)

    def losses(
        self, parameters: Mapping[str, Tensor], batch: Sequence[Tensor], casts: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the loss of every replica; the batch has one part per replica."""

        def loss(state: Mapping[str, Tensor], own: tuple[Tensor, ...]) -> Tensor:
            # the family's loss calls the model: here with this replica's state
            return self.family.loss_fn(lambda *x: functional_call(self.base, dict(state), x), own)

        found: Tensor = vmap(loss, randomness="error")({**parameters, **casts}, tuple(batch))
        return found

    def same(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return one batch for all replicas."""
        return tuple(part.expand(self.count, *part.shape) for part in batch)

    def drawn(self, batches: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Return the batch of every seed for each of its replicas."""
        parts = (torch.stack(each) for each in zip(*batches, strict=True))
        return tuple(part.repeat_interleave(len(self.labels), 0) for part in parts)


# --- runs ----------------------------------------------------------------------------------------


def run_unit(name: str, steps: int, start: int, seeds: Sequence[int]) -> Iterator[Row]:
    """Train a family for so many steps, all plans and seeds; yield a row per run and point.

    Plans act from the step `start` on.
    """
    started, family = time.process_time(), FAMILIES[name]
    replicas = Replicas(family, seeds)
    optimizer = family.build_optimizer(_Holder(replicas.parameters))
    group, curve, points = optimizer.param_groups[0], [], {}
    rate = group["lr"]
    streams = zip(*(family.train_batches(seed) for seed in seeds), strict=True)
    for step, batches in enumerate(islice(streams, steps)):
        warm = min(1.0, (step + 1) / LR_WARMUP)
        group["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        casts = replicas.casts if step >= start else replicas.exact
        losses = replicas.losses(replicas.parameters, replicas.drawn(batches), casts)
        losses.sum().backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        curve.append(losses.detach())
        if step + 1 in POINTS:
            points[step + 1] = measure_errors(replicas, optimizer)
    own, exact = (evaluate(replicas, casts) for casts in (replicas.casts, replicas.exact))
    curves = torch.stack(curve)
    spent = (time.process_time() - started) / steps / replicas.count
    for index in range(replicas.count):
        seed, label = (
            seeds[index // len(replicas.labels)],
            replicas.labels[index % len(replicas.labels)],
        )
        row = {
            "family": name,
            "steps": steps,
            "start": start,
            "seed": seed,
            "plan": label,
            "step_s": spent,
        }
        row |= {"exact": float(exact[index]), "own": float(own[index])}
        row["tail"] = float(curves[-max(steps // 10, 1) :, index].mean())
        row["errors"] = {step: found[index] for step, found in points.items()}
        if label == "reference":
            row["curve"] = [round(value, 5) for value in curves[:, index].tolist()]
        yield row


class _Holder(nn.Module):
    """A module whose parameters are these, as an optimizer wants them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameters.values())


@torch.no_grad()
def evaluate(replicas: Replicas, casts: Mapping[str, Tensor]) -> Tensor:
    batches = map(replicas.same, replicas.family.eval_batches())
    losses = [replicas.losses(replicas.parameters, batch, casts) for batch in batches]
    return torch.stack(losses).mean(0)


def measure_errors(replicas: Replicas, optimizer: Any) -> list[dict[str, list[float]]]:
    """Return the sums of every replica: its casts at the weights of its seed's reference."""
    weights = {
        name: p.detach()[replicas.of_reference].requires_grad_()
        for name, p in replicas.parameters.items()
    }
    gradients = []
    for batch in islice(replicas.family.train_batches(ERROR_SEED), ERROR_BATCHES):
        losses = replicas.losses(weights, replicas.same(batch), replicas.casts)
        gradients.append(torch.autograd.grad(losses.sum(), list(weights.values())))
    product = read_preconditioner(optimizer)
    parameters = list(replicas.parameters.values())
    own = [
        flat(
            [
                product.weight(p, at=g)[replicas.of_reference]
                for p, g in zip(parameters, each, strict=True)
            ]
        )
        for each in gradients
    ]
    flats = [flat(each) for each in gradients]
    exact = [each[replicas.of_reference] for each in flats]
    root = torch.stack(exact).square().mean(0).sqrt()
    moments = (root + 0.01 * root.mean(1, keepdim=True)).rsqrt()
    found: list[dict[str, list[float]]] = [{} for _ in range(replicas.count)]
    ones = torch.ones_like(moments)
    for norm, scales in (("product", own), ("plain", [ones] * 4), ("moments", [moments] * 4)):
        # |d|^2, d.g and |g|^2: means of single batches, then the same of the mean batch
        g = [each * scale for each, scale in zip(exact, scales, strict=True)]
        d = [f * scale - e for f, e, scale in zip(flats, g, scales, strict=True)]
        single = [_sums(a, b) for a, b in zip(d, g, strict=True)]
        whole = _sums(torch.stack(d).mean(0), torch.stack(g).mean(0))
        both = torch.cat([torch.stack(single).mean(0), whole], 1)
        for index, values in enumerate(both.tolist()):
            found[index][norm] = [float(f"{value:.5g}") for value in values]
    return found


def _sums(d: Tensor, g: Tensor) -> Tensor:
    pairs = ((d, d), (d, g), (g, g))
    return torch.stack([(a.double() * b.double()).sum(1) for a, b in pairs], 1)


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten(1) for part in parts], 1)


def order() -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
    """Yield (family, horizon, start, seeds), every family at every horizon as early as may be."""
    names = [*(n for n in FAMILIES if n not in HELD_BACK), *HELD_BACK]
    for turn in range(ROUNDS):
        for runs in (((75, 0), (300, 0)), ((2000, 0),), (LAST_THIRD,)):
            for name in names:
                for steps, start in runs:
                    count = SEEDS[steps]
                    seeds = tuple(range(1 + turn * count, 1 + (turn + 1) * count))
                    yield name, steps, start, seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "convergence.jsonl"
    )
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.set_num_threads(1)
    check_casts()
    lines = out.read_text().splitlines() if out.exists() else []
    done = {tuple(json.loads(line)[key] for key in UNIT) for line in lines}
    for name, steps, start, seeds in order():
        if name not in arguments.families or (name, steps, start, seeds[0]) in done:
            continue
        started = time.perf_counter()
        rows = [json.dumps(row) + "\n" for row in run_unit(name, steps, start, seeds)]
        with out.open("a") as file:  # one write: all rows of a unit or none
            file.write("".join(rows))
            file.flush()
            os.fsync(file.fileno())
        print(
            f"{name} {steps} from {start}, seeds {seeds}: {time.perf_counter() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
