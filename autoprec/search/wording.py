"""Numbers in words, for reasons and notes."""

from autoprec.records import GemmShape


def percent(share: float) -> str:
    """Return e.g. `0.28 %`, `12 %` or `< 0.001 %`."""
    value = 100.0 * share
    if value >= 1e6:
        return "any amount"
    if value >= 10.0:
        return f"{value:.0f} %"
    if 0.0 < value < 0.001:
        return "< 0.001 %"
    return f"{value:.2g} %"


def compared(ms: float, other_ms: float) -> str:
    """Return how a time compares to another: `1.6x slower`, `1.42x faster`, `as fast`."""
    if ms <= 0.0 or other_ms <= 0.0:
        return "as fast"
    ratio = ms / other_ms
    if 0.995 < ratio < 1.005:
        return "as fast"
    factor, word = (ratio, "slower") if ratio > 1.0 else (1.0 / ratio, "faster")
    return f"{factor:,.0f}x {word}" if factor >= 100.0 else f"{factor:.3g}x {word}"


def shape(gemm: GemmShape | None) -> str:
    """Return ` at M=2048 K=256 N=768`, or nothing where there is no GEMM."""
    return "" if gemm is None else f" at M={gemm.M} K={gemm.K} N={gemm.N}"
