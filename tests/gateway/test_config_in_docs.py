"""Every TOML of a gateway that the documentation shows is one that a gateway starts with."""

import ast
import re
import textwrap
import tomllib
from pathlib import Path

import pytest

from anabranch.gateway.config import load_config
from anabranch.gateway.http.run import try_out

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
GUIDE = ROOT / "docs" / "gateway-guide.md"
FENCE = re.compile(r"^ *```toml[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# A name that only files of something else have: a package, a training, a server of one model, a pool to train a router with.
OTHERS = {"project", "preset", "http", "base_url"}
# What parts of a config name and leave to the rest of it.
NAMED = ("small", "medium", "large", "router", "qwen3", "gpt-4o", "big-coder")
MODEL = """
[[models]]
name = "{}"
price = {{ input_usd = 1, output_usd = 2 }}
deployments = [{{ provider = {{ kind = "mock", model = "m" }} }}]
"""


def shown(page):
    """Configs of gateways, and parts of them."""
    found = [textwrap.dedent(text) for text in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [text for text in found if not OTHERS & tomllib.loads(text).keys()]


def of_modules():
    """What module docstrings show of strategies, by the module."""
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        # All modules are read and few parsed, which takes long.
        said = (ast.get_docstring(ast.parse(text)) or "") if "\n    [strategies." in text else ""
        parts = [textwrap.dedent(part) for part in re.findall(r"(?:^    .*\n|^\n)+", f"{said}\n", re.MULTILINE)]
        tables = [part for part in parts if part.lstrip().startswith("[strategies.")]
        found |= {str(path.relative_to(ROOT)): tables} if tables else {}
    return found


def starts(path, text):
    """The config of a text, with models that it leaves out."""
    there = {model["name"] for model in tomllib.loads(text).get("models", ())}
    path.write_text(text + "".join(MODEL.format(name) for name in NAMED if name not in there))
    config = load_config(path)
    try_out(config)
    return config


@pytest.fixture
def path(tmp_path, monkeypatch):
    for name in {"OPENAI_API_KEY", "ANTHROPIC_API_KEY", *re.findall(r"env:(\w+)", GUIDE.read_text(encoding="utf-8"))}:
        monkeypatch.setenv(name, "x")
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    return tmp_path / "gateway.toml"


def test_the_configs_of_the_guide_are_right(path):
    """The first one as it stands; the others, which are parts, behind it."""
    first, *parts = shown(GUIDE)
    path.write_text(first)
    try_out(load_config(path))
    for part in parts:
        path.write_text(f"{first}\n[strategies.learned]\nkind = 'random'\n{part}")
        try_out(load_config(path))


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != GUIDE and shown(page)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_configs_of_other_pages_are_right(page, path):
    for text in shown(page):
        starts(path, text)


@pytest.mark.parametrize(("module", "tables"), of_modules().items())
def test_the_configs_of_docstrings_are_right(module, tables, path):
    for text in tables:
        starts(path, text)


def test_pages_and_docstrings_that_show_configs_are_found():
    pages = {page.stem for page in PAGES if shown(page)}
    assert {"gateway-guide", "thinking-guide", "router-r1", "scale", "ic-cache", "ttspm"} <= pages
    assert len(shown(GUIDE)) == GUIDE.read_text(encoding="utf-8").count("```toml")
    assert {name.split("/")[-2] for name in of_modules()} >= {"router_r1", "scale", "strategies"}


def budgeted():
    """Strategies that have a budget of their own, in dollars."""
    from anabranch.registry import kinds, resolve

    return [kind for kind in kinds("strategy") if "budget_usd" in resolve("strategy", kind).Config.__dataclass_fields__]


@pytest.mark.parametrize("kind", budgeted())
def test_a_budget_that_is_the_strategys_own_may_stand_beside_its_kind(kind, path):
    assert set(budgeted()) >= {"router_r1", "scale"}
    found = starts(path, f'[strategies.s]\nkind = "{kind}"\nbudget_usd = 0.02\n').strategies["s"]
    assert (found.budget_usd, found.fields) == (None, {"budget_usd": 0.02})
    found = starts(path, f'[strategies.s]\nkind = "{kind}"\nfields = {{ budget_usd = 0.02 }}\n').strategies["s"]
    assert found.fields == {"budget_usd": 0.02}
