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
