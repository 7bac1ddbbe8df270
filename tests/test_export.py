"""Exports against their consumers; those that are not installed are replaced by their own rules."""

import fnmatch
import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]  # ships no types
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprec.device.torchao import float8_config, import_torchao
from autoprec.errors import PlanMismatchError, RecordError
from autoprec.integrations.export import TARGETS, export_plan
from autoprec.integrations.export.text import exact_glob, yaml_string
from autoprec.records import (
    BF16_O2,
    FP32,
    Assignment,
    Basis,
    Constraint,
    Fingerprint,
    Gemm,
    LayerKind,
    Option,
    Phase,
    Plan,
    Recipe,
    fp8_option,
)
from tests.accelerate_state import fresh_accelerate
from tests.examples import examples

__all__ = ["fresh_accelerate"]
TENSORWISE, ROWWISE = fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE)
GRAD_WEIGHT_HP = fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT)
TWO_HP = fp8_option(Recipe.ROWWISE, Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT)
FINGERPRINT = Fingerprint(
    structure="x",
    device="NVIDIA H100",
    capability="9.0",
    software={},
    compile_mode="",
    tokens_per_step=2048,
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="."), min_size=1, max_size=12)


def plan(options: dict[str, Option], **fields: Any) -> Plan:  # Any: any field of a plan
    """Return a plan of 64 x 64 linears, and of norms where the name ends in one."""
    layers = [
        Assignment(
            name=name,
            kind=LayerKind.NORM if name.endswith("norm") else LayerKind.LINEAR,
            shapes=((64,),) if name.endswith("norm") else ((64, 64),),
            precision=option.precision,
            recipe=option.recipe,
            gemms_hp=option.gemms_hp,
        )
        for name, option in options.items()
    ]
    return Plan.model_validate(
        {
            "layers": layers,
            "uncovered": (),
            "constraint": Constraint(loss_tolerance=0.001, grad_error_budget=None),
            "fingerprint": FINGERPRINT,
            "grad_error": None,
            "grad_error_basis": Basis.UNKNOWN,
            "predicted": None,
            **fields,
        }
    )


# names that substrings and unescaped patterns would mix up
TRAPS = {
    "layers.1.w": TENSORWISE,
    "layers.10.w": BF16_O2,
    "layersX1.w": BF16_O2,
    "embed": TENSORWISE,
    "embedding_layer": BF16_O2,
    "norm": FP32,
}


class Named(nn.Module):
    """A model with linears of these names, called one after the other."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, nn.LayerNorm(64) if last == "norm" else nn.Linear(64, 64))
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


def run_snippet(text: str) -> dict[str, Any]:  # Any: a module's globals
    found: dict[str, Any] = {}
    exec(compile(text, "snippet", "exec"), found)
    return found


def fp8_configs(model: nn.Module) -> dict[str, Any]:  # Any: torchao ships no types
    """Return torchao's config of every converted layer by name."""
    float8_linear = import_torchao().float8_linear.Float8Linear
    named = model.named_modules(remove_duplicate=False)
    return {name: module.config for name, module in named if isinstance(module, float8_linear)}


# --- torchao -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        TRAPS,
        {"a": TENSORWISE, "b": GRAD_WEIGHT_HP, "c": TWO_HP, "d": ROWWISE, "e.norm": BF16_O2},
        {"a.b": fp8_option(Recipe.ROWWISE_WITH_GW_HP), "a.bb": BF16_O2},
        {"quote'\"\\n": ROWWISE, "größe": ROWWISE, "*": BF16_O2},
    ],
)
def test_torchao_code_converts_exactly_the_fp8_layers(options: dict[str, Option]) -> None:
    model = Named(list(options))
    parameters = dict(model.named_parameters())
    converted = run_snippet(export_plan(plan(options), "torchao"))["convert_fp8_layers"](model)
    expected = {name: float8_config(o) for name, o in options.items() if o.is_fp8}
    assert fp8_configs(converted) == expected
    assert dict(converted.named_parameters()).keys() == parameters.keys()
    converted.bfloat16()(torch.randn(16, 64, dtype=torch.bfloat16)).sum().backward()


def test_torchao_code_refuses_a_layer_with_two_names_and_converts_a_root() -> None:
    model = Named(["first", "second"])
    model.add_module("third", model.get_submodule("first"))
    snippet = run_snippet(export_plan(plan({"first": ROWWISE, "second": BF16_O2}), "torchao"))
    with pytest.raises(ValueError, match=r"layers of the plan are \['third'\] too"):
        snippet["convert_fp8_layers"](model)
    root = run_snippet(export_plan(plan({"": ROWWISE}), "torchao"))
    assert fp8_configs(root["convert_fp8_layers"](nn.Linear(16, 16))).keys() == {""}


def test_torchao_code_stops_at_a_layer_that_is_not_there() -> None:
    convert = run_snippet(export_plan(plan(TRAPS), "torchao"))["convert_fp8_layers"]
    with pytest.raises(ValueError, match=r"names \['embed'\], which are no linear layers"):
        convert(Named(["layers.1.w", "embedding_layer"]))


def test_torchao_code_gathers_fp8_where_it_can_and_says_where_not() -> None:
    options = {"a": TENSORWISE, "b": ROWWISE, "c": GRAD_WEIGHT_HP}
    text = export_plan(plan(options, fp8_all_gather=True), "torchao")
    configs = fp8_configs(run_snippet(text)["convert_fp8_layers"](Named(list(options))))
    gathers = {name: config.enable_fsdp_float8_all_gather for name, config in configs.items()}
    assert gathers == {"a": True, "b": False, "c": False}
    assert "gathers FP8 weights for tensorwise layers with all GEMMs in FP8, and no others" in text


# --- Accelerate --------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_code_converts_exactly_the_fp8_layers() -> None:
    text = export_plan(plan(TRAPS, fp8_all_gather=True), "accelerate")
    model = Named(list(TRAPS))
    recipe = run_snippet(text)["fp8_recipe"](model)
    accelerator = Accelerator(cpu=True, mixed_precision="fp8", kwargs_handlers=[recipe])
    optimizer = torch.optim.SGD(model.parameters())
    prepared, _ = accelerator.prepare(model, optimizer)
    configs = fp8_configs(accelerator.unwrap_model(prepared))
    assert configs.keys() == {"layers.1.w", "embed"}
    assert all(config.enable_fsdp_float8_all_gather for config in configs.values())
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # as the comment says


def test_accelerate_refuses_what_it_would_not_do() -> None:
    with pytest.raises(PlanMismatchError, match="runs one FP8 recipe"):
        export_plan(plan({"a": TENSORWISE, "b": ROWWISE}), "accelerate")
    with pytest.raises(PlanMismatchError, match="keeps grad_weight in BF16"):
        export_plan(plan({"a": GRAD_WEIGHT_HP}), "accelerate")
    with pytest.raises(PlanMismatchError, match="has head in fp32"):
        export_plan(plan({"a": TENSORWISE, "head": FP32}), "accelerate")
    with pytest.raises(PlanMismatchError, match="itself a linear layer"):
        export_plan(plan({"": TENSORWISE}), "accelerate")


# --- torchtitan --------------------------------------------------------------------------------


class TitanConverter:
    """The part of torchtitan 0.3.0's `Float8LinearConverter` that chooses layers."""

    class Config:
        def __init__(self, *, recipe_name: str, filter_fqns: list[str]) -> None:
            self.recipe_name, self.filter_fqns = recipe_name, filter_fqns

        def converts(self, name: str) -> bool:
            filters = [f for f in self.filter_fqns if f != "auto_filter_small_kn"]
            return not any(f in name for f in filters)


def titan_converters(text: str) -> list[TitanConverter.Config]:
    text = re.sub(r"^from torchtitan.*$", "", text, flags=re.MULTILINE)
    found: dict[str, Any] = {"Float8LinearConverter": TitanConverter}
    exec(compile(text, "snippet", "exec"), found)
    converters: list[TitanConverter.Config] = found["CONVERTERS"]
    return converters


@examples(20)
@given(st.dictionaries(NAMES, st.sampled_from([TENSORWISE, ROWWISE, BF16_O2]), min_size=1))
def test_torchtitan_filters_are_exact_or_refused(options: dict[str, Option]) -> None:
    options = {name: option for name, option in options.items() if not name.endswith("norm")}
    if not any(option.is_fp8 for option in options.values()):
        return
    try:
        converters = titan_converters(export_plan(plan(options), "torchtitan"))
    except PlanMismatchError as error:
        assert "filters by substring" in str(error)  # noqa: PT017 - either outcome is right
        return
    for name, option in options.items():
        recipes = [c.recipe_name for c in converters if c.converts(name)]
        assert recipes == ([option.recipe] if option.is_fp8 else [])


def test_torchtitan_refuses_a_substring_and_fp32_gemms() -> None:
    with pytest.raises(PlanMismatchError, match=r"'output' \(not .* of 'layers.0.output'"):
        export_plan(plan({"layers.0.output": ROWWISE, "output": BF16_O2}), "torchtitan")
    with pytest.raises(PlanMismatchError, match="has head in fp32"):
        export_plan(plan({"layers.0.output": ROWWISE, "head": FP32}), "torchtitan")
    with pytest.raises(PlanMismatchError, match="switches a layer's three GEMMs together"):
        export_plan(plan({"layers.0.output": GRAD_WEIGHT_HP}), "torchtitan")


def test_torchtitan_converts_exactly_the_fp8_layers_of_its_llama() -> None:
    quantization = pytest.importorskip("torchtitan.components.quantization")
    linear = importlib.import_module("torchtitan.models.common.linear").Linear.Config
    registry = importlib.import_module("torchtitan.models.llama3").model_registry
    names = [fqn for fqn, *_ in registry("debugmodel").model.traverse(linear)]
    assert "layers.1.feed_forward.w1" in names
    options = {n: (ROWWISE, TENSORWISE, BF16_O2)[i % 3] for i, n in enumerate(names)}
    converters = run_snippet(export_plan(plan(options), "torchtitan"))["CONVERTERS"]
    for converter in converters:
        converter.emulate = True  # its own check of the device knows no CPU
    model = registry("debugmodel", converters=converters).model
    float8 = quantization.Float8Linear.Config
    found = {fqn for fqn, cfg, *_ in model.traverse(linear) if isinstance(cfg, float8)}
    assert found == {name for name, option in options.items() if option.is_fp8}


# --- Megatron ----------------------------------------------------------------------------------


def megatron_config(file: dict[str, Any], name: str) -> str:  # Any: YAML values
    """Return the config that Megatron's first fitting matcher gives a module."""
    for matcher in file["matchers"].values():
        assert matcher["enabled"] is True
        assert matcher["type"] == "glob"
        if fnmatch.fnmatch(name, matcher["pattern"]):
            return str(matcher["config"])
    raise AssertionError("nothing fits")


@examples(20)
@given(st.dictionaries(NAMES, st.sampled_from([TENSORWISE, BF16_O2]), min_size=1), NAMES)
def test_megatron_matchers_are_exact(options: dict[str, Option], stranger: str) -> None:
    options = {"every other module": TENSORWISE, **options}
    text = export_plan(plan({n: o for n, o in options.items() if n[-4:] != "norm"}), "megatron")
    file = yaml.safe_load(text)
    for name in [*options, stranger]:
        is_fp8 = options.get(name, BF16_O2).is_fp8 and not name.endswith("norm")
        assert megatron_config(file, name) == ("fp8_o1" if is_fp8 else "bf16_o2")


def test_megatron_itself_reads_the_file(tmp_path: Path) -> None:
    quantization = pytest.importorskip("megatron.core.quantization.utils")
    engine = importlib.import_module("megatron.core.extensions.transformer_engine")
    path = tmp_path / "precision.yaml"
    path.write_text(export_plan(plan(TRAPS), "megatron"))
    recipe = quantization.load_quantization_recipe(str(path))
    for name, option in {**TRAPS, "stranger": BF16_O2}.items():
        matched = quantization.get_quant_config_or_none(name, recipe)
        training = engine.TEQuantizationParams.parse_from_config(matched).training_recipe
        expected = ("tensorwise", "hybrid") if option.is_fp8 else (None, "e4m3")
        assert (training.fp8_quantization_recipe, training.fp8_format) == expected
        assert training.override_quantized_autocast
        assert training.override_nonquantized_autocast is option.is_fp8


def test_megatron_refuses_what_its_file_has_no_word_for() -> None:
    with pytest.raises(PlanMismatchError, match="but a has rowwise"):
        export_plan(plan({"a": ROWWISE}), "megatron")
    with pytest.raises(PlanMismatchError, match="switches a layer's three GEMMs together"):
        export_plan(plan({"a": GRAD_WEIGHT_HP}), "megatron")
    with pytest.raises(PlanMismatchError, match="cannot be told to gather FP8 weights"):
        export_plan(plan({"a": TENSORWISE}, fp8_all_gather=True), "megatron")


@examples(20)
@given(NAMES, NAMES)
def test_an_exact_glob_fits_its_name_only(name: str, other: str) -> None:
    assert fnmatch.fnmatch(name, exact_glob(name))
    assert fnmatch.fnmatch(other, exact_glob(name)) is (other == name)


# --- Transformer Engine ------------------------------------------------------------------------


def engine_features(file: dict[str, Any], name: str) -> list[Any]:  # Any: YAML values
    """Return the features that a TE module of this name gets."""
    found = [
        section["transformer_engine"]
        for section in file.values()
        if re.search(section["layers"]["layer_name_regex_pattern"], name)
    ]
    assert len(found) <= 1  # nvdlfw-inspect refuses a second section for a layer
    return found


OFF = {"DisableQuantizationLayer": {"enabled": True}}
FP8_OR_NOT = st.sampled_from([TENSORWISE, GRAD_WEIGHT_HP, BF16_O2])


def engine_feature(option: Option) -> list[Any]:  # Any: YAML values
    gemms = {"enabled": True, "gemms": ["wgrad"]}
    return {
        TENSORWISE: [],
        GRAD_WEIGHT_HP: [{"DisableQuantizationGEMM": gemms}],
    }.get(option, [OFF])


@examples(20)
@given(st.dictionaries(NAMES, FP8_OR_NOT, min_size=1), NAMES)
def test_transformer_engine_patterns_are_exact(options: dict[str, Option], stranger: str) -> None:
    options = {"layers.1": TENSORWISE, **options}
    options = {name: option for name, option in options.items() if not name.endswith("norm")}
    file = yaml.safe_load(export_plan(plan(options), "transformer-engine"))
    for name in [*options, stranger]:
        expected = engine_feature(options.get(name, BF16_O2))
        assert engine_features(file, name) == expected
        assert engine_features(file, f"model.module.{name}") == expected
        assert engine_features(file, f"{name}.tail") == [OFF]


def test_transformer_engine_reads_delayed_scaling_and_refuses_names_it_cannot_tell_apart() -> None:
    text = export_plan(plan({"a": fp8_option(Recipe.DELAYED)}), "transformer-engine")
    assert "recipe=DelayedScaling()" in text
    with pytest.raises(PlanMismatchError, match=r"but 'a' and 'model\.a' do not"):
        export_plan(plan({"a": TENSORWISE, "model.a": BF16_O2}), "transformer-engine")
    both = {"a": TENSORWISE, "b": fp8_option(Recipe.DELAYED)}
    with pytest.raises(PlanMismatchError, match="runs one FP8 recipe, but this plan has several"):
        export_plan(plan(both), "transformer-engine")


def test_the_inspect_tool_itself_reads_the_file(tmp_path: Path) -> None:
    manager = pytest.importorskip("nvdlfw_inspect.config_manager").ConfigManager
    logging = importlib.import_module("nvdlfw_inspect.logging")
    path = tmp_path / "debug.yaml"
    options = {**TRAPS, "head": GRAD_WEIGHT_HP}
    path.write_text(export_plan(plan(options), "transformer-engine"))
    features = dict.fromkeys(["DisableQuantizationLayer", "DisableQuantizationGEMM"])
    spaces = {"transformer_engine": SimpleNamespace(features=features)}
    logging.initialize_logger(str(tmp_path))
    try:
        manager._load_config(str(path), spaces)
        for name, option in options.items():
            expected = engine_feature(option)
            found = manager.get_config_for_layer(f"model.{name}")
            assert found == ({"transformer_engine": expected[0]} if expected else {})
    finally:
        manager.reset()


# --- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("to", list(TARGETS))
def test_every_target_says_what_it_leaves_out_and_is_ascii(to: str) -> None:
    text = export_plan(plan({**TRAPS, "größe\n# x": TENSORWISE}), to)
    assert text.isascii()
    assert "# Not in here" in text
    assert text.startswith("# autoprec plan ")


def test_fp32_outside_of_layers_is_left_to_the_trainer_where_that_can_say_it() -> None:
    outside = plan({"a": TENSORWISE}, uncovered=("moves",), fp32_outputs=("moves",))
    assert "up to the next layer, is for your trainer too: moves." in export_plan(
        outside, "torchao"
    )
    for to in TARGETS.keys() - {"torchao"}:
        with pytest.raises(PlanMismatchError, match="the plan has moves in fp32"):
            export_plan(outside, to)


@pytest.mark.parametrize("to", list(TARGETS))
def test_every_target_refuses_what_none_can_say(to: str) -> None:
    with pytest.raises(PlanMismatchError, match="this plan has none"):
        export_plan(plan({"a": BF16_O2}), to)
    with pytest.raises(
        PlanMismatchError, match="only linear layers run in FP8, but the plan has norm"
    ):
        export_plan(plan({"norm": TENSORWISE}), to)
    phases = (Phase(start_step=0, fp8=False), Phase(start_step=9, fp8=True))
    with pytest.raises(PlanMismatchError, match="switches FP8 on and off at 2 steps"):
        export_plan(plan({"a": TENSORWISE}, schedule=phases), to)


def test_an_unknown_target_is_named_with_the_known_ones() -> None:
    with pytest.raises(RecordError, match="transformer-engine, but it is 'deepspeed'"):
        export_plan(plan(TRAPS), "deepspeed")


@examples(20)
@given(st.text(st.characters(codec="utf-8")))
def test_yaml_strings_read_back_to_the_character(text: str) -> None:
    assert yaml.safe_load(yaml_string(text)) == text
