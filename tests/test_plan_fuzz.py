"""A plan file is hostile input: whatever is in it, it is a valid plan or one error of one line."""

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import autoprec
from autoprec.common.files import MAX_RECORD_BYTES
from autoprec.errors import AutoprecError, RecordError
from autoprec.model.layers import comes_from_plan
from autoprec.records import FP32, Phase, Plan, PredictedStep, Recipe, fp8_option
from autoprec.records.base import MAX_VALUES
from tests.examples import examples
from tests.models import Mlp
from tests.plans import plan_for
from tests.ranks import exit_code_of

Json = Any  # Any: JSON values, objects as `Pairs`
Mutation = tuple[str, int, Json]
MODEL = Mlp()
OTHERS = {"second": fp8_option(Recipe.ROWWISE), "norm": FP32}
PLAN = plan_for(MODEL, fp8_option(Recipe.TENSORWISE), OTHERS).model_copy(
    update={
        "predicted": PredictedStep(plan_ms=1, fp32_ms=2, bf16_o2_ms=1.5),
        "schedule": (Phase(start_step=10, fp8=True),),
        "notes": ("a note",),
    }
)
TEXT = PLAN.to_json()
CODE = "__import__('os').system('touch owned')"
HOSTILE: list[Json] = [
    None, True, False, 0, -1, 1, 3.5, -0.0, 1e308, 2**63, -(2**200), 10**4299, 1e-320,
    float("nan"), float("inf"), -float("inf"),
    "", "3", "null", "first", "second", "head", "fp32", "bf16_o2", "fp8_o1", "tensorwise",
    "rowwise", "rowwise_with_gw_hp", "delayed", "output", "linear", "norm", "torch.nn.Linear",
    "../../etc/passwd", "file:///etc/passwd", CODE, "!!python/object/apply:os.system ['id']",
    "{{ 7 * 7 }}", "<script>alert(1)</script>", "[/bold]", "[red]", "%s%n", "a\nb", "a\r\nb", "\0",
    "\x1b[2J", "\x7f", "\ud800", "\udfff", "\u2028", "\u202e", "\ufeff", "\U0001f4a5", "x" * 5000,
    [], [[]], [None], [1, 2], [-1], [2**70], ["first"], {}, {"a\nb": 1}, {"": None},
    {"__class__": "os"}, {"$ref": "file:///etc/passwd"},
]  # fmt: skip
OPERATIONS = ("replace", "delete", "double", "rename", "swap", "wrap", "copy")
values = st.one_of(
    st.sampled_from(HOSTILE), st.sampled_from(HOSTILE), st.text(max_size=8), st.integers()
)
mutations = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 10**6), values), min_size=1, max_size=3
)
cuts = st.tuples(st.integers(0, 10**6), st.integers(0, 6), st.binary(max_size=4))


class Pairs(list[tuple[str, Json]]):
    """An object that may have a key twice."""


def as_pairs(value: Json) -> Json:
    return json.loads(json.dumps(value), object_pairs_hook=Pairs)


def as_text(value: Json) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{as_text(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_text, value)) + "]"
    return json.dumps(value)


def slots(value: Json) -> Iterator[tuple[list[Any], int]]:
    """Yield every place in a tree as a container and a position in it."""
    if isinstance(value, list):
        for position, item in enumerate(value):
            yield value, position
            yield from slots(item[1] if isinstance(value, Pairs) else item)


def mutate(tree: Json, operation: str, place: int, new: Json) -> None:
    found = list(slots(tree))
    if not found:
        return
    container, position = found[place % len(found)]
    item = container[position]
    key, value = item if isinstance(container, Pairs) else (None, item)

    def put(value: Json) -> None:
        container[position] = (key, value) if isinstance(container, Pairs) else value

    other = (place * 7919 + 1) % len(container)
    source, elsewhere = found[(place * 7919 + 1) % len(found)]
    changes: dict[str, Callable[[], None]] = {
        "replace": lambda: put(as_pairs(new)),
        "delete": lambda: container.pop(position),
        "double": lambda: container.insert(position, item),
        "rename": lambda: container.__setitem__(
            position, (str(new), value) if isinstance(container, Pairs) else value
        ),
        "swap": lambda: container.insert(other, container.pop(position)),
        "wrap": lambda: put([value]),
        "copy": lambda: put(as_pairs(source[elsewhere])),
    }
    changes[operation]()


def mutated(changes: list[Mutation], *, inside: str = "") -> str:
    tree = json.loads(TEXT, object_pairs_hook=Pairs)
    part = dict(tree)[inside] if inside else tree
    for operation, place, new in changes:
        mutate(part, operation, place, new)
    return as_text(tree)


def check_one_line(error: AutoprecError) -> None:
    assert str(error).isprintable()
    assert 10 < len(str(error)) < 3000


def check_reading(read: Callable[[], Plan]) -> None:
    """Check that a plan is read, which its own file gives again, or one short line raised."""
    try:
        plan = read()
    except RecordError as error:
        check_one_line(error)
    else:
        assert Plan.from_json(plan.to_json()) == plan


def check_applying(plan: Plan) -> None:
    """Check that a plan applies to the model and goes again, or that nothing happens to it."""
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [(p, p.detach().clone(), p.dtype) for p in model.parameters()]
    try:
        autoprec.apply(plan, model, optimizer)
    except AutoprecError as error:
        check_one_line(error)
    else:
        autoprec.undo(model, optimizer)
    assert all(
        now is p and now.dtype is dtype and torch.equal(now, data)
        for now, (p, data, dtype) in zip(model.parameters(), before, strict=True)
    )
    assert not any(comes_from_plan(type(module)) for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


# --- fuzzing: 1,000 plans, and 20,000 others in `make test-random` ------------------------------


@examples(250)
@given(mutations)
def test_a_mutated_plan_is_a_plan_or_one_line(changes: list[Mutation]) -> None:
    check_reading(lambda: Plan.from_json(mutated(changes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@examples(120)
@given(st.lists(cuts, min_size=1, max_size=4))
def test_mutated_bytes_are_a_plan_or_one_line(
    folder: Path, changes: list[tuple[int, int, bytes]]
) -> None:
    content = TEXT.encode()
    for place, length, new in changes:
        start = place % (len(content) + 1)
        content = content[:start] + new + content[start + length :]
    path = folder / "plan.json"
    path.write_bytes(content)
    check_reading(lambda: Plan.load(path))


@examples(80)
@given(st.sampled_from(["layers", "uncovered", "schedule", "fingerprint"]), mutations)
def test_a_mutated_plan_applies_or_leaves_all_as_it_was(
    inside: str, changes: list[Mutation]
) -> None:
    try:
        plan = Plan.from_json(mutated(changes, inside=inside))
    except RecordError as error:
        return check_one_line(error)
    return check_applying(plan)


@given(
    layer=st.integers(0, 3),
    option=st.builds(
        lambda precision, recipe: {"precision": precision, "recipe": recipe},
        st.sampled_from(["fp8_o1", "bf16_o2", "fp32"]),
        st.sampled_from([None, "tensorwise", "rowwise", "rowwise_with_gw_hp", "delayed"]),
    ),
)
def test_any_precision_in_any_layer_applies_or_leaves_all_as_it_was(
    layer: int, option: dict[str, str | None]
) -> None:
    fields = json.loads(TEXT)
    fields["layers"][layer] |= option
    try:
        plan = Plan.from_json(json.dumps(fields))
    except RecordError as error:
        return check_one_line(error)
    return check_applying(plan)


# --- nothing in it runs ------------------------------------------------------------------------

FORBIDDEN = {
    *("import", "exec", "compile", "open", "os", "subprocess", "socket"),
    *("ctypes", "shutil", "pickle", "marshal", "code", "urllib"),
}


def use_watched(folder: Path) -> None:
    """Use every plan of a folder; end with what Python is asked for that a plan must not do."""
    paths = sorted(str(path) for path in folder.glob("*.json"))
    is_watching = False

    def watch(event: str, args: Any) -> None:  # Any: an audit hook's
        nonlocal is_watching
        reads = event == "open" and args[1] in ("r", "rb")
        harmless = reads and args[0] in (*paths, "/proc/cpuinfo")  # the device's name
        if is_watching and event.split(".")[0] in FORBIDDEN and not harmless:
            is_watching = False
            traceback.print_stack()
            (folder / "used").write_text(f"{event} {args}")
            os._exit(1)

    def use(path: str) -> None:
        with contextlib.suppress(AutoprecError):
            autoprec.apply(Plan.load(path), Mlp())

    for name in ("good", "bad", "unfit"):
        use(str(folder / f"{name}.json"))  # what is imported lazily is imported now
    sys.addaudithook(watch)
    is_watching = True
    for path in paths:
        use(path)
    is_watching = False
    (folder / "used").write_text(f"{len(paths)} read")


def test_nothing_in_a_plan_is_imported_or_run(tmp_path: Path) -> None:
    good = json.loads(TEXT)
    unfit = {**good, "uncovered": ["absent"]}
    texts = {"good": TEXT, "bad": json.dumps({**good, "layers": 3}), "unfit": json.dumps(unfit)}
    places = range(sum(1 for _ in slots(json.loads(TEXT, object_pairs_hook=Pairs))))
    for place in places:
        code = (CODE, {"__class__": "os", "py/object": CODE}, [CODE])[place % 3]
        texts[str(place)] = mutated([("replace", place, code)])
        texts[f"{place}-name"] = mutated([("rename", place, CODE)])
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    ended = exit_code_of(use_watched, tmp_path)  # a hook stays for good
    assert ((tmp_path / "used").read_text(), ended) == (f"{len(texts)} read", 0)
    assert not (tmp_path / "owned").exists()


# --- files that are no plan --------------------------------------------------------------------


def write_big(path: Path, start: bytes, unit: bytes, size: int) -> None:
    path.write_bytes(start + unit * (size // len(unit)))


def memory_and_error(path: Path) -> tuple[int, str]:
    """Load a file in a process of its own with 30 s of CPU time; return its MB and the error."""
    code = (
        "import resource, sys; from autoprec.records import Plan\n"
        "from autoprec.errors import RecordError\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (30, 30))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "try: Plan.load(sys.argv[1])\n"
        "except RecordError as error: print(peak() - before, error)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes, _, message = done.stdout.partition(" ")
    return int(megabytes), message.strip()


def test_a_file_of_a_terabyte_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(10**12)
    tracemalloc.start()
    with pytest.raises(RecordError, match="has 1,000,000,000,000; it is not"):
        Plan.load(path)
    assert tracemalloc.get_traced_memory()[1] < MAX_RECORD_BYTES
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("start", "unit", "message"),
    [
        (b"", b"[", "nests at most 32 levels"),
        (b"", b'{"a":', "nests at most 32 levels"),
        (b'{"kind":"plan","version":2,"layers":', b"[", "nests at most 32 levels"),
    ],
)
def test_a_100_000_deep_file_is_refused_at_once(
    start: bytes, unit: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    write_big(path, start, unit, 100_000 * len(unit))
    started = time.process_time()
    with pytest.raises(RecordError, match=message):
        Plan.load(path)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("start", "unit", "message"),
    [
        pytest.param(b'"', b'\\"', "Unterminated string", marks=pytest.mark.slow),
        (b'"', b"a", "Unterminated string"),
        (b"[0", b",[]", f"holds at most {MAX_VALUES:,} values"),
    ],
)
def test_the_worst_files_of_the_largest_size_take_bounded_time_and_memory(
    start: bytes, unit: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    write_big(path, start, unit, MAX_RECORD_BYTES - 8)
    megabytes, error = memory_and_error(path)
    assert message in error
    assert megabytes < 600


@pytest.mark.slow
def test_a_million_wrong_values_take_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(TEXT.replace('"notes": [', '"notes": [' + "[]," * 1_000_000))
    megabytes, error = memory_and_error(path)
    assert "notes.0: Input should be a valid string, but it is []" in error
    assert megabytes < 300


def encoded(encoding: str) -> bytes:
    return TEXT.encode(encoding)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b" \n", "Expecting value"),
        (encoded("utf-8-sig"), "Unexpected UTF-8 BOM"),
        (encoded("utf-16"), "not UTF-8"),
        (encoded("utf-16-le"), "complete JSON"),
        (encoded("utf-32"), "not UTF-8"),
        (b"\xff" * 9, "not UTF-8"),
        (b"\x1f\x8b\x08\x00", "not UTF-8"),
        (b"\0" * 100, "Expecting value"),
        (b"kind: plan\n", "Expecting value"),
        (b'{"kind": "plan", "kind": "plan"}', "the key 'kind' is there twice"),
        (b'{"a": {"x\\ny": 1, "x\\ny": 2}}', "is there twice"),
        (b'{"kind": "plan", "version": NaN}', "JSON has no NaN"),
        (b'{"kind": "plan", "version": -Infinity}', "JSON has no -Infinity"),
        (b'{"kind": "plan", "version": ' + b"9" * 5000 + b"}", "4300"),
        (b'{"kind": "' + b"k" * 100_000 + b'"}', "must say kind='plan'"),
        (TEXT.encode() + b"{}", "Extra data"),
        (TEXT.encode()[:-9], "complete JSON"),
        (TEXT.replace('"notes"', '"no\\ntes"').encode(), r"no\\ntes: Extra inputs"),
        (TEXT.replace("a note", "\\ud800").encode(), "Invalid JSON"),
    ],
)
def test_a_file_that_is_no_plan_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        Plan.load(path)
    check_one_line(caught.value)


def test_what_is_no_regular_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    wrong = {
        tmp_path: "Is a directory",
        tmp_path / "absent.json": "No such file",
        tmp_path / "pipe": "a pipe or a device",
        Path("/dev/zero"): "a pipe or a device",
        tmp_path / "loop": "symbolic links",
        Path("a\0b"): "no file can have that name",
        Path("a\ud800b"): "no file can have that name",
        Path("x" * 5000): "File name too long",
        tmp_path / "line\nbreak": "No such file",
    }
    for path, message in wrong.items():
        with pytest.raises(RecordError, match=message) as caught:
            autoprec.apply(path, Mlp())
        check_one_line(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    path.chmod(0)
    with pytest.raises(RecordError, match="Permission denied"):
        Plan.load(path)
