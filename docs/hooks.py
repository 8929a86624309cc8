"""What MkDocs makes while it builds, so that none of it is typed by hand or goes stale.

- one API page per package, from its docstrings;
- the command line page, from ``--help``;
- tables of recorded results, where a page says ``<!-- results: studies/rexmoe -->`` (or ``benchmarks/moe_layer``, or
  ``studies`` or ``benchmarks`` for all).
"""

import ast
import json
import os
import re
import statistics
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from _bars import is_met  # noqa: E402
from _sources import age  # noqa: E402

PACKAGE = ROOT / "src" / "anabranch"
MARKER = re.compile(r"<!-- results: (benchmarks|studies)(?:/(\w+))? -->")
COMMAND_LINE = "command-line.md"
MARGIN, NOT_BY_INTERVAL = "\\*", "\u2020"  # beside a difference, beside a verdict
FENCE_WORDS = re.compile(
    r"^( *```\w+)[ ]+[\w-]+[ ]*$", re.MULTILINE
)  # ```python no-run: for our tests, no language of any renderer's


def generated_pages() -> dict[str, str]:
    """Path below docs/ and text of each page that no file holds, the command line's left empty (it takes a second)."""
    return {f"api/{name}.md": _api_page(name) for name in api_names()} | {COMMAND_LINE: ""}


def on_config(config: Any) -> Any:
    """Add the API pages to the navigation."""
    pages = [{f"anabranch.{name}": f"api/{name}.md"} for name in api_names()]
    config.nav = [*config.nav, {"Python API": pages}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the plots of studies."""
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        text = command_line_page() if path == COMMAND_LINE else text
        files.append(File.generated(config, path, content=text))
    for record in (*_records("studies"), *_records("benchmarks")):
        for plot in _plots(record):
            files.append(File.generated(config, f"results/{_plot_name(record)}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the recorded results in the place of their markers, and leave fences only the word that MkDocs knows: the language."""
    markdown = FENCE_WORDS.sub(r"\1", markdown)
    up = "../" * page.file.src_uri.count("/")
    return MARKER.sub(lambda found: results(found[1], found[2], up), markdown)


# Python API


def api_names() -> list[str]:
    """Packages and modules of Anabranch that have a page: whatever is there and public, but the command line."""
    found = [path for path in PACKAGE.iterdir() if (path.is_dir() and any(path.glob("*.py"))) or path.suffix == ".py"]
    return sorted(path.stem for path in found if not path.stem.startswith("_") and path.stem not in ("cli", "studies"))


def _api_page(name: str) -> str:
    """A package that lists its public names is one entry; of any other each module is."""
    modules = [f"anabranch.{name}"]
    if (PACKAGE / name).is_dir() and not _public_names(PACKAGE / name / "__init__.py"):
        inner = sorted(path.stem for path in (PACKAGE / name).glob("*.py") if not path.stem.startswith("_"))
        modules = [f"anabranch.{name}.{module}" for module in inner]
    return f"# anabranch.{name}\n\n" + "".join(f"::: {module}\n\n" for module in modules)


def _public_names(file: Path) -> list[str]:
    if not file.exists():
        return []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(name, ast.Name) and name.id == "__all__" for name in node.targets
        ):
            return ast.literal_eval(node.value)
    return []


# Command line


def command_line_page() -> str:
    """Every command with its help, as a terminal of 100 columns shows it."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from anabranch.cli.main import app

    os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1", TERM="dumb")

    def help_of(*words: str) -> str:
        shown = CliRunner().invoke(app, [*words, "--help"], prog_name="anabranch")
        if shown.exit_code:
            raise RuntimeError(f"anabranch {' '.join(words)} --help failed: {shown.output}")
        lines = "\n".join(line.rstrip() for line in shown.output.strip("\n").splitlines())
        return f"```text\n$ anabranch {' '.join([*words, '--help'])}\n{lines}\n```\n\n"

    def below(group: Any, prefix: str = "") -> list[str]:
        """Commands of a group and, after each that is a group itself, its own."""
        found = []
        for name, command in group.commands.items():
            found += [prefix + name, *(below(command, f"{prefix}{name} ") if hasattr(command, "commands") else [])]
        return found

    names = below(get_command(app))
    intro = (
        "# Command line\n\nEvery command takes `--help`. Commands that print results take `--json`: one object on standard "
        "output and nothing else there.\nProgress goes to standard error. A mistake gives one line and exit code 2; the kinds "
        "of mistakes are on [Errors](errors.md).\n\n"
    )
    return intro + help_of() + "".join(f"## {name}\n\n{help_of(*name.split())}" for name in names)


# Results


def results(folder: str, name: str | None, up: str = "") -> str:
    """Tables of one recorded result, of each processor where there are several, or all of a folder. ``up`` leads from the page to docs/."""
    found = [path for path in _records(folder) if name in (None, path.name.partition(".")[0])]
    tables = []
    for path in found:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        table = study_table(recorded) if folder == "studies" else benchmark_table(recorded)
        pictures = "".join(
            f"\n![{path.stem}: recorded curves]({up}results/{_plot_name(path)})\n" for plot in _plots(path)
        )
        tables.append((f"### {path.stem}\n\n" if name is None else "") + table + pictures)
    return "\n".join(tables) or "Nothing is recorded yet."


def _plot_name(record: Path) -> str:
    """What the picture beside a record is called on the site: a benchmark may have the name of a study."""
    mark = "benchmark-" if record.parent.parent.name == "benchmarks" else ""
    return "".join(mark + plot.name for plot in _plots(record))


def _plots(record: Path) -> list[Path]:
    """The picture beside a record, as SVG if there is one, else as PNG."""
    return [plot for plot in (record.with_suffix(".svg"), record.with_suffix(".png")) if plot.exists()][:1]


def study_table(recorded: dict[str, Any]) -> str:
    """What a study claimed, what the paper found and what we found."""
    columns = {
        "Claim": "claim",
        "Paper": "paper",
        "Baseline": "baseline",
        "Limit": "limit",
        "Ours": "ours",
        "Difference": "difference",
        "95% interval": "interval",
        "Verdict": "verdict",
    }
    seeds = _seeds_told(recorded)
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    again = f"Repeat it with `anabranch study {recorded['name']} --full`."
    rows = [
        claim
        | {"difference": _marked(claim["difference"], MARGIN if claim.get("margin") else "")}
        | {"verdict": _marked(_verdict_told(claim), NOT_BY_INTERVAL if is_judged_otherwise(claim) else "")}
        for claim in recorded["claims"]
    ]
    told = [
        f"{MARGIN} Not ours - baseline. {claim['claim'][:1].upper()}{claim['claim'][1:]}: {claim['margin']}."
        for claim in recorded["claims"]
        if claim.get("margin")
    ]
    if any(map(is_judged_otherwise, recorded["claims"])):
        told.append(
            f"{NOT_BY_INTERVAL} The interval contains zero, and the verdict goes by another rule of the study, such as a limit."
        )
    told += _frozen_told(recorded)
    idle = arms_not_run(recorded)
    if idle:
        told.append(f"Arms that have not run: {', '.join(idle)}.")
    return _table(columns, rows) + "".join(f"\n{line}\n" for line in [*told, f"Seeds {seeds}. {versions}. {again}"])


def _verdict_told(claim: dict[str, Any]) -> str:
    return f"{claim['verdict']}, exact" if claim.get("exact") else claim["verdict"]


def _frozen_told(recorded: dict[str, Any]) -> list[str]:
    """When the plan was frozen, and why claims are void."""
    history = (recorded.get("frozen") or {}).get("history", [])
    told = []
    if history:
        entry = history[-1]
        told.append(f"Plan and rule frozen on {entry['date']} ({entry['hash']}), {entry['why'].partition('. ')[0]}.")
    if any(claim["verdict"] == "void" for claim in recorded["claims"]):
        reasons = [entry["why"].partition(". ")[2] or entry["why"] for entry in history if entry["voids"]]
        told += [f"Void until the arms have run again. {reason}." for reason in reasons]
    return told


def is_judged_otherwise(claim: dict[str, Any]) -> bool:
    """Whether a verdict was given although the interval contains zero: it is of a rule about each seed, or of another limit than zero."""
    interval = claim["interval"]
    return bool(interval) and interval[0] <= 0 <= interval[1] and claim["verdict"] in ("holds", "does not hold")


def arms_not_run(recorded: dict[str, Any]) -> list[str]:
    """Arms that were planned and of which no run counts."""
    ran = {arm for group in recorded["runs"] for arm in group["runs"]}
    return [arm for arm in recorded["config"]["arms"] if arm not in ran]


def _seeds_told(recorded: dict[str, Any]) -> str:
    """The seeds of a study, and of arms that ran with fewer of them, theirs."""
    ran: dict[str, set[int]] = {}
    for group in recorded["runs"]:
        for arm, seeds in group["runs"].items():
            ran.setdefault(arm, set()).update(seeds)
    fewer: dict[str, list[str]] = {}
    for arm, seeds in ran.items():
        if seeds < set(recorded["seeds"]):
            fewer.setdefault(_numbers(seeds), []).append(arm)
    return "; ".join(
        [_numbers(recorded["seeds"]), *(f"{', '.join(arms)}: {seeds} only" for seeds, arms in fewer.items())]
    )


def _numbers(numbers: Collection[int]) -> str:
    """Each of a few, or from where to where they go."""
    found = sorted(numbers)
    if len(found) > 4 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def _marked(value: Any, mark: str) -> Any:
    return f"{_cell(value)} {mark}" if mark else value


def benchmark_table(recorded: dict[str, Any]) -> str:
    """Ours against the peer, case by case, with what was asked before it was measured, and where and when that was."""
    columns = {
        "Case": "case",
        "Against": "peer_name",
        "Ours": "ours",
        "Peer": "peer",
        "Ratio": "ratio",
        "Bar": "bar",
        "Spread": "spread",
    }
    # Of benchmarks that say what each vector, or whatever it is, takes.
    if any("bytes_ours" in row for row in recorded["rows"]):
        columns |= {"Bytes each, ours": "bytes_ours", "Peer's": "bytes_peer"}
    rows = [
        row | {"ratio": "withdrawn", "bar": None} if row.get("withdrawn") else row | {"bar": _bar_told(row)}
        for row in recorded["rows"]
    ]
    withdrawn = sorted({f"Withdrawn: {row['withdrawn']}." for row in rows if row.get("withdrawn")})
    said = age(recorded).told()
    told = " ".join(
        [*withdrawn, *([recorded["note"]] if recorded.get("note") else []), *([f"{said}."] if said else [])]
    )
    again = f"Repeat it with `python benchmarks/{recorded['name']}.py --json FILE`."
    return (
        _table(columns, rows)
        + f"\nMeasured on {_measured(recorded)}. Ratio above 1: ours is better. {again}\n"
        + (f"\n{told}\n" if told else "")
    )


def _bar_told(row: dict[str, Any]) -> str | None:
    if row.get("bar") is None:
        return None
    why = f" ({row['missed']})" if row.get("missed") else ""
    return f"{_cell(row['bar'])}, {'met' if is_met(row) else 'missed'}{why}"


def _measured(recorded: dict[str, Any]) -> str:
    """Processor, day and the commit that a record measured: what it says of later code is not known."""
    parts = [recorded["device"], recorded.get("date")]
    return ", ".join(filter(None, parts)) + (f", at commit {recorded['commit']}" if recorded.get("commit") else "")


def _table(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    numeric = [any(isinstance(row.get(key), int | float) for row in rows) for key in columns.values()]
    lines = [list(columns), ["--:" if right else ":--" for right in numeric]]
    lines += [[_cell(row.get(key)) for key in columns.values()] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


# README


README_MARK = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.DOTALL)
VERDICTS = ("holds", "does not hold", "not resolved", "void", "not run")


def readme_with_figures(text: str) -> str:
    """The README with its figures taken from the records. ``python docs/hooks.py`` writes it; a test finds it stale."""
    return README_MARK.sub(lambda found: found[1] + readme_figures() + found[2], text)


def readme_figures() -> str:
    """How many claims of each study came out how, and the ratios of each benchmark against each peer, as two tables."""
    studies = [json.loads(path.read_text(encoding="utf-8")) for path in _records("studies")]
    verdicts = [{"study": recorded["name"], **_verdicts(recorded)} for recorded in studies]
    text = _table({"Study": "study"} | {name.capitalize(): name for name in VERDICTS}, verdicts) if verdicts else ""
    # A benchmark may have several records, each of a file's name: of one peer, or of other settings.
    benchmarks = [
        (json.loads(path.read_text(encoding="utf-8")), *path.stem.partition(".")[::2])
        for path in _records("benchmarks")
    ]
    rows = [row for one in benchmarks for row in _ratios(*one)]
    columns = ("Benchmark", "Against", "Cases", "Lowest", "Median", "Highest", "Bars met", "Measured")
    told = [
        f"{MARGIN} {name}{f' ({isa})' if isa else ''}: {' '.join(_told(recorded))}\n"
        for recorded, name, isa in benchmarks
        if _told(recorded)
    ]
    return (
        text
        + ("\n" + _table({name: name.lower() for name in columns}, rows) if rows else "")
        + "".join(f"\n{line}" for line in told)
    )


def _told(recorded: dict[str, Any]) -> list[str]:
    """What is to be known of a record beside its figures: rows that are withdrawn, and its note."""
    reasons: dict[str, int] = {}
    for row in recorded["rows"]:
        if row.get("withdrawn"):
            reasons[row["withdrawn"]] = reasons.get(row["withdrawn"], 0) + 1
    withdrawn = [f"{count} cases are withdrawn: {reason}." for reason, count in reasons.items()]
    return [*withdrawn, *([recorded["note"]] if recorded.get("note") else [])]


def _verdicts(recorded: dict[str, Any]) -> dict[str, int]:
    # What is exact is a test, and no evidence for a claim of a paper.
    found = [claim["verdict"] for claim in recorded["claims"] if not claim.get("exact")]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def _ratios(recorded: dict[str, Any], name: str, isa: str) -> list[dict[str, Any]]:
    """One row for each peer of a benchmark of time, by its record's ``name``; ``isa`` are the instructions where that has them."""
    of_peer: dict[str, list[dict[str, Any]]] = {}
    name += (f" ({isa})" if isa else "") + (f" {MARGIN}" if _told(recorded) else "")
    for row in recorded["rows"]:
        # A row that ours failed has no ratio, and counts all the same where one was asked of it.
        has_failed = row.get("bar") is not None and row.get("missed")
        shown = row.get("peer_name") and (row.get("ratio") is not None or has_failed) and not row.get("withdrawn")
        if shown and row.get("unit") not in ("MB", "% answered"):
            of_peer.setdefault(row["peer_name"], []).append(row)
    return [
        {
            "benchmark": name, "against": peer, "cases": len(found),
            **_range([row["ratio"] for row in found if row.get("ratio") is not None]),
            "bars met": _bars_met(found), "measured": _measured(recorded),
        }
        for peer, found in of_peer.items()
    ]  # fmt: skip


def _range(ratios: list[float]) -> dict[str, float]:
    if not ratios:
        return {}
    return {"lowest": min(ratios), "median": statistics.median(ratios), "highest": max(ratios)}


def _bars_met(rows: list[dict[str, Any]]) -> str | None:
    """How many of the rows of which a ratio was asked reach it; None if none was asked of any."""
    asked = [row for row in rows if row.get("bar") is not None]
    return f"{sum(map(is_met, asked))} of {len(asked)}" if asked else None


def _records(folder: str) -> list[Path]:
    return sorted((ROOT / folder / "results").glob("*.json"))


# Systems


SYSTEMS_MARK = re.compile(r"(<!-- systems -->\n).*?(<!-- /systems -->)", re.DOTALL)
SYSTEM_ROW = re.compile(r"^\| (?P<name>[^|(]+?) (?:\([^|]*\) )?\| (?P<cells>[^\n]*) \|$", re.MULTILINE)
CODE_LINK = re.compile(r"\[[^\]]*\]\(src/([^)]*)\)")


def index_with_systems(index: str, readme: str) -> str:
    """docs/systems/index.md with its table taken from the README's. ``python docs/hooks.py`` writes it; a test finds it stale."""
    return SYSTEMS_MARK.sub(lambda found: found[1] + systems_table(readme) + found[2], index)


def systems_table(readme: str) -> str:
    """The README's systems as rows of docs/systems/index.md: links from there, modules in place of files."""
    table = readme.partition("| System |")[2].partition("\n\n")[0].split("\n", 2)[2]
    rows = []
    for found in SYSTEM_ROW.finditer(table):
        routes, page, code, evidence, state = found["cells"].split(" | ", 4)
        rows.append([
            page.replace("[page]", f"[{found['name']}]"), routes,
            CODE_LINK.sub(lambda link: f"`{link[1].removesuffix('.py').strip('/').replace('/', '.')}`", code), evidence, state,
        ])  # fmt: skip
    header = [["System", "Routes", "Module", "Evidence", "State"], ["---"] * 5]
    text = "".join("| " + " | ".join(row) + " |\n" for row in header + rows)
    return text.replace("](docs/systems/", "](").replace("](docs/", "](../")


if __name__ == "__main__":
    for page, written in (
        (ROOT / "README.md", readme_with_figures),
        (
            ROOT / "docs" / "systems" / "index.md",
            lambda text: index_with_systems(text, (ROOT / "README.md").read_text()),
        ),
    ):
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
