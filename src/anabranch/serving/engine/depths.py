"""`Depths`: requests whose blocks depth routers choose, on their prompts and once (`anabranch.depth`)."""
# Shapes: L tokens of a prompt, N blocks, D width

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import ConfigError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.request import Request

__all__ = ["Depths"]


@dataclass
class Depths:
    """Routers, and the requests that wait for their decision.

    Attributes:
        bank: the routers.
        num_blocks: N, of the model.
        control: of requests that do not say it, see `anabranch.serving.depth.DepthConfig`.
        most: visits of blocks that the engine keeps keys and values of.
    """

    bank: Any
    num_blocks: int
    control: float
    most: int
    # Requests that have no path yet; of the others the path; and of whom nobody has been told that.
    _waiting: dict[str, Request] = field(default_factory=dict)
    _paths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _untold: set[str] = field(default_factory=set)
    # Of requests that come from another process.
    _handed: dict[str, tuple[tuple[int, ...], bool]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Decoder, config: ServingConfig, bank: Any, most: int) -> "Depths | None":
        """Those of an engine; None where there are no routers."""
        return None if bank is None else cls(bank, len(model.blocks), config.depth.control, most)

    def handed_over(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """By request its path, and whether somebody is still to be told it: for who goes on with what is stored of them."""
        return {id: (path, id in self._untold) for id, path in self._paths.items()}

    def take_over(self, handed: Mapping[str, Any]) -> None:
        """What another has `handed_over`, before its requests are added; what is said of requests without routed depth is let be."""
        self._handed = dict(handed)

    def add(self, request: Request) -> None:
        """A request that begins, or goes on here."""
        if not request.routes_depth:
            return
        if (handed := self._handed.pop(request.id, None)) is None:
            self._waiting[request.id] = request
            return
        self._paths[request.id], is_untold = handed
        self._untold |= {request.id} if is_untold else set()

    def forget(self, id: str) -> None:
        """One that has ended."""
        self._waiting.pop(id, None)
        self._paths.pop(id, None)
        self._handed.pop(id, None)
        self._untold.discard(id)

    def path_of(self, id: str) -> tuple[int, ...] | None:
        """The path that was chosen for a request; None for one that waits, and for any other."""
        return self._paths.get(id)

    def prompt_behind(self, chunk: Chunk) -> tuple[int, ...] | None:
        """The prompt of a request that waits, where ``chunk`` is not just that and routers would have to see it; None for any other.

        It may come in pieces, or with tokens that the request was given elsewhere.
        """
        request = self._waiting.get(chunk.id)
        return None if request is None or len(chunk.tokens) == len(request.prompt) else request.prompt

    def choose(
        self, id: str, x_1LD: Tensor, run: Callable[[int, Tensor, Sequence[int]], Tensor]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(x_1LD behind the last block, the path): the prompt of ``id`` runs as the routers decide.

        Args:
            id: of a request that waits.
            x_1LD: its embedded prompt.
            run: see `anabranch.depth.routed.routed_blocks`.
        """
        from anabranch.depth.decisions import path_of
        from anabranch.depth.routed import routed_blocks

        mask_1L = torch.ones(x_1LD.shape[:2], dtype=torch.bool, device=x_1LD.device)
        own = self._waiting[id].depth_control
        control = self.control if own is None else own
        made = routed_blocks(self.bank, self.num_blocks, x_1LD, mask_1L, run, control=control, most=self.most)
        path = path_of(made.decision_BN[0].tolist())
        del self._waiting[id]
        self._paths[id] = path
        self._untold.add(id)
        return made.x_BLD, path

    def take_untold(self, id: str) -> tuple[int, ...] | None:
        """The path that was chosen for a request, once."""
        if id not in self._untold:
            return None
        self._untold.discard(id)
        return self._paths[id]


def check_depth(request: Request, depths: object | None) -> None:
    """Raise InputError for a request that wants routers to choose its path and has one, or where there are none, or in no way they know."""
    if not request.routes_depth:
        if request.depth_control is not None:
            raise InputError("depth_control is set, and routes_depth is not; it is for routers that choose the path")
        return
    if request.depth_control is not None:
        _check_control(request.depth_control)
    if request.path is not None:
        raise InputError("routes_depth is set, and path says which blocks run; leave one of them out")
    if depths is None:
        raise InputError("routes_depth is set, and the engine has no depth routers (engine.depth.routers)")


def _check_control(control: Any) -> None:
    from anabranch.depth.routed import check_control

    try:
        check_control(control)
    except ConfigError as error:
        raise InputError(f"depth_{error}") from None


def routers_of(model: Decoder, bank: Any) -> Any:
    """Depth routers, or those in a folder, held against the model that they are to decide for; None stays None.

    Raises CheckpointError where a folder has none or those of another model, ConfigError for loaded ones of another model.
    """
    if bank is None:
        return None
    from anabranch.depth.router import DepthRouter

    return DepthRouter.attach(model, bank).bank
