"""Rows of timed FP8 layers -> the same rows with the names of the CUDA kernels that ran.

The names come from CUPTI, which stays attached to the process after its first session and makes
every later launch 10 to 20 % slower for the host (PyTorch issue 144455; TEARDOWN_CUPTI=1 detaches
it, but a session that begins meanwhile sees no kernels, Kineto PR 1554). So this comes last, when
all has been timed, with the layers built once more. They run eagerly: a compiled layer calls the
same library for its GEMMs.
"""

import logging
from collections.abc import Sequence

from autoprec.profiler.candidates import MakeLayer, make_candidate
from autoprec.profiler.recording import Call
from autoprec.profiler.tracing import cuda_kernels, is_fp8_kernel
from autoprec.records import LayerTiming

log = logging.getLogger(__name__)


def name_kernels(
    rows: Sequence[LayerTiming], calls: Sequence[Call], make_layer: MakeLayer
) -> list[LayerTiming]:
    """Return the rows of one group of layers, the timed FP8 ones with their kernels' names."""
    return [_named(row, calls, make_layer) if _is_timed_fp8(row) else row for row in rows]


def _is_timed_fp8(row: LayerTiming) -> bool:
    return row.option.is_fp8 and row.total is not None and row.total.samples > 0


def _named(row: LayerTiming, calls: Sequence[Call], make_layer: MakeLayer) -> LayerTiming:
    candidate = make_candidate(make_layer, calls, row.option)
    candidate.step()
    names = cuda_kernels(candidate.step)
    if not any(map(is_fp8_kernel, names)):
        seen = ", ".join(names) or "the profiler reports none, so CUPTI does not work here"
        log.warning("no CUDA kernel of %s in %s names FP8: %s", row.names[0], row.option.key, seen)
    return row.model_copy(update={"kernels": (*row.kernels, *names)})
