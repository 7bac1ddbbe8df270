"""An applied plan against the same model written by hand, side by side in one run.

    python bench/runtime.py [--rounds 15] [--layers 1000]

By hand means what a careful user would write: torchao's `convert_to_float8_training` on the same
layers, `.bfloat16()`, a list of FP32 masters that AdamW trains, gradients and weights copied with
foreach calls. The model is examples/char_gpt.py. One step is forward, backward and optimizer; the
steps take turns in random order. On a CPU the clock is the process's CPU time, which other users of
the machine disturb least, and torch's reference loop for FP8 GEMMs (30 s for one of this model's)
gives way to equal FP32 ones in both. Memory is the peak that the model and five steps add, in a
process of their own. Targets: step time and memory within 2 %; `apply` to 1,000 layers in 2 s.
"""

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprec
from autoprec.precision import float8_config, import_torchao
from autoprec.records import BF16_O2, Recipe, fp8_option
from autoprec.sensitivity.gemm import fast_fp8_gemms
from autoprec.timing import CudaClock, Stopping, sample_interleaved, speedup_interval

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import char_gpt  # noqa: E402  # examples are no package

from tests.runtime_plans import plan_for  # noqa: E402  # as above

Step = Callable[[], object]
Batch = tuple[Tensor, Tensor]
LAYERS_IN_FP8 = ("qkv", "proj", "fc1", "fc2")
MIXED = fp8_option(Recipe.TENSORWISE)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ProcessClock:
    """CPU milliseconds of this process."""

    name = "process"

    def measure(self, fn: Step) -> float:
        started = time.process_time()
        fn()
        return (time.process_time() - started) * 1e3

    def synchronize(self) -> None:
        """Return at once: the CPU is done when a call returns."""


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


def compare_steps(rounds: int) -> None:
    batch = tuple(part.to(DEVICE) for part in next(char_gpt.train_batches(0)))
    for plan in ("bf16", "mixed fp8"):
        steps = {}
        for name, make in MAKERS.items():
            torch.manual_seed(0)
            steps[name] = make(plan, batch)  # type: ignore[arg-type]  # a batch is a pair
        clock = CudaClock(DEVICE) if DEVICE.type == "cuda" else ProcessClock()
        taken = sample_interleaved(steps, clock=clock, stopping=Stopping(samples=rounds), warmup=3)
        ratio = speedup_interval(taken["applied"].rounds, taken["by hand"].rounds)
        times = "  ".join(f"{name} {taken[name].timing().median_ms:8.2f} ms" for name in steps)
        print(
            f"{plan:10}  step    {times}  applied / by hand {ratio.value:.3f} "
            f"({ratio.low:.3f} to {ratio.high:.3f}, {ratio.pairs} pairs)"
        )


def compare_memory() -> None:
    """Print the peak of each in a process of its own."""
    for plan in ("bf16", "mixed fp8"):
        peaks = {}
        for name in MAKERS:
            command = [sys.executable, __file__, "--peak", plan, name]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[name] = float(printed.split()[-1])
        shown = "  ".join(f"{name} {peak:8.1f} MB" for name, peak in peaks.items())
        ratio = peaks["applied"] / peaks["by hand"]
        print(f"{plan:10}  memory  {shown}  applied / by hand {ratio:.3f}")


def print_peak(plan: str, name: str) -> None:
    """Print the MB that making the model and five steps add at their peak."""
    batch = tuple(part.to(DEVICE) for part in next(char_gpt.train_batches(0)))
    import_torchao()
    nn.Linear(16, 16)(torch.randn(1, 16)).sum().backward()
    before = reset_peak()
    step = MAKERS[name](plan, batch)  # type: ignore[arg-type]  # a batch is a pair
    for _ in range(5):
        step()
    print(peak_mb() - before)


def reset_peak() -> float:
    """Start counting the peak anew; return the MB in use."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats(DEVICE)
        return torch.cuda.memory_allocated(DEVICE) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    return peak_mb()


def peak_mb() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated(DEVICE) / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


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
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--peak", nargs=2, metavar=("PLAN", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        with fast_fp8_gemms(DEVICE):
            print_peak(*arguments.peak)
        return
    with fast_fp8_gemms(DEVICE):
        compare_steps(arguments.rounds)
    if DEVICE.type == "cuda" or sys.platform == "linux":
        compare_memory()
    time_apply(arguments.layers)


if __name__ == "__main__":
    main()
