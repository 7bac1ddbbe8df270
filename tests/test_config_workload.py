"""A transformers config is a workload with --meta, and one clear line in every other case."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from autoprec.cli.main import main
from autoprec.errors import WorkloadError
from autoprec.model.meta import capture_on_meta
from autoprec.records import Basis, ModelSpec, Plan
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings
from autoprec.workload.functions import workload_from
from autoprec.workload.hf_config import config_file, config_model

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "torch_dtype": "bfloat16",
}
TARGET = "h100-sxm"
META = ("--meta", "--target", TARGET)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"the network was asked for {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def config_in(folder: Path, **fields: Any) -> Path:  # Any: what a config takes
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**TINY, **fields}))
    return path


def captured(file: Path, **shape: int) -> ModelSpec:
    return capture_on_meta(workload_from(config_model(file, **shape)))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.endswith("...")]
    assert (leaving.value.code, captured.out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("autoprec: error: ")
    return lines[0]


def test_tune_plans_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = config_in(tmp_path / "cfg").parent, tmp_path / "run"
    options = ("--batch", "2", "--sequence", "16", "--trials", "0", "--json")
    with pytest.raises(SystemExit) as leaving:
        main(["tune", str(folder), *META, *options, "--out", str(out)])
    assert not leaving.value.code
    found = json.loads(capsys.readouterr().out)
    assert (found["grad_error_basis"], found["verdict"]) == ("unknown", "not_run")
    plan = Plan.load(out / "plan.json")
    assert plan.fingerprint.tokens_per_step == 32
    assert plan.fingerprint.time_basis is Basis.PREDICTED
    assert {"lm_head", "model.layers.0.mlp.down_proj"} <= {layer.name for layer in plan.layers}


def test_the_assumed_shape_of_a_step_is_told_and_in_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_in(tmp_path)
    with pytest.raises(SystemExit):
        main(["profile", str(file), *META, "--out", str(tmp_path / "run"), "--json"])
    assert "1 x 32 tokens; --batch and --sequence say otherwise" in caplog.text
    assert json.loads(capsys.readouterr().out)["model"]["tokens_per_step"] == 32


@pytest.mark.parametrize(("limit", "taken"), [(32, 32), (131072, 4096), (None, 4096)])
def test_the_sequence_is_at_most_what_the_config_allows_and_4096(
    limit: int | None, taken: int, tmp_path: Path
) -> None:
    kind = {"max_position_embeddings": limit} if limit else BLOOM
    assert captured(config_in(tmp_path, **kind)).tokens_per_step == taken


BLOOM = {"model_type": "bloom", "n_layer": 1, "n_head": 4, "max_position_embeddings": None}


def test_a_config_saved_in_bf16_is_trained_in_fp32(tmp_path: Path) -> None:
    spec = captured(config_in(tmp_path))
    assert {parameter.dtype for parameter in spec.parameters()} == {"float32"}


def test_the_decoder_is_the_one_that_its_own_class_builds(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    own = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"}))
    spec = captured(config_in(tmp_path), batch=3, sequence=8)
    assert sum(p.numel for p in spec.parameters()) == sum(p.numel() for p in own.parameters())
    assert spec.tokens_per_step == 24


@pytest.mark.slow
def test_resuming_with_another_shape_or_config_predicts_again(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def tokens(batch: int, *, resume: bool = True) -> tuple[int, int]:
        settings = Settings.of(
            workload=str(tmp_path), meta=True, target=TARGET, out=out, batch=batch, resume=resume
        )
        found = Run(settings).profile.model.tokens_per_step
        return found, (out / "profile.json").stat().st_mtime_ns

    config_in(tmp_path)
    first = tokens(2, resume=False)
    assert tokens(2) == first
    assert tokens(3)[0] == 96
    config_in(tmp_path, max_position_embeddings=16)
    assert tokens(3)[0] == 48


def test_without_meta_a_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_in(tmp_path)
    for given in (file, tmp_path):
        line = refusal(capsys, "tune", given, "--out", tmp_path / "run")
        assert "random weights say nothing of convergence" in line
        assert "build_model" in line


def test_sizes_are_for_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--batch", "--sequence"):
        line = refusal(capsys, "tune", "model.py", *META, option, "8")
        assert "for a workload that is a transformers config, but it is 'model.py'" in line


WRONG: dict[str, tuple[str, str]] = {
    "no decoder": ('{"model_type": "vit"}', "model_type is 'vit'"),
    "unknown": ('{"model_type": "zebra"}', "model_type is 'zebra'"),
    "code beside it": (
        '{"model_type": "zebra", "auto_map": {"AutoConfig": "zebra.Config"}}',
        "code beside a config is not run",
    ),
    "no kind": ('{"hidden_size": 64}', "a model_type, but it has none"),
    "a list": ("[1]", "a model_type, but it has none"),
    "no JSON": ('{"model_type"', "must be JSON"),
    "a wrong type": ('{"model_type": "llama", "hidden_size": "big"}', "expected int, got str"),
    "sizes at odds": (
        '{"model_type": "llama", "hidden_size": 33, "num_attention_heads": 2}',
        "not a multiple",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_cannot_be_built_gets_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = WRONG[case]
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "zebra.py").write_text("raise SystemExit('code beside the config was run')")
    line = refusal(capsys, "tune", tmp_path, *META, "--out", tmp_path / "run")
    assert words in line
    assert "config.json" in line


def test_a_config_of_several_texts_is_read_as_its_decoder(tmp_path: Path) -> None:
    small = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1}
    parts = {
        "text_encoder": {"model_type": "t5", "vocab_size": 32},
        "audio_encoder": {"model_type": "encodec"},
        "decoder": {**small, "max_position_embeddings": 16},
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "musicgen_melody", **parts}))
    with pytest.raises(WorkloadError, match=r"--sequence must be at most .* 16, but it is 32"):
        config_model(file, batch=1, sequence=32)


def test_experts_are_refused_because_their_times_are_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_in(tmp_path, model_type="mixtral", num_local_experts=4)
    line = refusal(
        capsys, "tune", file, *META, "--batch=1", "--sequence=16", "--out", tmp_path / "run"
    )
    assert "without experts" in line
    assert "MixtralExperts" in line


@pytest.mark.parametrize("asked", ["flash_attention_2", "kernels-community/flash-attn"])
def test_a_kernel_that_is_not_here_is_not_asked_for(asked: str, tmp_path: Path) -> None:
    file = config_in(
        tmp_path, attn_implementation=asked, quantization_config={"quant_method": "fp8"}
    )
    assert captured(file, batch=1, sequence=16).tokens_per_step == 16


@pytest.mark.parametrize("said", [["LlamaForSequenceClassification"], "LlamaModel"])
def test_a_config_of_another_model_than_the_decoder_is_refused(
    said: list[str] | str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_in(tmp_path, architectures=said)
    line = refusal(capsys, "tune", file, *META, "--out", tmp_path / "run")
    assert "of the decoder that is built from it, LlamaForCausalLM" in line
    assert captured(config_in(tmp_path, architectures=["LlamaForCausalLM"])).tokens_per_step == 32


def test_a_sequence_beyond_the_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_in(tmp_path)
    line = refusal(capsys, "tune", file, *META, "--sequence", "33", "--out", tmp_path / "run")
    assert "max_position_embeddings" in line
    assert "32, but it is 33" in line


def test_missing_transformers_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = refusal(capsys, "tune", config_in(tmp_path), *META, "--out", tmp_path / "run")
    assert "pip install transformers" in line


def test_only_json_files_and_folders_with_a_config_are_configs(tmp_path: Path) -> None:
    assert config_file("") is None
    assert config_file(str(tmp_path)) is None
    file = config_in(tmp_path)
    assert config_file(str(tmp_path)) == config_file(str(file)) == file
    assert config_file(str(tmp_path / "other.json")) is None
    assert config_file(__file__) is None
