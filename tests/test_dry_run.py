"""`tune --dry-run`: what there is and what would be done, with nothing measured or written."""

from pathlib import Path

import pytest

from autoprec.cli.main import main
from autoprec.profiler.layers import LayerMeter

TINY = Path(__file__).parent / "workloads" / "tiny.py"


@pytest.mark.parametrize("more", [["--target", "cpu"], ["--target", "h100-sxm", "--meta"]])
def test_a_dry_run_lists_layers_and_choices_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    monkeypatch.delattr(LayerMeter, "time_group")
    monkeypatch.setenv("COLUMNS", "150")
    words = ["tune", str(TINY), "--dry-run", "--out", str(tmp_path / "out"), "--trials", "7", *more]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--keep", "*=bf16_o2", "--no-verify"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "*=bf16_o2" in said
    assert "fixed by --keep; nothing was timed or written" in said
    assert "search: up to 7 plans" in said
    assert "proof: none (--no-verify)" in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main([*words, "--keep", "nosuch*=bf16_o2"])
    assert ended.value.code == 2
    assert "nosuch" in capsys.readouterr().err


def test_a_layer_that_shares_a_parameter_with_a_kept_one_is_said_to_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tied.py"
    path.write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build_model():\n"
        "    model = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 32))\n"
        "    model[1].weight = model[0].weight\n"
        "    return model\n"
        "def train_batches(seed):\n"
        "    while True:\n"
        "        yield torch.arange(16)\n"
        "def loss_fn(model, batch):\n"
        "    return model(batch).square().mean()\n"
    )
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit):
        main(["tune", str(path), "--dry-run", "--target", "cpu", "--keep", "1=bf16_o2"])
    said = capsys.readouterr().out
    (follows,) = [line for line in said.splitlines() if line.startswith("0 ")]
    assert follows.rstrip().endswith("tied to 1: 1=bf16_o2")
    assert "2 layers, 2 fixed by --keep" in said


def test_no_device_offers_fp8_for_a_weight_that_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`apply` refuses them: a device profile is told so before the sensitivity."""
    path = tmp_path / "normed.py"
    path.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torch.nn.utils import parametrizations, weight_norm\n"
        "def build_model():\n"
        "    normed = parametrizations.weight_norm(nn.Linear(32, 32))\n"
        "    spectral = parametrizations.spectral_norm(nn.Linear(32, 32))\n"
        "    return nn.Sequential(normed, spectral, weight_norm(nn.Linear(32, 32)), "
        "nn.Linear(32, 32))\n"
        "def train_batches(seed):\n"
        "    while True:\n"
        "        yield torch.ones(16, 32)\n"
        "def loss_fn(model, batch):\n"
        "    return model(batch).square().mean()\n"
    )
    monkeypatch.setenv("COLUMNS", "200")
    for more in ([], ["--meta"]):
        with pytest.raises(SystemExit), pytest.warns(FutureWarning, match="weight_norm"):
            main(["tune", str(path), "--dry-run", "--target", "h100-sxm", *more])
        said = capsys.readouterr().out
        (takes,) = [line for line in said.splitlines() if "fp8_o1" in line]
        assert takes.startswith("3 ")
        assert "its weight is parametrized" in said
        assert "its weight is made anew" in said
