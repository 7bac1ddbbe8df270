"""What the guard costs, as a share of the training step it watches, in one run.

    python bench/guard.py [--steps 40]

The step is the character GPT's of examples/char_gpt.py with every block linear in `fp8_o1:rowwise`
and the guard's switch off, so that the GEMMs run in BF16: torch's FP8 GEMMs on a CPU are emulated,
many times slower than on a GPU, and would hide the guard's cost behind theirs. Three parts, medians
of one run:

    step     forward, backward, optimizer
    look     `Guard.step` in a step that is not sampled
    sample   what a sampled step adds: the shares of input, weight and output gradient of every FP8
             layer, timed on tensors of their shapes; paid once in `Limits.sample_every` steps

On a GPU the guard also waits for the step's result once, as `loss.item()` does, unless the
optimizer is one that leaves out bad steps by itself (fused).
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from autoprec.guard import Guard, Limits
from autoprec.guard.sampling import range_shares
from autoprec.model.layers import find_layers
from autoprec.records import (
    BF16_O2,
    Plan,
    Recipe,
    fp8_option,
)
from autoprec.runtime import apply, uniform_plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))


def block_plan(model: nn.Module) -> Plan:
    """Return a plan with every linear inside a block in FP8."""
    linears = [n for n, layer in find_layers(model).items() if isinstance(layer, nn.Linear)]
    blocks = [name for name in linears if name.startswith("blocks.")]
    return uniform_plan(model, BF16_O2, dict.fromkeys(blocks, fp8_option(Recipe.ROWWISE)))


def elapsed_ms(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def sample_ms(guard: Guard, tokens: int) -> float:
    """Return the time of one look at all operands of all FP8 layers."""
    operands = []
    for layer in guard.layers.values():
        n, k = layer.weight.shape
        shapes = ((tokens, k), (n, k), (tokens, n))
        operands += [torch.randn(shape).bfloat16() for shape in shapes]

    def look() -> None:
        for operand in operands:
            range_shares(operand, torch.float8_e4m3fn, is_rowwise=True)

    return statistics.median(elapsed_ms(look) for _ in range(7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    import char_gpt

    torch.manual_seed(0)
    model = char_gpt.build_model()
    optimizer = char_gpt.build_optimizer(model)
    plan = block_plan(model)
    apply(plan, model, optimizer)
    guard = Guard(model, optimizer, plan, limits=Limits(sample_every=10**9))
    batches = char_gpt.train_batches(0)
    step_ms, look_ms = [], []
    for _ in range(steps + 5):
        for layer in guard.layers.values():
            layer.fp8_active = False
        batch = next(batches)
        begin = time.perf_counter()
        loss = char_gpt.loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        looked = elapsed_ms(functools.partial(guard.step, loss))
        optimizer.step()
        optimizer.zero_grad()
        look_ms.append(looked)
        step_ms.append((time.perf_counter() - begin) * 1e3 - looked)
    tokens = char_gpt.BATCH * char_gpt.BLOCK
    step, look = statistics.median(step_ms[5:]), statistics.median(look_ms[5:])
    sample, every = sample_ms(guard, tokens), Limits().sample_every
    result = {
        "step_ms": round(step, 2),
        "look_ms": round(look, 3),
        "sample_ms": round(sample, 2),
        "sample_every": every,
        "cost": round((look + sample / every) / step, 5),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fp8_layers": len(guard.layers),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
