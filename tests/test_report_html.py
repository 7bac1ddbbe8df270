import base64
import hashlib
import itertools
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec import __version__
from autoprec.records import Verdict
from autoprec.report import RunRecords, formats, render_html
from autoprec.report.runs import FILES
from autoprec.report.svg import Scale, fitted, padded
from tests.examples import examples
from tests.golden_text import check_golden
from tests.report_runs import CPU, H100, make_run, predicted_run, renamed, uncertified

VOID = {"meta", "input", "br", "link", "img"}
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "</style><script>alert(1)</script>",
    '" onmouseover="alert(1)" x="',
    "' autofocus onfocus='alert(1)",
    "{{ run }}{% include 'x' %}",
    "<!--",
    "]]>&lt;&amp;",
    "javascript:alert(1)",
)


class Page(HTMLParser):
    """The tags with their attributes, and the text outside of figures, style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        words = " ".join(data.split())
        if words and not {"svg", "style", "script"} & set(self.open):
            self.words.append(f"{self.open[-1]}: {words}")

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        """Tags and attribute names, without any value."""
        return [(tag, tuple(name for name, _ in attributes)) for tag, attributes in self.tags]


def script_of(text: str) -> str:
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    return str(script)


def column_of(text: str, head: str) -> list[str]:
    """Return the texts of a column of the table that has that heading."""
    (table,) = (t for t in re.findall(r"<table.*?</table>", text, re.DOTALL) if f">{head}<" in t)
    at = re.findall(r"<th[^>]*>(.*?)</th>", table).index(head)
    rows = (re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("</tr>"))
    return [cells[at] for cells in rows if cells]


def test_the_words_of_the_page_are_what_a_person_looked_at() -> None:
    words = "\n".join(Page(render_html(make_run(blocks=1))).words)
    check_golden("report.txt", words.replace(f"autoprec {__version__}", "autoprec VERSION"))


def test_the_page_has_every_section() -> None:
    text = render_html(make_run())
    names = "summary layers pareto sensitivity statistics verification environment gaps"
    for name in names.split():
        assert f'<section id="{name}">' in text
        assert f'href="#{name}"' in text


@pytest.mark.parametrize("machine", [H100, CPU])
def test_the_page_asks_nothing_of_any_network(machine: object) -> None:
    assert machine in (H100, CPU)
    text = render_html(make_run(machine=H100 if machine is H100 else CPU, M=512, width=256))
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import|\bimport\(|fetch\(|XMLHttp|WebSocket", text
    )
    for tag, attributes in Page(text).tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "video", "form"}
        for name, value in attributes:
            assert name not in {"src", "srcset", "action", "xlink:href"}
            assert name != "href" or (value or "").startswith("#")
            assert not name.startswith("on")


def test_the_policy_forbids_every_request_and_every_other_script() -> None:
    text = render_html(make_run(blocks=1))
    digest = base64.b64encode(hashlib.sha256(script_of(text).encode()).digest()).decode()
    (policy,) = [
        dict(attributes)["content"]
        for tag, attributes in Page(text).tags
        if tag == "meta" and ("http-equiv", "Content-Security-Policy") in attributes
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "script-src 'unsafe" not in policy


def test_script_and_style_hold_nothing_of_the_run() -> None:
    one, other = (render_html(make_run(blocks=blocks)) for blocks in (1, 2))
    assert script_of(one) == script_of(other)


def test_hostile_names_add_no_tag_and_no_attribute() -> None:
    run = make_run(blocks=2)
    assert run.plan
    names = [layer.name for layer in run.plan.layers]
    plain = {name: f"layer{chr(97 + at)}" for at, name in enumerate(names)}
    hostile = {name: HOSTILE[at % len(HOSTILE)] + chr(97 + at) for at, name in enumerate(names)}
    expected = Page(render_html(renamed(run, plain))).shape
    text = render_html(renamed(run, hostile))
    assert expected == Page(text).shape
    assert "<img src=x" not in text
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in text


@examples(15)
@given(st.lists(st.text(min_size=1, max_size=40), min_size=2, max_size=2, unique=True))
def test_no_name_breaks_the_page(names: list[str]) -> None:
    run = make_run(blocks=1, machine=CPU, M=64, width=32)
    first, second = (f"{name}_" for name in names)
    text = render_html(renamed(run, {"head": first, "blocks.0.qkv": second}))
    Page(text)
    text.encode("utf-8")
    for figure in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(figure)


@pytest.mark.parametrize("kept", list(itertools.product([True, False], repeat=len(FILES))))
def test_the_page_is_made_of_whatever_is_there(kept: tuple[bool, ...]) -> None:
    run = make_run(blocks=1)
    absent = {name: None for name, is_kept in zip(FILES, kept, strict=True) if not is_kept}
    page = Page(render_html(replace(run, **absent)))  # type: ignore[arg-type]  # records or None
    words = "\n".join(page.words)
    for name in FILES:
        assert (name in absent) == (f"no {name}.json" in words)
    if "verification" in absent:
        assert "Not run: no training was compared" in words


def test_every_figure_is_well_formed() -> None:
    text = render_html(make_run(blocks=3))
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        ElementTree.fromstring(figure)


def test_every_card_says_measured_or_predicted() -> None:
    text = render_html(make_run())
    cards = text.count('<div class="card ')
    assert cards >= 6
    inside = text[text.index('class="cards"') : text.index('class="split"')]
    assert cards == len(re.findall(r'class="basis (measured|predicted)"', inside))


def test_intervals_of_predictions_are_not_called_percentiles() -> None:
    text, measured = render_html(predicted_run()), render_html(make_run())
    for words in ("percentile of the samples", "p20..p80"):
        assert words in measured
        assert words not in text
    for words in ("whiskers are predicted: the median and its 80 % interval", "80 % interval, pre"):
        assert words in text
        assert words not in measured
    mixed = render_html(replace(uncertified(make_run()), verification=None))
    assert "hatched bars are predicted, with what the spread of the parts gives" in mixed


def test_predicted_steps_have_no_spread_of_samples() -> None:
    spreads = column_of(render_html(predicted_run()), "spread p80-p20")
    assert spreads
    assert set(spreads) == {"-"}
    assert set(column_of(render_html(make_run()), "spread p80-p20")) == {"2.4 %"}


def test_a_plan_that_does_not_fit_is_an_answer_and_its_peak_a_card() -> None:
    run = predicted_run(memory_gb=2.0)
    words = Page(render_html(run)).words
    assert sum("does not fit in memory" in word for word in words) == 1
    card = words.index("div: Peak memory of a step")
    assert run.plan
    assert run.plan.predicted
    peak = formats.size(run.plan.predicted.memory_bytes)
    assert words[card + 1] == f"div: {peak}"
    assert words[card + 3] == "span: predicted"


def test_a_refuted_plan_has_no_line_to_paste() -> None:
    run = make_run(blocks=1)
    assert run.verification
    proof = run.verification.model_copy(update={"verdict": Verdict.REFUTED})
    assert "autoprec.apply" in render_html(run)
    assert "autoprec.apply" not in render_html(replace(run, verification=proof))


def test_a_diverged_branch_is_said() -> None:
    run = make_run(blocks=1)
    assert run.verification
    *others, last = run.verification.branches
    broken = last.model_copy(update={"eval_loss": None, "diverged_at": 3, "curve": last.curve[:3]})
    fields = {"branches": (*others, broken), "gap": None, "verdict": Verdict.REFUTED}
    proof = run.verification.model_copy(update=fields)
    assert "diverged at step 3" in render_html(replace(run, verification=proof))


@examples(100)
@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(1e-9, 1e6, allow_nan=False),
    st.booleans(),
)
def test_ticks_lie_on_the_scale(low: float, width: float, is_log: bool) -> None:
    if is_log:
        low = abs(low) + 1e-6
    scale = Scale(*((low, low + width) if is_log else padded(low, low + width)), 0.0, 500.0, is_log)
    ticks = scale.ticks()
    assert len(ticks) <= 40
    assert ticks == sorted(ticks)
    assert all(-1.0 <= scale(tick) <= 501.0 for tick in ticks)


def test_fitted_names_keep_both_ends() -> None:
    name = "model.layers.17.self_attention.query_key_value"
    short = fitted(name, 120.0)
    assert short.startswith("model.")
    assert short.endswith("value")
    assert len(short) <= 17
    assert fitted("short", 120.0) == "short"


def test_200_layers_render_at_once_and_without_torch(tmp_path: Path) -> None:
    run = make_run(blocks=33)
    for name in FILES:
        getattr(run, name).save(tmp_path / f"{name}.json")
    code = (
        "import sys, time\n"
        "from autoprec.report import layers_frame, load_run, render_html\n"
        "run = load_run(sys.argv[1]); assert len(run.plan.layers) > 200\n"
        "page = render_html(run); table = layers_frame(run).to_csv(index=False)\n"
        "assert 200_000 < len(page) < 6_000_000 and table.count(chr(10)) > 200\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'torchao', 'plotly', 'optuna'}, loaded\n"
        "assert time.process_time() < 10.0\n"  # 2 s here, of the processor: also where it is busy
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_run_of_nothing_is_a_page_too() -> None:
    assert "No plan yet" in render_html(RunRecords())
