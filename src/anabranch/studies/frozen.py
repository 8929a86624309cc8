"""The frozen plan of a study: its arms, seeds, claims, primary claim and rule, written down and signed before its first recorded run.

    FOLDER/NAME/frozen.json     beside the runs it is of: ``hash``, ``plan``, and ``history``, one entry for each time it was frozen

A study at its recorded size whose arms, seeds, claims or rule are not those of its frozen plan is refused. It may be frozen anew, with
the reason; then its verdicts are void until its arms have run under the new plan. Each run notes the hash of the plan it ran under.

The rule is what decides verdicts: the code of ``judge`` and of all it uses of its own package, without comments, docstrings and form.
The harness, which is the same for all studies, is no part of it.
"""

import ast
import datetime
import functools
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.config import to_dict
from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_write_json, parse_json
from anabranch.studies.fingerprint import bare, of_tree
from anabranch.studies.records import changes

if TYPE_CHECKING:
    from anabranch.studies.harness import Claim, Study

# What all studies share, and decides nothing of one.
SHARED = "anabranch.studies.harness"
ALL = "all"
_SHOWN = 60


@dataclass(frozen=True)
class Frozen:
    """What lies in ``frozen.json``.

    Attributes:
        plan: see `plan_of`.
        history: each time it was frozen, the last one last: ``date``, ``hash``, ``why``, what ``changed``, and which claims it ``voids``:
            their words, or `ALL`.
    """

    plan: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]

    @property
    def hash(self) -> str:
        """Of the plan."""
        return sign(self.plan)

    def voiding(self) -> list[tuple[list[str], Callable[[str | None], bool]]]:
        """For each time it was frozen, which claims that voids, and whether a run is older, by the hash that it notes."""
        hashes = [entry["hash"] for entry in self.history]

        def older(at: int) -> Callable[[str | None], bool]:
            return lambda own: (hashes.index(own) if own in hashes else -1) < at

        return [(list(entry["voids"]), older(at)) for at, entry in enumerate(self.history)]

    def voided(self, ran_under: Iterable[str | None]) -> list[str]:
        """Claims that are void, by their words, or `ALL`: those of entries that came after one of the runs. ``ran_under``: the hash that
        each run notes, None for one that notes none, as those do that are older than plans."""
        hashes = [entry["hash"] for entry in self.history]
        oldest = min((hashes.index(own) if own in hashes else -1 for own in ran_under), default=len(hashes))
        return [claim for entry in self.history[oldest + 1 :] for claim in entry["voids"]]


def plan_of(study: "Study", planned: Sequence["Claim"]) -> dict[str, Any]:
    """What is to be frozen of a study; ``planned`` are its claims where nothing has run."""
    claims = [[claim.claim, claim.paper] for claim in planned]
    return {
        "study": study.name,
        "revision": study.revision,
        "seeds": list(study.seeds),
        "primary": study.primary or (claims[0][0] if claims else None),
        "claims": claims,
        "rule": of_rule(study.judge),
        "arms": {arm.name: json.loads(json.dumps(to_dict(arm.config))) for arm in study.arms},
    }


def sign(plan: Mapping[str, Any]) -> str:
    """The hash of a plan."""
    return blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=8).hexdigest()


def path_of(folder: Path, name: str) -> Path:
    """Where the frozen plan of a study lies."""
    return folder / name / "frozen.json"


def read(folder: Path, name: str) -> Frozen | None:
    """The frozen plan of a study, None if there is none. Raises DataError if it was edited since it was signed."""
    path = path_of(folder, name)
    try:
        found = parse_json(path.read_bytes())
        made, signed = Frozen(found["plan"], found["history"]), [found["hash"], found["history"][-1]["hash"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is no frozen plan ({error}); restore it") from error
    if signed != [made.hash] * 2:
        raise DataError(
            f"{path} was edited after it was signed: its plan has the hash {made.hash}, and {signed[0]} is written there; restore it"
        )
    return made


def freeze(
    folder: Path, plan: Mapping[str, Any], why: str, *, changed: Sequence[str] = (), voids: Sequence[str] = ()
) -> Frozen:
    """Write a plan down, after those that were frozen before."""
    before = read(folder, plan["study"])
    entry = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hash": sign(plan),
        "why": why,
        "changed": list(changed),
        "voids": list(voids),
    }
    made = Frozen(plan, [*(before.history if before else []), entry])
    path = path_of(folder, plan["study"])
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, {"hash": made.hash, "history": made.history, "plan": made.plan})
    return made


def check(frozen: Frozen, study: "Study") -> None:
    """Raises ConfigError if the plan of ``study`` is not the one that was frozen."""
    plan = study.plan()
    found = differing(frozen.plan, study)
    if found:
        last, more = frozen.history[-1], f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ConfigError(
            f"study {plan['study']!r} is not what was frozen on {last['date']} ({last['hash']}): {found[0]}{more}. Undo it, or freeze it "
            f"anew: anabranch study {plan['study']} --full --refreeze REASON; its verdicts are void until its arms have run again"
        )


def differing(frozen: Mapping[str, Any], study: "Study") -> list[str]:
    """In what a study is not as it was frozen, in words. A field of a config that came later counts at its default."""
    plan = study.plan()
    told = [
        f"{name} was {_short(frozen[name])} and is now {_short(plan[name])}"
        for name in ("revision", "seeds", "primary")
        if frozen[name] != plan[name]
    ]
    before, after = (dict(one["claims"]) for one in (frozen, plan))
    told += [f"claim {_short(claim)} is gone" for claim in before if claim not in after]
    told += [f"claim {_short(claim)} is new" for claim in after if claim not in before]
    told += [
        f"the paper's number of claim {_short(claim)} was {_short(before[claim])} and is now {_short(after[claim])}"
        for claim in before
        if claim in after and before[claim] != after[claim]
    ]
    if frozen["rule"] != plan["rule"]:
        told.append("the code of its rule is another")
    # As they are, not as JSON, which does not tell fields of a config from what somebody wrote.
    before, after = frozen["arms"], {arm.name: arm.config for arm in study.arms}
    told += [f"arm {name} is gone" for name in before if name not in after]
    told += [f"arm {name} is new" for name in after if name not in before]
    told += [
        f"arm {name}: {field or 'it'} was {_short(old)} and is now {_short(new)}"
        for name in before
        if name in after
        for field, (old, new) in changes(before[name], after[name]).items()
    ]
    return told


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


# The rule


def of_rule(judge: Callable[..., Any]) -> str:
    """Digest of the code that decides verdicts: ``judge`` and whatever it uses, directly or not, of its own package."""
    found: dict[str, str] = {}
    while isinstance(judge, functools.partial):
        # What is given beforehand is of the rule as well.
        found[f"given {len(found)}"] = repr((judge.args, sorted(judge.keywords.items())))
        judge = judge.func
    package = judge.__module__.rpartition(".")[0] or judge.__module__
    _follow(judge.__module__, judge.__qualname__.partition(".")[0], package, found)
    return blake2b(repr(sorted(found.items())).encode(), digest_size=8).hexdigest()


def _follow(module: str, name: str, package: str, found: dict[str, str]) -> None:
    """Add what ``name`` is in ``module``, and what that uses. Where it lies is no part of it: code may move."""
    tree, defined, imported = _names(module)
    if name in imported:
        origin, own = imported[name]
        if origin != SHARED and (origin == package or origin.startswith(f"{package}.")):
            _follow(origin, own, package, found)
        return
    # What has no name in its module, as a lambda, may be anything in it.
    nodes: Sequence[ast.AST] = defined.get(name) or ([tree] if name.startswith("<") else [])
    key = f"{name} {''.join(map(of_tree, nodes))}"
    if not nodes or key in found:
        return
    found[key] = ""
    for used in {used for node in nodes for used in _used(bare(node))}:
        # Of a module that was imported, what is taken from it.
        origin, own = imported.get(used[0], ("", ""))
        inner = f"{origin}.{own}"
        if len(used) > 1 and inner.startswith(f"{package}.") and inner != SHARED and _is_module(inner):
            _follow(inner, used[1], package, found)
        else:
            _follow(module, used[0], package, found)


def _used(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """Names that a piece of code reads, with the attribute that is taken of each, where one is."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            yield part.value.id, part.attr
        elif isinstance(part, ast.Name):
            yield (part.id,)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _names(module: str) -> tuple[ast.Module, dict[str, list[ast.AST]], dict[str, tuple[str, str]]]:
    """The tree of a module, what each of its own names is, and where those come from that it imports by name."""
    tree = ast.parse(_source(module))
    defined: dict[str, list[ast.AST]] = {}
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {part.asname or part.name: (node.module, part.name) for part in node.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (part for one in targets for part in ast.walk(one) if isinstance(part, ast.Name)):
                defined.setdefault(target.id, []).append(node)
    return tree, defined, imported


def _source(module: str) -> str:
    """Of a module, imported or not; empty for one that has none."""
    if module in sys.modules:
        try:
            return inspect.getsource(sys.modules[module])
        except (OSError, TypeError):
            return ""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
