"""Means and standard errors on numbers whose truth is known."""

import math

import pytest
import torch

from autoprec.sensitivity.estimates import DIVERGED, ratio_estimate

REPEATS = 2000
BATCHES = 8


def test_ratio_is_the_ratio_of_means_and_one_batch_has_no_error() -> None:
    found = ratio_estimate([1.0, 3.0], [10.0, 30.0])
    assert found.mean == 0.1
    assert found.stderr == pytest.approx(0.0, abs=1e-12)
    assert ratio_estimate([1.0], [10.0]).stderr is None


def test_standard_errors_cover_the_truth() -> None:
    """Student's 95 % interval on 7 degrees of freedom is +- 2.36 standard errors."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(REPEATS):
        scale = 1.0 + 0.2 * torch.randn(BATCHES, generator=generator).abs()
        noise = 0.3 * torch.randn(BATCHES, generator=generator)
        found = ratio_estimate((scale * 0.05 * (1 + noise)).tolist(), scale.tolist())
        assert found.stderr is not None
        covered += abs(found.mean - 0.05) <= 2.36 * found.stderr
    assert 0.92 < covered / REPEATS < 0.97


def test_what_is_not_finite_stands_as_diverged() -> None:
    assert ratio_estimate([1.0, math.nan], [1.0, 1.0]).mean == DIVERGED
