"""The pages name keys, files and headings that exist."""

import re
from pathlib import Path

import pytest

from rwkv_accel.config.load import leaf_keys, load_config
from rwkv_accel.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
PAGES = ("faq.md", "methods.md", "launching.md", "health.md")
SECTIONS = tuple(name for name in RunConfig.model_fields if name != "out_dir")
KEYS = set(leaf_keys())


def text_of(page):
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_keys_that_a_page_names_exist(page):
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_A-Z.]+[a-zA-Z_])", text_of(page))
    code = re.findall(rf"\s((?:{'|'.join(SECTIONS)})\.[a-z_A-Z.]+)=", text_of(page))
    assert named
    for key in {*named, *code}:
        assert key in KEYS, f"docs/{page} names {key}"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        file, _, anchor = target.partition("#")
        path = (ROOT / "docs" / file).resolve() if file else ROOT / "docs" / page
        assert path.is_file(), f"docs/{page} links {target}"
        assert not anchor or anchor in anchors(path), f"docs/{page} links {target}"


def test_the_first_screen_links_every_page():
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").split("## Commands")[0]
    for page in ("recipes.md", "methods.md", "data.md", "launching.md", "resuming.md", "faq.md", "config.md"):
        assert f"(docs/{page})" in first_screen


def test_recipes_of_the_methods_page_load(tmp_path):
    parts = re.findall(r"```yaml\n(.*?)```", text_of("methods.md"), re.S)
    assert len(parts) >= 8
    for part in parts:
        path = tmp_path / "r.yaml"
        path.write_text(part)
        load_config(path, ["out_dir=x", "model.path=m.pth", "data.path=d.jsonl"])
