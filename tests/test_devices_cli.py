"""`autoprec devices` as a user runs it: output and exit status."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from autoprec.cli.main import main


class Done(NamedTuple):
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str, status: int = 0) -> Done:
        with pytest.raises(SystemExit) as leaving:
            main(["devices", *arguments])
        found = capsys.readouterr()
        assert leaving.value.code == status, found.err
        return Done(found.out, found.err)

    return call


def test_no_command_but_measure_needs_torch(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("device,M,K,N\nh200,4096,8192,1024\n")
    code = (
        "import sys; from autoprec.cli.devices import devices_app as app\n"
        "for words in (['list'], ['show', 'h100'], ['predict', '--csv', sys.argv[1]]):\n"
        "    app(words, standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(table)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_list_and_show_name_every_device_and_source(run: Run) -> None:
    listed = run("list").stdout
    assert "h100-sxm" in listed
    assert "no FP8: the A100" in listed
    devices = json.loads(run("list", "--json").stdout)["devices"]
    assert {"name", "title", "fp8_recipes", "fp8_reason"} <= set(devices[0])
    shown = run("show", "h100").stdout
    assert "bf16_peak_tflops" in shown
    assert "datasheet" in shown
    assert "software assumed: torch 2.11, CUDA 13.0, torchao 0.18" in shown
    assert json.loads(run("show", "h100-sxm", "--json").stdout)["kind"] == "device_profile"


def test_predict_prints_times_and_speedups_with_intervals(run: Run) -> None:
    text = run("predict", "h100-sxm", "--shape", "8192x4096x14336").stdout
    for word in (
        "output",
        "grad_input",
        "grad_weight",
        "cast",
        "total",
        "BF16",
        "FP8",
        "CUDA 13.0",
    ):
        assert word in text
    found = json.loads(run("predict", "H100", "--shape", "8192x4096x14336", "--json").stdout)
    assert found["compiled"] is True
    assert found["recipe"] == "tensorwise"
    assert found["speedup"]["low"] < found["speedup"]["value"] < found["speedup"]["high"]
    assert {"output_ms", "grad_input_ms", "grad_weight_ms", "cast_ms", "total_ms"} <= set(
        found["fp8"]
    )


def test_predict_says_why_fp8_cannot_run(run: Run) -> None:
    text = run("predict", "h100-sxm", "--shape", "8192x4096x10").stdout
    assert "N=10 is not a multiple of 16" in text
    found = json.loads(run("predict", "a100", "--shape", "64x64x64", "--eager", "--json").stdout)
    assert found["fp8"] is None
    assert found["bf16"]["total_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("predict", "h100-sxm", "--shape", "8192x4096"), "--shape must be MxKxN"),
        (("predict", "h100-sxm"), "got no --shape"),
        (("predict",), "got neither"),
        (("predict", "h100-sxm", "--shape", "0x16x16"), "must be between 1 and"),
        (("predict", "nothing", "--shape", "16x16x16"), "a device must be"),
        (
            ("predict", "h100-sxm", "--shape", "16x16x16", "--recipe", "odd"),
            "a recipe must be one of",
        ),
        (("show", "h10"), "nearest: "),
        (("predict", "--csv", "/nowhere.csv"), "must be readable"),
        (("predict", "--csv", "/nowhere.csv", "--json"), "--json came with it"),
        (("predict", "--csv", "/nowhere.csv", "--shape", "16x16x16"), "--shape came with it"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Run, arguments: tuple[str, ...], words: str
) -> None:
    done = run(*arguments, status=2)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_a_csv_keeps_its_columns_order_and_rows(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "rows.csv"
    table.write_text(
        "tag,device,M,K,N,recipe,compiled\n"
        '"a, b",H100 SXM,8192,4096,4096,rowwise dynamic,yes\n'
        "c,NVIDIA H100 80GB HBM3,8192,4096,4096,tensorwise,no\n"
        "d,a100,8192,4096,4096,delayed,yes\n"
        "e,h100-pcie,8192,4096,4090,blockwise,yes\n"
        "f,Z80,8192,4096,4096,tensorwise,yes\n"
        "g,B200,8192,4096,4096,mxfp8,yes\n"
        "h,h100,8192,many,4096,tensorwise,yes\n"
    )
    done = run("predict", "--csv", str(table))
    found = rows(done.stdout)
    assert [row["tag"] for row in found] == ["a, b", "c", "d", "e", "f", "g", "h"]
    assert done.stdout.startswith("tag,device,M,K,N,recipe,compiled,profile,bf16_output_ms")
    assert found[0]["profile"] == found[1]["profile"] == "h100-sxm"
    assert float(found[0]["speedup_low"]) < float(found[0]["speedup"])
    assert float(found[1]["speedup"]) < 1  # eager casts
    assert "no FP8" in found[2]["refusal"]
    assert float(found[2]["bf16_total_ms"]) > 0
    assert found[2]["speedup"] == found[2]["fp8_total_ms"] == ""
    assert "N=4090" in found[3]["refusal"]
    assert "nearest" in found[4]["refusal"] or "shows all names" in found[4]["refusal"]
    assert found[4]["bf16_total_ms"] == ""
    assert float(found[5]["speedup"]) > 1
    assert "K must be a positive whole number" in found[6]["refusal"]
    assert "2 of 7 rows not predicted" in caplog.text


def test_a_csv_says_the_same_as_a_single_prediction(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("device,M,K,N\nh200,4096,8192,1024\n")
    row = rows(run("predict", "--csv", str(table), "--recipe", "rowwise").stdout)[0]
    arguments = ("predict", "h200", "--shape", "4096x8192x1024", "--recipe", "rowwise", "--json")
    single = json.loads(run(*arguments).stdout)
    assert float(row["speedup"]) == pytest.approx(single["speedup"]["value"], rel=1e-4)
    assert float(row["fp8_cast_ms"]) == pytest.approx(single["fp8"]["cast_ms"], rel=1e-4)


def test_a_csv_without_its_columns_is_an_error(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("device,M,K\nh100,16,16\n")
    assert "lacks N" in run("predict", "--csv", str(table), status=2).stderr


def test_a_csv_of_which_nothing_is_predicted_still_has_its_rows(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("device,M,K,N\nZ80,16,16,16\n/nowhere.json,16,16,16\nh100,16,16,16,16\n")
    done = run("predict", "--csv", str(table), status=2)
    found = rows(done.stdout)
    assert "a device must be" in done.stderr
    assert [row["M"] for row in found] == ["16", "16", "16"]
    for row, words in zip(found, ("Z80", "/nowhere.json", "at most the header's 4"), strict=True):
        assert words in row["refusal"]


def test_a_name_is_for_rows_without_a_device(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("device,M,K,N\n,4096,4096,4096\nb200,4096,4096,4096\n")
    found = rows(run("predict", "h200", "--csv", str(table)).stdout)
    assert [row["profile"] for row in found] == ["h200", "b200"]
    table.write_text("M,K,N\n4096,4096,4096\n")
    assert rows(run("predict", "h200", "--csv", str(table)).stdout)[0]["profile"] == "h200"


def test_a_column_that_the_input_has_is_told_from_the_predicted_one(
    run: Run, tmp_path: Path
) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("device,M,K,N,Speedup,profile\nh200,4096,4096,4096,9.5,mine\n")
    text = run("predict", "--csv", str(table)).stdout
    header = next(csv.reader(io.StringIO(text)))
    assert len({name.lower() for name in header}) == len(header)
    row = rows(text)[0]
    assert (row["Speedup"], row["profile"]) == ("9.5", "mine")
    assert row["predicted_profile"] == "h200"
    assert 0 < float(row["predicted_speedup"]) < 3
    assert row["speedup_low"]


def test_an_empty_table_is_its_header_alone(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("device,M,K,N,recipe,compiled\n")
    assert rows(run("predict", "--csv", str(table)).stdout) == []
