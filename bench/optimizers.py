"""Optimizers of many kinds, each through `tune`, `apply` and a resume: the table of compatibility.

    python bench/optimizers.py [NAME ...] [--no-verify]

Every optimizer of tests/optimizer_zoo.py trains a small model of tokens (embedding, linears, norm)
through a whole `autoprec tune` with its proof, then under the plan.
"""

import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import autoprec
from tests.optimizer_zoo import ZOO, Kind

TOKENS, WIDTH, BATCH, STEPS = 32, 32, 8, 3


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
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


def train_on(kind: Kind, plan: autoprec.Plan) -> None:
    """Train under the plan for a few steps."""
    torch.manual_seed(0)
    model = Mixer()
    optimizer = kind.make(model)
    autoprec.apply(plan, model, optimizer)
    batches = train_batches(1)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, next(batches))
        torch.autograd.backward(loss)
        return loss

    for _ in range(STEPS):
        if kind.name == "LBFGS":
            optimizer.step(evaluate)  # type: ignore[arg-type]  # torch says float
        else:
            evaluate()
            optimizer.step()


def try_one(kind: Kind, folder: Path, *, verify: bool) -> str:
    """Return what P is made of, what share has a rule, and the verdict."""
    run = autoprec.tune(
        build_model=Mixer,
        train_batches=train_batches,
        loss_fn=loss_fn,
        build_optimizer=kind.make,
        out=folder,
        recipes="tensorwise",
        trials=0,
        loss_tolerance=0.5,
        keep=("up=fp8_o1:tensorwise",),
        verify=verify,
    )
    train_on(kind, run.plan)
    notes = [note for note in run.sensitivity.notes if "no rule for" in note]
    verdict = run.verification.verdict if run.verification else "not verified"
    return f"{run.sensitivity.preconditioner} | {notes or 100} | {verdict} | applied"


def main() -> int:
    names = [name for name in sys.argv[1:] if name != "--no-verify"]
    verify = "--no-verify" not in sys.argv
    warnings.simplefilter("ignore")
    for kind in ZOO:
        if names and not any(name.lower() in kind.name.lower() for name in names):
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = try_one(kind, Path(folder) / "run", verify=verify)
            except Exception as problem:  # noqa: BLE001  # a bench reports what broke and goes on
                found = f"FAILED: {type(problem).__name__}: {problem}"
                traceback.print_exc()
        print(f"{kind.name:24} | {found} | {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
