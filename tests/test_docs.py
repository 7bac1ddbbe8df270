"""What the documents promise about formats is what the code has."""

import json
from pathlib import Path

from autoprec.records import Assignment, Plan

DOCS = Path(__file__).parent.parent / "docs"


def test_the_published_schema_is_the_plans() -> None:
    published = json.loads((DOCS / "plan.schema.json").read_text())
    assert published == Plan.json_schema(), "autoprec plan schema > docs/plan.schema.json"


def test_every_field_of_a_plan_is_described() -> None:
    text = (DOCS / "plan-format.md").read_text()
    fields = ["kind", "version", *Plan.model_fields, *Assignment.model_fields]
    assert [name for name in fields if f"`{name}`" not in text] == []
