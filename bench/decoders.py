"""Model specs of well-known decoders from their dimensions: what a capture would have shown."""

from collections.abc import Iterator
from dataclasses import dataclass

from autoprec.records.model import (
    BF16_O2,
    FP32,
    CallSpec,
    GemmShape,
    LayerKind,
    LayerSpec,
    ModelSpec,
    ParameterSpec,
    TensorSpec,
)

LINEAR = "torch.nn.modules.linear.Linear"


@dataclass(frozen=True)
class Decoder:
    """A decoder's dimensions; `gated` says whether the MLP has a gate beside its up projection."""

    width: int
    blocks: int
    kv_width: int
    hidden: int
    vocabulary: int
    gated: bool = True
    is_tied: bool = False


DECODERS = {
    "LLaMA2-7B": Decoder(4096, 32, 4096, 11008, 32000),
    "LLaMA2-13B": Decoder(5120, 40, 5120, 13824, 32000),
    "Llama3-8B": Decoder(4096, 32, 1024, 14336, 128256),
    "Llama3-70B": Decoder(8192, 80, 1024, 28672, 128256),
    "Llama3 70B": Decoder(8192, 80, 1024, 28672, 128256),
    "Llama3 405B": Decoder(16384, 126, 1024, 53248, 128256),
    "Command-R 35B": Decoder(8192, 40, 8192, 22528, 256000, is_tied=True),
    "Qwen2.5-0.5B": Decoder(896, 24, 128, 4864, 151936, is_tied=True),
    "Qwen2.5-1.5B": Decoder(1536, 28, 256, 8960, 151936, is_tied=True),
    "Qwen2.5-3B": Decoder(2048, 36, 256, 11008, 151936, is_tied=True),
    "Qwen2.5-7B": Decoder(3584, 28, 512, 18944, 152064),
    "Qwen2.5-14B": Decoder(5120, 48, 1024, 13824, 152064),
    "Qwen2.5-32B": Decoder(5120, 64, 1024, 27648, 152064),
    "MPT-1B": Decoder(2048, 24, 2048, 8192, 50368, gated=False, is_tied=True),
    "MPT-3B": Decoder(2560, 32, 2560, 10240, 50368, gated=False, is_tied=True),
}


def decoder_spec(decoder: Decoder, *, batch: int, sequence: int) -> ModelSpec:
    """Return what a training step of the decoder on `batch` sequences shows."""
    layers = tuple(_layers(decoder, batch, sequence))
    return ModelSpec(
        layers=layers,
        uncovered=(),
        uncalled=(),
        structure=str(hash(decoder)),
        tokens_per_step=batch * sequence,
        # causal attention: half the scores, five products in backward against two
        product_flops=decoder.blocks * 4 * batch * sequence**2 * decoder.width / 2 * 3.5,
        optimizer="AdamW",
        optimizer_state_numel_ratio=2.0,
        has_randomness=False,
        is_deterministic=True,
        loss=None,
        device="meta",
    )


def _layers(decoder: Decoder, batch: int, sequence: int) -> Iterator[LayerSpec]:
    shape = (batch, sequence)
    yield _embedding(decoder, shape)
    for block in range(decoder.blocks):
        prefix = f"layers.{block}"
        yield _norm(f"{prefix}.attention_norm", decoder.width, shape)
        for name, inner, outer in _attention(decoder):
            yield _linear(f"{prefix}.attention.{name}", inner, outer, shape)
        yield _norm(f"{prefix}.ffn_norm", decoder.width, shape)
        for name, inner, outer in _mlp(decoder):
            yield _linear(f"{prefix}.feed_forward.{name}", inner, outer, shape)
    yield _norm("norm", decoder.width, shape)
    head = _linear("lm_head", decoder.width, decoder.vocabulary, shape)
    if decoder.is_tied:
        weight = head.parameters[0].model_copy(update={"shared_with": "embedding.weight"})
        head = head.model_copy(update={"parameters": (weight,), "tied_to": "embedding"})
    yield head


def _attention(decoder: Decoder) -> Iterator[tuple[str, int, int]]:
    yield "wq", decoder.width, decoder.width
    yield "wk", decoder.width, decoder.kv_width
    yield "wv", decoder.width, decoder.kv_width
    yield "wo", decoder.width, decoder.width


def _mlp(decoder: Decoder) -> Iterator[tuple[str, int, int]]:
    if decoder.gated:
        yield "w1", decoder.width, decoder.hidden
    yield "w3", decoder.width, decoder.hidden
    yield "w2", decoder.hidden, decoder.width


def _linear(name: str, inner: int, outer: int, shape: tuple[int, int]) -> LayerSpec:
    tokens = shape[0] * shape[1]
    return _layer(
        name,
        LayerKind.LINEAR,
        LINEAR,
        (outer, inner),
        inputs=(*shape, inner),
        gemm=GemmShape(M=tokens, K=inner, N=outer),
    )


def _norm(name: str, width: int, shape: tuple[int, int]) -> LayerSpec:
    return _layer(
        name,
        LayerKind.NORM,
        "torch.nn.modules.normalization.RMSNorm",
        (width,),
        inputs=(*shape, width),
    )


def _embedding(decoder: Decoder, shape: tuple[int, int]) -> LayerSpec:
    table = (decoder.vocabulary, decoder.width)
    name = "torch.nn.modules.sparse.Embedding"
    return _layer("embedding", LayerKind.EMBEDDING, name, table, inputs=shape, dtype="int64")


def _layer(
    name: str,
    kind: LayerKind,
    type_name: str,
    weight: tuple[int, ...],
    *,
    inputs: tuple[int, ...],
    gemm: GemmShape | None = None,
    dtype: str = "float32",
) -> LayerSpec:
    tensor = TensorSpec(
        shape=inputs, stride=_strides(inputs), dtype=dtype, requires_grad=dtype == "float32"
    )
    parameter = ParameterSpec(
        name=f"{name}.weight", shape=weight, dtype="float32", is_trainable=True
    )
    return LayerSpec(
        name=name,
        kind=kind,
        type_name=type_name,
        settings="",
        parameters=(parameter,),
        gemm=gemm,
        calls=(CallSpec(inputs=(tensor,), count=1),),
        is_frozen=False,
        tied_to=None,
        options=(FP32, BF16_O2),
        refusals=(),
    )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)
