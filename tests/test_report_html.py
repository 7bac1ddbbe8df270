import io
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from autoprec import __version__
from autoprec.records import Operand, Verdict
from autoprec.report import RunRecords, formats, layers_frame, print_layers, render_html
from autoprec.report.answer import Advice
from autoprec.report.answer_page import answer_facts
from autoprec.report.figures import MOST_BARS, layers_figure
from autoprec.report.layer_frame import options_frame
from autoprec.report.layer_table import fitted, fold_layers, layer_groups
from autoprec.report.runs import FILES
from autoprec.report.summary import summarise_run, summary_object
from autoprec.report.svg import Scale, padded
from tests.examples import examples
from tests.golden_text import check_golden
from tests.report_runs import (
    CPU,
    H100,
    answers,
    make_run,
    predicted_run,
    renamed,
    uncertified,
)

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


def test_the_words_of_the_page_are_what_a_person_looked_at() -> None:
    words = "\n".join(Page(render_html(make_run(blocks=1))).words)
    check_golden("report.txt", words.replace(f"autoprec {__version__}", "autoprec VERSION"))


def test_the_page_has_every_section() -> None:
    text = render_html(make_run())
    for name in ("answer", "layers", "loss", "search", "method", "gaps"):
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


def test_there_is_no_script_and_the_policy_forbids_any() -> None:
    tags = Page(render_html(make_run(blocks=1))).tags
    policies = [dict(attributes).get("content") for tag, attributes in tags if tag == "meta"]
    assert "script" not in {tag for tag, _ in tags}
    allowed = "base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"
    assert f"default-src 'none'; {allowed}" in policies


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


@examples(6)
@given(st.lists(st.text(min_size=1, max_size=40), min_size=2, max_size=2, unique=True))
def test_no_name_breaks_the_page(names: list[str]) -> None:
    run = make_run(blocks=1, machine=CPU, M=64, width=32)
    first, second = (f"{name}_" for name in names)
    text = render_html(renamed(run, {"head": first, "blocks.0.qkv": second}))
    Page(text)
    text.encode("utf-8")
    for figure in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(figure)


@pytest.mark.parametrize("number", range(len(FILES) + 1))
@pytest.mark.parametrize("is_alone", [True, False])
def test_the_page_is_made_of_whatever_is_there(number: int, *, is_alone: bool) -> None:
    run, one = make_run(blocks=1), list(FILES)[number : number + 1]
    absent = {name: None for name in FILES if (name not in one) is is_alone}
    page = Page(render_html(replace(run, **absent)))  # type: ignore[arg-type]  # records or None
    words = "\n".join(page.words)
    for name in FILES:
        assert (name in absent) == (f"no {name}.json" in words)
    if "verification" in absent:
        assert "Not run: no training was compared" in words


def test_every_figure_is_well_formed() -> None:
    text = render_html(make_run(blocks=3))
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert sum('class="chart"' in figure for figure in figures) == 4
    for figure in figures:
        ElementTree.fromstring(figure)


def test_every_time_and_error_says_measured_or_predicted() -> None:
    for run, basis in ((make_run(), "measured"), (predicted_run(), "predicted")):
        text = render_html(run)
        assert f"ms per step, forward and backward ({basis})" in text
        steps = re.findall(r" ms (measured|predicted)", figure_of(text, "One training step"))
        assert len(steps) >= 3
        assert set(steps) == {basis}
    heads = re.search(r">gradient error</text>\s*<text[^>]*>\((.*?)\)<", render_html(make_run()))
    assert heads is not None
    assert heads[1] == "measured"


def figure_of(text: str, title: str) -> str:
    (figure,) = (x for x in text.split("<figure") if f"<figcaption>{title}" in x)
    return figure


def test_intervals_of_predictions_are_not_called_percentiles() -> None:
    text, measured = render_html(predicted_run()), render_html(make_run())
    assert '<th class="n">p20..p80</th>' in measured
    assert '<th class="n">80 % interval</th>' in text
    assert "80 % interval" not in measured
    assert "p20..p80" not in text
    mixed = render_html(replace(uncertified(make_run()), verification=None))
    assert '<th class="n">spread</th>' in mixed  # of steps: predicted ones beside measured


def test_a_plan_that_does_not_fit_is_an_answer_and_its_peak_is_said() -> None:
    run = predicted_run(memory_gb=2.0)
    words = Page(render_html(run)).words
    assert sum("does not fit in memory" in word for word in words) == 1
    assert run.plan
    assert run.plan.predicted
    peak = formats.size(run.plan.predicted.memory_bytes)
    assert any(f"Peak memory of a step: {peak} (predicted)" in word for word in words)


def test_page_terminal_and_json_say_one_answer_the_page_on_its_first_screen() -> None:
    for run in answers().values():
        words, told = Page(render_html(run)).words, summary_object(run, "OUT")
        first = words.index(f"h1: {told['answer']}")
        assert words[first - 1].startswith("a: ")  # the links above it
        assert next(word for word in words if word.startswith(("h1: ", "h2: "))) == words[first]
        # nothing that the terminal does not say too, in the same words
        found = summarise_run(run)
        for _, said, _ in answer_facts(found):
            assert f"dd: {said.partition('`')[0].strip()}" in words
        assert words[first + 1] == f"span: {found.promise.badge}"
        assert told["promise"] == found.promise.words
        pasted = sum("autoprec.apply" in word for word in words)
        assert pasted == (found.answer.advice is Advice.APPLY)


@pytest.mark.parametrize("make", [partial(make_run, layers=100), predicted_run])
def test_layers_are_folded_as_in_the_terminal(make: Callable[[], RunRecords]) -> None:
    run = make()
    layers = summarise_run(run).layers
    words = Page(render_html(run)).words
    shown = [row.removeprefix("b: ") for row in words if row.startswith("b: ")]
    target = Console(file=io.StringIO(), width=300)
    print_layers(run, target)
    printed = target.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    groups = layer_groups(layers, options_frame(run))
    assert {group.row["name"] for group in groups} == set(fold_layers(layers)["name"])
    for group in groups:
        assert shown.count(group.row["name"]) == 1
        line = next(x for x in printed.splitlines() if x.startswith(f"{group.row['name']} "))
        assert line.split()[-1] == group.row["code"]
    assert sum(len(group.layers) for group in groups) == len(layers)


def test_a_layer_says_that_an_operand_is_far_from_zero_whatever_its_reason() -> None:
    run = make_run(machine=CPU, M=2048, width=256)  # time alone decides
    assert run.sensitivity
    first, *others = run.sensitivity.statistics
    assert first.operand is Operand.INPUT
    update = {"mean_over_std": 12.0, "mean_share": {"tensorwise": 0.81, "rowwise": -0.1}}
    far = (first.model_copy(update=update), *others)
    told = replace(run, sensitivity=run.sensitivity.model_copy(update={"statistics": far}))
    line = (
        f"p: {first.name}, input: mean 12x its spread, which rounding is relative to "
        "(81 % of tensorwise's error)"
    )
    assert [words for words in Page(render_html(told)).words if "its spread" in words] == [line]
    assert "its spread" not in render_html(run)


def test_options_of_a_group_are_sums_of_those_that_are_all_known() -> None:
    run = make_run(blocks=3)
    options = options_frame(run)
    unknown = (options["name"] == "blocks.1.fc1") & (options["option"] == "fp8_o1:rowwise")
    options.loc[unknown, "total_ms"] = float("nan")
    groups = layer_groups(summarise_run(run).layers, options)
    (group,) = (g for g in groups if g.row["name"] == "blocks.{0-2}.fc1 (x3)")
    found = {row["option"]: row["total_ms"] for row in group.options}
    assert found["bf16_o2"] == pytest.approx(group.row["bf16_o2_total_ms"])
    assert found[group.row["option"]] == pytest.approx(group.row["total_ms"])
    assert found["fp8_o1:rowwise"] is None
    saved = [g.row["saved_vs_bf16_o2_ms"] for g in groups]
    assert saved == sorted(saved, reverse=True)


def test_the_largest_loss_is_in_the_picture_and_what_is_left_out_is_summed() -> None:
    run = make_run(blocks=9)
    names = {f"blocks.{n}.fc1": f"stage{chr(97 + n)}.fc1" for n in range(9)}
    run = renamed(run, names | {f"blocks.{n}.fc2": f"stage{chr(97 + n)}.fc2" for n in range(9)})
    groups = layer_groups(summarise_run(run).layers, options_frame(run))
    (worst, *_) = (group.row for group in groups if group.row["name"] == "blocks.0.qkv")
    worst.update(saved_vs_bf16_o2_ms=-9.0, total_ms=worst["bf16_o2_total_ms"] + 9.0)
    figure = layers_figure(groups)
    assert "blocks.0.qkv" in figure
    assert f"{sum(g.row['layers'] for g in groups) - shown_layers(figure)} other layers" in figure
    assert sum(1 for _ in re.finditer('class="label"', figure)) == MOST_BARS + 1


def shown_layers(figure: str) -> int:
    names = re.findall(r'class="label"[^>]*>(.*?)</text>', figure)
    counts = [re.search(r"\(x(\d+)\)", name) for name in names if "other" not in name]
    return sum(int(count.group(1)) if count else 1 for count in counts)


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
    assert "diverged at 3" in render_html(replace(run, verification=proof))


@examples(100)
@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(1e-9, 1e6, allow_nan=False),
)
def test_ticks_lie_on_the_scale(low: float, width: float) -> None:
    scale = Scale(*padded(low, low + width), 0.0, 500.0)
    ticks = scale.ticks()
    assert len(ticks) <= 40
    assert ticks == sorted(ticks)
    assert all(-1.0 <= scale(tick) <= 501.0 for tick in ticks)


def test_fitted_names_keep_both_ends() -> None:
    name = "model.layers.17.self_attention.query_key_value"
    short = fitted(name, 17)
    assert short.startswith("mode...")
    assert short.endswith("value")
    assert len(short) == 17
    assert fitted("short", 17) == "short"


def test_300_layers_are_below_500_kb_also_where_none_are_alike() -> None:
    run = make_run(layers=300)
    assert run.plan
    assert len(render_html(run).encode()) < 100_000
    unlike = {x.name: "x" * n for n, x in enumerate(run.plan.layers, start=1)}
    assert len(render_html(renamed(run, unlike)).encode()) < 500_000
    assert layers_frame(run).to_csv(index=False).count("\n") == 301


def test_a_run_of_nothing_is_a_page_too() -> None:
    assert "No plan yet" in render_html(RunRecords())
