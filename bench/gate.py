"""Error rates of the proof's test, simulated: `python bench/gate.py`, under a minute on one core.

No training: gaps are drawn from a distribution whose mean is the tolerance exactly, so that every
`verified` is false, and from normal ones below it, whose rate of `verified` is the power. A spread
is a standard deviation in units of the tolerance; a jump, in spreads, comes on top in a share of
the seeds. Prints docs/convergence.md's section "Error rates of the gate".
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from autoprec.verification import Terms
from autoprec.verification.sequential import half_widths

Gaps = np.ndarray  # [sequences, seeds], in tolerances
# The gaps so far, with the p-value that a look may use -> which are verified, and which refuted.
Test = Callable[[Gaps, float], tuple[np.ndarray, np.ndarray]]

SEQUENCES = 10_000  # the standard error of a rate of 5 % is then 0.2 %
SPREADS = (0.05, 0.2, 0.5)  # false rates are the worst of them; char GPTs have 0.15 at most
POWER = ((0.0, 0.1), (0.2, 0.1), (0.2, 0.15), (0.2, 0.3), (0.5, 0.1))  # mean and spread


def normal(generator: np.random.Generator, shape: tuple[int, int]) -> Gaps:
    """Return draws of mean 0 and spread 1."""
    return generator.standard_normal(shape)


def lognormal(generator: np.random.Generator, shape: tuple[int, int], *, sigma: float) -> Gaps:
    """Return draws of mean 0 and spread 1 with a right tail."""
    draws = np.exp(sigma * generator.standard_normal(shape))
    variance = math.expm1(sigma * sigma) * math.exp(sigma * sigma)
    return (draws - math.exp(sigma * sigma / 2)) / math.sqrt(variance)


def student(generator: np.random.Generator, shape: tuple[int, int]) -> Gaps:
    """Return draws of Student's t of 3 degrees of freedom, of spread 1."""
    return generator.standard_t(3, shape) / math.sqrt(3)


def shared(generator: np.random.Generator, shape: tuple[int, int], *, share: float) -> Gaps:
    """Return normal draws of which a share of the variance is a warm-up's, common to its seeds."""
    common = generator.standard_normal((shape[0], 1))
    return math.sqrt(1 - share) * generator.standard_normal(shape) + math.sqrt(share) * common


def jumps(
    generator: np.random.Generator, shape: tuple[int, int], *, rate: float, size: float
) -> Gaps:
    """Return normal draws of which a share `rate` jumps by `size` spreads; the mean is 0."""
    jumped = generator.random(shape) < rate
    return generator.standard_normal(shape) + size * (jumped - rate)


DISTRIBUTIONS: dict[str, Callable[..., Gaps]] = {
    "normal": normal,
    "Student's t, 3 degrees of freedom": student,
    "normal, 21 % of the variance between warm-ups": lambda *x: shared(*x, share=0.21),
    "normal, 40 % between warm-ups": lambda *x: shared(*x, share=0.4),
    "normal, 60 % between warm-ups": lambda *x: shared(*x, share=0.6),
    "lognormal, sigma 0.5": lambda *x: lognormal(*x, sigma=0.5),
    "lognormal, sigma 1": lambda *x: lognormal(*x, sigma=1.0),
    "lognormal, sigma 1.5": lambda *x: lognormal(*x, sigma=1.5),
} | {
    f"{rate:.0%} jumps of {size} spreads".replace("%", " %"): (
        lambda *x, rate=rate, size=size: jumps(*x, rate=rate, size=size)
    )
    for rate, size in ((0.05, 10), (0.1, 5), (0.1, 10), (0.1, 15), (0.1, 20), (0.1, 100), (0.3, 10))
}


def usual(gaps: Gaps, p_value: float) -> tuple[np.ndarray, np.ndarray]:
    """Student's interval alone, as it was before."""
    count = gaps.shape[1]
    half = stats.t.ppf(1 - p_value / 2, count - 1) * gaps.std(axis=1, ddof=1) / math.sqrt(count)
    mean = gaps.mean(axis=1)
    return mean + half <= 1.0, mean - half > 1.0


def skewness(gaps: Gaps, p_value: float) -> tuple[np.ndarray, np.ndarray]:
    """Johnson's t (1978), which corrects for the skewness seen; refuting as before."""
    count, mean, sd = gaps.shape[1], gaps.mean(axis=1), gaps.std(axis=1, ddof=1)
    third = ((gaps - mean[:, None]) ** 3).mean(axis=1)
    off = mean - 1.0
    moved = off + third / (6 * sd**2 * count) + third / (3 * sd**4) * off**2
    low = moved * math.sqrt(count) / sd
    return low <= -stats.t.ppf(1 - p_value / 2, count - 1), usual(gaps, p_value)[1]


def sign_flips(gaps: Gaps, p_value: float) -> tuple[np.ndarray, np.ndarray]:
    """The permutation test of a symmetric distribution; it needs 7 seeds to say anything."""
    count, off = gaps.shape[1], gaps - 1.0
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=count)))
    sums, own = off @ signs.T, off.sum(axis=1, keepdims=True)
    return (sums <= own).mean(axis=1) <= p_value / 2, (sums >= own).mean(axis=1) <= p_value / 2


def largest(gaps: Gaps, p_value: float) -> tuple[np.ndarray, np.ndarray]:
    """Student's interval, and no single gap above the tolerance."""
    verified, refuted = usual(gaps, p_value)
    return verified & (gaps.max(axis=1) <= 1.0), refuted


def own(gaps: Gaps, p_value: float) -> tuple[np.ndarray, np.ndarray]:
    """The product's: room for a warm-up's shift, and for jumps that no seed showed."""
    below, above = half_widths(gaps.std(axis=1, ddof=1), gaps.shape[1], p_value, 1.0)
    mean = gaps.mean(axis=1)
    return mean + above <= 1.0, mean - below > 1.0


TESTS: dict[str, tuple[Test, Terms]] = {
    "Student, 3:5 (before)": (usual, Terms(seeds_min=3, seeds_max=5)),
    "Student, 3:10": (usual, Terms()),
    "Johnson's t, 3:10": (skewness, Terms()),
    "sign flips, 3:10": (sign_flips, Terms()),
    "no gap above, 3:10": (largest, Terms()),
    "**the gate's, 3:10**": (own, Terms()),
    "the gate's, 29": (own, Terms(seeds_min=29, seeds_max=29)),
}


def rates(test: Test, terms: Terms, gaps: Gaps) -> tuple[float, float, float]:
    """Return the shares of sequences verified and refuted, and the mean number of seeds."""
    found, used = np.zeros((2, len(gaps)), dtype=bool), np.full(len(gaps), terms.seeds_max)
    for count in range(terms.seeds_min, terms.seeds_max + 1):
        going = np.flatnonzero(~found.any(axis=0))
        if not len(going):
            break
        found[:, going] = test(gaps[going, :count], terms.p_value)
        used[going[found[:, going].any(axis=0)]] = count
    verified, refuted = found.mean(axis=1)
    return float(verified), float(refuted), float(used.mean())


def table(name: str, heads: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield a table in Markdown."""
    yield f"| {name} | " + " | ".join(heads) + " |"
    yield "| --- " * (len(heads) + 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def main() -> None:
    """Print the tables."""
    generator = np.random.default_rng(0)
    rows = []
    for name, draw in DISTRIBUTIONS.items():
        row = [name]
        for test, terms in TESTS.values():
            draws = draw(generator, (SEQUENCES, terms.seeds_max))
            worst = max(rates(test, terms, 1 + s * draws)[0] for s in SPREADS)
            row.append(f"{100 * worst:.1f} %")
        rows.append(row)
    print(*table("distribution of gaps", list(TESTS), rows), "", sep="\n")
    rows = []
    for mean, spread in POWER:
        row = [f"mean {mean:g}, spread {spread:g}"]
        for test, terms in TESTS.values():
            draws = normal(generator, (SEQUENCES, terms.seeds_max))
            verified, _, used = rates(test, terms, mean + spread * draws)
            row.append(f"{100 * verified:.0f} % ({used:.1f})")
        rows.append(row)
    print(*table("gap", list(TESTS), rows), sep="\n")


if __name__ == "__main__":
    main()
