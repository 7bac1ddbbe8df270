"""Numbers in words, for reasons and notes."""

from autoprec.records import GemmShape


def shape(gemm: GemmShape | None) -> str:
    """Return ` at M=2048 K=256 N=768`, or nothing where there is no GEMM."""
    return "" if gemm is None else f" at M={gemm.M} K={gemm.K} N={gemm.N}"
