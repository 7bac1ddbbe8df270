"""Specs of decoder layers for tests without torch: what a capture of them would have shown."""

import math

from autoprec.records.model import (
    BF16_O2,
    FP32,
    CallSpec,
    GemmShape,
    LayerKind,
    LayerSpec,
    ModelSpec,
    Option,
    ParameterSpec,
    Refusal,
    TensorSpec,
)

LINEAR = "torch.nn.modules.linear.Linear"


def linear_layer(
    name: str,
    K: int,
    N: int,
    *,
    shape: tuple[int, ...] = (1, 4096),
    type_name: str = LINEAR,
    requires_grad: bool = True,
    is_frozen: bool = False,
    options: tuple[Option, ...] = (FP32, BF16_O2),
    refusals: tuple[Refusal, ...] = (),
    tokens: tuple[int, ...] = (),
) -> LayerSpec:
    """Return a linear that was called once on an input of `shape` x K; `tokens`: all its M."""
    return LayerSpec(
        name=name,
        kind=LayerKind.LINEAR,
        type_name=type_name,
        settings="",
        parameters=(_weight(name, (N, K), is_trainable=not is_frozen),),
        gemm=GemmShape(M=math.prod(shape), K=K, N=N),
        calls=(_call((*shape, K), requires_grad=requires_grad),),
        is_frozen=is_frozen,
        tied_to=None,
        options=options,
        refusals=refusals,
        tokens=tokens,
    )


def plain_layer(
    name: str, kind: LayerKind, weight: tuple[int, ...], inputs: tuple[int, ...], settings: str = ""
) -> LayerSpec:
    """Return a layer that is no linear."""
    return LayerSpec(
        name=name,
        kind=kind,
        type_name=f"torch.nn.{kind}",
        settings=settings,
        parameters=(_weight(name, weight, is_trainable=True),),
        gemm=None,
        calls=(_call(inputs, requires_grad=True),),
        is_frozen=False,
        tied_to=None,
        options=(FP32, BF16_O2),
        refusals=(),
    )


def decoder(width: int = 4096, kv: int = 1024, hidden: int = 14336, blocks: int = 2) -> ModelSpec:
    """Return a Llama-like decoder with one sequence of 4,096 tokens."""
    layers = [plain_layer("embed", LayerKind.EMBEDDING, (32000, width), (1, 4096))]
    for block in range(blocks):
        at = f"layers.{block}"
        layers += [
            plain_layer(f"{at}.norm", LayerKind.NORM, (width,), (1, 4096, width)),
            linear_layer(f"{at}.attn.q_proj", width, width),
            linear_layer(f"{at}.attn.k_proj", width, kv),
            linear_layer(f"{at}.attn.v_proj", width, kv),
            linear_layer(f"{at}.attn.o_proj", width, width),
            linear_layer(f"{at}.mlp.gate_proj", width, hidden),
            linear_layer(f"{at}.mlp.up_proj", width, hidden),
            linear_layer(f"{at}.mlp.down_proj", hidden, width),
        ]
    layers.append(linear_layer("lm_head", width, 32000))
    causal = 4 * 4096**2 * width / 2  # attention's two products, half of the scores
    return model_of(*layers).model_copy(update={"product_flops": 3.5 * causal * blocks})


def model_of(*layers: LayerSpec) -> ModelSpec:
    """Return a model of these layers, trained with AdamW."""
    return ModelSpec(
        layers=layers,
        uncovered=(),
        uncalled=tuple(layer.name for layer in layers if not layer.calls),
        structure="0" * 16,
        tokens_per_step=4096,
        optimizer="AdamW",
        optimizer_state_numel_ratio=2.0,
        has_randomness=False,
        is_deterministic=True,
        loss=None,
        device="cpu",
    )


def _weight(name: str, shape: tuple[int, ...], *, is_trainable: bool) -> ParameterSpec:
    return ParameterSpec(
        name=f"{name}.weight", shape=shape, dtype="float32", is_trainable=is_trainable
    )


def _call(shape: tuple[int, ...], *, requires_grad: bool) -> CallSpec:
    strides = tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
    tensor = TensorSpec(shape=shape, stride=strides, dtype="float32", requires_grad=requires_grad)
    return CallSpec(inputs=(tensor,), count=1)
