"""One more id of each of several sequences through the route predictor's decoder: compiled where that can be, else in torch.

Both keep of a sequence what the network knows of it: keys and values of the prompt by layer, and those of the last W ids.
"""
# Shapes: B sequences, P ids of a prompt, W window, D width, L routed layers, E experts, N, K of a matrix, H heads, S W in whole vectors

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.nn import kernels
from anabranch.nn.kernels.binding import Kernel
from anabranch.nn.kernels.operands import address, array_address
from anabranch.nn.kernels.packed import Matrix, matrix
from anabranch.nn.packed import WIDE, Packed
from anabranch.serving.expertflow.predictors.network import PathNetwork

__all__ = ["CompiledSteps", "Steps", "TorchSteps", "make_steps"]

# Floats in whose place the counts of a sequence stand.
HEADER = WIDE

_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class Steps(Protocol):
    """Continues sequences of one network, whose weights stay as they are."""

    def begin(self, cross: Sequence[Tensor], past: Tensor, count: int) -> Any:
        """What is kept of a sequence.

        Args:
            cross: keys and values of the prompt, ``[P, 2 D]`` of each layer.
            past: those of the last ids, ``[depth, W, 2 D]``, the latest last.
            count: ids so far; where they are fewer than W, the others of ``past`` do not count.
        """

    def step(self, states: Sequence[Any], id_B: np.ndarray) -> np.ndarray:
        """prob_BLE of one more id (int64) of each sequence; the states are those with it from here on."""


def make_steps(network: PathNetwork) -> Steps:
    """Compiled where there are kernels and they take the network's widths."""
    if kernels.load() is not None and CompiledSteps.supports(network):
        return CompiledSteps(network)
    return TorchSteps(network)


@dataclass
class _State:
    cross: list[Tensor]  # [P, 2 D] of each layer
    past: Tensor  # [depth, W, 2 D]
    count: int


class TorchSteps:
    """In torch."""

    def __init__(self, network: PathNetwork) -> None:
        self.network = network

    def begin(self, cross: Sequence[Tensor], past: Tensor, count: int) -> _State:
        """See `Steps`."""
        return _State(list(cross), past, count)

    @torch.inference_mode()
    def step(self, states: Sequence[_State], id_B: np.ndarray) -> np.ndarray:
        """See `Steps`."""
        window = self.network.window
        length_B = torch.tensor([len(state.cross[0]) for state in states])
        hidden_BP = torch.arange(int(length_B.max()))[None] >= length_B[:, None]
        mask = torch.zeros(hidden_BP.shape).masked_fill(hidden_BP, -1e9)[:, None, None, :]
        cross = [
            (torch.nn.utils.rnn.pad_sequence([state.cross[layer] for state in states], batch_first=True), mask)
            for layer in range(len(self.network.decoder))
        ]
        past = torch.stack([state.past for state in states])
        count_B = torch.tensor([min(state.count, window) for state in states])
        real_BW = torch.arange(window)[None] >= window - count_B[:, None]
        id_B1 = self.network.known(torch.from_numpy(id_B)[:, None])
        logit_BSLE, new = self.network.decode(id_B1, cross, past, real_BW)
        for state, old, more in zip(states, past, new, strict=True):
            state.past, state.count = torch.cat((old[:, 1:], more), 1), state.count + 1
        return logit_BSLE[:, 0].sigmoid().numpy()


class CAffine(ctypes.Structure):
    """`Affine` of path_step.cpp."""

    _fields_ = (("matrix", Matrix), ("bias", _pointer))


class CLayer(ctypes.Structure):
    """`PathLayer` of path_step.cpp."""

    _fields_ = (
        *((name, _pointer) for name in ("norm", "cross_norm", "feed_forward_norm")),
        *((name, CAffine) for name in ("qkv", "out", "cross_query", "cross_out", "up", "down")),
    )


class CNetwork(ctypes.Structure):
    """`PathNetwork` of path_step.cpp."""

    _fields_ = (
        *((name, _int) for name in ("depth", "dim", "heads", "feed_forward", "window", "stride", "vocab", "outputs")),
        *((name, _pointer) for name in ("embedding", "bias", "last_norm")),
        ("head", CAffine),
        ("layers", ctypes.POINTER(CLayer)),
        ("eps", ctypes.c_float),
    )


STEP = Kernel(
    "anabranch_path_step",
    "network: CNetwork, B, ids: int64[B] array, kept: int64[B] array, probabilities: float32[B, C] array out, C",
    structures={"CNetwork": CNetwork},
    result="status",
)


@dataclass(frozen=True)
class _Kept:
    memory: np.ndarray  # `Kept` of path_step.cpp, and what lies behind it
    address: int


class CompiledSteps:
    """By `nn/kernels/path_step.cpp`, in one call on the calling thread. Its copy of the weights is made here."""

    def __init__(self, network: PathNetwork) -> None:
        # What the structures point to.
        self._keep: list[Any] = []
        self._shape = (network.num_layers, network.num_experts)
        self._window, self._stride = network.window, _padded(network.window)
        dim, feed_forward = _widths(network)
        decoder: Any = network.decoder
        layers = [self._layer(layer) for layer in decoder]
        self._network = CNetwork(
            len(layers),
            dim,
            decoder[0].heads,
            feed_forward,
            self._window,
            self._stride,
            network.embedding.num_embeddings - 1,
            network.num_layers * network.num_experts,
            self._floats(network.embedding.weight),
            self._floats(self._bias(network)),
            self._floats(network.norm.weight),
            self._affine(network.heads),
            (CLayer * len(layers))(*layers),
            _eps(network.norm),
        )

    @staticmethod
    def supports(network: PathNetwork) -> bool:
        """Whether the widths fill whole vectors."""
        return all(width % WIDE == 0 for width in _widths(network))

    def begin(self, cross: Sequence[Tensor], past: Tensor, count: int) -> _Kept:
        """See `Steps`."""
        depth, _, width = past.shape
        prompt, seen = len(cross[0]), min(count, self._window)
        ring, input = width * self._stride, width * _padded(prompt)
        # Behind the counts nothing may be NaN.
        memory = np.zeros(HEADER + depth * (ring + input), np.float32)
        memory[:4].view(np.int64)[:] = seen, prompt
        ring_WS, input_WP = memory[HEADER : HEADER + depth * ring], memory[HEADER + depth * ring :]
        ring_WS.reshape(depth, width, -1)[:, :, :seen] = past[:, past.shape[1] - seen :].mT.numpy()
        input_WP.reshape(depth, width, -1)[:, :, :prompt] = torch.stack(list(cross)).mT.numpy()
        return _Kept(memory, array_address(memory, "float32", None))

    def step(self, states: Sequence[_Kept], id_B: np.ndarray) -> np.ndarray:
        """See `Steps`."""
        layers, experts = self._shape
        prob_BC = np.empty((len(states), layers * experts), np.float32)
        STEP(self._network, id_B, np.array([state.address for state in states], np.int64), prob_BC)
        return prob_BC.reshape(-1, layers, experts)

    def _layer(self, layer: Any) -> CLayer:
        qkv = [torch.cat((getattr(layer.query, name), getattr(layer.key_value, name))) for name in ("weight", "bias")]
        rest = (layer.out, layer.cross_query, layer.cross_out, layer.up, layer.down)
        norms = (self._floats(norm.weight) for norm in layer.norms)
        return CLayer(*norms, self._packed(*qkv), *map(self._affine, rest))

    def _affine(self, linear: nn.Linear) -> CAffine:
        return self._packed(linear.weight, linear.bias)

    def _packed(self, weight_NK: Tensor, bias_N: Tensor) -> CAffine:
        self._keep.append(Packed.pack(weight_NK, "float32"))
        return CAffine(matrix(self._keep[-1]), self._floats(F.pad(bias_N, (0, _padded(len(bias_N)) - len(bias_N)))))

    def _floats(self, value: Tensor) -> int:
        self._keep.append(value.detach().float().clone(memory_format=torch.contiguous_format))
        return address(self._keep[-1])

    def _bias(self, network: PathNetwork) -> Tensor:
        """[H, W + S]: entry W + k is of distance -k mod W, so that a part of it is of the ring's places, wherever the latest id is."""
        distance = -torch.arange(-self._window, self._stride) % self._window
        return network.decoder_bias.table[:, network.decoder_bias.most + distance]


def _widths(network: PathNetwork) -> tuple[int, int]:
    layer: Any = network.decoder[0]
    return network.embedding.embedding_dim, layer.up.out_features


def _padded(count: int) -> int:
    return -(-count // WIDE) * WIDE


def _eps(norm: nn.RMSNorm) -> float:
    return torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
