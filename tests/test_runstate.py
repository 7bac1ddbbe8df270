"""`--resume` repeats a stage when something that it was made of has changed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from autoprec.errors import RecordError
from autoprec.predict import load_device_profile, predict_profile
from autoprec.records import Profile
from autoprec.tuning.folder import staged
from autoprec.tuning.settings import Settings
from tests.decoder_specs import linear_layer, model_of

Resumed = Callable[[], bool]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return load_device_profile("h100-sxm").save(tmp_path / "card.json")


@pytest.fixture
def resumed(tmp_path: Path, target: Path) -> Resumed:
    """Return a function that runs the profile stage and says whether it was loaded."""

    def run() -> bool:
        settings = Settings(workload="none.py", target=str(target), out=tmp_path, resume=True)
        made: list[Profile] = []

        def make() -> Profile:
            spec = model_of(linear_layer("fc", 64, 64, shape=(32,)))
            made.append(predict_profile(spec, load_device_profile(target)))
            return made[-1]

        profile = staged(settings, "profile", Profile, make)
        assert profile == (made[0] if made else Profile.load(tmp_path / "profile.json"))
        return not made

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


def test_a_device_profile_that_is_gone_is_an_error(target: Path, resumed: Resumed) -> None:
    assert not resumed()
    target.unlink()
    with pytest.raises(RecordError, match="check the path"):
        resumed()
