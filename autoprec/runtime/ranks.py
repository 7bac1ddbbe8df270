"""What each rank is about to do -> the same on all of them, or one error on all of them.

A rank with another plan would wait for the others in its first collective, for ever: its gradients
have other dtypes or shapes. So ranks tell each other, once in `apply`, whether they could install
their plan, and which. Every rank sees the same answers, so all of them go on or all raise.
Tested with gloo on CPUs; NCCL on several GPUs was not yet run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from autoprec.common.text import short_digest
from autoprec.device.ranks import gathered, listed, world_size
from autoprec.errors import PlanMismatchError
from autoprec.records import Plan


@dataclass(frozen=True)
class Answer:
    """What one rank says: its rank in the job, the plan that it installed, or why it could not."""

    rank: int
    digest: str = ""
    failure: str = ""


def agree(own: Plan | str, *, device: torch.device, group: "dist.ProcessGroup | None") -> None:
    """Check that every rank of the group installed this plan; a collective on all of them.

    `own` is this rank's plan, or the reason that it installed none. NCCL sends from `device`, the
    model's, whatever the current device is; `group` None are all ranks.

    Raises:
        PlanMismatchError: a rank installed nothing, or another plan; the same on every rank.
    """
    if world_size(group) == 1:
        return
    if isinstance(own, str):
        answer = Answer(dist.get_rank(), failure=own)
    else:  # everything that ranks must agree about, evidence left out
        layers = [[layer.name, layer.shapes, layer.option.key] for layer in own.layers]
        schedule = [[phase.start_step, phase.fp8] for phase in own.schedule]
        digest = short_digest(layers, own.uncovered, schedule, own.fp8_all_gather, own.fp32_outputs)
        answer = Answer(dist.get_rank(), digest=digest)
    check_answers(gathered(answer, group=group, device=device))


def check_answers(answers: Sequence[Answer]) -> None:
    """Raise the same error everywhere unless all ranks installed one plan; see `agree`."""
    failed = {answer.rank: answer.failure for answer in answers if answer.failure}
    if failed:
        first = next(iter(failed.values()))
        raise PlanMismatchError(
            f"every rank must apply the plan, but {listed(failed)} of {len(answers)} could not, "
            f"so that none did: {first}"
        )
    counts = Counter(answer.digest for answer in answers)
    usual, _ = counts.most_common(1)[0]  # of equally many the lowest rank's
    others = {answer.rank: answer.digest for answer in answers if answer.digest != usual}
    if others:
        raise PlanMismatchError(
            f"every rank must have the same plan, but {listed(others)} of {len(answers)} "
            f"got another than the others ({next(iter(others.values()))}, not {usual}); give all "
            "ranks one plan.json, or group= where ranks hold different parts of a model"
        )
