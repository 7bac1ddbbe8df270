"""Plans against torchao's rule and against FP8 everywhere, predicted on every device profile.

    python bench/plans.py [NAME of examples/llama_meta.py ...]

Each model is captured on meta tensors, its step priced per device and `--parallel`, and the plan
compared with the best recipe of two rules that people use: FP8 in every linear that can run it, and
torchao's `_auto_filter_for_recipe` (a shape rule for H100, on the whole weights, as torchtitan asks
it before it shards). Once with the output head out of FP8 in all arms (the default while the
gradient error is unknown; torchtitan filters it too), once with it free. Exit status 1 where a plan
is slower.

The plan is exact for this cost model: the table shows that nothing between model and plan loses
that, and how much the rules do lose by the same model.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from autoprec.common.noise import import_noise_dropped
from autoprec.model.meta import capture_on_meta
from autoprec.predict import list_device_profiles, parse_parallel, predict_profile
from autoprec.predict.transfer import default_locks, unknown_sensitivity
from autoprec.records import (
    APPLICABLE_RECIPES,
    BF16_O2,
    Basis,
    Constraint,
    LayerSpec,
    ModelSpec,
    Option,
    Recipe,
    Sensitivity,
    fp8_option,
)
from autoprec.records.devices import DeviceProfile
from autoprec.search import search_plan
from autoprec.search.costs import Costs, make_costs
from autoprec.workload.loading import load_workload

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama_meta.py"
PARALLELS = ("", "fsdp=8", "tp=8")
TORCHAO_RECIPES = (Recipe.TENSORWISE, Recipe.ROWWISE)  # its filter has no third
ROUNDING = 1e-9
COLUMNS = ("BF16", "all FP8", "torchao", "plan")

Rule = Callable[[LayerSpec], bool]


@dataclass(frozen=True)
class Row:
    """Predicted step times in ms; of each rule that of its best recipe."""

    device: str
    parallel: str
    head: str
    bf16: float
    all_fp8: float
    torchao: float
    plan: float

    @property
    def is_slower(self) -> bool:
        return self.plan > (1 + ROUNDING) * min(self.bf16, self.all_fp8, self.torchao)

    def __str__(self) -> str:
        times = " ".join(f"{ms:9.1f}" for ms in (self.bf16, self.all_fp8, self.torchao, self.plan))
        gain = self.bf16 / self.plan
        slower = "  SLOWER" if self.is_slower else ""
        return f"{self.device:14} {self.parallel:8} {self.head:6} {times}  {gain:.3f}x{slower}"


def main(names: list[str]) -> int:
    """Print the tables; return 1 if any plan is slower than a rule."""
    rows: list[Row] = []
    for name in names or ["llama2_7b"]:
        started = time.perf_counter()
        spec = capture_on_meta(load_workload(f"{EXAMPLE}:{name}"))
        captured = time.perf_counter() - started
        print(f"{name}: captured in {captured:.1f} s, {len(spec.layers)} layers")
        heads = " ".join(f"{column:>9}" for column in COLUMNS)
        print(f"{'device':14} {'parallel':8} {'head':6} {heads}  plan vs BF16")
        for row in compare(spec):
            print(row)
            rows.append(row)
    slower = sum(row.is_slower for row in rows)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"plan slower than a rule in {slower} of {len(rows)} cases; {peak_gb:.2f} GB at most")
    return 1 if slower else 0


def compare(spec: ModelSpec) -> Iterator[Row]:
    """Yield a row per device, parallelism and treatment of the head."""
    for device in list_device_profiles():
        for parallel in PARALLELS:
            for head in ("locked", "free"):
                yield _compared(spec, device, parallel, head)


def _compared(spec: ModelSpec, device: DeviceProfile, parallel: str, head: str) -> Row:
    profile = predict_profile(
        spec,
        device,
        parallel=parse_parallel(parallel),
        compiled=True,
        options=[fp8_option(recipe) for recipe in APPLICABLE_RECIPES],
    )
    unknown = unknown_sensitivity(profile.model)
    sensitivity = unknown if head == "locked" else _without_locks(unknown)
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=0.0)
    search = search_plan(profile, sensitivity, constraint=constraint, evaluate=None, trials=0)
    costs = make_costs(profile, sensitivity)
    locked = set(default_locks(spec.layers)) if head == "locked" else set()

    def best(rule_of: Callable[[Recipe], Rule]) -> float:
        recipes = TORCHAO_RECIPES if rule_of is torchao_rule else APPLICABLE_RECIPES
        return min(_step_ms(costs, recipe, rule_of(recipe), locked) for recipe in recipes)

    return Row(
        device=device.name,
        parallel=parallel,
        head=head,
        bf16=_step_ms(costs, Recipe.ROWWISE, lambda _: False, locked),
        all_fp8=best(lambda _: lambda layer: True),
        torchao=best(torchao_rule),
        plan=search.chosen.step_ms,
    )


def torchao_rule(recipe: Recipe) -> Rule:
    """Return torchao's own filter as a rule on layers."""
    with import_noise_dropped():
        from torchao.float8 import float8_linear_utils

    keeps = float8_linear_utils._auto_filter_for_recipe(recipe.value, filter_fqns=[])

    def rule(layer: LayerSpec) -> bool:
        if layer.gemm is None:
            return False
        linear = nn.Linear(layer.gemm.K, layer.gemm.N, bias=False, device="meta")
        return bool(keeps(linear, layer.name))

    return rule


def _step_ms(costs: Costs, recipe: Recipe, rule: Rule, locked: set[str]) -> float:
    """Return the step time of the plan that a rule makes with one recipe, BF16 elsewhere."""
    wanted = fp8_option(recipe)
    options: list[Option] = [
        wanted if wanted in prices and layer.name not in locked and rule(layer) else BF16_O2
        for layer, prices in zip(costs.layers, costs.prices, strict=True)
    ]
    return costs.step_ms(options)


def _without_locks(sensitivity: Sensitivity) -> Sensitivity:
    rows = tuple(r.model_copy(update={"basis": Basis.PREDICTED}) for r in sensitivity.rows)
    return sensitivity.model_copy(update={"rows": rows})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
