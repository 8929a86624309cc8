"""Metrics of several sources as one text for Prometheus."""

import logging
import re
from collections.abc import Callable, Mapping

from anabranch.gateway.logged_error import raised
from anabranch.web.turns import plainly

logger = logging.getLogger(__name__)

_SAMPLE = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def labelled(texts: Mapping[int, bytes] | Mapping[str, bytes], label: str = "worker") -> bytes:
    """The metrics of all sources as one text: each number with a label that says whose it is, each family described once.

    A sum would jump whenever a source is replaced, since it begins anew at 0; whoever reads these numbers adds them up.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for source, text in sorted(texts.items()):
        family, whose = "", _escaped(str(source))
        for line in text.decode().splitlines():
            if line.startswith("#"):
                _, kind, family, *_ = line.split(" ", 3)
                known = headers.setdefault(family, [])
                if not any(one.startswith(f"# {kind} ") for one in known):
                    known.append(line)
            elif found := _SAMPLE.match(line):
                name, rest = found[0], line[found.end() :]
                more = f",{rest[1:]}" if rest.startswith("{") else f"}}{rest}"
                samples.setdefault(family, []).append(f'{name}{{{label}="{whose}"{more}')
    lines = [line for family, known in headers.items() for line in (*known, *samples.get(family, ()))]
    return "".join(f"{line}\n" for line in lines).encode()


def told_by(engines: Mapping[Callable[[], bytes], str]) -> dict[str, bytes]:
    """What each engine says, by the name of its deployment; one that fails, or says what is no such text, is left out."""
    told = {}
    for text, name in engines.items():
        try:
            told[name] = plainly(text)
            labelled({name: told[name]})
        except Exception as error:
            logger.warning("the numbers of deployment %s are left out: %s", name, raised(error))
            told.pop(name, None)
    return told


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
