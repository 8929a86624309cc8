"""What MkDocs makes while it builds, so that none of it is typed by hand or goes stale.

- one API page per package, from its docstrings;
- a page for each notebook, with what its cells printed;
- the command line, from what ``--help`` says: a page of all commands and one for each;
- tables of recorded results, where a page says ``<!-- results: studies/rexmoe -->`` (or ``benchmarks/moe_layer``, or
  ``studies`` or ``benchmarks`` for all);
- what came out of all studies, one row each (``<!-- results: headlines -->``), and all bars (``<!-- results: bars -->``).
"""

import ast
import html
import inspect
import itertools
import json
import re
import sys
import tomllib
from collections.abc import Collection, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from _bars import AIMS, AWAITED, BARS, Bar, asked_of, is_met, parts  # noqa: E402
from _sources import age  # noqa: E402

PACKAGE = ROOT / "src" / "anabranch"
NOTEBOOKS = ROOT / "docs" / "notebooks"
MARKER = re.compile(r"<!-- results: (benchmarks|studies)(?:/(\w+))? -->")
TABLES = re.compile(r"<!-- results: (headlines|bars) -->")
COMMAND_LINE = "command-line.md"
# Beside a difference; beside verdicts.
MARGIN, NOT_BY_INTERVAL, NOT_BY_HOLM = "\\*", "\u2020", "\u2021"
# Beside benchmarks, whose table has none of those.
STALE, OF_UNKNOWN_AGE = MARGIN, NOT_BY_INTERVAL
FENCE_WORDS = re.compile(
    r"^( *```\w+)[ ]+[\w-]+[ ]*$", re.MULTILINE
)  # ```python no-run: for our tests, no language of any renderer's


def generated_pages() -> dict[str, str]:
    """Path below docs/ and text of each page that no file holds, the command line's first left empty (it takes a second)."""
    notebooks = {f"notebooks/{path.stem}.md": notebook_page(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    return {f"api/{name}.md": _api_page(name) for name in api_names()} | notebooks | {COMMAND_LINE: ""}


def on_config(config: Any) -> Any:
    """Add the API pages to the navigation."""
    pages = [{f"anabranch.{name}": f"api/{name}.md"} for name in api_names()]
    config.nav = [*config.nav, {"Python API": pages}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the plots of studies."""
    from mkdocs.structure.files import File

    for path, text in (generated_pages() | command_line_pages()).items():
        files.append(File.generated(config, path, content=text))
    for record in (*_records("studies"), *_records("benchmarks")):
        for plot in _plots(record):
            files.append(File.generated(config, f"results/{_plot_name(record)}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the recorded results in the place of their markers, and leave fences only the word that MkDocs knows: the language."""
    markdown = FENCE_WORDS.sub(r"\1", markdown)
    up = "../" * page.file.src_uri.count("/")
    markdown = TABLES.sub(lambda found: (headlines if found[1] == "headlines" else bars)(up), markdown)
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


# Notebooks


def notebook_page(path: Path) -> str:
    """Its words, its code, and what that printed and drew; the file itself lies beside the page."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts += [_output(output) for output in cell.get("outputs", [])]
    parts.insert(1, f"[The notebook itself]({path.name})")
    return "\n\n".join(filter(None, parts)) + "\n"


def _output(output: dict[str, Any]) -> str:
    """What a cell printed as a block, a picture as one; of what has both, the picture."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![What the cell draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


# Command line


def command_line_pages() -> dict[str, str]:
    """The page of all commands, and one for each with what its help and that of the commands below it say, as tables."""
    from typer.main import get_command

    from anabranch.cli.main import app

    def below(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        """Commands of a group and, after each that is a group itself, its own."""
        for name, command in group.commands.items():
            yield prefix + name, command
            if hasattr(command, "commands"):
                yield from below(command, f"{prefix}{name} ")

    intro = (
        "# Command line\n\nEvery command takes `--help`. Commands that print results take `--json`: one object on standard "
        "output and nothing else there.\nProgress goes to standard error. An error is one line, with exit code 2; the kinds "
        "of errors are on [Errors](errors.md).\n`anabranch --install-completion` lets your shell complete commands and options.\n\n"
    )
    rows, pages = [], {}
    for name, command in get_command(app).commands.items():
        about = (command.help or "").strip().partition("\n\n")[0].replace("\n", " ")
        rows.append({"command": f"[anabranch {name}](command-line/{name}.md)", "about": about})
        inner = below(command, f"{name} ") if hasattr(command, "commands") else ()
        parts = "".join(f"## {path}\n\n{_command_told(path, one)}" for path, one in inner)
        pages[f"command-line/{name}.md"] = f"# anabranch {name}\n\n{_command_told(name, command)}{parts}"
    return {COMMAND_LINE: intro + _table({"Command": "command", "About": "about"}, rows)} | pages


def _command_told(path: str, command: Any) -> str:
    """Usage, help, arguments and options of one command; of a group what it is for, and its commands."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    usage = " ".join(["anabranch", path, *(_argument(one) for one in arguments)])
    usage += " COMMAND ..." if hasattr(command, "commands") else " [OPTIONS]"
    told = [f"```text\n{usage}\n```"]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        line = " ".join(paragraph.split())
        example = line.removeprefix("Example: ")
        told.append(f"```bash\n{example}\n```" if example != line else _as_text(line))
    if hasattr(command, "commands"):
        inner = [
            {
                "name": f"[{name}](#{path.replace(' ', '-')}-{name})",
                "about": _as_text(inspect.cleandoc(one.help or "").partition("\n\n")[0]),
            }
            for name, one in command.commands.items()
        ]
        return "\n\n".join([*told, _table({"Command": "name", "About": "about"}, inner)]) + "\n"
    rows = [
        {"name": f"`{_names(one)}`", "help": _as_text(one.help or "") + _default(one)}
        for one in (*arguments, *options)
        if "--help" not in one.opts
    ]
    return "\n\n".join([*told, _table({"Option": "name", "What it does": "help"}, rows)]) + "\n"


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name.upper()).strip("{}[]")
    return name if parameter.required else f"[{name}]"


def _names(parameter: Any) -> str:
    """As it is typed."""
    if parameter.param_type_name == "argument":
        return _argument(parameter)
    choices = _choices(parameter)
    value = (parameter.metavar or ("/".join(map(str, choices)) if choices else "")).strip()
    return f"{', '.join([*parameter.opts, *parameter.secondary_opts])} {value}".strip()


def _choices(parameter: Any) -> list[str]:
    """The words that an option may have, where there are few."""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(one.value) for one in kind]
    found = [get_args(one) for one in (kind, *get_args(kind)) if get_origin(one) is Literal]
    return list(map(str, found[0])) if found else []


def _default(parameter: Any) -> str:
    """What it is where it is not given, unless its help says so."""
    value = parameter.default
    if parameter.required:
        return " Required."
    if "Default:" in (parameter.help or "") or isinstance(value, bool) or not isinstance(value, int | float | str):
        return ""
    return f" Default: {_as_text(str(value))}." if value != "" else ""


def _as_text(text: str) -> str:
    """As it stands, also where Markdown or HTML would see something in it."""
    return re.sub(r"([*_`\[\]#])", r"\\\1", html.escape(text, quote=False))


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
        | {"verdict": _marked(_verdict_told(claim), _verdict_mark(claim, recorded))}
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
    if any(falls_to_holm(claim, recorded) for claim in recorded["claims"]):
        told.append(f"{NOT_BY_HOLM} Told apart by itself; not beside all claims of the study (Holm's rule at 5%).")
    told += _frozen_told(recorded)
    idle = arms_not_run(recorded)
    if idle:
        told.append(f"Arms that have not run: {', '.join(idle)}.")
    return _table(columns, rows) + "".join(f"\n{line}\n" for line in [*told, f"Seeds {seeds}. {versions}. {again}"])


def _verdict_told(claim: dict[str, Any]) -> str:
    return f"{claim['verdict']}, exact" if claim.get("exact") else claim["verdict"]


def _verdict_mark(claim: dict[str, Any], recorded: dict[str, Any]) -> str:
    if is_judged_otherwise(claim):
        return NOT_BY_INTERVAL
    return NOT_BY_HOLM if falls_to_holm(claim, recorded) else ""


def falls_to_holm(claim: dict[str, Any], recorded: dict[str, Any]) -> bool:
    """Whether a claim that is not resolved would be by its own test at 5%, with repetitions enough."""
    from types import SimpleNamespace

    from anabranch.studies.corrected import LEVEL, p_value
    from anabranch.studies.paired import SEEDS_NEEDED

    count = claim.get("count") or len(recorded["seeds"])
    if claim["verdict"] != "not resolved" or claim.get("exact") or count < SEEDS_NEEDED:
        return False
    p = p_value(SimpleNamespace(**{"margin": None, "limit": None, **claim}), count)
    return p is not None and p <= LEVEL


def _frozen_told(recorded: dict[str, Any]) -> list[str]:
    """When the plan was frozen, and why claims are void."""
    history = (recorded.get("frozen") or {}).get("history", [])
    told = []
    if history:
        first, last = history[0], history[-1]
        told.append(f"Plan and rule frozen on {first['date']} ({last['hash']}), {first['why'].partition('. ')[0]}.")
    told += [f"Frozen anew on {entry['date']}. {entry['why']}." for entry in history[1:] if _is_told(entry)]
    void = [claim for claim in recorded["claims"] if claim["verdict"] == "void"]
    # What the study itself calls void stays so, whatever runs.
    told += [f"Void: {why}." for why in dict.fromkeys(claim.get("why_void") for claim in void) if why]
    if any(not claim.get("why_void") for claim in void):
        reasons = [entry["why"].partition(". ")[2] or entry["why"] for entry in history[:1] if entry["voids"]]
        told.append(" ".join(["Void until the arms have run again.", *(f"{reason}." for reason in reasons)]))
    return told


def _is_told(entry: dict[str, Any]) -> bool:
    """Whether a plan that was frozen anew says something else, and not only the same in another form."""
    return bool(entry["voids"]) or any(what.startswith("primary was ") for what in entry.get("changed", []))


def is_judged_otherwise(claim: dict[str, Any]) -> bool:
    """Whether a verdict was given although the interval contains zero: it is of a rule about each seed, or of another limit than zero."""
    interval = claim["interval"]
    if claim.get("exact"):
        return False
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
    # Of those whose rows keep several bars each.
    if any("holds" in row for row in recorded["rows"]):
        columns |= {
            "Attempts a request": "attempts_per_request",
            "99th percentile, s": "p99_s",
            "In use again after, s": "recovered_s",
            "Of at most, s": "most_s",
        }
    # Of benchmarks that say what each vector, or whatever it is, takes.
    if any("bytes_ours" in row for row in recorded["rows"]):
        columns |= {"Bytes each, ours": "bytes_ours", "Peer's": "bytes_peer"}
    rows = [
        row | {"ratio": "withdrawn", "bar": None} if row.get("withdrawn") else row | {"bar": _bar_told(row)}
        for row in (_with_limits(row, recorded) for row in recorded["rows"])
    ]
    withdrawn = sorted({f"Withdrawn: {row['withdrawn']}." for row in rows if row.get("withdrawn")})
    said = age(recorded).told()
    told = " ".join(
        [
            *withdrawn,
            *_limits_told(recorded),
            *([recorded["note"]] if recorded.get("note") else []),
            *([f"{said}."] if said else []),
        ]
    )
    again = f"Repeat it with `python benchmarks/{recorded['name']}.py --json FILE`."
    return (
        _table(columns, rows)
        + _missed_told(recorded)
        + f"\nMeasured on {_measured(recorded)}. Ratio above 1: ours is better. {again}\n"
        + (f"\n{told}\n" if told else "")
    )


def _with_limits(row: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """A row that keeps several bars, with the one that depends on itself."""
    return row | {"most_s": recorded["bars"]["periods"] * row["period_s"]} if "holds" in row else row


def _limits_told(recorded: dict[str, Any]) -> list[str]:
    """The bars of a record whose rows keep all of them, in words."""
    if not any("holds" in row for row in recorded["rows"]):
        return []
    words = ", ".join(dict.fromkeys(row["peer_name"] for row in parts(recorded)))
    return [f"Asked of every row: {words}."]


def _missed_told(recorded: dict[str, Any]) -> str:
    """Missed bars of a record in words, so that no page is silent on them; empty where all are met."""
    asked = []
    for row in parts(recorded):
        bar = asked_of(recorded["name"], row)
        # Records have their bars themselves; parts of rows have not.
        ratio = row.get("bar") if bar is None else bar.ratio
        if ratio is not None and not row.get("withdrawn"):
            asked.append(row | {"bar": ratio})
    missed = [row for row in asked if not is_met(row)]
    if not missed:
        return ""
    worst = min(missed, key=lambda row: (row["ratio"] or 0.0) / row["bar"])
    figure = "has no figure" if worst["ratio"] is None else f"is {_cell(float(worst['ratio']))}"
    name = f"{worst['case']} ({worst['peer_name']})"
    of = f", of which the farthest, {name}," if len(missed) > 1 else f": {name}"
    return f"\n**Missed: {len(missed)} of {len(asked)} bars**{of} {figure} where {_cell(worst['bar'])} was asked.\n"


def _bar_told(row: dict[str, Any]) -> str | None:
    if "holds" in row:
        missed = [name for name, is_held in row["holds"].items() if not is_held]
        return f"missed: {', '.join(missed)}" if missed else "met"
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


def _records(folder: str) -> list[Path]:
    return sorted((ROOT / folder / "results").glob("*.json"))


# What came out: one row a study, one row a bar

OUTCOMES = {
    "holds": "reproduced",
    "does not hold": "contradicted",
    "not resolved": "undecided",
    "void": "void",
    "not run": "not run",
}
# Of a primary claim that is none of the paper's, which its cell for the paper says at the start: nothing is reproduced by it.
OURS = "ours"
OUTCOMES_OF_OURS = {"holds": "holds, a claim of ours", "does not hold": "does not hold, a claim of ours"}
# Plans that were frozen with a figure in that cell which is none of what the claim says: a table of others (the survey has no figures of
# its own), another task and measure, or a direction where five points are asked.
ALSO_OURS = frozenset({"mhr", "peft_survey", "rewiring"})


TESTS_ONLY = "tests only"
# What outcome stands for claims of which no single one was named beforehand: the first of these that any of them has.
SEVEREST = ("does not hold", "void", "not run", "not resolved", "holds")


def headline(name: str) -> dict[str, Any] | None:
    """The claim that stands for a study and what came out of it; None for a study that has no frozen plan.

    That is its primary claim. Where that is exact, it is a test: see `_beside_tests`.
    """
    place = ROOT / "studies" / "results" / name / "frozen.json"
    if not place.exists():
        return None
    plan = json.loads(place.read_text(encoding="utf-8"))["plan"]
    planned = [claim for claim, _ in plan["claims"]]
    number = planned.index(plan["primary"])
    claim, paper = plan["claims"][number]
    found = {"study": name, "claim": claim, "paper": paper, "outcome": OUTCOMES["not run"]}
    record = place.parents[1] / f"{name}.json"
    if not record.exists():
        return found
    recorded = json.loads(record.read_text(encoding="utf-8"))
    # Its words may name what was found, such as the baseline that came out best; its place does not change.
    judged = recorded["claims"][number]
    outcome = OUTCOMES[judged["verdict"]]
    if judged.get("exact"):
        other = _beside_tests(plan["claims"], recorded["claims"], number)
        if other is not None:
            judged, paper = recorded["claims"][other], plan["claims"][other][1]
        outcome = TESTS_ONLY if other is None else OUTCOMES[judged["verdict"]]
    count = judged["count"] or max((len(of) for group in recorded["runs"] for of in group["runs"].values()), default=0)
    told = {
        "claim": judged["claim"],
        "ours": _ours_told(judged),
        "count": count if judged["ours"] is not None and outcome != TESTS_ONLY else None,
    }
    if paper.startswith(OURS) or name in ALSO_OURS:
        outcome = OUTCOMES_OF_OURS.get(judged["verdict"], outcome)
    return found | told | {"paper": paper, "outcome": outcome}


def _beside_tests(planned: list[list[str]], judged: list[dict[str, Any]], primary: int) -> int | None:
    """Number of the claim that stands for a study whose primary claim is a test; None where all that the paper says are tests.

    The next in the plan that is neither a test nor "not in the paper" begins. Nobody named it beforehand, so the kindest of an
    experiment is not picked: of those that have its experiment ("E2: ...") the one with the severest outcome stands.
    """
    of_paper = [
        number
        for number, ((_, paper), claim) in enumerate(zip(planned, judged, strict=True))
        if number > primary and not claim.get("exact") and not re.match("not in the paper|not claimed|-?$", paper)
    ]
    if not of_paper:
        return None
    experiments = [claim.partition(":")[0] if ":" in claim else claim for claim, _ in planned]
    alike = [number for number in of_paper if experiments[number] == experiments[of_paper[0]]]
    return min(alike, key=lambda number: SEVEREST.index(judged[number]["verdict"]))


def _ours_told(claim: dict[str, Any]) -> str | None:
    """What was measured, beside what, and the interval of their difference."""
    if claim["ours"] is None:
        return None
    beside = f"; baseline {_cell(claim['baseline'])}" if claim["baseline"] is not None else ""
    limit = f"; limit {_cell(claim['limit'])}" if claim["limit"] is not None else ""
    interval = claim["interval"]
    spread = f"; difference {_cell(claim['difference'])} ({_cell(interval)})" if interval else ""
    return f"{_cell(claim['ours'])}{beside}{limit}{spread}"


def headlines(up: str = "") -> str:
    """A row for each study: what came out of the claim that stands for it."""
    frozen = sorted((ROOT / "studies" / "results").glob("*/frozen.json"))
    rows = [found for path in frozen if (found := headline(path.parent.name)) is not None]
    order = [*OUTCOMES.values(), TESTS_ONLY, *OUTCOMES_OF_OURS.values()]
    rows.sort(key=lambda row: order.index(row["outcome"]))
    columns = {
        "Study": "page",
        "Outcome": "outcome",
        "n": "count",
        "Primary claim": "claim",
        "Paper": "paper",
        "Ours": "ours",
        "Size here (in the paper)": "scale",
    }
    sizes = tomllib.loads((ROOT / "docs" / "scales.toml").read_text(encoding="utf-8"))
    made = _table(
        columns, [row | {"page": _linked(row["study"], up), "scale": _scale(sizes, row["study"])} for row in rows]
    )
    counts = ", ".join(
        f"{count} {name}"
        for name in order
        # Of the other kinds there may be none at all.
        if (count := sum(row["outcome"] == name for row in rows)) or name in OUTCOMES.values()
    )
    return f"{made}\n{len(rows)} studies: {counts}.\n"


def _scale(sizes: dict[str, list[str]], study: str) -> str | None:
    return "{} ({})".format(*sizes[study]) if study in sizes else None


def _linked(study: str, up: str) -> str:
    page = page_of(study)
    # With spaces, so that a narrow column can break it.
    name = study.replace("_", " ")
    return f"[{name}]({up}systems/{page}.md)" if page else name


def page_of(study: str) -> str | None:
    """The page that a study's result is on: of its name, or of the system whose second study it is; None if there is none."""
    words = study.split("_")
    names = ("-".join(words[:last]) for last in range(len(words), 0, -1))
    return next((name for name in names if (ROOT / "docs" / "systems" / f"{name}.md").exists()), None)


def bars(up: str = "") -> str:
    """A row for each bar: its worst case, missed ones first, and those of which nothing is recorded."""
    found: dict[tuple[str, Bar, bool], list[dict[str, Any]]] = {}
    marks: dict[str, str] = {}
    for path in _records("benchmarks"):
        recorded = json.loads(path.read_text(encoding="utf-8"))
        changed = age(recorded).changed
        if changed is None:
            marks.setdefault(recorded["name"], OF_UNKNOWN_AGE)
        elif changed:
            marks[recorded["name"]] = STALE
        for row, asked in itertools.product(parts(recorded), (BARS, AIMS)):
            bar = asked_of(recorded["name"], row, asked)
            if bar is not None and not row.get("withdrawn"):
                key = (recorded["name"], bar, asked is AIMS)
                found.setdefault(key, []).append(row | {"bar": bar.ratio})
    rows = [
        _bar_row(name, of, marks.get(name, "")) | {"asked": f"{bar.ratio:g} (aim)" if is_aim else bar.ratio}
        for (name, bar, is_aim), of in found.items()
    ]
    rows.sort(key=lambda row: (row["is_met"], row["figure"] / row["bar"]))
    columns = {
        "Benchmark": "name",
        "Worst case": "case",
        "Against": "peer_name",
        "Asked": "asked",
        "Figure": "figure",
        "Met": "met",
    }
    missing = sorted(name for name, asked in AWAITED.items() if asked)
    met = sum(row["is_met"] for row in rows)
    return (
        _table(columns, rows)
        + f"\n{met} of {len(rows)} bars and aims are met in all of their cases. A figure is a ratio: above 1, ours is better. "
        f"{STALE} The record is stale. {OF_UNKNOWN_AGE} Its age is not known: the commit that it names is not in the history.\n"
        + (f"\nAsked, and not recorded yet: {', '.join(missing)}.\n" if missing else "")
    )


def _bar_row(name: str, rows: list[dict[str, Any]], mark: str = "") -> dict[str, Any]:
    """Of rows with one bar; ``mark`` of their record."""
    met = sum(map(is_met, rows))
    # One that ours failed has no ratio.
    worst = min(rows, key=lambda row: (is_met(row), row["ratio"] or 0.0))
    return {
        "name": _marked(name, mark),
        "case": worst["case"],
        "peer_name": worst["peer_name"],
        "bar": worst["bar"],
        "figure": worst["ratio"] or 0.0,
        "met": f"{'yes' if met == len(rows) else 'no'}, {met} of {len(rows)}",
        "is_met": met == len(rows),
    }


# Systems

SYSTEMS_MARK = re.compile(r"(<!-- systems -->\n).*?(<!-- /systems -->)", re.DOTALL)
SYSTEM_ROW = re.compile(r"^\| \[(?P<name>[^\]]+)\]\((?P<page>[\w-]+)\.md\) \| (?P<routes>[^|]*) \|", re.MULTILINE)


def readme_with_systems(readme: str, index: str) -> str:
    """The README with its table of systems taken from docs/systems/index.md and from the records. ``python docs/hooks.py`` writes it;
    a test finds it stale."""
    return SYSTEMS_MARK.sub(lambda found: found[1] + systems_table(index) + found[2], readme)


def systems_table(index: str) -> str:
    """The systems of docs/systems/index.md: what each routes, and what came out of its study."""
    rows = []
    for found in SYSTEM_ROW.finditer(index):
        studied = headline(found["page"].replace("-", "_"))
        told = None if studied is None else studied["outcome"]
        if studied is not None and studied.get("count"):
            told = f"{told} (n = {studied['count']})"
        rows.append(
            {"name": f"[{found['name']}](docs/systems/{found['page']}.md)", "routes": found["routes"], "told": told}
        )
    return _table({"System": "name", "Routes": "routes", "Evidence": "told"}, rows)


if __name__ == "__main__":
    page, index = ROOT / "README.md", ROOT / "docs" / "systems" / "index.md"
    page.write_text(readme_with_systems(page.read_text("utf-8"), index.read_text("utf-8")), encoding="utf-8")
