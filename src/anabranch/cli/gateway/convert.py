"""``anabranch gateway import``: move in from another gateway's config."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.options import AsJson
from anabranch.cli.output import print_json, say, wrote
from anabranch.errors import ConfigError
from anabranch.files import atomic_file, check_apart, mode_of

if TYPE_CHECKING:
    from anabranch.routers.money import Price


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A LiteLLM config.yaml.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output file for our config, as YAML.")] = Path(
        "gateway.yaml"
    ),
    partial: Annotated[bool, typer.Option("--partial", help="Write the config even if something is left out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a LiteLLM config to ours, and report what could not be converted.

    If anything could not be converted, nothing is written without --partial, and the exit code is 2.

    Example: anabranch gateway import config.yaml --out gateway.yaml
    """
    import yaml

    from anabranch.gateway.config import import_litellm
    from anabranch.gateway.config.needs import lacking

    check_apart([out], [file])
    imported = import_litellm(file)
    if imported.left and not partial:
        if as_json:
            names = [model.name for model in imported.config.models]
            print_json({"out": None, "models": names, "left": list(imported.left), "notes": list(imported.notes)})
        for line in imported.left:
            say(f"left out  {line}")
        for line in imported.notes:
            say(f"note      {line}")
        num = len(imported.left)
        what = "1 setting is" if num == 1 else f"{num} settings are"
        raise ConfigError(f"{what} left out, so {out} was not written; give --partial to write the rest")
    text = yaml.safe_dump(_changed(imported.config), sort_keys=False, allow_unicode=True)
    # It may hold keys, as what it is made from may.
    with atomic_file(out, mode=mode_of(file)) as temporary:
        temporary.write_text(f"# made from {file.name} by anabranch gateway import\n{text}", encoding="utf-8")
    if as_json:
        names = [model.name for model in imported.config.models]
        print_json(
            {
                "out": str(out),
                "models": names,
                "left": list(imported.left),
                "notes": list(imported.notes),
                "unpriced": list(imported.unpriced),
                "install": lacking(imported.config),
            }
        )
        return
    for line in imported.left:
        say(f"left out  {line}")
    for line in imported.notes:
        say(f"note      {line}")
    for line in imported.unpriced:
        say(f"no price  {line}")
    for line in lacking(imported.config):
        say(f"install   {line}")
    wrote(str(out), f"anabranch gateway serve --config {out}")


def _changed(config: Any) -> Any:
    """The plain form of a config without the fields that are at their defaults."""
    from anabranch.config import Config
    from anabranch.routers.money import Price

    if isinstance(config, Price):
        return _price(config)
    if isinstance(config, dict):
        return {name: _changed(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [_changed(value) for value in config]
    if not isinstance(config, Config):
        # A reference to a secret is plain text.
        return str(config) if isinstance(config, str) else config
    kind = getattr(config.owner, "kind", None)
    fields = {
        field.name: _changed(value)
        for field in dataclasses.fields(config)  # type: ignore[arg-type]
        if (value := getattr(config, field.name)) != _default(field)
    }
    return {"kind": kind, **fields} if kind else fields


def _price(price: Price, *, is_inner: bool = False) -> dict[str, Any]:
    """In dollars, as people write it. One that prices tokens of text names both sides, as one of a tier does always: what it does not name
    would be read as its outer one's, or the list's.
    """
    from anabranch.routers.money import TOKEN_RATES

    made: dict[str, Any] = {}
    is_of_text = (
        is_inner
        or any((price.input, price.output))
        or any(getattr(price, name) is not None for name in ("cached_input", "cache_write", "cache_write_1h"))
    )
    for field in dataclasses.fields(price):
        value = getattr(price, field.name)
        if field.name in (*TOKEN_RATES, "web_search", "request"):
            if value != _default(field) or (is_of_text and field.name in ("input", "output")):
                made[f"{field.name}_usd"] = _dollars(value)
        elif field.name == "tiers":
            made |= {"tiers": {name: _price(tier, is_inner=True) for name, tier in value.items()}} if value else {}
        elif value is not None:
            made[field.name] = _price(value, is_inner=True) if field.name == "long" else value
    return made


def _dollars(nano: int) -> int | float | str:
    """Read as exactly as many nano-dollars."""
    from anabranch.routers.money import NANO

    if nano % NANO == 0:
        return nano // NANO
    exact = Decimal(nano) / NANO
    return float(exact) if Decimal(str(float(exact))) == exact else f"{exact:f}"


def _default(field: Any) -> Any:
    from pydantic.fields import FieldInfo

    if isinstance(field.default, FieldInfo):
        return field.default.get_default(call_default_factory=True)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
