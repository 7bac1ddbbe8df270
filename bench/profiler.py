"""Predicted against measured step time of mixed plans that the profile never saw.

    python bench/profiler.py [--plans 10] [--seed 0] [--cpu-time] [examples/char_gpt.py ...]

Each plan draws an option for every layer from those that were timed; it is predicted from the
profile as the search does, and measured interleaved with the others. The uniform steps are measured
again beside the plans: they show how far the machine itself moved in between. On a machine that is
busy with something else use --cpu-time, the CPU time of one thread in place of the wall clock.
"""

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from autoprec.device.timing import MOST_CPU_CACHE_BYTES, Clock, Stopping, make_clock
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.memory import io_elements
from autoprec.profiler import profile_model, time_steps
from autoprec.profiler.measure import sum_totals
from autoprec.records import FP32, Basis, ModelSpec, Option, Profile
from autoprec.workload.loading import load_workload

EXAMPLES = ("examples/char_gpt.py", "examples/digits_cnn.py")
SAMPLES = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("workloads", nargs="*", default=EXAMPLES)
    parser.add_argument("--plans", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    if given.cpu_time:
        torch.set_num_threads(1)
    clock = CpuTimeClock() if given.cpu_time else make_clock(torch.device("cpu"))
    how = f"{torch.get_num_threads()} threads, clock: {type(clock).__name__}"
    print(f"torch {torch.__version__}, {how}")
    for path in given.workloads:
        compare_plans(path, plans=given.plans, seed=given.seed, clock=clock)


def compare_plans(path: str, *, plans: int, seed: int, clock: Clock) -> None:
    """Profile a workload, then print predicted and measured step times of random plans."""
    context = Context(load_workload(path), torch.device("cpu"), seed, clock=clock)
    spec = capture_model(context)
    profile = profile_model(context, spec)
    print(
        f"\n{path}: profile cost {profile.step_equivalents:.1f} FP32 steps, boundary cast "
        f"{profile.boundary_cast_ms_per_melement:.2f} ms per million elements"
    )
    print_layers(profile)
    drawn = draw_plans(profile, count=plans, seed=seed)
    uniform = {"fp32": dict.fromkeys(spec.names, FP32), "bf16_o2": bf16_plan(spec)}
    arms: dict[str, dict[str, Option]] = {**uniform, **drawn}
    measured, _ = time_steps(context, arms, stopping=Stopping(SAMPLES))
    errors = []
    for step in measured:
        predicted = predict_step(profile, arms[step.label])
        error = predicted / step.timing.median_ms - 1
        errors.append(error)
        low = sum(option != FP32 for option in arms[step.label].values())
        print(
            f"{step.label:>8}  {low:>3} of {len(spec.layers)} layers 16-bit  "
            f"predicted {predicted:8.2f} ms  measured {step.timing.median_ms:8.2f} "
            f"({step.timing.p20_ms:.2f}..{step.timing.p80_ms:.2f})  error {error:+7.1%}"
        )
    unseen = [abs(error) for error in errors[len(uniform) :]]
    print(f"unseen plans: worst {max(unseen):.1%}, mean {sum(unseen) / len(unseen):.1%}")


def print_layers(profile: Profile) -> None:
    for row in profile.layers:
        if row.total is not None:
            parts = (row.output, row.grad_input, row.grad_weight, row.cast)
            shown = " ".join(f"{part.median_ms:8.3f}" if part else "       -" for part in parts)
            print(
                f"  {row.names[0]:<20} x{len(row.names):<3} {row.option.key:<28} {shown} "
                f"total {row.total.median_ms:9.3f} n={row.total.samples}"
            )


def draw_plans(profile: Profile, *, count: int, seed: int) -> dict[str, dict[str, Option]]:
    """Return random plans that mix options, for no uniform one is new to the profile."""
    generator = random.Random(seed)
    plans: list[dict[str, Option]] = []
    while len(plans) < count:
        plan = draw_plan(profile, generator)
        if len({plan[layer.name] for layer in profile.model.layers if layer.calls}) > 1:
            plans.append(plan)
    return {f"plan {number}": plan for number, plan in enumerate(plans)}


def draw_plan(profile: Profile, generator: random.Random) -> dict[str, Option]:
    """Return a random plan; tied layers get one option, so that they agree on their storage."""
    share = generator.random()
    plan: dict[str, Option] = {}
    for layer in profile.model.layers:
        others = [option for option in timed_options(profile, layer.name) if option != FP32]
        lowered = bool(others) and generator.random() < share
        plan[layer.name] = generator.choice(others) if lowered else FP32
        if layer.tied_to is not None:
            plan[layer.name] = plan[layer.tied_to]
    return plan


def timed_options(profile: Profile, name: str) -> Sequence[Option]:
    return [
        row.option
        for row in profile.layers
        if name in row.names and (row.total is None or row.total.basis is Basis.MEASURED)
        if not row.infeasible
    ]


def bf16_plan(spec: ModelSpec) -> dict[str, Option]:
    return {layer.name: layer.options[min(1, len(layer.options) - 1)] for layer in spec.layers}


def predict_step(profile: Profile, plan: Mapping[str, Option]) -> float:
    layers_ms = sum_totals(profile.layers, plan)
    if all(option == FP32 for option in plan.values()):
        return profile.fixed_ms + layers_ms
    cast_ms = profile.boundary_cast_ms_per_melement
    kept = [layer for layer in profile.model.layers if plan[layer.name] == FP32]
    return profile.fixed_bf16_ms + layers_ms + cast_ms * sum(map(io_elements, kept)) / 1e6


class CpuTimeClock(Clock):
    """CPU time of the calling thread in ms, from caches as cold as CpuClock leaves them."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(2 * MOST_CPU_CACHE_BYTES // 4)

    def measure(self, fn: Callable[[], object]) -> float:
        self._buffer.sum()
        started = time.thread_time()
        fn()
        return (time.thread_time() - started) * 1e3


if __name__ == "__main__":
    main()
