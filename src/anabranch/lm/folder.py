"""What is in a model folder beside the weights: a record of what we wrote, so that nobody else's file is ever lost to a new model.

    with model_folder("out") as temporary:      # refused where "out" holds anything that we did not write
        ...                                     # write files into temporary

The last file written is ``SHA256SUMS``, a digest of every other one (``sha256sum -c SHA256SUMS`` checks it too). A folder is ours if its
config.json says so, and only ours if each file in it is as its record says; such a folder is replaced as a whole, any other (one without
a record is one) only with ``force``, which keeps every file that the new model has no file for.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anabranch
from anabranch.errors import CheckpointError
from anabranch.files import atomic_folder, atomic_write_text, check_not_here, is_within, parse_json, sha256_of

__all__ = [
    "FORMAT",
    "MARK",
    "METRICS_FILE",
    "OPTIMIZER_FILE",
    "PREDICTOR_FILE",
    "RECORD",
    "STEPS_FOLDER",
    "TRAINER_FILE",
    "best_name",
    "best_of",
    "carry",
    "check_apart",
    "check_no_adapter",
    "check_replaceable",
    "files_of",
    "model_folder",
    "run_bests",
    "run_of",
    "run_steps",
    "seal",
    "step_name",
    "step_of",
    "verify",
]

FORMAT = "anabranch"
RECORD = "SHA256SUMS"
# What makes a model folder a checkpoint of a training run, see `anabranch.train.checkpoint`.
TRAINER_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
# Of a route predictor, see `anabranch.serving.expertflow.predictors.files`: made for a model that is there, and so not in its record.
PREDICTOR_FILE = "route-predictor.safetensors"
_PREDICTORS = re.compile(rf"{re.escape(PREDICTOR_FILE)}(\.old\d*)?")
# In the folder of a run; the second has a folder for each step.
METRICS_FILE = "metrics.jsonl"
STEPS_FOLDER = "checkpoints"
# In the config.json of what we write, native or not.
MARK = {"anabranch_version": anabranch.__version__}
_MOST_ENTRIES = 10_000
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# Of programs whose folders we read, and our own.
_WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|gguf|pth?)(\.index\.json)?")
# What every model's folder may hold, whoever wrote it.
_USUAL = re.compile(rf"config\.json|{_WEIGHTS.pattern}|tokenizer(_config)?\.json")
# What makes up a model in the eyes of the programs that read Hugging Face folders, beside config.json and weights.
_PARTS = re.compile(
    r"generation_config\.json|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|spiece\.model|(preprocessor|processor|image_processor|feature_extractor)(_config)?\.json"
    r"|.*\.jinja|chat_template\.json"
)
_TEMPLATES = "additional_chat_templates"
# Of the package peft; transformers applies it, and the model is another.
_ADAPTER = "adapter_config.json"
# Ours, by its name and the format that it tells, see `anabranch.adapters.own_folder`; others may keep a file of that name beside a model.
_OWN_ADAPTER, _OWN_FORMAT = "adapter.json", "anabranch-adapter"
_DOCUMENTS = re.compile(r"(readme|licen[cs]e|notice|copying|use_policy|usage_policy|citation)([._-].*)?", re.IGNORECASE)

# What lies in a folder, folders with a slash behind their names: (inode, size, nanosecond of the last change) of each.
Entries = dict[str, tuple[int, int, int]]


def step_of(name: str) -> int | None:
    """The step whose checkpoint a folder of this name is; None for any other name, such as that of a copy somebody keeps."""
    digits = name.removeprefix("step-")
    return int(digits) if digits.isascii() and digits.isdecimal() and name == step_name(int(digits)) else None


def step_name(step: int) -> str:
    """The name of the folder that holds the checkpoint of ``step``."""
    return f"step-{step:08d}"


def run_steps(run: Path) -> list[Path]:
    """The folders of a training run's checkpoints, in the order of their steps. No other name is one of them."""
    found = ((step_of(path.name), path) for path in run.glob(f"{STEPS_FOLDER}/step-*"))
    return [path for step, path in sorted((step, path) for step, path in found if step is not None)]


def best_of(name: str) -> int | None:
    """The step whose weights, the best of a training so far, a folder of this name holds; None for any other name."""
    step = name.removeprefix("best-")
    return step_of(f"step-{step}") if step != name else None


def best_name(step: int) -> str:
    """The name of the folder, beside checkpoints, that holds the weights of ``step`` as the best of a training so far."""
    return step_name(step).replace("step", "best")


def run_bests(run: Path) -> list[Path]:
    """The folders of a training run with the best weights so far (``train.keep_best``), in the order of their steps; the last counts.

    A copy of a checkpoint that somebody named so is none.
    """
    places = (path for path in run.glob(f"{STEPS_FOLDER}/best-*") if not (path / TRAINER_FILE).exists())
    found = ((best_of(path.name), path) for path in places)
    return [path for step, path in sorted((step, path) for step, path in found if step is not None)]


def run_of(model: str | Path) -> Path | None:
    """The training run that a folder is a checkpoint of, or its best weights, by name and place; None for any other."""
    place = Path(model).absolute()
    return place.parent.parent if _is_of_run(place) else None


def _is_of_run(place: Path) -> bool:
    """Whether a folder has the name and the place of a checkpoint, or of the best weights of a run."""
    is_named = step_of(place.name) is not None or best_of(place.name) is not None
    return is_named and place.parent.name == STEPS_FOLDER


def files_of(model: str | Path) -> list[Path]:
    """What belongs to a model, and to the training run around it, of all that lies in its folders: what no program may write over.

    ``model`` itself where it is no folder, be it a file or a name.
    """
    place = Path(model)
    if not place.is_dir():
        return [place]
    run = place.parent.parent if place.parent.name == STEPS_FOLDER else place
    folders = dict.fromkeys([place, run, *run_steps(run), *run_bests(run)])
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file() and _is_of_model(path)]


def _is_of_model(path: Path) -> bool:
    patterns = (_USUAL, _PARTS, _DOCUMENTS, _WEIGHT_FILES)
    own = (RECORD, TRAINER_FILE, METRICS_FILE)
    return path.name in own or any(pattern.fullmatch(path.name) for pattern in patterns)


def check_no_adapter(folder: Path) -> None:
    """Raise CheckpointError if ``folder`` holds an adapter, with which the model beside it is another than its weights say."""
    is_own = _table(folder / _OWN_ADAPTER).get("format") == _OWN_FORMAT
    held = _ADAPTER if (folder / _ADAPTER).is_file() else _OWN_ADAPTER if is_own else None
    if held is not None:
        raise CheckpointError(
            f"{folder} holds an adapter ({held}), which is not applied here; name the model that it was made for, and put the adapter "
            "onto it (--adapter of anabranch eval, anabranch.adapters.load_peft), or move that file elsewhere to take the model without it"
        )


@contextmanager
def model_folder(path: str | Path, *, before: Entries | None = None, force: bool = False) -> Iterator[Path]:
    """`anabranch.files.atomic_folder` for a model: refused where something would be lost, sealed when it is filled.

    Args:
        path: the place.
        before: what `check_replaceable` found there, where it was asked before longer work.
        force: see `check_replaceable`. Files in ``path`` that would be read as parts of the new model but are not go on as ``NAME.old``.

    Raises:
        CheckpointError: as `check_replaceable`, or if ``path`` has changed since ``before``.
        CapacityError, DataError: as `atomic_folder`.
    """
    place = Path(path)
    if before is None:
        before = check_replaceable(place, force=force)

    def check_same(folder: Path) -> None:
        if _entries(folder) != before:
            raise CheckpointError(
                f"{place} has changed while a model was made for it, so it is not replaced; try again"
            )

    with atomic_folder(place, replacing=".*", check_old=check_same) as temporary:
        yield temporary
        seal(temporary)
        check_same(place)
        # A predictor took longer than the model it was made for, and would be taken for the new one's: it goes on under another name.
        kept = before if force else {name: entry for name, entry in before.items() if _PREDICTORS.fullmatch(name)}
        _keep(place.resolve(), temporary, kept)


def check_replaceable(folder: Path, *, force: bool = False, advice: str = "choose a new folder") -> Entries:
    """What lies in ``folder``, which a model may replace: nothing, or a model that we saved and nothing else but its route predictor.

    ``force`` lets it hold other files too. Raises CheckpointError, with ``advice``, for any other folder, and always for a training run
    and its checkpoints; DataError for the working directory, and what holds it.
    """
    _check_no_run(folder)
    check_not_here(folder)
    entries = _entries(folder)
    foreign = _foreign(folder, entries) if entries and not force else None
    if foreign is not None:
        raise CheckpointError(
            f"{folder} is not a saved model (it holds {foreign.rstrip('/')}), so it is not replaced; {advice}"
        )
    return entries


def _check_no_run(folder: Path) -> None:
    """Raise CheckpointError if ``folder`` is, holds or lies among a training run's checkpoints."""
    place = folder.resolve()
    if (place / TRAINER_FILE).exists():
        what = f"is a checkpoint of a training run (it holds {TRAINER_FILE})"
    elif _holds_model_of_run(place) or _config(place).keys() >= {"model", "data", "train"}:
        what = "is the folder of a training run"
    elif any(step_of(parent.name) is not None and (parent / TRAINER_FILE).exists() for parent in place.parents):
        what = "lies inside a checkpoint of a training run, which is removed in time"
    elif any(best_of(parent.name) is not None and _is_of_run(parent) for parent in place.parents):
        what = "lies inside the best weights of a training run, which are removed in time"
    elif _is_of_run(place) and _has_steps(place.parent.parent):
        what = "would be taken for a checkpoint of the training run around it"
    else:
        return
    raise CheckpointError(f"{folder} {what}, so no model is saved there; choose a new folder")


def _holds_model_of_run(place: Path) -> bool:
    """Whether `anabranch.lm.checkpoint.find_model` would look past a model in ``place`` itself."""
    return any((path / name).exists() for path in run_steps(place) for name in (TRAINER_FILE, "config.json"))


def _has_steps(run: Path) -> bool:
    return any((path / TRAINER_FILE).exists() for path in run_steps(run))


def _entries(folder: Path) -> Entries:
    """What lies in ``folder``, at any depth; links are not followed. Empty for one that is not there."""
    found: Entries = {}
    if not folder.is_dir():
        return found
    for where, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(where, name)
            status = path.lstat()
            is_folder = stat.S_ISDIR(status.st_mode)
            key = path.relative_to(folder).as_posix() + ("/" if is_folder else "")
            found[key] = (status.st_ino, 0, 0) if is_folder else (status.st_ino, status.st_size, status.st_mtime_ns)
        if len(found) > _MOST_ENTRIES:
            raise CheckpointError(
                f"{folder} holds more than {_MOST_ENTRIES} files, so it is no model's and not replaced; choose a new folder"
            )
    return found


def _foreign(folder: Path, entries: Entries) -> str | None:
    """What lies in ``folder`` that we did not write, or not so; None where there is no such thing."""
    recorded = _record(folder)
    table = _config(folder)
    if not _is_marked(table):
        return _first_named(entries)
    if recorded is None:
        name = _first_named(entries)
        return f"{name}, and no {RECORD} that lists it" if _USUAL.fullmatch(name) else name
    if not _is_ours(folder):
        return f"a {RECORD} that we did not write"
    files = [name for name in sorted(entries) if not name.endswith("/")]
    for name in sorted(entries.keys() - set(files)):
        if not any(other.startswith(name) for other in recorded):
            return name
    # Names first: a file that nobody recorded may be large, or a pipe that never ends.
    files = [name for name in files if name != RECORD and not _PREDICTORS.fullmatch(name)]
    unknown = next((name for name in files if name not in recorded), None)
    if unknown is not None:
        return unknown
    changed = next((name for name in files if not _is_as_saved(folder, name, recorded)), None)
    return None if changed is None else f"{changed}, which is not as it was saved"


def _is_as_saved(folder: Path, name: str, recorded: dict[str, str]) -> bool:
    """Whether a file is in the record, and a file of its own with the content that was saved."""
    path = folder / name
    return name in recorded and stat.S_ISREG(path.lstat().st_mode) and sha256_of(path) == recorded[name]


def _first_named(entries: Entries) -> str:
    """What an error says that a folder holds: something that no model has, if there is such a thing."""
    return min(entries, key=lambda name: (bool(_USUAL.fullmatch(name)), name))


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of any folder; empty where it is none."""
    return _table(folder / "config.json")


def _table(path: Path) -> dict[str, Any]:
    """The table in a JSON file; empty where it is none."""
    if not path.is_file():
        return {}
    try:
        table = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def check_apart(source: Path, target: Path) -> None:
    """Raise CheckpointError unless a model at ``source`` stays whole when ``target`` is replaced, whatever links lead where."""
    problem = None
    if target.exists() and source.samefile(target):
        problem = f"{target} is the model that is to be converted"
    elif is_within(target, source) or is_within(source, target):
        problem = f"{target} and the model that is to be converted, {source}, lie one inside the other"
    for entry in source.iterdir() if source.is_dir() and problem is None else ():
        if entry.is_symlink() and is_within(entry, target):
            problem = f"{entry} is a link into {target}, which would be replaced"
    if problem is not None:
        raise CheckpointError(f"{problem}; choose a new folder beside it")


def carry(source: Path, target: Path) -> None:
    """Copy into ``target`` what belongs to the model in the folder ``source`` beside its config.json and weights.

    That is what loaders read (tokenizer, chat templates, generation_config.json) and papers (README, LICENSE), to the byte.
    """
    for entry in sorted(source.iterdir()):
        if entry.is_file() and (_PARTS.fullmatch(entry.name) or _DOCUMENTS.fullmatch(entry.name)):
            shutil.copyfile(entry, target / entry.name)
    for entry in sorted((source / _TEMPLATES).glob("*.jinja")):
        (target / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(entry, target / _TEMPLATES / entry.name)


def _keep(old: Path, new: Path, entries: Entries) -> None:
    """Put into ``new`` what lies in ``old`` and is not as we saved it: links to the same data, nothing is copied.

    Where ``new`` has a file of its name, or a loader would read it as a part of the new model, it goes on as ``NAME.old``.
    """
    recorded = _saved_by_us(old)
    # Where each folder goes; those around a folder come before it.
    places = {"": new}
    for name in sorted(name for name in entries if name.endswith("/")):
        place = _place_of(name, places)
        if place.exists() and not place.is_dir():
            place = _renamed(place, old / name)
        place.mkdir(exist_ok=True)
        places[name] = place
    for name in sorted(name for name in entries if not name.endswith("/")):
        path, place = old / name, _place_of(name, places)
        is_saved = bool(recorded) if name == RECORD else _is_as_saved(old, name, recorded)
        if place.exists() and not place.is_dir() and is_saved:
            continue
        if place.exists() or _is_read(name):
            place = _renamed(place, path)
        _link(path, place)
    for name in sorted(places.keys() - {""}, reverse=True):
        shutil.copystat(old / name, places[name])


def _place_of(name: str, places: dict[str, Path]) -> Path:
    """Where something goes whose folder goes to one of ``places``."""
    folder, slash, last = name.rstrip("/").rpartition("/")
    return places[folder + slash] / last


def _renamed(place: Path, path: Path) -> Path:
    """``place`` with the ending ``.old``: a name that nothing in its folder has, nor has beside ``path``, whose neighbours follow."""
    names = (f"{place.name}.old{number or ''}" for number in range(_MOST_ENTRIES))
    return place.with_name(
        next(
            name
            for name in names
            if not os.path.lexists(place.with_name(name)) and not os.path.lexists(path.with_name(name))
        )
    )


def _saved_by_us(folder: Path) -> dict[str, str]:
    """Digests by name of what we saved in ``folder``; empty where it is not ours, whose list of digests may be anybody's."""
    if not _is_marked(_config(folder)) or not _is_ours(folder):
        return {}
    try:
        return _record(folder) or {}
    except CheckpointError:
        return {}


def _is_marked(table: dict[str, Any]) -> bool:
    """Whether a config.json is of a model that we wrote."""
    return table.get("format") == FORMAT or MARK.keys() <= table.keys()


def _is_read(name: str) -> bool:
    """Whether a loader takes a file of this name for a part of the model; the old model's must not be taken for the new one's."""
    parts = (
        _PARTS,
        _WEIGHTS,
        re.compile(re.escape(PREDICTOR_FILE)),
        re.compile(rf"{re.escape(_ADAPTER)}|{re.escape(_TEMPLATES)}/.*"),
    )
    return any(pattern.fullmatch(name) for pattern in parts)


def _link(path: Path, place: Path) -> None:
    if path.is_symlink():
        place.symlink_to(os.readlink(path))
        return
    try:
        os.link(path, place)
    except OSError:
        # A file system without hard links.
        shutil.copy2(path, place)


def seal(folder: Path) -> None:
    """Write the record of what is in ``folder``: the last file that is written.

    Its first line, which ``sha256sum -c`` passes over, has the digest of the others: by it we know our list from one made later.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names if name != RECORD)
    atomic_write_text(folder / RECORD, _first_line(lines) + lines)


def _first_line(lines: str) -> str:
    return f"# anabranch {hashlib.sha256(lines.encode()).hexdigest()}\n"


def _is_ours(folder: Path) -> bool:
    """Whether the list of digests in ``folder`` is as `seal` wrote it."""
    path = folder / RECORD
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, ValueError):
        return False
    first, _, lines = text.partition("\n")
    return f"{first}\n" == _first_line(lines)


def verify(folder: Path, *, needed: Iterable[str] = (), skip: Iterable[str] = ()) -> bool:
    """Whether ``folder`` has a record, once each of its files but those to ``skip`` was found to be as it was written.

    Raises CheckpointError for the first that is missing or damaged, and if one that is ``needed`` is not in the record.
    """
    recorded = _record(folder)
    if recorded is None:
        return False
    unlisted = next((name for name in needed if name not in recorded), None)
    if unlisted is not None:
        raise CheckpointError(f"{folder / RECORD} does not list {unlisted}; it is truncated or corrupt")
    for name, digest in recorded.items():
        path = folder / name
        if name in skip:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, and {RECORD} lists it")
        if sha256_of(path) != digest:
            raise CheckpointError(
                f"cannot read {path}: it is damaged, not what was saved ({RECORD} has another digest)"
            )
    return True


def _record(folder: Path) -> dict[str, str] | None:
    """Digests by name; None for a folder without a record. Raises CheckpointError for one that cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    found = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines]
    if not found or not all(found):
        raise CheckpointError(f"cannot read {path}: it is no list of digests and names; it is truncated or corrupt")
    return {match[2]: match[1] for match in found if match}
