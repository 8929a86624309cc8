"""What a base install must do: every help, every command that needs an extra, those that need none, and every public name.

`SCRIPT` runs where nothing but the base is installed: in a new environment, or here with all else hidden from it.
"""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = {"numpy", "pydantic", "rich", "typer"}

SCRIPT = """
import contextlib, io, json, os, sys, tempfile
BASE, COMMANDS, PACKAGES, IS_HIDING, FILES = json.loads(sys.argv[1])
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN or name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
from anabranch.extras import extras
HIDDEN = {module for extra in extras().values() for module in extra.modules} - set(BASE)
if IS_HIDING:
    sys.meta_path.insert(0, Hide())
folder = tempfile.mkdtemp()
os.environ["HOME"] = folder
os.chdir(folder)
for name, text in FILES.items():
    with open(name, "w") as file:
        file.write(text)
from anabranch.cli.main import main
told = {}
def note(name, call):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call()
    told[name] = [code, out.getvalue(), err.getvalue()]
for command in COMMANDS:
    note(command, lambda: main(command.split()))
import importlib
names = {}
for package, wanted in PACKAGES.items():
    for name in wanted:
        try:
            getattr(importlib.import_module(package), name)
            names[f"{package}.{name}"] = None
        except Exception as error:
            names[f"{package}.{name}"] = f"{type(error).__name__}: {error}"
print(json.dumps([told, names, sorted(set(sys.modules) & HIDDEN)]))
"""
NEEDS = {  # a command as it is given, and the extras it names
    "train --out x": "lm",
    "compare --out x": "lm,plots",
    "eval x": "lm",
    "generate x --prompt x": "lm",
    "chat x": "lm",
    "report x --out x": "lm,plots",
    "adapters report x x --out x": "lm,plots",
    "experts fit-predictor x x": "lm",
    "adapt x y --out z": "lm",
    "heads train x --out y": "lm",
    "heads report x": "lm",
    "heads transcribe x y": "huggingface",
    "cluster attention x": "lm",
    "cluster bench": "lm",
    "cluster churn": "lm",
    "cluster elastic x": "lm",
    "cluster plan x": "lm",
    "cluster plan x --picture y.svg": "lm,plots",
    "rl train x --out y": "lm",
    "rl eval x": "lm",
    "rl eval x --picture y.svg": "lm,plots",
    "rl replay x --out y": "lm,images",
    "cluster fabric --picture y.svg": "plots",
    "cluster fabric --trace x.parquet": "lm",
    "adapters card x": "lm",
    "adapters list": "lm",
    "adapters cluster x --clusters 2": "lm",
    "adapters describe x --instruction y": "lm",
    "adapters gates x --model y --data z": "lm",
    "adapters estimate x y": "lm",
    "adapters recommend x": "lm",
    "adapters merge x --out y": "lm",
    "adapters export x y --out z": "lm",
    "adapters fuse x y --out z": "lm",
    "adapters eval x y --data z": "lm",
    "adapters route x y": "lm",
    "pvchat pretrain x --out y": "lm,images",
    "pvchat learn x y --name <a> --bank z --out w": "lm,images,graph",
    "pvchat ask x y z": "lm,images",
    "pvchat eval x y --name <a> --subject z": "lm,images,graph",
    "pvchat ways x y --bank z --out w": "lm,images,graph",
    "pvchat compose x --out y": "lm,images",
    "convert x y --to native": "lm",
    "oracle x --out x": "lm,plots",
    "depth search x --out y": "lm",
    "depth train x --out y": "lm",
    "depth eval x": "lm",
    "depth report x --routers y --out z": "lm,plots",
    "depth prune x --out y": "lm",
    "depth prune-eval x y": "lm",
    "depth redundancy x": "lm",
    "depth oracle x --out x": "lm,plots",
    "serve": "serve",
    "serve runs/demo": "serve",
    "study rexmoe": "lm",
    "study fastrp": "graph",
    "study alf_lb": "lm",
    "info": "lm",
    "info moe": "lm",
    "plan runs/demo": "lm",
    "graph info": "graph",
    "graph info karate": "graph",
    "graph ppr x": "graph",
    "graph embed x --out x.npy": "graph",
    "graph tune x": "graph",
    "graph resume x y --save z.anb": "graph",
    "graph transform x --out x.npy": "graph",
    "graph predict x y": "graph",
    "graph index x --out x.anb": "graph",
    "graph search x": "graph",
    "graph rank x": "graph",
    "graph peer x": "graph",
    "graph serve x": "graph",
    "graph remove x y": "graph",
    "graph update x y": "graph",
    "graph rewalk x y --add z.csv --out w.anb --out-graph g.anb": "graph",
    "gateway serve": "gateway",
    "gateway serve --check": "gateway",
    "gateway import x": "gateway",
    "gateway collect -c x --out x.jsonl --judge exact": "gateway",
    "gateway add-model x -c x": "gateway",
    "gateway eval x.jsonl --html x.html": "plots",
    "gateway curve x.jsonl --picture x.svg": "plots",
    "routers curve x.jsonl --picture x.svg": "plots",
    "gateway ledger export --out x.parquet": "parquet",
    "routers eval x.jsonl --html x.html": "plots",
}
WORKS = (
    "doctor",
    "cluster fabric permutation --network leaf-spine:2x2x2 --bytes 1MB",
    "plan",
    "study",
    "gateway keys create",
    "gateway keys list",
    "gateway budget list",
    "gateway ledger list",
)

# What wants files and its own extra alone, in an order in which one leaves what the next reads.
OUTCOMES = [
    {
        "query": f"question {number} about {('cats', 'sums', 'code')[number % 3]}",
        "task": ("cats", "sums", "code")[number % 3],
        "scores": {"small": number % 2, "large": number % 3 / 2},
    }
    for number in range(60)
]
LOGGED = [
    {"query": row["query"], "scores": {name: row["scores"][name]}}
    for row, name in zip(OUTCOMES, ["small", "large"] * 30, strict=True)
]
SAMPLED = [
    {"question": row["query"], "task": row["task"], "samples": [number % 2, 0, number % 3 > 0, 1]}
    for number, row in enumerate(OUTCOMES)
]
# Where nobody answers: what asks an endpoint gets as far as that, and says so.
NOBODY = "http://127.0.0.1:9"
STEPS = [{"step": row["query"], "right1": number % 2, "right2": 1} for number, row in enumerate(OUTCOMES)]
FILES = {
    "questions.jsonl": '{"question": "What is 1 plus 1?", "answer": 2}',
    "steps.jsonl": "\n".join(map(json.dumps, STEPS)),
    "samples.jsonl": "\n".join(map(json.dumps, SAMPLED)),
    "outcomes.jsonl": "\n".join(map(json.dumps, OUTCOMES)),
    "logged.jsonl": "\n".join(map(json.dumps, LOGGED)),
    "gateway.toml": """store = "gateway.db"
models = [{ name = "small", deployments = [{ provider = { kind = "mock", model = "small" } }] }]
strategies = { first = { kind = "static" }, second = { kind = "random" } }
ab = { trial = { a = "first", b = "second", metric = "success" } }
""",
}
_KEPT = (
    "gateway keys create ci",
    "gateway keys edit ci --rpm 60",
    "gateway keys rotate ci",
    "gateway keys revoke ci",
    "gateway budget set global 25 --period month",
    "gateway budget remove global --period month",
    "gateway ledger spend --by model",
    "gateway ledger backup copy.db",
    "gateway ledger prune 90d",
    "gateway ab gateway.toml",
    "gateway serve --check -c gateway.toml",
)
_LEARNED = (
    "fit outcomes.jsonl --out routers --quiet",
    "eval outcomes.jsonl --router routers --allow-leak --quiet",
    "route question --router routers",
    "replay logged.jsonl --router routers --allow-leak",
    "curve samples.jsonl --quiet",
    "fit samples.jsonl --strategy best_of --out sampled --quiet",
    "probe steps.jsonl --out probe.json --quiet",
    f"scale questions.jsonl --url {NOBODY}/v1 --system1 a --out runs --quiet",
)
_COMPOSED = (
    "fit outcomes.jsonl --strategy coe --out composed --quiet",
    "coe frontier --router composed --size small=8 --size large=70",
    "coe report outcomes.jsonl --router composed",
    "route question --router composed",
)
WITH_FILES = {
    "gateway": (*_KEPT, *(f"{door} {line}" for door in ("gateway", "routers") for line in _LEARNED)),
    "gateway,routers": tuple(f"{door} {line}" for door in ("gateway", "routers") for line in _COMPOSED),
}


def public():
    """The public names of each package, as they are pinned."""
    spec = importlib.util.spec_from_file_location("public_api", ROOT / "tests" / "test_public_api.py")
    pinned = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pinned)
    return {package: names.split() for package, names in pinned.PUBLIC.items()}


def helps():
    from typer.main import get_command

    from anabranch.cli.main import app

    def below(group, prefix):
        yield f"{prefix}--help"
        for name, command in group.commands.items():
            yield from (
                below(command, f"{prefix}{name} ") if hasattr(command, "commands") else [f"{prefix}{name} --help"]
            )

    return list(below(get_command(app), ""))


def tried(
    python: str | Path, *, hide: bool, extra: str = "", **options: object
) -> tuple[dict[str, tuple[int, str, str]], dict[str, str | None]]:
    """Run `SCRIPT` with an interpreter; exit code and both outputs of each command, and why each public name cannot be had.

    Args:
        python: of the environment.
        hide: hide what belongs to extras, since it is installed there.
        extra: a key of `WITH_FILES`, whose packages are there and whose commands are run on `FILES`; none: all commands that need no file.
        options: of `subprocess.run`.
    """
    if extra:
        from anabranch.extras import extras

        there = {module for name in extra.split(",") for module in extras()[name].modules}
        asked = json.dumps([sorted(BASE | there), WITH_FILES[extra], {}, hide, FILES])
    else:
        asked = json.dumps([sorted(BASE), [*helps(), *NEEDS, *WORKS], public(), hide, {}])
    done = subprocess.run([str(python), "-c", SCRIPT, asked], capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stderr
    told, names, loaded = json.loads(done.stdout)
    assert loaded == []
    return told, names


def check_base(told: dict[str, tuple[int, str, str]], names: dict[str, str | None]) -> None:
    """Every help runs, every missing extra is one line with the pip command and exit code 2, the rest works."""
    for command in helps():
        code, out, err = told[command]
        assert (code, err) == (0, ""), command
        assert out, command
    for command, extra in NEEDS.items():
        code, out, err = told[command]
        assert (code, out) == (2, ""), (command, err)
        assert re.fullmatch(rf"error: .* needs .*; pip install 'anabranch\[{extra}\]'\n", err), (command, err)
    for command in WORKS:
        code, out, err = told[command]
        # Whoever makes a store is told where.
        is_told = command == "gateway keys create" and err.startswith("there is no store at ")
        assert (code, "" if is_told else err) == (0, ""), command
        assert out, command
    for name, text in names.items():
        how = r"MissingExtraError: anabranch\S* needs .*; pip install 'anabranch\[\w+\]'"
        assert text is None or re.fullmatch(how, text), (name, text)
    assert (names["anabranch.lm.Decoder"] or "").endswith("pip install 'anabranch[lm]'")
    assert (names["anabranch.graph.PageRank"] or "").endswith("pip install 'anabranch[graph]'")
    works = {name.rpartition(".")[0] for name in names} - {name.rpartition(".")[0] for name in names if names[name]}
    assert {"anabranch.config", "anabranch.routers.data", "anabranch.routers.referee"} <= works


def check_ends(told: dict[str, tuple[int, str, str]]) -> None:
    """Every command of `WITH_FILES` ends well, but for those that ask nobody, which say so."""
    failed = {command: err for command, (code, _, err) in told.items() if code}
    asked = {command: failed.pop(command) for command in list(failed) if NOBODY in command}
    assert failed == {}
    assert all("did not answer" in err for err in asked.values()), asked
