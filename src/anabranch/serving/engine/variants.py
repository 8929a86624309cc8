"""How each request runs the model, where not as all others do: its streams, its path, and whether routers have still to choose that."""

from collections.abc import Sequence
from dataclasses import replace

from anabranch.errors import ConfigError
from anabranch.nn.visits import check_path
from anabranch.serving.core.request import Request
from anabranch.serving.engine.passes import Variant

__all__ = ["Variants", "check_own_path"]


class Variants:
    """Kept of requests under way.

    Args:
        num_streams: of requests that do not say it.
        num_blocks: of the model.
    """

    def __init__(self, num_streams: int, num_blocks: int) -> None:
        self._usual, self._whole = Variant(num_streams), tuple(range(num_blocks))
        self._others: dict[str, Variant] = {}

    def __bool__(self) -> bool:
        """Whether any request runs the model otherwise."""
        return bool(self._others)

    def add(self, request: Request, *, is_open: bool = False) -> None:
        """Take a request in; ``is_open``: a skipper has still to decide about it."""
        variant = Variant(
            request.num_streams or self._usual.num_streams,
            self._own(request.path),
            chooser=request.id if request.routes_depth or is_open else None,
            is_pruned=request.skips_tokens,
        )
        if variant != self._usual:
            self._others[request.id] = variant

    def forget(self, id: str) -> None:
        """A request is gone."""
        self._others.pop(id, None)

    def of(self, id: str) -> Variant:
        """How a request runs the model, adapters apart."""
        return self._others.get(id, self._usual)

    def chosen(self, id: str, path: Sequence[int]) -> None:
        """Routers have chosen the path of a request that waited for it."""
        self._others[id] = replace(self._others[id], path=self._own(path), chooser=None)

    def decided(self, id: str) -> None:
        """A skipper has decided what blocks compute of a request that waited for it."""
        self._others[id] = replace(self._others[id], chooser=None)

    def _own(self, path: Sequence[int] | None) -> tuple[int, ...] | None:
        """None where a path is that of everybody else."""
        return None if path is None or tuple(path) == self._whole else tuple(path)


def check_own_path(path: Sequence[int], num_blocks: int) -> None:
    """Raise ConfigError for what is no path of a request through a model of so many blocks."""
    if check_path(path, num_blocks, 1) != tuple(path):
        raise ConfigError(f"path is {path!r}; a request has one path, of block numbers")
