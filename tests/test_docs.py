"""What the documents promise about formats is what the code has."""

import json
from pathlib import Path

import pytest
from mkdocs.config import load_config
from mkdocs.structure.files import get_files
from mkdocs.structure.nav import get_navigation

from autoprec.records import Assignment, Plan

DOCS = Path(__file__).parent.parent / "docs"


def test_the_published_schema_is_the_plans() -> None:
    published = json.loads((DOCS / "plan.schema.json").read_text())
    assert published == Plan.json_schema(), "autoprec plan schema > docs/plan.schema.json"


def test_every_field_of_a_plan_is_described() -> None:
    text = (DOCS / "plan-format.md").read_text()
    fields = ["kind", "version", *Plan.model_fields, *Assignment.model_fields]
    assert [name for name in fields if f"`{name}`" not in text] == []


def test_every_page_is_in_the_nav_and_every_entry_is_a_page(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load_config(str(DOCS.parent / "mkdocs.yml"))
    config.plugins.run_event("config", config)  # docs/nav.py
    nav = get_navigation(get_files(config), config)  # warns of entries that are no page
    assert caplog.messages == []
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(page.file.src_uri for page in nav.pages) == sorted(pages)
