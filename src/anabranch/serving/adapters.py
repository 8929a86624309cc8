"""`AdaptersConfig`: the adapters that a model is served with."""

from anabranch.bounds import shown
from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.serving.core.mixture import check_name
from anabranch.sizes import parse_bytes

__all__ = ["AdaptersConfig"]


@configclass
class AdaptersConfig(Config):
    """Adapters of an engine: those it starts with, and how much memory all of them may take.

    Attributes:
        load: ``NAME=FOLDER`` of each adapter that is there from the start and never leaves memory. A folder of adapters' folders is a
            router over them, also as ``NAME=arrow:FOLDER`` or ``NAME=phatgoose:FOLDER``, see `anabranch.serving.engine.layer_reader`.
        memory: bytes of all adapters in memory, such as ``2GiB``; those that no request uses leave when others come.
        versions: of some of ``load`` by name, which version of their numbers they are: of an engine that is started in place of another.
            One that cannot be read, or is another by now, does not keep that from starting, and requests for it are refused.
    """

    load: tuple[str, ...] = ()
    memory: str = "1GiB"
    versions: dict[str, str] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        parse_bytes(self.memory, "memory")
        names = [name for name, _ in self.folders]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"load has the adapter {twice!r} twice; give each a name of its own")

    @property
    def folders(self) -> list[tuple[str, str]]:
        """(name, folder) of each that is there from the start. Raises ConfigError for an entry that is none."""
        made = []
        for place, entry in enumerate(self.load):
            name, sign, folder = entry.partition("=") if isinstance(entry, str) else ("", "", "")
            if not sign or not folder:
                raise ConfigError(
                    f"load.{place} is {shown(entry)}; it must be NAME=FOLDER, such as french=adapters/french"
                )
            try:
                made.append((check_name(name), folder))
            except InputError as error:
                raise ConfigError(f"load.{place}: {error}") from None
        return made
