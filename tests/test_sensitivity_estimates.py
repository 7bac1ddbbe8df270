"""Means, standard errors and the bias part on numbers whose truth is known."""

import math

import pytest
import torch

from autoprec.sensitivity.estimates import (
    DIVERGED_E,
    bias_estimate,
    gradient_noise,
    mean_estimate,
    ratio_estimate,
)
from autoprec.sensitivity.projection import WIDTH, Projection

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


def test_bias_estimate_is_unbiased_and_the_mean_of_squares_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.zeros(64)
    truth[:4] = 0.5  # |truth|^2 = 1
    found, naive = [], []
    for _ in range(REPEATS):
        draws = truth + torch.randn(4, 64, generator=generator) * 0.5  # |noise|^2 = 16 per batch
        found.append(bias_estimate(list(draws), [1.0] * 4).mean)
        naive.append(float(draws.mean(0).square().sum()))
    scatter = float(torch.tensor(found).std()) / math.sqrt(REPEATS)
    assert abs(sum(found) / REPEATS - 1.0) < 4 * scatter < 0.3
    assert sum(naive) / REPEATS > 4.0


def test_gradient_noise_is_the_relative_variance() -> None:
    generator = torch.Generator().manual_seed(2)
    signal = torch.randn(4096, generator=generator)
    draws = [signal + torch.randn(4096, generator=generator) for _ in range(6)]
    found = gradient_noise(draws, [float(d.square().sum()) for d in draws])
    assert found is not None
    assert found.mean == pytest.approx(0.5, abs=0.03)
    assert gradient_noise(draws[:1], [1.0]) is None


def test_what_is_not_finite_stands_as_diverged() -> None:
    assert ratio_estimate([1.0, math.nan], [1.0, 1.0]).mean == DIVERGED_E
    assert mean_estimate([math.inf]).mean == DIVERGED_E
    assert bias_estimate([torch.tensor([math.nan])] * 2, [1.0, 1.0]).mean == DIVERGED_E


def test_sketches_keep_inner_products() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5 * WIDTH + 17, generator=generator)
    y = 0.3 * x + torch.randn(len(x), generator=generator)
    errors = []
    for seed in range(20):
        projection = Projection(seed, torch.device("cpu"))
        sketches = []
        for vector in (x, y):
            sketch = projection.empty()
            projection.add(sketch, vector[:1000], place=0)
            projection.add(sketch, vector[1000:], place=1)
            sketches.append(sketch)
        inner = float(torch.dot(*sketches))
        errors.append((inner - float(torch.dot(x, y))) / float(x.norm() * y.norm()))
    assert max(map(abs, errors)) < 5 / math.sqrt(WIDTH)
    assert abs(sum(errors) / 20) < 4 / math.sqrt(20 * WIDTH)
