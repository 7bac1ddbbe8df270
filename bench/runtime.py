"""An applied plan against the same model written by hand, side by side in one run.

    python bench/runtime.py [--rounds 15] [--sets 4] [--layers 1000] [--optimizer-only]

By hand means what a careful user would write: torchao's `convert_to_float8_training` on the same
layers, `.bfloat16()`, a list of FP32 masters that AdamW trains, gradients and weights copied with
foreach calls. The model is examples/char_gpt.py. One step is forward, backward and optimizer; the
steps take turns in random order, and each set makes both models anew, the other one first, because
where a model's memory lies changes its speed by percents.

On a CPU the clock is the process's CPU time, which other users of the machine disturb least. torch
runs a reference loop for FP8 GEMMs there (30 s for one of this model's), so in both models the FP8
GEMMs take no time and give zeros: what is compared is all the rest, of which autoprec's share is
larger than of a whole step. `extra` is the same difference in a step of 16 tokens, where little but
Python runs, as a share of the whole step: it is measured much more finely, and leaves out only what
grows with the tokens, which both compute with the same operations. Memory is the peak of the bytes
in tensors over five steps, the making of the model included: exact, unlike the resident size.
`optimizer` is `AdamW.step` alone with 289 small tensors, where a GPU would do nothing but wait for
the host: CPU ms of the thread, in turns; `plain` is FP32 without a plan.
Targets: step time and memory within 2 %; `apply` to 1,000 layers in 2 s; less than 1 ms for a step
of 289 tensors beyond `by hand`.
"""

import argparse
import contextlib
import copy
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import autoprec
from autoprec.device.cuda_clock import CudaClock
from autoprec.device.fp8 import fp8_support
from autoprec.device.timing import Clock, Stopping, sample_interleaved
from autoprec.device.torchao import float8_config, import_torchao
from autoprec.records import BF16_O2, Recipe, fp8_option

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import char_gpt  # noqa: E402  # examples are no package

from tests.plans import plan_for  # noqa: E402  # as above

Step = Callable[[], object]
Batch = tuple[Tensor, Tensor]
Rounds = dict[str, list[float | None]]
LAYERS_IN_FP8 = ("qkv", "proj", "fc1", "fc2")
MIXED = fp8_option(Recipe.TENSORWISE)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ProcessClock(Clock):
    """CPU milliseconds of this process."""

    def measure(self, fn: Step) -> float:
        started = time.process_time()
        fn()
        return (time.process_time() - started) * 1e3


def applied_step(plan: str, batch: Batch) -> Step:
    """Return one training step of an applied plan."""
    model = char_gpt.build_model().to(DEVICE)
    made = plan_for(model, BF16_O2)
    if plan == "mixed fp8":
        made = plan_for(model, MIXED, {"head": BF16_O2})
    _, optimizer = autoprec.apply(made, model, char_gpt.build_optimizer(model))

    def step() -> None:
        optimizer.zero_grad()
        char_gpt.loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()

    return step


def hand_written_step(plan: str, batch: Batch) -> Step:
    """Return the same step written by hand."""
    model = char_gpt.build_model().to(DEVICE)
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model.bfloat16()
    if plan == "mixed fp8":
        import_torchao().convert_to_float8_training(
            model,
            config=float8_config(MIXED),
            module_filter_fn=lambda _, name: name.rpartition(".")[2] in LAYERS_IN_FP8,
        )
    optimizer = torch.optim.AdamW(masters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    weights: list[Tensor] = list(model.parameters())
    tokens, targets = batch

    def step() -> None:
        for weight in weights:
            weight.grad = None
        logits = model(tokens).float()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]  # torch's
        for master in masters:
            if master.grad is None:
                master.grad = torch.empty_like(master)
        with torch.no_grad():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            torch._foreach_copy_([m.grad for m in masters if m.grad is not None], gradients)
            optimizer.step()
            torch._foreach_copy_(weights, masters)
            if DEVICE.type == "cuda":
                for master in masters:
                    master.grad = None

    return step


MAKERS = {"applied": applied_step, "by hand": hand_written_step}


@contextlib.contextmanager
def free_fp8_gemms() -> Iterator[None]:
    """Make `torch._scaled_mm` on the CPU return zeros at once."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch's own

    def zeros(a: Tensor, b: Tensor, *args: Any, **_: Any) -> Tensor:  # Any: torch's own
        dtype: torch.dtype = args[4]  # after scale_a, scale_b, bias, scale_result
        return torch.zeros(a.shape[0], b.shape[1], dtype=dtype)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered")
        library.impl("_scaled_mm", zeros, "CPU", allow_override=True)  # type: ignore[no-untyped-call]  # torch's
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]  # torch's own


def compare_steps(rounds: int, sets: int) -> None:
    tokens, targets = next(char_gpt.train_batches(0))
    whole = tokens.to(DEVICE), targets.to(DEVICE)
    small = whole[0][:1, :16], whole[1][:1, :16]
    for plan in ("bf16", "mixed fp8"):
        seen = sample_sets(plan, whole, rounds=rounds, sets=sets)
        show_steps(plan, seen, rounds)
        extra = difference_ms(sample_sets(plan, small, rounds=4 * rounds, sets=sets))
        share = extra / median_ms(seen["by hand"])
        print(f"{plan:10}  extra   {extra:.2f} ms a step, {share:.2%} of the step by hand")


def sample_sets(plan: str, batch: Batch, *, rounds: int, sets: int) -> Rounds:
    """Return the ms of every round of all sets, by maker."""
    seen: Rounds = {name: [] for name in MAKERS}
    clock = CudaClock(DEVICE) if DEVICE.type == "cuda" else ProcessClock()
    for number in range(sets):
        steps = {}
        for name in sorted(MAKERS, reverse=number % 2 == 1):
            torch.manual_seed(0)
            steps[name] = MAKERS[name](plan, batch)
        stopping = Stopping(samples=rounds)
        taken = sample_interleaved(steps, clock=clock, stopping=stopping, warmup=3, seed=number)
        for name, samples in taken.items():
            seen[name] += samples.rounds
    return seen


def median_ms(taken: Sequence[float | None]) -> float:
    return statistics.median(ms for ms in taken if ms is not None)


def difference_ms(seen: Rounds) -> float:
    """Return the median over rounds of what the applied plan takes more."""
    pairs = zip(seen["applied"], seen["by hand"], strict=True)
    return statistics.median(a - b for a, b in pairs if a is not None and b is not None)


class Interval(NamedTuple):
    value: float
    low: float
    high: float
    pairs: int


def speedup_interval(
    baseline: Sequence[float | None], candidate: Sequence[float | None]
) -> Interval:
    """Return the median of baseline / candidate over paired rounds, with its 95 % interval.

    Rounds are drawn anew: a drift that both saw in a round cancels in its ratio.
    """
    pairs = zip(baseline, candidate, strict=False)
    ratios = np.array([a / b for a, b in pairs if a is not None and b])
    found = bootstrap((ratios,), np.median, method="percentile", n_resamples=2000, rng=0)
    low, high = found.confidence_interval
    return Interval(float(np.median(ratios)), float(low), float(high), len(ratios))


def show_steps(plan: str, seen: Rounds, rounds: int) -> None:
    ratio = speedup_interval(seen["applied"], seen["by hand"])
    times = "  ".join(f"{name} {median_ms(taken):8.2f} ms" for name, taken in seen.items())
    starts = range(0, len(seen["applied"]), rounds)
    parts = [{name: taken[s : s + rounds] for name, taken in seen.items()} for s in starts]
    each = ", ".join(
        f"{speedup_interval(part['applied'], part['by hand']).value:.3f}" for part in parts
    )
    print(
        f"{plan:10}  step    {times}  applied / by hand {ratio.value:.3f} "
        f"({ratio.low:.3f} to {ratio.high:.3f}, {ratio.pairs} pairs; of each set {each})"
    )


def compare_memory() -> None:
    for plan in ("bf16", "mixed fp8"):
        peaks = {name: peak_mb(plan, name) for name in MAKERS}
        shown = "  ".join(f"{name} {peak:8.1f} MB" for name, peak in peaks.items())
        ratio = peaks["applied"] / peaks["by hand"]
        print(f"{plan:10}  memory  {shown}  applied / by hand {ratio:.3f}")


def peak_mb(plan: str, name: str) -> float:
    """Return the MB of tensors that making the model and five steps add at their peak."""
    batch = next(char_gpt.train_batches(0))
    batch = batch[0].to(DEVICE), batch[1].to(DEVICE)

    def run() -> None:
        step = MAKERS[name](plan, batch)
        for _ in range(5):
            step()

    return cuda_peak_mb(run) if DEVICE.type == "cuda" else cpu_peak_mb(run)


def cuda_peak_mb(run: Step) -> float:
    torch.cuda.synchronize(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    run()
    return (torch.cuda.max_memory_allocated(DEVICE) - before) / 1e6


def cpu_peak_mb(run: Step) -> float:
    """Add up what torch's profiler saw allocated and freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    if profiler.profiler is None:
        raise RuntimeError("torch's profiler recorded nothing")
    events = profiler.profiler.kineto_results.events()
    changes = [
        (grad_error.start_ns(), grad_error.nbytes())
        for grad_error in events
        if grad_error.name() == "[memory]"
    ]
    peak: int = max(itertools.accumulate(size for _, size in sorted(changes)))
    return peak / 1e6


def small_tensors() -> nn.Sequential:
    """Return a model of 289 tensors."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(16, bias=False)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(144)), norm)


def optimizer_steps(settings: dict[str, Any]) -> dict[str, Step]:
    """Return the step of AdamW over 289 tensors: FP32, masters by hand, and applied."""

    def with_gradients(model: nn.Module) -> list[Tensor]:
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        return list(model.parameters())

    plain = torch.optim.AdamW(with_gradients(small_tensors()), **settings)
    model = small_tensors()
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
    with_gradients(model)
    other = small_tensors()
    masters = [parameter.detach().clone() for parameter in other.parameters()]
    weights = with_gradients(other.bfloat16())
    own = torch.optim.AdamW(masters, **settings)
    for master in masters:
        master.grad = torch.empty_like(master)

    def by_hand() -> None:
        with torch.no_grad():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            torch._foreach_copy_([m.grad for m in masters if m.grad is not None], gradients)
            own.step()
            torch._foreach_copy_(weights, masters)

    return {"plain": plain.step, "by hand": by_hand, "applied": optimizer.step}


def time_optimizer(rounds: int = 80) -> None:
    """Print the host's time for a step over 289 tensors."""
    for name in ("foreach", "fused"):
        steps = optimizer_steps({name: True})
        for step in steps.values():
            for _ in range(5):
                step()
        taken: dict[str, list[float]] = {label: [] for label in steps}
        for _ in range(rounds):
            for label, step in steps.items():
                started = time.thread_time()
                step()
                taken[label].append((time.thread_time() - started) * 1e3)
        extra = statistics.median(map(float.__sub__, taken["applied"], taken["by hand"]))
        shown = "  ".join(f"{label} {statistics.median(ms):.2f}" for label, ms in taken.items())
        print(f"{name:10}  optimizer, 289 tensors: {shown} ms; applied - by hand {extra:.2f} ms")


def time_apply(layers: int) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    plan = plan_for(model, MIXED)
    import_torchao()
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    autoprec.apply(plan, copied, copied_optimizer)  # FP8 is tried once per process
    started = time.perf_counter()
    autoprec.apply(plan, model, optimizer)
    print(f"apply to {layers} layers: {time.perf_counter() - started:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--optimizer-only", action="store_true")
    arguments = parser.parse_args()
    time_optimizer()
    if arguments.optimizer_only:
        return
    import_torchao()
    fp8_support(DEVICE)  # tried once per process, with the true kernels
    with free_fp8_gemms() if DEVICE.type == "cpu" else contextlib.nullcontext():
        compare_steps(arguments.rounds, arguments.sets)
        compare_memory()
    time_apply(arguments.layers)


if __name__ == "__main__":
    main()
