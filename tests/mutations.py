"""Break one line at a time and count what no test notices.

    python tests/mutations.py                       a sample of routing, nn and experts
    python tests/mutations.py --modules routing.bias nn.moe --sample 0      every mutant of two modules

A mutant is a module with one small change: a comparison or a sum turned round, ``+=`` made ``=``, a condition negated, a constant
moved by one, a statement left out. It is run against the tests of its module first, then against those of its folder; a mutant that
passes both is a survivor: a line that no test pins. Each runs in a process forked from one that has the libraries loaded, with the
changed module put in by an import hook (in Python processes that tests start, too), so nothing on disk is touched. Quick tests run
first: most mutants fail many. What is compiled (`anabranch/native`) is not changed. A survivor may be equivalent (a faster path with
the same result); equivalent_mutants.json names those that were looked at, by their line, and says why no test can tell.
"""

import argparse
import ast
import copy
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "anabranch"
FOLDERS = ("routing", "nn", "experts")

# Modules whose tests go by another name than theirs.
NEAR = {
    "nn.operator": ("nn/test_operator.py", "nn/test_grouped.py", "nn/test_pool.py", "nn/test_derivatives.py"),
    "nn.latent_attention": ("nn/test_latent_attention.py", "adapters/test_routed.py", "adapters/test_mhr.py"),
    "nn.expert_call": ("nn/test_operator.py", "nn/test_grouped.py"),
    "nn.expert_loop": ("nn/test_operator.py", "nn/test_grouped.py", "nn/test_pool.py", "nn/test_derivatives.py"),
    "nn.sums": ("nn/test_sums.py", "nn/test_pool.py"),
    "nn.streams": ("experts/test_parscale.py",),
    "nn.weighted": ("nn/test_rows.py", "nn/test_derivatives.py", "experts/test_versatile.py"),
    "nn.norm": ("nn/test_norm.py", "nn/test_derivatives.py", "nn/test_rows.py"),
    "nn.kernels.attention": ("nn/test_attention.py", "nn/test_causal.py"),
    "nn.kernels.expert_mlp": ("nn/test_grouped.py", "nn/test_pool.py", "nn/test_binding.py"),
    "nn.kernels.paged": ("nn/test_binding.py", "nn/test_fuzz.py"),
    "nn.kernels.rows": ("nn/test_rows.py", "nn/test_norm.py", "nn/test_rotary.py", "nn/test_binding.py"),
    "experts.versatile.loop_gate": (
        "experts/test_versatile_loop_gate.py",
        "experts/test_versatile_loops.py",
        "experts/test_versatile.py",
    ),
    "experts.rmoe_measure": ("experts/test_rmoe.py",),
    "routing.conversion": ("lm/formats/test_errors.py",),
    "routing.discovery": ("routing/test_record.py",),
    "routing.sequences": ("routing/test_record.py", "lm/test_generate_traces.py"),
    "routing.trace_builder": ("routing/test_trace.py", "routing/test_record.py"),
    "routing.trace_schema": ("routing/test_trace.py",),
    "routing.layer_overrides": ("routing/test_override.py",),
    "routing.record": ("routing/test_record.py", "lm/test_generate_traces.py"),
}

EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    (one["module"], one["line"], one["before"], one["after"]): one["why"]
    for one in json.loads(Path(__file__).with_name("equivalent_mutants.json").read_text("utf-8"))
}

_SWAPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "minimum": "maximum",
    "maximum": "minimum",
    "add_": "copy_",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module: which node of its tree, the text of the line where it begins, the node's source before and after."""

    module: str
    node: int
    line: int
    text: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names it, also when lines move."""
        return self.module, self.text, self.before, self.after

    def tree(self) -> ast.Module:
        """The module with the change made."""
        tree = ast.parse(path_of(self.module).read_text("utf-8"))
        _apply(next(itertools.islice(ast.walk(tree), self.node, None)))
        return ast.fix_missing_locations(tree)

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.before}  ->  {self.after}"


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree = ast.parse(source)
    words = set(map(id, _words(tree)))
    lines = source.splitlines()
    found = []
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in words or not _can_change(node):
            continue
        changed = copy.deepcopy(node)
        _apply(changed)
        ast.fix_missing_locations(changed)
        text = lines[node.lineno - 1].strip()
        found.append(Mutant(module, number, node.lineno, text, _written(node), _written(changed)))
    return sorted(found, key=lambda mutant: mutant.line)


def _can_change(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return type(node.ops[0]) in _SWAPPED
    if isinstance(node, ast.BinOp | ast.BoolOp):
        return type(node.op) in _SWAPPED
    if isinstance(node, ast.AugAssign | ast.If | ast.IfExp):
        return True
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool | int)
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        return name in _NAMES
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _apply(node: ast.AST) -> None:
    if isinstance(node, ast.Compare):
        node.ops[0] = _SWAPPED[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = _SWAPPED[type(node.op)]()
    elif isinstance(node, ast.AugAssign):
        _become(node, ast.Assign([node.target], node.value, lineno=node.lineno))
    elif isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            node.func.attr = _NAMES[node.func.attr]
        else:
            node.func.id = _NAMES[node.func.id]
    else:
        node.value = ast.Constant(None)


def _become(node: ast.AST, other: ast.AST) -> None:
    node.__class__ = other.__class__  # in place: its parent need not be known
    node.__dict__.clear()
    node.__dict__.update(other.__dict__)


def _words(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes of messages, annotations and log lines: what they say is no behaviour that a test should pin."""
    for parent in ast.walk(tree):
        places = [getattr(parent, field, None) for field in ("annotation", "returns")]
        called = ast.unparse(parent.func) if isinstance(parent, ast.Call) else ""
        spoken = isinstance(parent, ast.FunctionDef) and parent.name in ("__repr__", "__str__", "extra_repr")
        # A zip over what is equally long; a value that nobody sets.
        checked = isinstance(parent, ast.keyword) and parent.arg in ("strict", "frozen")
        is_words = isinstance(parent, ast.Raise | ast.JoinedStr) or called.startswith(
            ("log.", "logger.", "warnings.", "Field")
        )
        if spoken or checked or is_words:
            places.append(parent)
        for place in places:
            yield from ast.walk(place) if place is not None else ()


def _written(node: ast.AST) -> str:
    """On one line; of a condition, not what depends on it."""
    text = f"if {ast.unparse(node.test)}" if isinstance(node, ast.If | ast.IfExp) else ast.unparse(node)
    return " ".join(text.split())


class _Changed(importlib.machinery.SourceFileLoader):
    """Loads a module from a changed tree."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self.tree = tree

    def get_code(self, fullname: str):
        return compile(self.tree, self.path, "exec")


class _Finder:
    def __init__(self, mutant: Mutant) -> None:
        self.name = f"anabranch.{mutant.module}"
        self.path = str(path_of(mutant.module))
        self.tree = mutant.tree()

    def find_spec(self, name: str, path=None, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=_Changed(name, self.path, self.tree))


def install(mutant: Mutant) -> None:
    """From now on its module is imported changed."""
    sys.meta_path.insert(0, _Finder(mutant))


def _hand_on(mutant: Mutant) -> None:
    """Python processes that tests start get the mutant as well, see mutated/sitecustomize.py."""
    os.environ["ANABRANCH_MUTANT"] = f"{mutant.module}:{mutant.node}"
    paths = [str(ROOT / "tests" / "mutated"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def named(text: str) -> Mutant:
    """The mutant that `_hand_on` wrote down."""
    module, _, node = text.partition(":")
    return next(one for one in mutants(module, path_of(module).read_text("utf-8")) if one.node == int(node))


def path_of(module: str) -> Path:
    """The file of a module given without the package's name."""
    return PACKAGE / Path(*module.split(".")).with_suffix(".py")


def tests_of(module: str) -> list[tuple[str, ...]]:
    """Tests that are run one after another until one fails: of the module by its name, then of its folder and the contract."""
    folder, *rest = module.split(".")
    tests = ROOT / "tests"
    named = {path for name in rest for path in (tests / folder).glob(f"test_{name.strip('_')}*.py")}
    near = {tests / path for path in NEAR[module]} if module in NEAR else named
    far = {*(tests / folder).rglob("test_*.py"), tests / "test_contract.py"} - near
    return [tuple(sorted(map(str, group))) for group in (near, far) if group]


class Judge:
    """Runs tests with one module changed.

    What passes as it is may take ten times as long with a change before it counts as hanging, which is being noticed too.
    """

    def __init__(self) -> None:
        self._limit: dict[tuple[str, ...], float] = {}
        self._seconds: dict[tuple[str, ...], dict[str, float]] = {}  # of each test, as it is

    def survives(self, mutant: Mutant) -> bool:
        """Whether all tests of its module pass with this mutant in its place.

        Raises RuntimeError if they fail as they are: every mutant would look noticed.
        """
        return all(self._passes(mutant, tests) for tests in tests_of(mutant.module))

    def _passes(self, mutant: Mutant, tests: tuple[str, ...]) -> bool:
        if tests not in self._limit:
            begin, clock = time.monotonic(), _Clock({})
            with tempfile.NamedTemporaryFile() as file:
                if not _passes(None, tests, float("inf"), clock, file.name):
                    raise RuntimeError(f"these tests fail as they are: {' '.join(tests)}")
                self._seconds[tests] = json.loads(Path(file.name).read_text("utf-8"))
            self._limit[tests] = 30 + 10 * (time.monotonic() - begin)
        return _passes(mutant, tests, self._limit[tests], _Clock(self._seconds[tests]))


class _Clock:
    """A plugin of pytest that puts quick tests first, and takes the time of each."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.taken: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list) -> None:
        """In the order of time; tests without one stay first."""
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report) -> None:
        """Its three phases, added up."""
        self.taken[report.nodeid] = self.taken.get(report.nodeid, 0.0) + report.duration


def _passes(
    mutant: Mutant | None, tests: tuple[str, ...], seconds: float, clock: _Clock, times: str | None = None
) -> bool:
    child = os.fork()
    if child == 0:
        _run_tests(mutant, tests, clock, times)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run_tests(mutant: Mutant | None, tests: tuple[str, ...], clock: _Clock, times: str | None) -> None:
    """In the forked process: run and leave, whatever happens. What each test took is written to ``times``."""
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        if mutant is not None:
            install(mutant)
            _hand_on(mutant)
        import pytest

        options = "-x -q -p no:cacheprovider -p no:xdist --hypothesis-seed=0".split()
        # Plugins are loaded before pytest asks for them, see _preload.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "--rootdir", str(ROOT)]
        code = int(pytest.main([*options, *tests], plugins=[clock]))
        if times is not None:
            Path(times).write_text(json.dumps(clock.taken), "utf-8")
    finally:
        os._exit(min(code, 1))


def sample_of(modules: list[str], sample: int, seed: int) -> list[Mutant]:
    """``sample`` mutants of these modules (0: all), those known to be equivalent left out.

    Each has a place of its own in the order that they are drawn in, so a change of one line changes the sample by what it changed.
    """
    found = [mutant for module in modules for mutant in mutants(module, path_of(module).read_text("utf-8"))]
    found = [mutant for mutant in found if mutant.key not in EQUIVALENT]
    if not sample:
        return found
    # Equal changes of one line (or of equal lines) differ by which of them they are.
    numbers: dict[tuple[str, ...], itertools.count] = {}
    places = {mutant: (seed, mutant.key, next(numbers.setdefault(mutant.key, itertools.count()))) for mutant in found}
    return sorted(found, key=lambda mutant: hashlib.sha256(repr(places[mutant]).encode()).digest())[:sample]


def modules_of(folders: tuple[str, ...] = FOLDERS) -> list[str]:
    """Every module of these folders."""
    paths = sorted(
        path for folder in folders for path in (PACKAGE / folder).rglob("*.py") if path.name != "__init__.py"
    )
    return [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths]


def run(found: list[Mutant], *, show: Callable[[str], None] = print) -> list[Mutant]:
    """The survivors; ``show`` is told of each as it is found."""
    judge, left = Judge(), []
    for number, mutant in enumerate(found, 1):
        if judge.survives(mutant):
            left.append(mutant)
            show(f"{number}/{len(found)} survived: {mutant}")
    return left


def _preload() -> None:
    """What every test loads, once for all forks; nothing of ours, which is to be loaded changed."""
    names = ["numpy", "pytest", "pydantic", "pyarrow.parquet", "safetensors.torch", "tokenizers"]
    names += ["hypothesis.strategies", "torch.distributed.tensor", "torch.export"]
    for name in names:
        importlib.import_module(name)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    assert not any(name.split(".")[0] == "anabranch" for name in sys.modules)


def main(arguments: list[str] | None = None) -> int:
    """Print survivors; the exit code is 1 if there are more than ``--allow``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--modules", nargs="*", default=None, help="such as routing.bias; default: all of routing, nn, experts"
    )
    parser.add_argument("--sample", type=int, default=60, help="mutants to try; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow", type=int, default=0, help="survivors that are no failure")
    parser.add_argument("--json", type=Path, help="write survivors here")
    options = parser.parse_args(arguments)
    _preload()
    found = sample_of(options.modules or modules_of(), options.sample, options.seed)
    left = run(found, show=lambda text: print(text, flush=True))
    print(f"{len(left)} of {len(found)} mutants survived")
    for mutant in left:
        print(f"  {mutant}")
    if options.json:
        options.json.write_text(
            json.dumps({"tried": len(found), "survived": [list(mutant.key) for mutant in left]}, indent=2)
        )
    return int(len(left) > options.allow)


if __name__ == "__main__":
    sys.exit(main())
