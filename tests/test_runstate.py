"""`--resume` repeats a stage when something that it was made of has changed."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from autoprec.errors import RecordError
from autoprec.predict import load_device_profile
from autoprec.records import ModelSpec, Recipe
from autoprec.report import load_run
from autoprec.tuning.folder import INPUTS, Folder
from autoprec.tuning.run import Run
from autoprec.tuning.settings import STAGES, Settings, all_settings
from tests.decoder_specs import linear_layer, model_of
from tests.report_runs import make_run

Resumed = Callable[[], bool]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return load_device_profile("h100-sxm").save(tmp_path / "card.json")


@pytest.fixture
def resumed(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Resumed:
    """Return a function that runs the profile stage and says whether it was loaded."""
    spec = model_of(linear_layer("fc", 64, 64, shape=(32,)))
    captured: list[int] = []

    def run() -> bool:
        captured.clear()
        settings = Settings(workload="none.py", target=str(target), out=tmp_path, resume=True)
        made = Run(settings, stages=("profile",))
        assert made.profile.model.layers[0].name == "fc"
        return not captured

    def capture(_: Run) -> ModelSpec:
        captured.append(1)
        return spec

    monkeypatch.setattr(Run, "spec", property(capture))
    return run


def test_an_edited_device_profile_is_predicted_again(target: Path, resumed: Resumed) -> None:
    assert not resumed()
    assert resumed()
    profile = load_device_profile(target)
    faster = profile.constants["memory_bandwidth_tbs"].model_copy(update={"value": 4.0})
    constants = {**profile.constants, "memory_bandwidth_tbs": faster}
    profile.model_copy(update={"constants": constants}).save(target)
    assert not resumed()
    assert resumed()


def test_resuming_on_another_device_says_why(
    tmp_path: Path, resumed: Resumed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not resumed()

    def said(target: str) -> str:
        settings = Settings(workload="none.py", target=target, out=tmp_path, resume=True)
        return Run(settings, stages=("profile",)).resumes

    start = "--resume keeps no finished stage; made now: profile"
    assert said("h200") == f"{start} (profile.json was made for h100-sxm, and this is h200)"
    monkeypatch.setattr("autoprec.device.local.device_name", lambda _: "a CPU")
    assert said("cpu") == f"{start} (profile.json was made for h100-sxm, and this is a CPU)"
    assert said("h100-sxm") == start  # the card's file changed, and the device did not
    (tmp_path / "profile.json").unlink()
    assert said("h200") == start


def test_a_device_profile_that_is_gone_is_an_error(target: Path, resumed: Resumed) -> None:
    assert not resumed()
    target.unlink()
    with pytest.raises(RecordError, match="check the path"):
        resumed()


# Another value of every setting that decides a stage, beside those that the test itself needs.
OTHERS: dict[str, Any] = {  # Any: of the settings' own types
    "script_args": ("--width", "8"),
    "script_steps": 64,
    "target": "h200",
    "loss_tolerance": 0.01,
    "run_steps": 2000,
    "global_batch_tokens": 4096,
    "seeds": (4, 8),
    "warmup_steps": 100,
    "branch_steps": 50,
    "horizons": (75, 150),
    "verify_budget": 1800.0,
    "metric_tolerance": ("accuracy>=-0.2",),
    "memory": 2**30,
    "keep": ("fc=bf16_o2",),
    "recipes": (Recipe.ROWWISE,),
    "gemms_hp": False,
    "trials": 3,
    "time_budget": 60.0,
    "seed": 1,
    "storage": "sqlite:///other.db",
    "study": "other",
    "checkpoint": Path("weights.pt"),
    "sensitivity": Path("other.json"),
    "proxy": "small.py",
    "parallel": "tp=2",
    "compile": False,
    "meta": True,
}
BASE = Settings(workload="none.py", target="h100-sxm")


def digest_of(settings: Settings, stage: str, folder: Path) -> str:
    return Folder(folder).digest(stage, settings, settings.device_profile())


def test_a_profile_of_another_device_is_made_again(tmp_path: Path) -> None:
    folder, settings = Folder(tmp_path), Settings(workload="none.py")
    h100, h200 = (
        folder.digest("profile", settings, None, device=name) for name in ("H100", "H200")
    )
    assert h100 != h200
    assert h100 == folder.digest("profile", settings, None, device="H100")


FILES = {  # what model.py imports, and what those import
    "model.py": "import torch\nimport layers.norms\nfrom data import batches\n",
    "data.py": "from layers import size\n",
    "layers/__init__.py": "from .heads import Head\nfrom ..data import x\n",
    "layers/norms.py": "def f():\n    from layers.late import Norm\n",
    "layers/heads.py": "",
    "layers/late.py": "from ....above import x\n",
}


@pytest.mark.parametrize("name", [*FILES, "other.py", "../above.py", "layers/other.py"])
def test_an_edited_file_repeats_what_is_made_by_those_that_import_it(
    name: str, tmp_path: Path
) -> None:
    root = tmp_path / "project"
    (root / "layers").mkdir(parents=True)
    for file, text in FILES.items():
        (root / file).write_text(text)
    settings = Settings(workload=str(root / "model.py"), target="h100-sxm")
    before = digest_of(settings, "profile", tmp_path)
    assert before == digest_of(settings, "profile", tmp_path)
    (root / name).write_text(FILES.get(name, "") + "x = 1\n")
    assert (before == digest_of(settings, "profile", tmp_path)) == (name not in FILES)


def test_an_edited_package_repeats_what_is_made_by_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    monkeypatch.chdir(tmp_path)
    settings = Settings(script="-m", script_args=("pkg.train",), target="h100-sxm")
    (package / "train.py").write_text("from pkg.net import Net\n")
    before = digest_of(settings, "profile", tmp_path)
    assert before == digest_of(settings, "profile", tmp_path)
    (package / "net.py").write_text("class Net: ...\n")
    assert before != digest_of(settings, "profile", tmp_path)


@pytest.mark.parametrize("name", ["weights.pt", "model.py", "small.py", "given.json"])
def test_an_edited_file_repeats_a_stage_wherever_the_users_code_went(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = Settings(
        workload="model.py", checkpoint=Path("weights.pt"), sensitivity=Path("given.json")
    )
    settings = settings if name != "small.py" else Settings(workload="model.py", proxy="small.py")
    folder = Folder(tmp_path)
    monkeypatch.chdir("elsewhere")
    digests = set()
    for text in ("x = 1", "x = 2"):
        (tmp_path / name).write_text(text)
        digests.add(folder.digest("sensitivity", settings, None))
    assert len(digests) == 2


@pytest.mark.parametrize("name", OTHERS)
def test_a_changed_setting_repeats_the_stages_that_it_decides(name: str, tmp_path: Path) -> None:
    changed = replace(BASE, **{name: OTHERS[name]})
    decided = all_settings()[name].stages
    assert decided
    for stage in STAGES:
        is_same = digest_of(BASE, stage, tmp_path) == digest_of(changed, stage, tmp_path)
        assert is_same == (stage not in decided), stage


def test_every_setting_decides_a_stage_or_is_known_to_decide_none() -> None:
    needs_a_file = {"workload", "script", "batch", "sequence"}
    decides_none = {"out", "verify", "resume", "memory_limit", "workers", "launcher", "worker"}
    names = {each.name for each in fields(Settings)}
    assert names == {*OTHERS, *needs_a_file, *decides_none}
    assert {name for name, known in all_settings().items() if not known.stages} == decides_none
    assert all(all_settings()[name].stages for name in needs_a_file)


def test_a_stage_is_made_of_earlier_ones_only() -> None:
    assert tuple(INPUTS) == STAGES
    for stage, inputs in INPUTS.items():
        assert all(STAGES.index(name) < STAGES.index(stage) for name in inputs)


def test_a_folder_knows_the_script_of_its_run(tmp_path: Path) -> None:
    run, folder = make_run(), Folder(tmp_path)
    assert run.profile
    assert run.sensitivity
    for record, script, known in (
        (run.profile, "train.py --lr 1", "train.py --lr 1"),
        (run.sensitivity, "", "train.py --lr 1"),  # a later command names no workload
        (run.profile, "", ""),  # another run begins
    ):
        folder.keep(record, "digest", script=script)
        assert load_run(tmp_path).script == known
