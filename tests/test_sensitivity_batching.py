"""What larger batches do to a gradient error: shares of known vectors, and a model's."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import Estimate
from autoprec.sensitivity.batching import _common, batch_effect, measure_batch_effect
from autoprec.sensitivity.gap import growth, predicted_loss_gap
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.parked import InTurn
from autoprec.sensitivity.reference import fp8_everywhere, prepare_reference
from autoprec.workload.functions import workload_from

CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_that_vectors_have_in_common_is_found(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4000, generator=generator, dtype=torch.float64)
    own = torch.randn(6, 4000, generator=generator, dtype=torch.float64)
    found = _common(list(share**0.5 * shared + (1 - share) ** 0.5 * own))
    assert found.mean == pytest.approx(share, abs=0.04)
    assert found.stderr is not None
    assert 0.0 < found.stderr < 0.05


def test_noise_averages_out_and_a_systematic_error_does_not() -> None:
    def ratio(error: float, gradient: float, batches: int) -> float:
        shares = (Estimate(mean=error, stderr=0.01), Estimate(mean=gradient, stderr=0.01))
        found = batch_effect(*shares, tokens=100 * batches, batch_tokens=100).ratio
        assert found is not None
        return found

    assert ratio(0.9, 0.3, 1) == pytest.approx(1.0)
    assert ratio(0.9, 0.3, 4) == pytest.approx(0.925 / 0.475)
    assert ratio(0.9, 0.3, 10**6) == pytest.approx(3.0, rel=1e-4)
    assert ratio(0.1, 0.5, 10**6) == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize(
    ("error", "gradient", "reason"), [(0.01, 0.5, "the error"), (0.5, 0.03, "the gradient")]
)
def test_a_share_that_is_not_clear_of_zero_leaves_the_ratio_unknown(
    error: float, gradient: float, reason: str
) -> None:
    shares = (Estimate(mean=error, stderr=0.02), Estimate(mean=gradient, stderr=0.02))
    found = batch_effect(*shares, tokens=1000, batch_tokens=100)
    assert found.ratio is None
    assert reason in found.reason


def test_the_ratio_is_that_of_batches_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(32, 16, generator=generator)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        drawn = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(64, 32, generator=drawn)
            yield x, x @ target + 4 * torch.randn(64, 16, generator=drawn)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found: Tensor = (model(batch[0]) - batch[1]).square().mean()
        return found

    workload = workload_from(
        {
            "build_model": lambda: nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16)),
            "train_batches": batches,
            "loss_fn": loss,
            "build_optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
        },
        name="regression",
    )
    context = Context(workload, CPU)
    spec = capture_model(context)
    reference = prepare_reference(context, spec, warmup_steps=12)
    assert [point.step for point in reference.early] == [10]
    found = measure_batch_effect(reference, fp8_everywhere(spec), tokens=6 * spec.tokens_per_step)
    assert found.ratio is not None
    # the same from one pass of the six batches as one, against six passes of one each
    every = list(reference.longer.batches)
    joined = tuple(torch.cat(parts) for parts in zip(*every, strict=True))
    apart, together = (
        replace(reference, batches=InTurn(batches, CPU), gradients=InTurn((), CPU))
        .measure_step(12)[0]
        .grad_error.mean
        for batches in (every, [joined])
    )
    assert found.ratio == pytest.approx(together / apart, rel=0.25)


def test_a_sensitivity_counts_what_the_runs_batches_do() -> None:
    def inputs(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(16, 16, generator=generator)

    workload = workload_from(
        {
            "build_model": lambda: nn.Linear(16, 16),
            "train_batches": inputs,
            "build_scheduler": lambda optimizer: LinearLR(optimizer, 1.0, 0.0, total_iters=30),
            "loss_fn": lambda model, x: (model(x) - x).square().mean(),
        },
        name="identity",
    )
    context = Context(workload, CPU)
    spec = capture_model(context)
    reference = prepare_reference(context, spec, warmup_steps=12)
    plain = measure_sensitivity(reference)
    asked = measure_sensitivity(reference, run_tokens=10**6)
    assert [point.step for point in asked.by_step] == [10, 12]
    assert asked.schedule_steps == 30
    assert asked.batch_effect is not None
    ratio = asked.batch_effect.ratio
    assert growth(asked) == pytest.approx(growth(plain) * (1.0 if ratio is None else ratio))
    assert any("1000000 tokens per optimizer step" in note for note in asked.notes)
    known = asked.batch_effect.model_copy(update={"ratio": 3.0})
    tripled = asked.model_copy(update={"batch_effect": known})
    gap = predicted_loss_gap(plain, 0.01, 300)
    assert gap is not None
    assert predicted_loss_gap(tripled, 0.01, 300) == pytest.approx(3 * gap)
