"""What a master writes down before it tells anyone, so that another that is started in its place knows it.

A decision stands in the journal before any peer hears of it; so no peer can know of one that a restarted master does not know. It outlives
the process, not the machine's power: nothing is flushed to the disk itself.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anabranch.cluster.pccl.records import Forming, Held, Member, Running, Syncing
from anabranch.errors import DataError

log = logging.getLogger(__name__)

SCHEMA = 3
_PLAIN = ("run", "epoch", "_next_id")
_BY_GROUP = ("order", "revision", "_next_seq")


def to_dict(state: Held) -> dict[str, Any]:
    """All that a restarted master must know. Votes are not among it: peers give them again."""
    # Not by asdict, which would copy votes first, whatever peers have put there.
    members = [
        {**vars(member), "vote": None, "initiates": {}, "answered": list(member.answered.values())}
        for member in state.members.values()
    ]
    return {
        "schema": SCHEMA,
        **{name.strip("_"): getattr(state, name) for name in _PLAIN},
        **{name.strip("_"): list(getattr(state, name).items()) for name in _BY_GROUP},
        "members": members,
        "matrix": [[*edge, rate] for edge, rate in state.matrix.items()],
        "running": [[group, {**asdict(running), "votes": {}}] for (group, _), running in state.running.items()],
        "syncing": [
            [group, syncing.revision, syncing.participants, list(syncing.sources.items()), syncing.is_lost]
            for group, syncing in state.syncing.items()
        ],
        "forming": None
        if state.forming is None
        else {**asdict(state.forming), "rings": list(state.forming.rings.items())},
        "measuring": sorted(state._asked_to_measure),
    }


def from_dict(table: dict[str, Any], state: Held) -> None:
    """Make ``state`` what ``table`` tells of. Raises DataError where it tells of none."""
    if not isinstance(table, dict) or type(table.get("schema")) is not int:
        raise DataError("this is no journal of a master")
    if table["schema"] != SCHEMA:
        told = f"schema {table['schema']}, and this version reads {SCHEMA}"
        raise DataError(
            f"this journal of a master has {told}; its run ends with the version that began it: name another file"
        )
    try:
        for name in _PLAIN:
            setattr(state, name, table[name.strip("_")])
        for name in _BY_GROUP:
            setattr(state, name, dict(table[name.strip("_")]))
        for row in table["members"]:
            answered = {told["req"]: told for told in row.pop("answered")}
            state.members[row["id"]] = Member(**{**row, "answered": answered})
        state.matrix = {(start, end): rate for start, end, rate in table["matrix"]}
        for group, row in table["running"]:
            state.running[group, row["tag"]] = Running(**row)
        for group, revision, participants, sources, is_lost in table["syncing"]:
            state.syncing[group] = Syncing(revision, participants, dict(sources), is_lost)
        if (forming := table["forming"]) is not None:
            state.forming = Forming(**{**forming, "rings": dict(forming["rings"])})
        state._asked_to_measure = set(table["measuring"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"this journal of a master is damaged: {type(error).__name__} {error}") from None


class Journal:
    """A file with the newest state, replaced as a whole.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_failing = False

    def load(self, state: Held) -> bool:
        """Whether there was something, which ``state`` now is. Raises DataError for a file that is no journal."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from None
        try:
            table = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f"{self.path} is no journal of a master; name another file, or remove it") from None
        from_dict(table, state)
        return True

    def save(self, state: Held) -> None:
        """Write the state. A disk that is full does not end the run: it goes on without a journal, which is removed, and says so."""
        beside = self.path.with_name(f".{self.path.name}.new")
        try:
            # Who reads it could take a peer's place.
            beside.unlink(missing_ok=True)
            beside.touch(mode=0o600)
            beside.write_text(json.dumps(to_dict(state), separators=(",", ":")))
            os.replace(beside, self.path)
        except OSError as error:
            if not self._is_failing:
                log.warning(
                    "%s cannot be written (%s): a master that is restarted now will not know this run", self.path, error
                )
            self._is_failing = True
            # One that is out of date would tell of what is no longer so.
            for path in (beside, self.path):
                self._remove(path)
        else:
            if self._is_failing:
                log.warning("%s is written again", self.path)
            self._is_failing = False

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, error)
