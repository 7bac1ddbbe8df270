"""Optimizers of many kinds, each through `tune`, `apply` and a resume.

    python bench/optimizers.py [NAME ...] [--no-verify]

Every optimizer of tests/optimizer_zoo.py trains a small model of tokens (embedding, linears, norm)
through a whole `autoprec tune` (with its proof, unless told otherwise), for STEPS steps with FP8 in
one linear and BF16 elsewhere beside the same steps in FP32, and from a checkpoint in their middle.
The rows go into bench/data/compatibility.json, and from there into docs/compatibility.md.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compatibility import store

import autoprec
from autoprec.records import Option, Plan
from autoprec.runtime import uniform_plan
from autoprec.workload.optimizers import optimizers_in
from tests.optimizer_zoo import ZOO, Kind

TOKENS, WIDTH, BATCH, STEPS = 32, 32, 8, 20
PLAN = "up=fp8_o1:tensorwise"


class Mixer(nn.Module):
    def __init__(self, *, is_sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, sparse=is_sparse)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        logits: Tensor = self.head(x + self.down(F.gelu(self.up(self.norm(x)))))
        return logits


def train_batches(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(3, (BATCH, 17), generator=generator).cumsum(1) % TOKENS


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def start(kind: Kind, plan: Plan | None) -> tuple[Mixer, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Mixer(is_sparse=kind.is_sparse)
    optimizer = kind.make(model)
    if plan is not None:
        autoprec.apply(plan, model, optimizer)
    return model, optimizer


def train(
    kind: Kind, model: Mixer, optimizer: torch.optim.Optimizer, first: int, stop: int
) -> list[float]:
    losses = []
    for tokens in islice(train_batches(1), first, stop):

        def evaluate(tokens: Tensor = tokens) -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(model, tokens)
            torch.autograd.backward(loss)
            return loss

        losses.append(evaluate().item())
        if kind.refusal:  # some of these step with a closure only
            optimizer.step(evaluate)  # type: ignore[arg-type]  # torch says float
        else:
            optimizer.step()
    return losses


def applied(kind: Kind, plan: Plan) -> dict[str, str]:
    """Return how far losses with the plan are from those without it, and after a resume."""
    try:
        model, optimizer = start(kind, plan)
        half = STEPS // 2
        losses = train(kind, model, optimizer, 0, half)
        # an optimizer of optimizers leaves out their states: a script saves each
        states = [each.state_dict() for each in optimizers_in(optimizer)]
        weights, states = copy.deepcopy((model.state_dict(), states))
        other, resumed = start(kind, plan)
        other.load_state_dict(weights)
        for each, state in zip(optimizers_in(resumed), states, strict=True):
            autoprec.attach_optimizer(other, each)
            each.load_state_dict(state)
        again = train(kind, other, resumed, half, STEPS)
        going_on = train(kind, model, optimizer, half, STEPS)
    except autoprec.AutoprecError as error:
        return {"apply": f"refused: {error}", "resume": "-"}
    plain = train(kind, *start(kind, None), 0, STEPS)
    off = max(abs(a - b) / a for a, b in zip(plain, losses + going_on, strict=True))
    gap = max(abs(a - b) / a for a, b in zip(going_on, again, strict=True))
    return {
        "apply": f"{100 * off:.2g} %",
        "resume": "exact" if again == going_on else f"off by {100 * gap:.2g} %",
    }


def tuned(kind: Kind, folder: Path, *, verify: bool) -> dict[str, str]:
    """Return where P comes from, the share of elements that have a rule, and the verdict."""
    try:
        run = autoprec.tune(
            build_model=lambda: Mixer(is_sparse=kind.is_sparse),
            train_batches=train_batches,
            loss_fn=loss_fn,
            build_optimizer=kind.make,
            out=folder,
            recipes="tensorwise",
            trials=0,
            loss_tolerance=0.5,
            keep=(PLAN,),
            verify=verify,
        )
        table = run.sensitivity
        verdict = run.verification.verdict.value if run.verification else "planned, no proof"
    except autoprec.AutoprecError as error:
        return {"rule": "-", "share": "-", "tune": f"refused: {error}"}
    lacking = [note for note in table.notes if "no rule for" in note]
    share = 100 - float(lacking[0].split("no rule for ")[1].split()[0]) if lacking else 100
    return {"rule": table.preconditioner, "share": f"{share:.3g} %", "tune": verdict}


def try_one(kind: Kind, *, verify: bool) -> dict[str, Any]:
    """Return a row of the table."""
    torch.manual_seed(0)
    model = Mixer(is_sparse=kind.is_sparse)
    plan = uniform_plan(model, "bf16_o2", others={"up": Option.parse("fp8_o1:tensorwise")})
    row: dict[str, Any] = {"name": kind.name}
    with tempfile.TemporaryDirectory() as folder:
        try:
            row |= tuned(kind, Path(folder) / "run", verify=verify)
        except Exception as problem:  # noqa: BLE001  # a bench reports what broke and goes on
            row |= {"rule": "-", "share": "-", "tune": f"FAILED: {type(problem).__name__}"}
        try:
            row |= applied(kind, plan)
        except Exception as problem:  # noqa: BLE001  # as above
            row |= {"apply": f"FAILED: {type(problem).__name__}", "resume": "-"}
    return row


def main() -> int:
    names = [name for name in sys.argv[1:] if name != "--no-verify"]
    verify = "--no-verify" not in sys.argv
    warnings.simplefilter("ignore")
    for kind in ZOO:
        if not names or any(name.lower() in kind.name.lower() for name in names):
            row = try_one(kind, verify=verify)
            print(" | ".join(row.values()), flush=True)
            store("optimizers", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
