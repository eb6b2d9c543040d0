"""Pages name what exists: links and their anchors, and every setting with its default."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mdkv_vllm.config import MixedDimConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for folder in (".", "docs", "benchmarks", "deploy") for path in (ROOT / folder).glob(
        "*.md" if folder in (".", "docs") else "**/*.md"
    )
)  # fmt: skip
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page):
    """Of a page's headings, as the forges make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_setting_is_described():
    table = re.findall(r"^\| `(\w+)` \| (\S*) ?\|", (ROOT / "docs/settings.md").read_text(), re.M)
    described = {name: default.strip("`") for name, default in table}
    assert set(described) == {one.name for one in fields(MixedDimConfig)}
    config = MixedDimConfig()
    for name, default in described.items():
        value = getattr(config, name)
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        if default:
            assert name in ("head_share", "head_power") or shown == default, name
        else:
            assert value is None, name
