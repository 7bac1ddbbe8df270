"""The gradient error of larger batches: what averages out over batches, and what does not.

With d the error and g the gradient of a batch, both in the norm of P, and pairs of batches i != j,

    e(A) = (s + (1 - s) / A) / (q + (1 - q) / A) * e(1)
    s = E d_i'P d_j / E d_i'P d_i       the share of the error that all batches have in common
    q = E g_i'P g_j / E g_i'P g_i       the share of the gradient

is the error where A batches make an optimizer step: minibatch noise falls with the batch, its part
of the error with it, and a systematic error stays. Vectors of several batches are compared by
random projections: sums of their elements with random signs, of which inner products are kept to
1 / sqrt(WIDTH) of the norms.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from autoprec.device.random_state import random_state_kept
from autoprec.device.ranks import share, sum_over_ranks
from autoprec.records import BatchEffect, Estimate, Option
from autoprec.runtime import install_options
from autoprec.sensitivity.gemm import casts_in_parts, fast_gemms
from autoprec.sensitivity.reference import Reference, ReferenceGradient, gradient_of

WIDTH = 1 << 16
CLEAR = 2.0  # standard errors


@random_state_kept()
def measure_batch_effect(
    reference: Reference, options: Mapping[str, Option], *, tokens: int
) -> BatchEffect:
    """Return what `tokens` per optimizer step do to the gradient error of options by layer name.

    Costs two passes for each of the reference's batches, those that are there beside included.
    """
    # ranks with batches of their own average their gradients: a batch here is that of all of them
    here = max(reference.spec.tokens_per_step, 1) * reference.context.workload.part.ranks
    uncovered = [parameter.name for parameter in reference.spec.uncovered]
    errors, gradients = [], []
    reference = reference.longer
    for index in range(len(reference.batches)):
        exact = reference.gradient(index)
        with (
            fast_gemms(),
            casts_in_parts(),
            install_options(reference.model, options, uncovered=uncovered),
        ):
            reference.run(index)
            found = {p: gradient_of(p).to(g.device) - g for p, g in exact.of.items()}
        errors.append(_projected(reference, found, exact))
        gradients.append(_projected(reference, exact.of, exact))
    return batch_effect(_common(errors), _common(gradients), tokens=tokens, batch_tokens=here)


def batch_effect(
    systematic: Estimate, gradient: Estimate, *, tokens: int, batch_tokens: int
) -> BatchEffect:
    """Return e at `tokens` over e at `batch_tokens`, where both shares are clear of zero.

    >>> half = Estimate(mean=0.5, stderr=0.01)
    >>> batch_effect(half, half, tokens=4096, batch_tokens=1024).ratio
    1.0
    """
    unclear = [
        what
        for what, share in (("error", systematic), ("gradient", gradient))
        if share.stderr is None or not share.mean > CLEAR * share.stderr
    ]
    known = partial(
        BatchEffect,
        tokens=tokens,
        batch_tokens=batch_tokens,
        systematic=systematic,
        gradient=gradient,
    )
    if unclear:
        return known(
            reason=f"what the {' and the '.join(unclear)} of several batches have in common "
            "cannot be told from zero"
        )
    batches = max(tokens / batch_tokens, 1.0)
    s, q = min(systematic.mean, 1.0), min(gradient.mean, 1.0)
    return known(ratio=(s + (1.0 - s) / batches) / (q + (1.0 - q) / batches))


def _common(vectors: Sequence[Tensor]) -> Estimate:
    """Return the share that vectors have in common, with the jackknife's standard error."""
    own_gram = torch.stack(list(vectors)) @ torch.stack(list(vectors)).t()
    # of parts that ranks hold the inner products add up, whatever their signs
    gram = torch.tensor(sum_over_ranks(own_gram.flatten().tolist()), dtype=torch.float64).reshape(
        own_gram.shape
    )

    def common(kept: Sequence[int]) -> float:
        part = gram[list(kept)][:, list(kept)]
        own = float(part.diagonal().sum())
        return (float(part.sum()) - own) / (len(kept) - 1) / own

    count = len(vectors)
    if count < 3:  # a jackknife leaves one out, and a pair must be left
        return Estimate(mean=common(range(count)))
    without = [common([i for i in range(count) if i != left]) for left in range(count)]
    middle = math.fsum(without) / count
    spread = math.fsum((each - middle) ** 2 for each in without) * (count - 1) / count
    return Estimate(mean=common(range(count)), stderr=math.sqrt(spread))


def _projected(
    reference: Reference, values: Mapping[Tensor, Tensor], at: ReferenceGradient
) -> Tensor:
    """Return the random projection of P^(1/2) times values by parameter, in FP64 on the CPU.

    Of several ranks it is that of this one's part; what all of them hold counts once in their sum.
    """
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for number, (parameter, value) in enumerate(values.items()):
        gradient = at.of[parameter]
        weight = reference.preconditioner.weight(parameter, at=gradient)
        weighed = (value.to(weight.device) * weight).flatten().cpu()
        generator = torch.Generator().manual_seed(number)
        signs = torch.randint(0, 2, weighed.shape, generator=generator, dtype=torch.int8)
        signed = weighed.double() * (2 * signs - 1) * math.sqrt(share(parameter))
        places = torch.arange(len(signed)).remainder_(WIDTH)
        total.index_add_(0, (places + number * 7919) % WIDTH, signed)
    return total
