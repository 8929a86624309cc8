"""Options of ``anabranch serve`` that belong together; each set says which fields of a `ServeConfig` its values are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.option_sets import OptionSet
from anabranch.cli.options import FLAG
from anabranch.cli.rewired import RewireSet, rewiring_settings


@dataclass(frozen=True)
class Listening(OptionSet):
    """Where it can be reached, and by which names."""

    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Address to listen on (http.host); 0.0.0.0 can be reached from other machines."
        ),
    ] = None
    served_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name of the model (http.name). Repeated: further names that requests may use (http.names).",
        ),
    ] = None
    port: Annotated[int | None, typer.Option(metavar="N", help="Default: 8000. 0 takes a free port (http.port).")] = (
        None
    )

    def settings(self) -> dict[str, Any]:
        """Those that are said, by the path of their field."""
        names = self.served_name
        return said(
            {
                "http.host": self.host,
                "http.port": self.port,
                "http.name": names[0] if names else None,
                "http.names": names[1:] if names else None,
            }
        )


@dataclass(frozen=True)
class Room(OptionSet):
    """How much memory there is, and how a model is made to fit into it."""

    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory limit for everything, such as 8GiB. Quantization and expert budget are chosen to fit (engine.memory).",
        ),
    ] = None
    expert_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for experts, such as 2GiB; other experts are loaded when needed (engine.expert_budget).",
        ),
    ] = None
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Weights in fewer bits: int8, int4 or nf4 (the base of adapt --quantize nf4); none for floating point. Default: those of "
            "the file, where kernels take them (engine.quantize).",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Those that are said, by the path of their field."""
        return said(
            {
                "engine.memory": self.memory,
                "engine.expert_budget": self.expert_budget,
                "engine.quantize": self.quantize,
            }
        )


@dataclass(frozen=True)
class Adapted(OptionSet):
    """Adapters that requests may name."""

    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="An adapter that peft or anabranch adapt saved; requests use it as the model NAME, or several as A+B. A folder "
            "of such folders is a pool, in which a router chooses (arrow:FOLDER or phatgoose:FOLDER: by tokens alone). May "
            "be repeated (engine.adapters.load).",
        ),
    ] = None
    adapter_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder from which POST /v1/adapters may load adapters while it serves (http.adapter_root).",
        ),
    ] = None
    adapter_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for all adapters, such as 2GiB. Default: 1GiB (engine.adapters.memory)."
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Those that are said, by the path of their field."""
        return said(
            {
                "engine.adapters.load": self.adapter,
                "http.adapter_root": _text(self.adapter_root),
                "engine.adapters.memory": self.adapter_memory,
            }
        )


@dataclass(frozen=True)
class ByDepth(OptionSet):
    """Which blocks run, and on which tokens, where the prompt decides it."""

    depth: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Depth routers that anabranch depth train made for this model; they choose which blocks each request runs "
            "(engine.depth.routers).",
        ),
    ] = None
    depth_control: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="From fewer to more blocks: -1 none, -0.5 as the routers decide, 0.5 every block once, 1 every block twice "
            "(engine.depth.control).",
        ),
    ] = None
    skipper: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Skipper that anabranch depth prune made for this model; blocks skip some tokens of each prompt "
            "(engine.depth.skipper).",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Those that are said, by the path of their field."""
        return said(
            {
                "engine.depth.routers": _text(self.depth),
                "engine.depth.control": self.depth_control,
                "engine.depth.skipper": _text(self.skipper),
            }
        )


@dataclass(frozen=True)
class Rewires(OptionSet):
    """Routers that are turned to the text of a request."""

    rewire: Annotated[
        bool,
        typer.Option(
            "--rewire",
            metavar=FLAG,
            help="Turn the routers of a mixture of experts to the text of each request that says rewire (engine.rewiring.on).",
        ),
    ] = False
    rewire_set: RewireSet = None

    def settings(self) -> dict[str, Any]:
        """Those that are said, by the path of their field. Raises ConfigError for a setting of --rewire-set that is none."""
        # A setting may be None itself (interval=none).
        return said({"engine.rewiring.on": self.rewire or None}) | rewiring_settings(
            self.rewire_set, "engine.rewiring.settings"
        )


def said(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is None."""
    return {path: value for path, value in values.items() if value is not None}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
