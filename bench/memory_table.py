"""What fits 24, 80 and 192 GB: the table of docs/scale.md, from the predictions of `model.memory`.

    python -m bench.memory_table

Llama-shaped decoders are captured without weights, one sequence of 2048 tokens a step. Attention is
taken to keep no scores, as the fused kernels of a GPU do: layers' inputs and outputs count alone.
"""

from transformers import LlamaConfig

from autoprec.model.memory import ModelSize, sensitivity_bytes, step_bytes
from autoprec.model.meta import capture_on_meta
from autoprec.records import ModelSpec
from autoprec.workload.functions import workload_from
from autoprec.workload.hf_config import config_model

TOKENS = 2048
DEVICES_GB = (24, 80, 192)
USABLE = 0.92  # of a device's memory: the rest is CUDA's own, and fragmentation
SHAPES = {  # width, blocks, feed-forward, classes
    "0.1 B": (768, 12, 2048, 32_000),
    "0.5 B": (1280, 20, 3456, 32_000),
    "1.2 B": (2048, 16, 8192, 32_000),
    "3.2 B": (3072, 28, 8192, 32_000),
    "6.7 B": (4096, 32, 11008, 32_000),
    "13 B": (5120, 40, 13824, 32_000),
}


def captured(shape: tuple[int, int, int, int]) -> ModelSpec:
    """Return the spec of a decoder of this shape."""
    import json
    import tempfile
    from pathlib import Path

    width, blocks, hidden, classes = shape
    config = LlamaConfig(
        vocab_size=classes,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        architectures=["LlamaForCausalLM"],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config.to_dict(), default=str))
        model = config_model(path, batch=1, sequence=TOKENS)
        spec = capture_on_meta(workload_from(model, name="llama"))
    return spec.model_copy(update={"saved_bytes": None, "backward_bytes": None})


def main() -> None:
    """Print one row per model."""
    print("| parameters | step FP32 | step BF16 O2 | sensitivity | at least | fits |")
    print("|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        spec = captured(shape)
        most = len(spec.layers)
        size = ModelSize.of(spec)
        # AdamW as torch makes it steps all parameters at once, and holds as much again meanwhile
        foreach = 4 * (size.parameters + (size.states + 2) * size.trainable)
        steps = [max(step_bytes(spec), foreach), step_bytes(spec, is_16_bit=True)]
        ways = [sensitivity_bytes(spec, groups=n, batches=0) for n in (1, most)]
        sizes = [size / 1e9 for size in (*steps, *ways)]
        need = max(sizes[0], sizes[3])
        fits = next((f"{gb} GB" for gb in DEVICES_GB if need <= USABLE * gb), "shard it")
        shown = " | ".join(f"{gb:.1f}" for gb in sizes)
        print(f"| {name} ({size.parameters / 1e9:.2f} B) | {shown} | {fits} |")


if __name__ == "__main__":
    main()
