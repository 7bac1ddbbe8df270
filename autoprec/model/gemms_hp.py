"""FP8 with some of its three GEMMs in BF16: where a device makes that worth considering.

It trades time for accuracy: the GEMM that hurts runs in BF16, the others stay in FP8. It is worth a
place among a layer's options only where it still beats plain BF16; whether a cheaper and more
precise option makes it superfluous, the search decides when it knows the gradient errors.
"""

from collections.abc import Iterable, Sequence

from autoprec.records.cost import LayerTiming
from autoprec.records.model import BF16_O2, ModelSpec, Option


def without_slow_gemms_hp(
    spec: ModelSpec, rows: Iterable[LayerTiming]
) -> tuple[ModelSpec, tuple[LayerTiming, ...]]:
    """Drop options with GEMMs kept in BF16 that are no faster than BF16, from rows and layers.

    They stay where a layer has no other FP8 option: then they are the answer to "why not FP8?".
    """
    by_names: dict[tuple[str, ...], list[LayerTiming]] = {}
    for row in rows:
        by_names.setdefault(row.names, []).append(row)
    kept = tuple(row for group in by_names.values() for row in _worthwhile(group))
    options: dict[str, list[Option]] = {}
    for row in kept:
        for name in row.names:
            options.setdefault(name, []).append(row.option)
    layers = tuple(
        layer.model_copy(update={"options": tuple(options.get(layer.name, layer.options))})
        for layer in spec.layers
    )
    return spec.model_copy(update={"layers": layers}), kept


def _worthwhile(group: Sequence[LayerTiming]) -> Sequence[LayerTiming]:
    plain = next((row.total for row in group if row.option == BF16_O2), None)
    if plain is None or not any(row.option.is_fp8 and not row.option.gemms_hp for row in group):
        return group
    return [
        row
        for row in group
        if not row.option.gemms_hp
        or (row.total is not None and row.total.median_ms < plain.median_ms)
    ]
