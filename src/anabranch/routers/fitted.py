"""A fitted router on disk: one file with all it needs, and a folder of several.

A file is safetensors: the arrays of strategy and embedder, and one JSON text with their configs, facts and the models. The text and the
arrays are covered by a digest, so a file that was cut off or changed is refused; nothing in it is ever run.

    DIR/manifest.json       routers by name, how they were fitted
    DIR/NAME.safetensors    a router
    DIR/seen.safetensors    hashes of the questions learned from, so that nobody is judged on them
    DIR/recommended.json    which of them to serve, once an evaluation said so (see `recommendation`)
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.bounds import shown
from anabranch.config import from_dict, to_dict
from anabranch.errors import AnabranchError, CheckpointError, DataError, InputError
from anabranch.files import atomic_folder, atomic_write, atomic_write_json, check_holds_only, parse_json
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Decision, Model, Pool, Query
from anabranch.routers.contract.strategy import Arrays, Facts, Strategy
from anabranch.routers.data.splits import question
from anabranch.routers.embed.checked import UNIT, check_dim, check_gave_unit, embed_of, unit_vectors
from anabranch.routers.embed.embedder import Embedder
from anabranch.routers.money import Price
from anabranch.routers.wording import letters_and_digits

VERSION = 1
ENDING = ".safetensors"
MANIFEST, SEEN, RECOMMENDED = "manifest.json", f"seen{ENDING}", "recommended.json"
# What a folder of routers holds.
_OURS = rf"[\w-]+{re.escape(ENDING)}|{re.escape(MANIFEST)}|{re.escape(RECOMMENDED)}"
_FIELD = "anabranch.router"


@dataclass(frozen=True, kw_only=True)
class FittedRouter:
    """A strategy that has learned, with what it needs to see a text as it did then.

    Attributes:
        strategy: fitted.
        models: it was fitted on, with prices where they were known.
        embedder: of the vectors it learned from; None if it needs none.
        about: how it was fitted, ready for JSON.

    Raises InputError for an embedder of other dimensions than the strategy learned from.
    """

    strategy: Strategy
    models: tuple[Model, ...]
    embedder: Embedder | None = None
    about: Facts = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_dim(self.strategy, self.embedder)

    @property
    def pool(self) -> Pool:
        """Of its models."""
        return Pool(self.models)

    def query(self, text: str, **fields: Any) -> Query:
        """A query as the strategy wants it, with its vector."""
        vector_D = (
            unit_vectors(self.embedder, [text])[0] if self.embedder is not None and self.strategy.needs_vector else None
        )
        return Query(text=text, vector_D=vector_D, **fields)

    def route(self, text: str, pool: Pool | None = None, **fields: Any) -> Decision:
        """Decide on a text; ``fields`` are further ones of `Query`."""
        return self.strategy.route(self.query(text, **fields), pool or self.pool)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        arrays, facts = self.strategy.state()
        tensors = {f"strategy.{name}": np.array(value, order="C") for name, value in arrays.items()}
        content: dict[str, Any] = {
            "version": VERSION,
            "config": to_dict(self.strategy.config),
            "facts": facts,
            "models": [_model_to_dict(model) for model in self.models],
            "about": self.about,
            "embedder": None,
        }
        if self.embedder is not None:
            learned, embedder_facts = self.embedder.state()
            tensors |= {f"embedder.{name}": np.array(value, order="C") for name, value in learned.items()}
            content["embedder"] = {"config": to_dict(self.embedder.config), "facts": embedder_facts, UNIT: True}
        _write(Path(path), tensors, content)

    @classmethod
    def load(cls, path: str | Path, embedder: Embedder | None = None) -> Self:
        """Read a file.

        Args:
            path: of the file.
            embedder: to share one among routers; used if its config is that of the file and it has learned nothing.

        Raises CheckpointError if it is missing, damaged, of another version, or names parts that are not installed; and if it may have
        learned from vectors of other lengths than 1, which nobody makes any more: what its embedder gives for a few texts tells.
        """
        path = Path(path)
        tensors, content = _read(path)
        try:
            strategy = from_dict(Strategy.Config, content["config"]).build()
            made = None if content["embedder"] is None else _embedder(content["embedder"], tensors, embedder)
            strategy.connect(embed=embed_of(made))
            strategy.load_state(_part(tensors, "strategy."), content["facts"])
            models = tuple(_model_from_dict(fields) for fields in content["models"])
            if made is not None and strategy.needs_vector and content["embedder"].get(UNIT) is not True:
                check_gave_unit(made, [model.description for model in models])
            return cls(strategy=strategy, models=models, embedder=made, about=content["about"])
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except AnabranchError as error:
            raise CheckpointError(f"{path} cannot be used here: {error}") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{path} lacks what its strategy needs ({type(error).__name__}: {error})") from None


def check_router_folder(folder: str | Path) -> None:
    """Raise DataError if something else than routers lies in ``folder``: `save_folder` would replace it."""
    folder = Path(folder)
    check_holds_only(folder, _OURS)
    if folder.is_dir() and os.listdir(folder) and not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} has no {MANIFEST}, so it is not a folder of routers to replace; choose a new folder")


def files_of(router: str | Path) -> list[Path]:
    """What belongs to fitted routers of all that lies in their folder: what no program may write over.

    ``router`` itself if it is no folder.
    """
    place = Path(router)
    if not place.is_dir():
        return [place]
    return [path for path in sorted(place.iterdir()) if re.fullmatch(_OURS, path.name)]


def save_folder(folder: str | Path, routers: Mapping[str, FittedRouter], learned: Recorded, about: Facts) -> None:
    """Write routers, by name, and what they were fitted on. An older folder of routers is replaced in one step.

    What was recommended of the older ones stays so, as judged before, where it is among the new ones: whoever serves the folder can
    start again before the next evaluation.

    Raises InputError for a name that cannot be that of a file, DataError as `check_router_folder`.
    """
    for name in routers:
        if not name.replace("_", "").replace("-", "").isalnum() or f"{name}{ENDING}" == SEEN:
            raise InputError(f"{name!r} cannot be the name of a router; use letters, digits, - and _")
    check_router_folder(folder)
    carried = _carried(Path(folder) / RECOMMENDED, routers, learned.models)
    with atomic_folder(folder, replacing=_OURS) as temporary:
        for name, router in routers.items():
            router.save(temporary / f"{name}{ENDING}")
        hashes = np.unique(np.array([_hash(text) for text in learned.query], np.uint64))
        _write(temporary / SEEN, {"hash": hashes}, {"version": VERSION, "signs": True})
        atomic_write_json(
            temporary / MANIFEST,
            {"version": VERSION, "routers": list(routers), "models": list(learned.models), **about},
        )
        if carried is not None:
            atomic_write_json(temporary / RECOMMENDED, carried)


def _carried(path: Path, routers: Mapping[str, FittedRouter], models: Sequence[str]) -> Facts | None:
    """What was recommended, if it can be served of these routers too; else None."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        choice = content["recommended"]
        if choice["kind"] == "strategy":
            router = routers[choice["name"]]
            if choice["setting"] is not None:
                router.strategy.with_knob(choice["setting"])
        elif choice["name"] not in models:
            return None
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError, AnabranchError):
        # None is there, or it is damaged, or of what is there no more.
        return None
    return {**content, "is_refitted": True}


@dataclass(frozen=True)
class RouterFolder:
    """What `save_folder` wrote.

    Attributes:
        routers: by name.
        manifest: as it stands in the folder.
        seen: hashes of the questions learned from.
        with_signs: those are of questions with their signs; older folders know letters and digits alone.
    """

    routers: dict[str, FittedRouter]
    manifest: Facts
    seen: frozenset[int]
    with_signs: bool = True

    def has_seen(self, text: str) -> bool:
        """Whether this question was learned from."""
        return _hash(text, self.with_signs) in self.seen

    def check_unseen(self, test: Recorded) -> None:
        """Raises DataError if a question of ``test`` was learned from."""
        shared = [text for text in test.query if self.has_seen(text)]
        if shared:
            raise DataError(
                f"{len(shared):,} of {len(test):,} questions were learned from, which would flatter the routers; the first is "
                f"{' '.join(shared[0].split())[:60]!r}. Take them out (--unseen), or allow the leak on purpose (--allow-leak; in Python "
                "leave this check out)"
            )


def load_folder(folder: str | Path, names: Sequence[str] | None = None) -> RouterFolder:
    """Read a folder, or the routers of these names. A single file is read as a folder of one.

    Raises CheckpointError if something is missing or damaged, InputError for an unknown name.
    """
    folder = Path(folder)
    if folder.is_file():
        router = FittedRouter.load(folder)
        manifest = {"routers": [folder.stem], "models": [model.name for model in router.models], **router.about}
        return RouterFolder({folder.stem: router}, manifest, frozenset())
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{folder} is no folder of routers: it has no {MANIFEST}; make one with fit") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST} is not JSON: {error}") from None
    known = manifest.get("routers") if isinstance(manifest, dict) else None
    if not isinstance(known, list) or manifest.get("version") != VERSION:
        raise CheckpointError(f"{folder / MANIFEST} is not of version {VERSION}, which this version reads")
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise InputError(f"{folder} has no router {unknown[0]!r}; it has {', '.join(known)}")
    routers: dict[str, FittedRouter] = {}
    embedder: Embedder | None = None
    for name in known if names is None else names:
        routers[name] = FittedRouter.load(folder / f"{name}{ENDING}", embedder)
        embedder = embedder or routers[name].embedder
    arrays, content = _read(folder / SEEN)
    return RouterFolder(routers, manifest, frozenset(arrays["hash"].tolist()), bool(content.get("signs")))


def _hash(text: str, with_signs: bool = True) -> int:
    form = question(text) if with_signs else letters_and_digits(text) or text
    return int.from_bytes(hashlib.sha256(form.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def _part(tensors: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _embedder(content: dict[str, Any], tensors: Arrays, shared: Embedder | None) -> Embedder:
    config, arrays = from_dict(Embedder.Config, content["config"]), _part(tensors, "embedder.")
    if shared is not None and shared.config == config and not arrays and not shared.state()[0]:
        return shared
    embedder = config.build()
    embedder.load_state(arrays, content["facts"])
    return embedder


def digest_of(tensors: Arrays, text: str) -> str:
    """SHA-256 of arrays and a text, in hex."""
    hashed = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        hashed.update(repr((name, value.dtype.str, value.shape)).encode())
        hashed.update(value.tobytes())
    return hashed.hexdigest()


def packed(tensors: Arrays, content: dict[str, Any], name: str) -> bytes:
    """Arrays and what is ready for JSON as the bytes of one file, under a digest. Raises InputError, which begins with ``name``."""
    from safetensors.numpy import save

    try:
        text = json.dumps(content)
    except TypeError as error:
        raise InputError(f"{name}: what the strategy learned is not ready for JSON: {error}") from None
    unfit = [name for name, value in tensors.items() if value.dtype.hasobject or value.dtype.kind not in "biuf"]
    if unfit:
        raise InputError(f"{name}: {unfit[0]} has type {tensors[unfit[0]].dtype}; only arrays of numbers can be saved")
    return save(tensors, {_FIELD: text, "digest": digest_of(tensors, text)})


def _write(path: Path, tensors: Arrays, content: dict[str, Any]) -> None:
    data = packed(tensors, content, path.name)

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    atomic_write(path, write)


def _read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} is damaged or no router: {error}") from None
    return unpacked(data, str(path))


def unpacked(data: bytes, name: str) -> tuple[Arrays, dict[str, Any]]:
    """What `packed` made bytes of. Raises CheckpointError, which begins with ``name``, if they are damaged or of another version."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = {key: np.array(value) for key, value in load(data).items()}
        # The header was read above, so that its length and its JSON are sound.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__") or {}
    except SafetensorError:
        # Its own words are of its parser, whatever the file is.
        raise CheckpointError(
            f"{name} is damaged or no router: it is no whole safetensors file, which fit writes"
        ) from None
    except (UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{name} is damaged or no router: {error}") from None
    text = metadata.get(_FIELD)
    if text is None:
        raise CheckpointError(f"{name} is no router of ours: it lacks the field {_FIELD}")
    if metadata.get("digest") != digest_of(tensors, text):
        raise CheckpointError(f"{name} was changed or damaged: its content does not match its digest")
    try:
        content = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{name} is damaged or no router: what it says of itself is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} is damaged or no router: it says of itself {shown(content)}, which is no table")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{name} is of version {content.get('version')}; this version of anabranch reads {VERSION}"
        )
    return tensors, content


def _model_to_dict(model: Model) -> dict[str, Any]:
    fields = {name: getattr(model, name) for name in ("name", "parameters", "description", "context")}
    return {**fields, "price": to_dict(model.price)}


def _model_from_dict(fields: dict[str, Any]) -> Model:
    return Model(**{**fields, "price": from_dict(Price, fields["price"])})
