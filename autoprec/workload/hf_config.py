"""A `transformers` config on disk -> the decoder that it describes and batches for it: a workload.

    autoprec tune llama/config.json --meta --target h100-sxm --batch 4 --sequence 8192

The config gives the model; what a step takes is not in it, hence the two options. Weights would be
random, which says nothing of convergence, so this is for `--meta` alone. Only the file is read: no
network, no code beside it. Parameters are FP32 whatever type the config was saved with, since
FP32 training is what plans are compared with.

Torch and transformers are imported where they are used: settings ask whether a path is a config.
"""

import json
import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.common.text import error_line
from autoprec.errors import WorkloadError

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

BATCH = 1  # sequences per device and step
LONGEST_SEQUENCE = 4096  # tokens, unless --sequence asks for more
META_ALONE = (
    "a transformers config can only be captured, by tune or profile with --meta, since random "
    "weights say nothing of convergence, but {config} is used without; add --meta and a device "
    "profile as --target, or write a MODEL.py with a build_model"
)


def config_file(reference: str) -> Path | None:
    """Return the config that a workload's name stands for: a JSON file, or a folder's own."""
    path = Path(reference)
    file = path / "config.json" if path.is_dir() else path
    return file if reference and file.suffix == ".json" and file.is_file() else None


def config_model(file: Path, *, batch: int | None = None, sequence: int | None = None) -> object:
    """Return the functions of a workload for the config's decoder; what is assumed is logged.

    Raises:
        WorkloadError: transformers is missing or has no such decoder, or the sequence is too long.
    """
    config = _read_config(file)
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None) or sequence or LONGEST_SEQUENCE
    if sequence and sequence > limit:
        raise WorkloadError(
            f"--sequence must be at most the max_position_embeddings of {file}, {limit}, but it is "
            f"{sequence}; shorten it, or edit the config"
        )
    rows, tokens = batch or BATCH, sequence or min(limit, LONGEST_SEQUENCE)
    if batch is None or sequence is None:
        assumed = "%s: a step is taken to have %d x %d tokens; --batch and --sequence say otherwise"
        logger.warning(assumed, file, rows, tokens)
    return ConfigModel(config, text.vocab_size, rows, tokens)


def _read_config(file: Path) -> Any:  # Any: transformers ships no usable types
    """Read the config with its own class, once it is known that there is a decoder for it."""
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig
    except ImportError as error:
        raise WorkloadError(
            f"{file} needs transformers to be built, but it cannot be imported ({error}); "
            "pip install transformers, or write a MODEL.py"
        ) from error
    decoder = _decoder_of(file)
    try:
        config = AutoConfig.from_pretrained(
            str(file), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise WorkloadError(
            f"{file} must be a config that transformers takes, but it says: "
            f"{error_line(error, most=300)}; fix the file"
        ) from error
    said = config.architectures or [decoder]  # the model that it was saved with
    said = [said] if isinstance(said, str) else said
    if decoder not in said:
        raise WorkloadError(
            f"{file} must be of the decoder that is built from it, {decoder}, but it is of "
            f"{' '.join(said)}; write a MODEL.py with a build_model"
        )
    config.use_cache = False  # a training step keeps no keys and values
    config._attn_implementation = None  # the default: a kernel asked for may not be installed here
    return config


def _decoder_of(file: Path) -> object:
    """Return the name of the decoder that transformers builds for the config's model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkloadError(f"{file} must be JSON, but {error}; fix the file") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str):
        raise WorkloadError(
            f"{file} must be a transformers config with a model_type, but it has none; "
            "give the config.json of a saved model, or a MODEL.py"
        )
    if kind not in DECODERS:
        raise WorkloadError(
            f"{file} must be of a decoder that AutoModelForCausalLM knows, but its model_type is "
            f"{kind!r}; write a MODEL.py with a build_model (code beside a config is not run)"
        )
    return DECODERS[kind]


@dataclass(frozen=True)
class ConfigModel:
    """The functions of a workload file as methods."""

    config: Any  # Any: as above
    vocabulary: int
    batch: int
    sequence: int

    def build_model(self) -> "nn.Module":
        """Build the decoder; it is the caller's default device that keeps its weights away."""
        import torch
        from transformers import AutoModelForCausalLM

        config = deepcopy(self.config)  # building writes to it
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        kinds = {type(module).__name__ for module in model.modules()}
        if experts := sorted(kind for kind in kinds if kind.endswith("Experts")):
            raise WorkloadError(
                "a config must be of a decoder without experts, since the times of grouped GEMMs "
                f"are not predicted, but it builds {experts[0]}; write a MODEL.py whose experts "
                "are nn.Linear layers"
            )
        return model

    def train_batches(self, seed: int) -> "Iterator[Tensor]":
        """Yield random token ids: only their shape is looked at."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.sequence)
        while True:
            yield torch.randint(self.vocabulary, shape, generator=generator)

    def loss_fn(self, model: "nn.Module", tokens: "Tensor") -> "Tensor":
        """Return the model's own next-token loss."""
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss
