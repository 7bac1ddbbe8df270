"""Train the character GPT with a saved plan, in a script of one's own, with checkpoints.

autoprec tune examples/char_gpt.py --out runs/char_gpt
python examples/train_char_gpt.py --plan runs/char_gpt/plan.json --steps 200
"""

import argparse
import itertools
import os
from pathlib import Path

import char_gpt
import torch

import autoprec


def main() -> None:
    arguments = read_arguments()
    torch.manual_seed(0)
    model = char_gpt.build_model()
    optimizer = char_gpt.build_optimizer(model)
    if arguments.plan:
        model, optimizer = autoprec.apply(arguments.plan, model, optimizer)
    start = load_checkpoint(arguments.checkpoint, model, optimizer)
    batches = itertools.islice(char_gpt.train_batches(seed=1), start, arguments.steps)
    for step, batch in enumerate(batches, start=start + 1):
        optimizer.zero_grad()
        loss = char_gpt.loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own stub
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step} loss {loss.item():.17g}", flush=True)
    save_checkpoint(arguments.checkpoint, model, optimizer, step=arguments.steps)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, help="a plan.json; without it, plain FP32")
    parser.add_argument("--steps", type=int, default=200, help="train up to this step")
    parser.add_argument("--checkpoint", type=Path, help="go on from here, and save here")
    return parser.parse_args()


def load_checkpoint(
    path: Path | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    if path is None or not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def save_checkpoint(
    path: Path | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, step: int
) -> None:
    if path is None:
        return
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)  # the old checkpoint or the new one, never half of one


if __name__ == "__main__":
    main()
