"""What `import autoprec` gives."""

import subprocess
import sys

import pytest

import autoprec


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, autoprec; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there_and_documented() -> None:
    for name in autoprec.__all__:
        assert getattr(autoprec, name).__doc__
        assert name in dir(autoprec)
        assert name in (autoprec.__doc__ or "")


def test_all_lists_what_the_type_checker_sees() -> None:
    names = {name for name in dir(autoprec) if not name.startswith("_")}
    assert names - {"import_module", "TYPE_CHECKING"} - {"runtime", "guard"} >= set(
        autoprec.__all__
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'autoprec' has no attribute 'aply'"):
        _ = autoprec.aply
