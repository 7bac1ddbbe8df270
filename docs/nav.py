"""What mkdocs runs before it reads the pages: a decision in its folder is in the nav."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig


def on_config(config: "MkDocsConfig") -> None:
    """Fill the nav's `Reference: Decisions`, by number."""
    pages = sorted(Path(config.docs_dir, "decisions").glob("*.md"))
    for section in config.nav or []:
        for entry in section.get("Reference", []):
            if "Decisions" in entry:
                entry["Decisions"] = [f"decisions/{page.name}" for page in pages]
