"""What `import autoprec` gives."""

import ast
import doctest
import re
from contextlib import chdir
from pathlib import Path

import pytest

import autoprec


def _type_checker_sees() -> set[str]:
    """Return the names that the `if TYPE_CHECKING:` block of the package imports."""
    tree = ast.parse(Path(autoprec.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _errors() -> set[str]:
    return {name for name in vars(autoprec.errors) if name.endswith("Error")}


def test_every_public_name_is_there_and_documented() -> None:
    for name in autoprec.__all__:
        assert getattr(autoprec, name).__doc__
        assert name in dir(autoprec)


def test_one_list_of_names_in_all_the_docstring_and_for_the_type_checker() -> None:
    described = re.findall(r"^(\w+(?:, \w+)*) {2,}\S", autoprec.__doc__ or "", re.MULTILINE)
    names = set(", ".join(described).split(", ")) - {"errors"}
    assert sorted(names | _errors()) == sorted(autoprec.__all__)
    assert _type_checker_sees() | _errors() == set(autoprec.__all__)


HAVE_EXAMPLES = [
    "Guard",
    "Plan",
    "apply",
    "attach_optimizer",
    "load_checkpoint",
    "master_view",
    "tune",
    "undo",
    "verify_applied",
]


@pytest.mark.parametrize("name", HAVE_EXAMPLES)
def test_the_example_of_a_public_name_runs(name: str, tmp_path: Path) -> None:
    public = getattr(autoprec, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(public, name)
    assert found.examples
    said: list[str] = []
    with chdir(tmp_path):
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=said.append)
    assert said == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'autoprec' has no attribute 'aply'"):
        _ = autoprec.aply
