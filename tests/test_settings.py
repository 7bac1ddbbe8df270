"""What the command line asks for is checked before anything is captured."""

from dataclasses import replace
from pathlib import Path

import pytest

from autoprec.cli.main import main
from autoprec.errors import DeviceError
from autoprec.tuning.settings import Settings


@pytest.mark.parametrize("target", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize("parallel", ["tp=8", "nonsense"])
def test_parallel_on_a_device_that_is_here_is_refused(target: str, parallel: str) -> None:
    with pytest.raises(DeviceError, match="--parallel needs a device profile as its target"):
        Settings(target=target, parallel=parallel)
    assert not Settings(target=target).parallel


def test_parallel_is_read_before_anything_runs() -> None:
    settings = Settings(target="h100-sxm", parallel="FSDP=8")
    with pytest.raises(DeviceError, match="--parallel must be fsdp=N, tp=N, gather=fp8"):
        replace(settings, parallel="nonsense")


@pytest.mark.parametrize("options", [["nonsense"], ["tp=8"], ["nope=1", "--target", "h100-sxm"]])
def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    command = ["profile", str(tmp_path / "none.py"), "--out", str(tmp_path), "--parallel", *options]
    with pytest.raises(SystemExit) as leaving:
        main(command)
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert len(err.splitlines()) == 1
    assert "--parallel" in err
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.parametrize("command", ["tune", "profile"])
def test_the_help_names_every_part_of_parallel(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert [part for part in ("fsdp=", "tp=", "gather=fp8", "ac=full") if part not in shown] == []
