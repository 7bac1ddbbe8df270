"""Megatron's per-module precision file (`--te-precision-config-file`).

Its form (megatron/core/quantization, megatron-core 0.16): `configs` by name, and `matchers` in
order, of which the first whose glob fits a module's full name decides. Transformer Engine's current
scaling with the `hybrid` format (e4m3 forward, e5m2 gradients) is torchao's `tensorwise`; the file
has no word for rowwise scales, for delayed scaling, for single GEMMs or for FP32.
"""

from autoprec.integrations.export.text import header, linears, yaml_string
from autoprec.records import Assignment, Plan

CONFIGS = """\
configs:
  fp8_o1:
    transformer_engine_config_type: "TEQuantizationParams"
    training_recipe:
      fp8_quantization_recipe: "tensorwise"
      fp8_format: "hybrid"
      override_nonquantized_autocast: true
  bf16_o2:
    transformer_engine_config_type: "TEQuantizationParams"
    training_recipe: {}
"""
CATCH_ALL = """\
  "every other module":
    config: "bf16_o2"
    type: "glob"
    pattern: "*"
    enabled: true
"""


def megatron_yaml(plan: Plan) -> str:
    """Return the YAML file: one matcher per linear layer by exact name, everything else in BF16."""
    matchers = "".join(_matcher(layer) for layer in linears(plan))
    return (
        header(
            plan,
            "Train with: --bf16 --fp8-format hybrid --fp8-recipe tensorwise",
            "            --te-precision-config-file THIS_FILE --logging-level 20",
            "The names must be those of the Megatron model: it only logs what matched nothing.",
            "Not in here: norms and embeddings; Megatron has its own arguments for these.",
        )
        + CONFIGS
        + f"matchers:\n{matchers}{CATCH_ALL}"
    )


def exact_glob(name: str) -> str:
    """Return the glob that fits this name and no other."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _matcher(layer: Assignment) -> str:
    return (
        f"  {yaml_string(f'layer {layer.name}')}:\n"  # never the key of the last matcher
        f"    config: {yaml_string(layer.precision.value)}\n"
        '    type: "glob"\n'
        f"    pattern: {yaml_string(exact_glob(layer.name))}\n"
        "    enabled: true\n"
    )
