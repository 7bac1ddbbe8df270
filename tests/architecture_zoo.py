"""Architectures that this project did not write: tiny configs -> models with random weights.

Everything comes from `transformers`, and from `diffusers` where that is installed; nothing is
downloaded. A batch is a dict of keyword arguments; the loss is the model's own if it has one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.workload.functions import Workload, workload_from
from tests.architecture_batches import (
    CLASSES,
    VOCABULARY,
    Batch,
    MakeBatch,
    boxes,
    class_images,
    guided_images,
    image_text,
    images,
    language,
    latents,
    noisy_images,
    padded,
    pairs,
    segmentation,
    series,
    sound,
    sound_image,
    spectrogram,
    videos,
)

Settings = Mapping[str, Any]  # Any: what a config takes
WIDTH = 64


@dataclass(frozen=True)
class Architecture:
    """A model class with a tiny config; nested configs are pairs of class name and settings."""

    family: str
    model: str
    config: str
    settings: Settings
    make_batch: MakeBatch
    library: str = "transformers"

    @property
    def name(self) -> str:
        return self.model.removesuffix("Model")

    def build(self) -> nn.Module:
        library = import_module(self.library)
        cls = getattr(library, self.model)
        if not self.config:  # diffusers: models take their settings themselves
            model: nn.Module = cls(**self.settings)
        else:
            model = cls(make_config(library, self.config, self.settings))
        return model

    def workload(self) -> Workload:
        """Return a workload over random data of this model."""

        def train_batches(seed: int) -> Iterator[Batch]:
            generator = torch.Generator().manual_seed(seed)
            while True:
                yield self.make_batch(generator)

        functions = {"build_model": self.build, "train_batches": train_batches, "loss_fn": loss_of}
        return workload_from(SimpleNamespace(**functions), name=self.name)


def make_config(library: Any, name: str, settings: Settings) -> Any:  # Any: untyped libraries
    """Return a config; a setting that is a pair (class, settings) becomes a config of its own."""
    made = {
        key: make_config(library, *value) if _is_config(value) else value
        for key, value in settings.items()
    }
    return getattr(library, name)(**made)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss, or the mean square of its first output."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.mean()
    first = next(leaf for leaf in torch.utils._pytree.tree_leaves(output) if leaf.requires_grad)
    return first.float().square().mean()  # type: ignore[no-any-return]  # a tensor


def _is_config(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)


SHAPE: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Settings = {**SHAPE, "num_key_value_heads": 2}
EXPERTS: Settings = {
    **GROUPED,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
ENCODER_DECODER: Settings = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
VISION: Settings = {
    "image_size": 32,
    "patch_size": 16,
    "num_channels": 3,
    "num_labels": CLASSES,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONVOLUTIONS: Settings = {
    "num_labels": CLASSES,
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
}
SPEECH: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [32, 32],
    "conv_kernel": [10, 3],
    "conv_stride": [10, 5],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "ctc_zero_infinity": True,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "pad_token_id": 0,
}
BACKBONE = ("ResNetConfig", {**CONVOLUTIONS, "out_features": ["stage2"]})
DETECTOR: Settings = {
    "backbone_config": BACKBONE,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "num_labels": CLASSES,
    "num_queries": 8,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}


def _decoders() -> Iterator[Architecture]:
    def decoder(
        name: str, settings: Settings = GROUPED, make_batch: MakeBatch = language, **more: Any
    ) -> Architecture:
        model, config = f"{name}ForCausalLM", f"{name}Config"
        return Architecture("decoder", model, config, {**settings, **more}, make_batch)

    heads: dict[str, Any] = {"head_dim": 16}
    ends = {key: SHAPE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    gpt2 = {**ends, "n_layer": 2, "n_head": 4, "n_embd": WIDTH, "n_positions": 64}
    yield Architecture("decoder", "GPT2LMHeadModel", "GPT2Config", gpt2, padded)
    yield decoder("Llama", make_batch=padded)
    yield decoder("Qwen2")
    yield decoder("Qwen3", **heads)
    yield decoder("Gemma", **heads)
    yield decoder("Gemma2", **heads)
    yield decoder("Mistral", sliding_window=8)
    yield decoder("Phi")
    yield decoder("Phi3")
    yield decoder("Olmo2")
    yield decoder("StableLm")
    yield decoder("Cohere")
    yield decoder("OPT", SHAPE, ffn_dim=128, word_embed_proj_dim=WIDTH)
    yield decoder("GPTNeoX", SHAPE)
    yield decoder("GPTJ", ends, n_layer=2, n_head=4, n_embd=WIDTH, n_positions=64, rotary_dim=8)
    yield decoder("Falcon", SHAPE)
    yield decoder("Bloom", ends, hidden_size=WIDTH, n_layer=2, n_head=4)
    yield decoder("GPTBigCode", gpt2)
    latent: dict[str, Any] = {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    }
    latent |= {"qk_nope_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    latent |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    latent |= {"moe_intermediate_size": 32, "num_key_value_heads": 4}
    for name, more in (
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen2Moe", {"decoder_sparse_step": 1}),
        ("Qwen3Moe", heads),
        ("Olmoe", {}),
        ("GptOss", {"num_local_experts": 4, **heads}),
        ("DeepseekV3", latent),
    ):
        made = decoder(name, EXPERTS, **more)
        yield Architecture("experts", made.model, made.config, made.settings, language)


def _state_spaces() -> Iterator[Architecture]:
    common = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    second = {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 8}
    recurrent: dict[str, Any] = {"attention_window_size": 8, "num_hidden_layers": 3, "head_dim": 16}
    recurrent |= {"block_types": ["recurrent", "recurrent", "attention"], "lru_width": WIDTH}
    jamba: dict[str, Any] = {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
    }
    linear: dict[str, Any] = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "head_dim": 16,
    }
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "decoder_sparse_step": 1}
    linear |= {"layer_types": ["linear_attention", "full_attention"]}
    for name, settings in (
        ("Mamba", {**common, "state_size": 8}),
        ("Mamba2", {**common, **second}),
        ("Rwkv", {**common, "attention_hidden_size": WIDTH, "intermediate_size": 128}),
        ("RecurrentGemma", {**GROUPED, **recurrent}),
        ("Jamba", {**GROUPED, **jamba, "use_mamba_kernels": False}),
        ("Qwen3Next", {**EXPERTS, **linear}),
    ):
        yield Architecture("state space", f"{name}ForCausalLM", f"{name}Config", settings, language)


def _encoders() -> Iterator[Architecture]:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    flat = {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
    modern = {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}
    for name, settings in (
        ("Bert", SHAPE),
        ("Roberta", SHAPE),
        ("Deberta", {**SHAPE, **relative}),
        ("DebertaV2", {**SHAPE, **relative}),
        ("Electra", {**SHAPE, "embedding_size": 32}),
        ("ModernBert", {**SHAPE, **modern}),
        ("Albert", {**SHAPE, "embedding_size": 32}),
        ("DistilBert", flat),
        ("FNet", SHAPE),
        ("Longformer", {**SHAPE, "attention_window": 8}),
    ):
        batch = language if name == "FNet" else padded
        yield Architecture("encoder", f"{name}ForMaskedLM", f"{name}Config", settings, batch)
    xlnet = {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 128}
    yield Architecture("encoder", "XLNetLMHeadModel", "XLNetConfig", xlnet, language)


def _encoder_decoders() -> Iterator[Architecture]:
    t5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2}
    t5 |= {"num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0}
    gated = {**t5, "feed_forward_proj": "gated-gelu"}
    led = {**ENCODER_DECODER, "attention_window": 8}
    for model, config, settings in (
        ("T5ForConditionalGeneration", "T5Config", t5),
        ("MT5ForConditionalGeneration", "MT5Config", gated),
        ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", t5),
        ("BartForConditionalGeneration", "BartConfig", ENCODER_DECODER),
        ("MarianMTModel", "MarianConfig", ENCODER_DECODER),
        ("PegasusForConditionalGeneration", "PegasusConfig", ENCODER_DECODER),
        ("LEDForConditionalGeneration", "LEDConfig", led),
    ):
        yield Architecture("encoder-decoder", model, config, settings, padded)


def _visions() -> Iterator[Architecture]:
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2]}
    swin |= {"num_heads": [2, 4], "window_size": 4, "num_labels": CLASSES}
    segments = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32]}
    segments |= {"num_attention_heads": [1, 2], "decoder_hidden_size": 32, "num_labels": CLASSES}
    segments |= {"sr_ratios": [4, 2], "patch_sizes": [7, 3], "strides": [4, 2]}
    segments |= {"mlp_ratios": [2, 2]}
    convnext = {"num_labels": CLASSES, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
    mobile: dict[str, Any] = {"num_labels": CLASSES, "image_size": 32, "output_stride": 8}
    mobile |= {"classifier_dropout_prob": 0.0, "depth_multiplier": 0.35}
    classifiers: tuple[tuple[str, Settings, MakeBatch], ...] = (
        ("ViT", VISION, images),
        ("DeiT", VISION, images),
        ("Beit", {**VISION, "use_relative_position_bias": True}, images),
        ("Dinov2", VISION, images),
        ("Swin", swin, images),
        ("ConvNext", convnext, images),
        ("ConvNextV2", convnext, images),
        ("ResNet", CONVOLUTIONS, images),
        ("RegNet", {**CONVOLUTIONS, "groups_width": 8}, images),
        ("MobileNetV2", mobile, images),
        ("VideoMAE", {**VISION, "num_frames": 2, "tubelet_size": 2}, videos),
    )
    for name, settings, batch in classifiers:
        family = "convolutional" if "Net" in name or "Next" in name else "vision"
        model = (
            f"{name}ForVideoClassification" if batch is videos else f"{name}ForImageClassification"
        )
        yield Architecture(family, model, f"{name}Config", settings, batch)
    yield Architecture(
        "vision", "SegformerForSemanticSegmentation", "SegformerConfig", segments, segmentation
    )
    for name, settings in (
        ("Detr", DETECTOR),
        ("ConditionalDetr", DETECTOR),
        ("Yolos", {**VISION, "image_size": [32, 32], "num_detection_tokens": 8}),
    ):
        yield Architecture("vision", f"{name}ForObjectDetection", f"{name}Config", settings, boxes)


def _speeches() -> Iterator[Architecture]:
    whisper = {**ENCODER_DECODER, "num_mel_bins": 16, "max_source_positions": 16}
    whisper |= {"max_target_positions": 32, "begin_suppress_tokens": None, "suppress_tokens": None}
    for name in ("Wav2Vec2", "Hubert", "WavLM"):
        yield Architecture("speech", f"{name}ForCTC", f"{name}Config", SPEECH, sound)
    yield Architecture(
        "speech", "WhisperForConditionalGeneration", "WhisperConfig", whisper, spectrogram
    )
    ast = {**VISION, "num_mel_bins": 16, "max_length": 32, "patch_size": 8}
    ast |= {"time_stride": 8, "frequency_stride": 8}
    yield Architecture("speech", "ASTForAudioClassification", "ASTConfig", ast, sound_image)


def _mixed() -> Iterator[Architecture]:
    text = {**SHAPE, "projection_dim": 32}
    tower = {**VISION, "projection_dim": 32}
    clip = {"text_config": text, "vision_config": tower, "projection_dim": 32}
    llava = {
        "text_config": ("LlamaConfig", {**GROUPED}),
        "vision_config": ("CLIPVisionConfig", {**tower, "num_hidden_layers": 3}),
        "image_token_index": 2,
        "image_token_id": 2,
        "vision_feature_layer": -2,
    }
    patches = {"num_input_channels": 2, "context_length": 32, "prediction_length": 8}
    patches |= {"patch_length": 8, "patch_stride": 8, "d_model": WIDTH, "num_hidden_layers": 2}
    patches |= {"num_attention_heads": 4, "ffn_dim": 128}
    yield Architecture("multimodal", "CLIPModel", "CLIPConfig", clip, pairs)
    yield Architecture("multimodal", "SiglipModel", "SiglipConfig", clip, pairs)
    yield Architecture(
        "multimodal", "LlavaForConditionalGeneration", "LlavaConfig", llava, image_text
    )
    yield Architecture("time series", "PatchTSTForPrediction", "PatchTSTConfig", patches, series)


def _diffusions() -> Iterator[Architecture]:
    unet = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1}
    unet |= {"in_channels": 3, "out_channels": 3, "norm_num_groups": 8, "attention_head_dim": 8}
    plain = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    plain |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    crossed: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    crossed |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32}
    dit = {"sample_size": 16, "patch_size": 4, "in_channels": 3, "out_channels": 3}
    dit |= {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16}
    dit |= {"norm_num_groups": 1, "num_embeds_ada_norm": CLASSES}
    vae = {"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 2}
    vae |= {"up_block_types": ("UpDecoderBlock2D",) * 2}
    for name, settings, batch in (
        ("UNet2DModel", {**unet, **plain}, noisy_images),
        ("UNet2DConditionModel", {**unet, **crossed}, guided_images),
        ("DiTTransformer2DModel", dit, class_images),
        ("AutoencoderKL", vae, latents),
    ):
        yield Architecture("diffusion", name, "", settings, batch, library="diffusers")


ARCHITECTURES = (
    *_decoders(),
    *_state_spaces(),
    *_encoders(),
    *_encoder_decoders(),
    *_visions(),
    *_speeches(),
    *_mixed(),
    *_diffusions(),
)
