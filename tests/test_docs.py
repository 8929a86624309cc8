"""What the documentation promises: examples run, commands and links exist, every system and error has its page."""

import ast
import html
import importlib.util
import json
import re
import shlex
import textwrap
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import anabranch
from anabranch import errors
from anabranch.registry import BUILTIN
from guides import cli_options

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
STUDIES = ROOT / "src" / "anabranch" / "studies"
# Folders of designs that are parts of a model; other systems have names and tests of several kinds.
OF_TOKENS = ("experts", "heads", "depth", "adapters", "subnets")
# What these have in common, and is no system.
SHARED_PARTS = {
    ("adapters", name)
    for name in ("adapt", "adapter_mixture", "after", "fusion", "gated", "ladder", "sparse_bottleneck", "tuners")
} | {("heads", "whisper")}
# Designs whose page says that no study of them is written yet; everything else that a design has they have.
WITHOUT_STUDY: set[str] = set()
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load_hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()

from _sources import Age  # noqa: E402  (hooks has put benchmarks/ on the path)

# Examples


@dataclass(frozen=True)
class Block:
    """A fenced block: its words after the fence, its text, and the line it starts on."""

    info: str
    body: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(found["info"].strip(), textwrap.dedent(found["body"]), text.count("\n", 0, found.start("body")))
        for found in FENCE.finditer(text)
    ]


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text(encoding="utf-8")) if block.info.split()[:1] == ["python"]]


def test_blocks_by_hand():
    text = "a\n```python\nx = 1\n```\n\n- b\n\n    ```bash\n    ls\n    ```\n```python no-run\ny\n```\n"
    assert blocks(text) == [Block("python", "x = 1\n", 2), Block("bash", "ls\n", 8), Block("python no-run", "y\n", 11)]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=short)
def test_python_examples_run(page, tmp_path, monkeypatch):
    """Blocks of a page run one after the other, as a reader would type them; ``no-run`` ones are compiled only."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in python_blocks(page):
        code = compile("\n" * block.line + block.body, str(page), "exec")  # so that a traceback shows the page's line
        if "no-run" not in block.info.split():
            exec(code, namespace)


def test_each_section_on_adding_a_design_runs_alone(tmp_path, monkeypatch):
    """A reader takes the file from the section that is about his kind of part; a section's later blocks may go on from its first."""
    monkeypatch.chdir(tmp_path)
    page = DOCS / "adding-a-design.md"
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [[block for block in blocks(section) if block.info == "python"] for section in sections]
    assert sum(map(bool, found)) == 5
    for number, block in enumerate(block for section in found[2:] for block in section):
        exec(compile(block.body, f"block {number}", "exec"), {"__name__": "__main__"})


@cache
def extensions() -> dict[str, dict[str, Any]]:
    """Those of mkdocs.yml, with their settings."""
    import yaml

    found = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["markdown_extensions"]
    return {
        name: settings
        for entry in found
        for name, settings in (entry if isinstance(entry, dict) else {entry: {}}).items()
    }


def rendered(text: str) -> str:
    """A page as the site shows it, without its frame."""
    import markdown

    return markdown.Markdown(extensions=[*extensions()], extension_configs=extensions()).convert(text)


def test_a_fence_that_the_site_does_not_know_shows():
    assert rendered("```python\nx = 1\n```").count('<div class="highlight">') == 1
    assert rendered("```python no-run\nx = 1\n```").count('<div class="highlight">') == 0
    assert (
        hooks.FENCE_WORDS.sub(r"\1", "a\n    ```python no-run\n    x\n    ```\n")
        == "a\n    ```python\n    x\n    ```\n"
    )


@pytest.mark.parametrize("page", [page for page in PAGES if page.is_relative_to(DOCS)], ids=short)
def test_every_fence_is_shown_as_code(page):
    class OfSite:
        class file:  # noqa: N801
            src_uri = str(page.relative_to(DOCS))

    text = hooks.on_page_markdown(page.read_text(encoding="utf-8"), OfSite)
    code = [
        html.unescape(re.sub(r"<[^>]*>", "", found))
        for found in re.findall(r"<pre>.*?</pre>", rendered(text), re.DOTALL)
    ]
    for block in blocks(text):
        assert any(block.body.strip() == textwrap.dedent(found).strip() for found in code), f"line {block.line}"


def shell_lines() -> list[tuple[Path, list[str]]]:
    """Each line of a ```bash block, as words."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.info == "bash":
                lines = block.body.replace("\\\n", " ").splitlines()
                found += [(page, shlex.split(line, comments=True)) for line in lines]
    return [(page, words) for page, words in found if words]


@pytest.mark.parametrize(
    ("page", "words"), shell_lines(), ids=lambda value: "-".join(value) if isinstance(value, list) else short(value)
)
def test_shell_examples_name_real_commands(page, words):
    program, arguments = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif Path(program).name == "anabranch" and arguments[:1] != ["--help"]:
        commands = cli_options()
        name = next((name for length in (3, 2, 1) if (name := " ".join(arguments[:length])) in commands), None)
        assert name is not None
        options = {word.split("=")[0] for word in arguments if word.startswith("-")}
        assert options <= commands[name] | {"--help"}


def test_every_option_of_every_command_has_a_row():
    pages = hooks.command_line_pages()
    assert len(pages) == len({name.split()[0] for name in cli_options()}) + 1
    for name, options in cli_options().items():
        page = pages[f"command-line/{name.split()[0]}.md"]
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0] if " " in name else page
        rows = set(re.findall(r"(?<![\w-])-[\w-]+", " ".join(re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE))))
        # Of `--resume auto`, which is two words.
        hidden = {"-h", "--help", "--resume-auto"}
        assert {one for one in options if one.startswith("-")} - hidden <= rows, name


def test_help_is_text_whatever_stands_in_it():
    assert rendered(hooks._as_text("'<cat>' *a* b_c_d [x](y) `z` # h")) == (
        "<p>'&lt;cat&gt;' *a* b_c_d [x](y) `z` # h</p>"
    )


# Links


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "`code`", FENCE.sub("", text))


def slug(title: str) -> str:
    """The anchor of a heading (as GitHub and Python-Markdown make it, for plain titles)."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower())


@cache
def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ +(.*?) *#*$", FENCE.sub("", text), re.MULTILINE)
    return {slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)) for title in titles}


@cache
def text_of(page: Path) -> str | None:
    """What a page holds, generated or not; None if there is no such page."""
    if (
        page.is_relative_to(DOCS)
        and (generated := hooks.generated_pages().get(str(page.relative_to(DOCS)))) is not None
    ):
        return generated
    return page.read_text(encoding="utf-8") if page.is_file() else None


def dead_links(page: Path) -> list[str]:
    dead = []
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):  # another site
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        text = text_of(place) if place.suffix == ".md" else None
        if not (place.exists() or text is not None) or (anchor and text is not None and anchor not in anchors(text)):
            dead.append(target)
    return dead


def test_slug_and_links_by_hand(tmp_path):
    assert slug("Bring a model, take it elsewhere") == "bring-a-model-take-it-elsewhere"
    assert slug("`make test`: the suite") == "make-test-the-suite"
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n[a](#a-title) [b](#none) [c](other.md) `[d](code.md)` [e](https://x.org/no) ![f](gone.png)\n"
        "```\n# no title\n[g](fenced.md)\n```\n[h](#no-title)\n[i](page.md#a-title)\n"
    )
    assert dead_links(page) == ["#none", "other.md", "gone.png", "#no-title"]


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


# Completeness


def designs() -> list[tuple[str, str]]:
    """(folder, name) of what a registered part of any family belongs to where it is a system of its own: a module, or a folder of it.

    A part that is registered by the folder alone is shared by its systems.
    """
    targets = {tuple(target.partition(":")[0].split(".")) for kinds in BUILTIN.values() for target in kinds.values()}
    return sorted({(folder, name[0]) for _, folder, *name in targets if folder in OF_TOKENS and name} - SHARED_PARTS)


# Studies of what is no published system of ours: the guide that shows what came out.
IN_GUIDES = {"ppo_tasks": "rl-guide.md"}


@cache
def studies() -> list[str]:
    """Modules of studies/ that are a study: those with a verdict."""
    found = []
    for file in sorted(STUDIES.glob("*.py")):
        names = {
            node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
        }
        found += [file.stem] if "judge" in names else []
    return found


def test_designs_are_found_in_modules_and_in_folders():
    assert {("experts", "rmoe"), ("experts", "rexmoe"), ("experts", "parscale"), ("depth", "duo_llm")} <= set(designs())


@pytest.mark.parametrize(("folder", "name"), designs())
def test_design_has_page_row_study_and_tests(folder, name):
    page = name.replace("_", "-")
    assert (DOCS / "systems" / f"{page}.md").is_file()
    assert f"]({page}.md)" in (DOCS / "systems" / "index.md").read_text(encoding="utf-8")
    assert f"](docs/systems/{page}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (name in studies()) != (name in WITHOUT_STUDY)
    assert (ROOT / "tests" / folder / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", studies())
def test_study_has_a_page_that_shows_its_result(name):
    pages = {path.stem: path for path in (DOCS / "systems").glob("*.md")}
    # A second study of a system has its name first, and stands on its page.
    words = name.split("_")
    of_system = (pages[own] for last in range(len(words), 0, -1) if (own := "-".join(words[:last])) in pages)
    page = DOCS / IN_GUIDES[name] if name in IN_GUIDES else next(of_system)
    text = page.read_text(encoding="utf-8")
    assert f"anabranch study {name}" in text
    assert f"<!-- results: studies/{name} -->" in text


def public_errors() -> list[str]:
    found = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.AnabranchError)
    ]
    return [error.__name__ for error in found if error is not errors.AnabranchError]


@pytest.mark.parametrize("name", public_errors())
def test_error_has_a_section_and_a_place_in_the_tree(name):
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", (DOCS / "errors.md").read_text(encoding="utf-8"), re.M | re.S)
    assert section is not None
    assert "Caused by:" in section[1]
    assert "Solution:" in section[1]
    assert f"── {name} " in (errors.__doc__ or "")


def test_changelog_tells_of_this_version_or_of_what_is_unreleased():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[:1] in (["Unreleased"], [anabranch.__version__])


# Generated parts


def test_study_table_by_hand():
    claim = {
        "claim": "reuse lowers loss | bits",
        "paper": "-0.5%",
        "baseline": 2.51234,
        "ours": 2.5,
        "difference": -0.01234,
        "interval": [-0.02, -0.0049],
        "verdict": "holds",
    }
    beside = {
        "config": {"arms": {"a": "", "b": "", "c": ""}},
        "runs": [{"runs": {"a": [0, 1]}}],
        "versions": {"torch": "2.13"},
    }
    recorded = {"name": "demo", "seeds": [0, 1], "claims": [claim], **beside}
    assert hooks.study_table(recorded) == (
        "| Claim | Paper | Baseline | Limit | Ours | Difference | 95% interval | Verdict |\n"
        "| :-- | :-- | --: | :-- | --: | --: | :-- | :-- |\n"
        "| reuse lowers loss \\| bits | -0.5% | 2.512 | - | 2.5 | -0.01234 | -0.02 to -0.0049 | holds |\n"
        "\nArms that have not run: b, c.\n"
        "\nSeeds 0, 1. torch 2.13. Repeat it with `anabranch study demo --full`.\n"
    )
    # Arms of fewer seeds say so; runs of other versions are a group of their own.
    groups = [{"runs": {"a": [0], "b": [1], "c": [0]}}, {"runs": {"a": [1]}}]
    assert "\nSeeds 0, 1; b: 1 only; c: 0 only. torch 2.13." in hooks.study_table({**recorded, "runs": groups})
    many = {
        **recorded,
        "seeds": list(range(10)),
        "runs": [{"runs": {"a": [*range(10)], "b": [*range(5)], "c": [0, 2, 3, 4, 5]}}],
    }
    assert "\nSeeds 0 to 9; b: 0 to 4 only; c: 0, 2, 3, 4, 5 only. torch 2.13." in hooks.study_table(many)
    # What the page says of intervals is said of the verdicts that do not keep to it, and a margin is no difference.
    other = claim | {"interval": [-0.02, 0.01], "margin": "limit - ours"}
    shown = hooks.study_table({**recorded, "claims": [other]})
    assert "| -0.01234 \\* | -0.02 to 0.01 | holds \u2020 |" in shown
    assert "\n\\* Not ours - baseline. Reuse lowers loss | bits: limit - ours.\n" in shown
    assert "\n\u2020 The interval contains zero" in shown
    assert "\u2020" not in hooks.study_table({**recorded, "claims": [{**other, "verdict": "not resolved"}]})
    # What is exact says so, and what is void says why.
    exact = {**claim, "interval": None, "exact": True}
    history = [{"date": "2026-11-30", "hash": "ab", "why": "after its runs. The grid was cut", "voids": ["all"]}]
    shown = hooks.study_table(
        {**recorded, "claims": [exact, {**claim, "verdict": "void"}], "frozen": {"hash": "ab", "history": history}}
    )
    assert "| holds, exact |" in shown
    assert "\nPlan and rule frozen on 2026-11-30 (ab), after its runs.\n" in shown
    assert "\nVoid until the arms have run again. The grid was cut.\n" in shown
    # What was frozen anew says so though nothing is void; what a study calls void itself is not made good by runs.
    history = [*history, {"date": "2026-12-01", "hash": "cd", "why": "a claim more", "voids": ["all"]}]
    own = {**claim, "verdict": "void", "why_void": "chosen on the same questions"}
    shown = hooks.study_table({**recorded, "claims": [claim, own], "frozen": {"hash": "cd", "history": history}})
    assert "\nFrozen anew on 2026-12-01. a claim more.\n" in shown
    assert "\nVoid: chosen on the same questions.\n" in shown
    assert "Void until" not in shown


def test_every_verdict_over_zero_is_marked():
    for path in (ROOT / "studies" / "results").glob("*.json"):
        recorded = json.loads(path.read_text(encoding="utf-8"))
        over = [
            claim
            for claim in recorded["claims"]
            if claim["interval"] and claim["interval"][0] <= 0 <= claim["interval"][1]
        ]
        decided = [claim for claim in over if claim["verdict"] in ("holds", "does not hold") and not claim["exact"]]
        assert hooks.study_table(recorded).count("holds \u2020") + hooks.study_table(recorded).count(
            "hold \u2020"
        ) == len(decided)


def test_benchmark_table_by_hand():
    rows = [
        {
            "case": "64 experts",
            "peer_name": "theirs",
            "ours": 1.0,
            "peer": 1.5,
            "ratio": 1.5,
            "bar": 1.5,
            "spread": None,
        },
        {
            "case": "8 experts",
            "peer_name": "theirs",
            "ours": 1.0,
            "peer": 1.4,
            "ratio": 1.4,
            "bar": 1.5,
            "spread": None,
        },
        {
            "case": "none",
            "peer_name": "theirs",
            "ours": 1.0,
            "peer": 1.4,
            "ratio": 1.4,
            "bar": 1,
            "withdrawn": "unequal",
        },
    ]
    record = {
        "name": "moe_layer",
        "device": "a laptop",
        "date": "2026-11-24",
        "commit": "abc",
        "note": "Older.",
        "rows": rows,
    }
    assert hooks.benchmark_table(record) == (
        "| Case | Against | Ours | Peer | Ratio | Bar | Spread |\n"
        "| :-- | :-- | --: | --: | --: | :-- | :-- |\n"
        "| 64 experts | theirs | 1 | 1.5 | 1.5 | 1.5, met | - |\n"
        "| 8 experts | theirs | 1 | 1.4 | 1.4 | 1.5, missed | - |\n"
        "| none | theirs | 1 | 1.4 | withdrawn | - | - |\n"
        "\n**Missed: 1 of 2 bars**: 8 experts (theirs) is 1.4 where 1.5 was asked.\n"
        "\nMeasured on a laptop, 2026-11-24, at commit abc. Ratio above 1: ours is better. "
        "Repeat it with `python benchmarks/moe_layer.py --json FILE`.\n"
        "\nWithdrawn: unequal. Older. Its age is not known: "
        "the commit is not in the history that lies here. Take it for stale.\n"
    )


def test_every_missed_bar_is_told_in_words():
    told = 0
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        recorded = json.loads(path.read_text(encoding="utf-8"))
        shown = hooks.benchmark_table(recorded)
        # A row of an outage keeps four bars, of which one is missed.
        assert ("**Missed: " in shown) == (", missed" in shown or "| missed: " in shown), path.stem
        told += "**Missed: " in shown
    assert told > 10


def test_results_of_every_record_can_be_shown():
    for folder in ("studies", "benchmarks"):
        shown = hooks.results(folder, None)
        for path in (ROOT / folder / "results").glob("*.json"):
            assert f"### {path.stem}\n\n| " in shown
    assert hooks.results("studies", "nothing") == "Nothing is recorded yet."


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_result_markers_name_what_exists(page):
    for folder, name in hooks.MARKER.findall(page.read_text(encoding="utf-8")):
        assert not name or name in (studies() if folder == "studies" else benchmarks() | records())


@cache
def benchmarks() -> set[str]:
    return {file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py")}


# A benchmark may have several records: one of each machine or setting, named after it.
@cache
def records() -> set[str]:
    return {
        file.stem
        for file in (ROOT / "benchmarks" / "results").glob("*.json")
        if file.stem.startswith(tuple(benchmarks()))
    }


def test_api_pages_cover_the_package():
    pages = hooks.generated_pages()
    assert "::: anabranch.routing\n" in pages["api/routing.md"]
    assert "::: anabranch.errors\n" in pages["api/errors.md"]
    assert not [path for path in pages if "_" in path.removeprefix("api/")[:1]]


def test_a_notebook_is_a_page_by_hand(tmp_path):
    drawn = {"output_type": "display_data", "data": {"image/png": "QUJD\n", "text/plain": "<Figure>"}}
    printed = {"output_type": "stream", "name": "stdout", "text": ["1\n", "2\n"]}
    found = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": ["print(1)\n", "print(2)"], "outputs": [printed, drawn]},
        {"cell_type": "code", "source": ["x = 1"], "outputs": []},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": found}))
    assert hooks.notebook_page(tmp_path / "a.ipynb") == (
        "# Title\nwords\n\n[The notebook itself](a.ipynb)\n\n```python\nprint(1)\nprint(2)\n```\n\n```text\n1\n2\n```\n\n"
        "![What the cell draws](data:image/png;base64,QUJD)\n\n```python\nx = 1\n```\n"
    )
    assert {"notebooks/researcher.md", "notebooks/data-engineer.md"} <= hooks.generated_pages().keys()


def test_every_record_is_shown_on_a_page():
    shown = {found for page in PAGES for found in hooks.MARKER.findall(page.read_text(encoding="utf-8"))}
    for folder in ("studies", "benchmarks"):
        for path in (ROOT / folder / "results").glob("*.json"):
            assert (folder, path.name.partition(".")[0]) in shown, path.name


def test_the_readme_says_what_came_out():
    index, readme = (DOCS / "systems" / "index.md").read_text("utf-8"), (ROOT / "README.md").read_text("utf-8")
    assert hooks.readme_with_systems(readme, index) == readme, "the README is stale: run python docs/hooks.py"
    systems = {path.stem for path in (DOCS / "systems").glob("*.md")}
    listed = set(re.findall(r"\]\(docs/systems/([\w-]+)\.md\)", readme))
    assert listed <= systems
    assert listed == set(re.findall(r"^\| \[[^]]+\]\(([\w-]+)\.md\)", index, re.MULTILINE))
    assert len(listed) > 30


def test_the_list_of_systems_knows_which_studies_have_run():
    """Rows were written when a study was frozen, and five of them still said so after it had run."""
    index = (DOCS / "systems" / "index.md").read_text("utf-8")
    checked = 0
    for row in re.findall(r"^\| \[[^]]+\]\([\w-]+\.md\).*$", index, re.MULTILINE):
        study = row.split("](")[1].split(".md")[0].replace("-", "_")
        found = hooks.headline(study)
        if found is None:
            continue
        ran = (ROOT / "studies" / "results" / f"{study}.json").exists()
        denied = [
            text for text in ("not yet run", "study is frozen and has not run", "no study has run") if text in row
        ]
        assert not (ran and denied), (study, denied)
        assert ran or "not run" in row or denied, study
        checked += 1
    assert checked > 30


def test_systems_table_by_hand(tmp_path, monkeypatch):
    recorded_study(tmp_path, "a_b", verdict="holds", count=5)
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    index = (
        "# Systems\n\n| System | Routes | Module | Evidence | State |\n| --- | --- | --- | --- | --- |\n"
        "| [A](a-b.md) | tokens | `p.b` | [study](a-b.md#evidence) | done |\n| [C](c.md) | walks | `p.c` | - | done |\n\nMore.\n"
    )
    assert hooks.systems_table(index) == (
        "| System | Routes | Evidence |\n| :-- | :-- | :-- |\n"
        "| [A](docs/systems/a-b.md) | tokens | reproduced (n = 5) |\n| [C](docs/systems/c.md) | walks | - |\n"
    )


def recorded_study(root, name, *, verdict=None, count=None, seeds=(0, 1, 2)):
    """A study with a frozen plan of two claims, of which the second is the primary one, and a record if there is a verdict."""
    folder = root / "studies" / "results" / name
    folder.mkdir(parents=True)
    plan = {"claims": [["first", "-"], ["second", "at least 2"]], "primary": "second"}
    (folder / "frozen.json").write_text(json.dumps({"plan": plan}))
    if verdict is not None:
        claim = {"claim": "first", "ours": 9.0, "verdict": "holds", "count": None}
        second = {
            "claim": "second (of kmeans)",
            "baseline": 2.0,
            "ours": 2.5,
            "difference": 0.5,
            "interval": [0.25, 0.75],
            "limit": None,
            "verdict": verdict,
            "count": count,
        }
        record = {"claims": [claim, second], "runs": [{"runs": {"x": list(seeds)}}]}
        folder.with_suffix(".json").write_text(json.dumps(record))


def test_headlines_by_hand(tmp_path, monkeypatch):
    recorded_study(tmp_path, "undecided", verdict="not resolved")
    recorded_study(tmp_path, "shown", verdict="holds", count=7)
    recorded_study(tmp_path, "waiting")
    (tmp_path / "docs" / "systems").mkdir(parents=True)
    (tmp_path / "docs" / "systems" / "shown.md").touch()
    (tmp_path / "docs" / "scales.toml").write_text('shown = ["2 nodes", "a million"]\n')
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    table = hooks.headlines("../")
    assert table.splitlines()[0] == "| Study | Outcome | n | Primary claim | Paper | Ours | Size here (in the paper) |"
    assert table.splitlines()[2:] == [
        "| [shown](../systems/shown.md) | reproduced | 7 | second (of kmeans) | at least 2 | "
        "2.5; baseline 2; difference 0.5 (0.25 to 0.75) | 2 nodes (a million) |",
        "| undecided | undecided | 3 | second (of kmeans) | at least 2 | 2.5; baseline 2; difference 0.5 (0.25 to 0.75) | - |",
        "| waiting | not run | - | second | at least 2 | - | - |",
        "",
        "3 studies: 1 reproduced, 0 contradicted, 1 undecided, 0 void, 1 not run.",
    ]
    assert hooks.headline("nothing") is None


@pytest.mark.parametrize(
    ("verdicts", "exact", "shown"),
    [
        # Its primary claim, as long as that is no test.
        ("holds, does not hold", "", ("reproduced", "A: one")),
        ("not resolved, holds", "", ("undecided", "A: one")),
        # Then the next of the paper's, by the severest of its experiment.
        ("holds, holds", "A", ("reproduced", "B: three")),
        ("holds, does not hold", "A", ("contradicted", "B: four")),
        ("does not hold, holds", "A", ("reproduced", "B: three")),
        ("holds, not resolved", "A", ("undecided", "B: four")),
        ("holds, void", "A", ("void", "B: four")),
        ("holds, not run", "A", ("not run", "B: four")),
        # What is not in the paper stands for nothing of it.
        ("holds, holds", "AB", ("tests only", "A: one")),
        ("does not hold, holds", "AB", ("tests only", "A: one")),
    ],
)
def test_no_test_is_the_headline_of_a_study(verdicts, exact, shown, tmp_path, monkeypatch):
    folder = tmp_path / "studies" / "results" / "s"
    folder.mkdir(parents=True)
    first, last = verdicts.split(", ")
    planned = [("A: one", "x"), ("A: two", "x"), ("C: ours", "not in the paper"), ("B: three", "x"), ("B: four", "x")]
    verdict = {"A: one": first, "A: two": first, "B: four": last}
    claims = [
        {
            "claim": claim,
            "baseline": None,
            "ours": 1.0,
            "limit": 1.0,
            "interval": None,
            "difference": 0.0,
            "verdict": verdict.get(claim, "holds"),
            "count": 7,
            "exact": claim[0] in exact,
        }
        for claim, _ in planned
    ]
    (folder / "frozen.json").write_text(json.dumps({"plan": {"claims": planned, "primary": "A: one"}}))
    folder.with_suffix(".json").write_text(json.dumps({"claims": claims, "runs": [{"runs": {"x": [0]}}]}))
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    found = hooks.headline("s")
    assert (found["outcome"], found["claim"]) == shown
    assert found["count"] == (None if shown[0] == "tests only" else 7)


def test_what_is_exact_reproduces_nothing():
    frozen = sorted((ROOT / "studies" / "results").glob("*/frozen.json"))
    assert frozen
    for path in frozen:
        found, record = hooks.headline(path.parent.name), path.parents[1] / f"{path.parent.name}.json"
        if record.exists() and found["outcome"] != "tests only":
            (claim,) = [
                claim
                for claim in json.loads(record.read_text(encoding="utf-8"))["claims"]
                if claim["claim"] == found["claim"]
            ]
            assert not claim["exact"], path.parent.name


@pytest.mark.parametrize(("verdict", "told"), [("holds", "holds, a claim of ours"), ("not resolved", "undecided")])
def test_a_claim_of_ours_is_not_said_to_be_reproduced(verdict, told, tmp_path, monkeypatch):
    recorded_study(tmp_path, "own", verdict=verdict)
    place = tmp_path / "studies" / "results" / "own" / "frozen.json"
    place.write_text(place.read_text().replace("at least 2", "ours; the paper has no figures"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "scales.toml").write_text("")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    assert hooks.headline("own")["outcome"] == told
    assert f"0 reproduced, 0 contradicted, {int(told == 'undecided')} undecided" in hooks.headlines()
    assert ("1 holds, a claim of ours" in hooks.headlines()) is (verdict == "holds")


def test_a_figure_beside_a_claim_of_ours_makes_it_no_claim_of_the_paper():
    """What "reproduced" and "contradicted" say, of studies whose frozen cell for the paper has a figure of something else."""
    for name in hooks.ALSO_OURS:
        assert hooks.headline(name)["outcome"] not in ("reproduced", "contradicted"), name


def test_the_size_of_every_study_is_told():
    from anabranch.studies import STUDIES

    sizes = tomllib.loads((DOCS / "scales.toml").read_text(encoding="utf-8"))
    assert sizes.keys() == STUDIES.keys()
    assert all(len(pair) == 2 and all(pair) for pair in sizes.values())


def test_bars_by_hand(tmp_path, monkeypatch):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    of = {"peer_name": "OLMoE", "ours": 1.0, "peer": 1.0}
    rows = [
        {**of, "case": "T=1 E=64 forward", "ratio": 1.3},
        {**of, "case": "T=1 E=8 forward", "ratio": 1.25},
        {**of, "case": "T=16 E=64 training", "ratio": 3.5},
        {**of, "case": "T=16 E=8 training", "ratio": 2.9},
        {**of, "case": "T=2048 E=8 training", "ratio": 0.1, "withdrawn": "unequal"},
        {**of, "case": "T=2048 E=64 K=8 training", "ratio": None, "failed": "ours: killed"},
        {**of, "case": "nothing was asked", "ratio": 0.1},
    ]
    record = {"name": "moe_layer", "device": "d", "commit": "abc", "rows": rows}
    (tmp_path / "benchmarks" / "results" / "moe_layer.json").write_text(json.dumps(record))
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    monkeypatch.setattr(hooks, "AWAITED", {"ring": frozenset({1}), "hnsw": frozenset()})
    # No commit of this history: not taken for fresh.
    assert "| moe_layer \u2020 | T=2048" in hooks.bars()
    assert "\u2020 Its age is not known" in hooks.bars()
    monkeypatch.setattr(hooks, "age", lambda record: Age(()))
    table = hooks.bars()
    assert table.splitlines()[2:5] == [
        "| moe_layer | T=2048 E=64 K=8 training | OLMoE | 1.3 | 0 | no, 0 of 1 |",
        "| moe_layer | T=16 E=8 training | OLMoE | 3 | 2.9 | no, 1 of 2 |",
        "| moe_layer | T=1 E=8 forward | OLMoE | 1.2 | 1.25 | yes, 2 of 2 |",
    ]
    assert "\n1 of 3 bars and aims are met in all of their cases." in table
    assert "\nAsked, and not recorded yet: ring.\n" in table
    monkeypatch.setattr(hooks, "age", lambda record: Age(("nn/moe.py",)))
    assert "| moe_layer \\* |" in hooks.bars()


def test_a_benchmark_is_shown_on_every_processor_that_it_ran_on(tmp_path, monkeypatch):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("b.avx2", "b.amx_bf16", "b_other"):
        record = {"name": name.partition(".")[0], "device": f"the machine of {name}", "rows": [{"case": "x"}]}
        (tmp_path / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    shown = hooks.results("benchmarks", "b")
    assert shown.index("the machine of b.amx_bf16") < shown.index("the machine of b.avx2")
    assert "other" not in shown
