"""Random batches for architectures of every kind: the keyword arguments of one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]  # Any: what a model takes
MakeBatch = Callable[[torch.Generator], Batch]
VOCABULARY, CLASSES = 96, 16
SEQUENCES, TOKENS = 2, 16


def _ids(generator: torch.Generator, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (SEQUENCES, tokens), generator=generator)


def language(generator: torch.Generator) -> Batch:
    ids = _ids(generator)
    return {"input_ids": ids, "labels": ids}


def padded(generator: torch.Generator) -> Batch:
    mask = torch.ones(SEQUENCES, TOKENS, dtype=torch.long)
    mask[1, -5:] = 0
    return {**language(generator), "attention_mask": mask}


def images(generator: torch.Generator) -> Batch:
    pixels = torch.randn(SEQUENCES, 3, 32, 32, generator=generator)
    return {
        "pixel_values": pixels,
        "labels": torch.randint(CLASSES, (SEQUENCES,), generator=generator),
    }


def pixels_only(generator: torch.Generator) -> Batch:
    return {"pixel_values": torch.randn(SEQUENCES, 3, 32, 32, generator=generator)}


def segmentation(generator: torch.Generator) -> Batch:
    labels = torch.randint(CLASSES, (SEQUENCES, 32, 32), generator=generator)
    return {**pixels_only(generator), "labels": labels}


def boxes(generator: torch.Generator) -> Batch:
    labels = [
        {
            "class_labels": torch.randint(CLASSES, (2,), generator=generator),
            "boxes": 0.25 + 0.5 * torch.rand(2, 4, generator=generator),
        }
        for _ in range(SEQUENCES)
    ]
    return {**pixels_only(generator), "labels": labels}


def videos(generator: torch.Generator) -> Batch:
    return {
        "pixel_values": torch.randn(SEQUENCES, 2, 3, 32, 32, generator=generator),
        "labels": torch.randint(CLASSES, (SEQUENCES,), generator=generator),
    }


def sound(generator: torch.Generator) -> Batch:
    return {
        "input_values": torch.randn(SEQUENCES, 1600, generator=generator),
        "labels": _ids(generator, 4),
    }


def spectrogram(generator: torch.Generator) -> Batch:
    features = torch.randn(SEQUENCES, 16, 32, generator=generator)
    return {"input_features": features, "labels": _ids(generator, 8)}


def sound_image(generator: torch.Generator) -> Batch:
    return {
        "input_values": torch.randn(SEQUENCES, 32, 16, generator=generator),
        "labels": torch.randint(CLASSES, (SEQUENCES,), generator=generator),
    }


def pairs(generator: torch.Generator) -> Batch:
    return {**pixels_only(generator), "input_ids": _ids(generator), "return_loss": True}


def image_text(generator: torch.Generator) -> Batch:
    ids = _ids(generator)
    ids[:, 1:5] = 2  # the image token: four patches
    return {**pixels_only(generator), "input_ids": ids, "labels": ids}


def series(generator: torch.Generator) -> Batch:
    return {
        "past_values": torch.randn(SEQUENCES, 32, 2, generator=generator),
        "future_values": torch.randn(SEQUENCES, 8, 2, generator=generator),
    }


def noisy_images(generator: torch.Generator) -> Batch:
    return {
        "sample": torch.randn(SEQUENCES, 3, 16, 16, generator=generator),
        "timestep": torch.randint(1000, (SEQUENCES,), generator=generator),
    }


def guided_images(generator: torch.Generator) -> Batch:
    context = torch.randn(SEQUENCES, 16, 32, generator=generator)
    return {**noisy_images(generator), "encoder_hidden_states": context}


def class_images(generator: torch.Generator) -> Batch:
    noisy = noisy_images(generator)
    return {
        "hidden_states": noisy["sample"],
        "timestep": noisy["timestep"],
        "class_labels": torch.randint(CLASSES, (SEQUENCES,), generator=generator),
    }


def latents(generator: torch.Generator) -> Batch:
    return {"sample": torch.randn(SEQUENCES, 3, 16, 16, generator=generator)}
