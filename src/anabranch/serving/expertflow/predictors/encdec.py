"""`EncoderDecoder`: the paper's Routing Path Predictor, which names the experts of all layers before the first one runs.

The encoder reads the prompt; the decoder reads the ids whose routes are wanted (the next id is sampled already when its forward pass
begins), and L heads on its output give the probability of every expert. Loss: mean binary cross-entropy over L x E.

Hidden width 32 and feed-forward 2048 are the paper's; depth (2 + 2), heads (4), AdamW at 1e-3 with a cosine are ours, it does not say.
"""
# Shapes: B sequences, S ids decoded, P ids encoded, W window, L routed layers, E experts of the widest layer, T tokens of a step, D width

import math
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.bounds import is_whole, shown
from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Repeats, Seed, Size, configclass, from_dict
from anabranch.errors import ConfigError, DataError
from anabranch.serving.expertflow.predictors import files
from anabranch.serving.expertflow.predictors.base import Fingerprint, RoutePredictor, Row
from anabranch.serving.expertflow.predictors.network import PathNetwork
from anabranch.serving.expertflow.predictors.steps import Steps, make_steps
from anabranch.serving.expertflow.routes import Routes

# Ids of one sequence that are decoded at once; of a longer prompt part the last ones.
MOST_NEW = 256


@configclass
class Settings(BaseConfig):
    """Size of the network and of its training.

    Attributes:
        dim, feed_forward, depth, heads: of the network; ``depth`` layers on each side.
        window: ids that the decoder looks back.
        max_input: ids of the prompt that are encoded, the last ones.
        learning_rate: peak of AdamW.
        batch: pieces a step.
        length: ids decoded in a piece.
        seconds: of training at most.
        steps: of training at most.
        seed: of weights and pieces.
    """

    dim: Size = Field(default=32, ge=4)
    feed_forward: Size = Field(default=2048, ge=1)
    depth: Repeats = Field(default=2, ge=1)
    heads: Size = Field(default=4, ge=1)
    window: int = Field(default=32, ge=1)
    max_input: int = Field(default=96, ge=1)
    learning_rate: float = 3e-3
    batch: int = Field(default=16, ge=1)
    length: int = Field(default=48, ge=1)
    seconds: float = 180.0
    steps: int = 3000
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(f"dim is {self.dim}; it must be a multiple of heads={self.heads}")


class EncoderDecoder(RoutePredictor):
    """See the module.

    Args:
        fingerprint: of the model.
        vocab_size: of its tokenizer; other ids count as unknown.
        settings: see `Settings`.

    Attributes:
        losses: of training, by step.
    """

    kind = "encdec"
    is_calibrated = True

    def __init__(self, fingerprint: Fingerprint, vocab_size: int, settings: Settings | None = None) -> None:
        self.fingerprint, self.vocab_size, self.settings = fingerprint, vocab_size, settings or Settings()
        sizes, chosen = fingerprint.num_experts, self.settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(chosen.seed)
            self.network = PathNetwork(
                vocab_size,
                len(sizes),
                max(sizes),
                dim=chosen.dim,
                feed_forward=chosen.feed_forward,
                depth=chosen.depth,
                heads=chosen.heads,
                window=chosen.window,
            )
        self.network.eval()
        self.losses: list[float] = []
        # Made when they are wanted, of the weights as they are then.
        self._steps: Steps | None = None
        self._states: dict[Hashable, Any] = {}

    @property
    def num_parameters(self) -> int:
        """Of the network."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    # training

    def fit(self, routes: Routes, progress: Callable[[str], None] = lambda text: None) -> Self:
        """Learn from recorded routes, until the steps or the seconds are over. Raises DataError for routes of another model."""
        if (routes.num_experts, routes.top_k) != (self.fingerprint.num_experts, self.fingerprint.top_k):
            raise DataError(
                f"these routes are of a model with {routes.num_experts} experts by layer, top {routes.top_k}; the predictor is for "
                f"{self.fingerprint.num_experts}, top {self.fingerprint.top_k}"
            )
        chosen, network, begin = self.settings, self.network.train(), time.monotonic()
        self._steps, self._states = None, {}
        optimizer = torch.optim.AdamW(network.parameters(), lr=chosen.learning_rate, weight_decay=0.01)
        pieces = _Pieces(routes, chosen)
        start_bias = torch.from_numpy(routes.chosen().mean(0)).clamp(1e-4, 1 - 1e-4).logit().flatten()
        # So that training begins from the frequencies.
        network.heads.bias.data.copy_(start_bias)
        for step in range(chosen.steps):
            spent = (time.monotonic() - begin) / chosen.seconds
            if spent >= 1:
                break
            done = max(spent, step / chosen.steps)
            for group in optimizer.param_groups:
                group["lr"] = chosen.learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
            loss = self._loss(*pieces.draw())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            self.losses.append(loss.item())
            if step % 100 == 99:
                progress(f"route predictor: step {step + 1}, loss {np.mean(self.losses[-100:]):.4f}")
        network.eval()
        return self

    def _loss(self, input_BP: Tensor, real_BP: Tensor, id_BS: Tensor, chosen_BSLE: Tensor, weight_BS: Tensor) -> Tensor:
        cross = self.network.encode(self.network.known(input_BP), real_BP)
        logit_BSLE, _ = self.network.decode(self.network.known(id_BS), cross)
        loss_BSLE = F.binary_cross_entropy_with_logits(logit_BSLE, chosen_BSLE, reduction="none")
        return (loss_BSLE.mean((-1, -2)) * weight_BS).sum() / weight_BS.sum()

    # prediction

    def predict(self, token_T: np.ndarray, rows: Sequence[Row]) -> np.ndarray | None:
        """prob_TLE."""
        if not rows:
            return None
        going = [number for number, row in enumerate(rows) if row.num_new == 1 and row.key in self._states]
        if len(going) == len(rows):
            prob_TLE = self._continue(rows)
        else:
            of_row: dict[int, np.ndarray] = {}
            if going:
                prob_BLE = self._continue([rows[number] for number in going])
                of_row.update(zip(going, prob_BLE[:, None], strict=True))
            alike: dict[tuple[int, ...], list[int]] = {}
            for number, row in enumerate(rows):
                if number not in of_row:
                    alike.setdefault((row.prompt_length, row.num_new, len(row.ids)), []).append(number)
            for numbers in alike.values():
                of_row.update(zip(numbers, self._begin([rows[number] for number in numbers]), strict=True))
            prob_TLE = np.concatenate([of_row[number] for number in range(len(rows))])
        # Who cannot be forgotten by a name.
        nameless = [key for key in self._states if not isinstance(key, str)]
        if nameless:
            here = {row.key for row in rows}
            for key in nameless:
                if key not in here:
                    self.forget(key)
        return prob_TLE

    def forget(self, key: Hashable) -> None:
        """Drop a sequence."""
        self._states.pop(key, None)

    @torch.inference_mode()
    def _begin(self, rows: Sequence[Row]) -> np.ndarray:
        """Several ids of sequences, or one of those that are not known: prompts are encoded, ids are decoded from W before.

        The sequences are as long as one another, and so are their prompts and what is new.
        """
        count, window = rows[0].num_new, self.settings.window
        given = np.stack([row.ids[: row.prompt_length][-self.settings.max_input :] for row in rows])
        prompt_BP = torch.from_numpy(given.astype(np.int64))
        cross = self.network.encode(self.network.known(prompt_BP), torch.ones_like(prompt_BP, dtype=torch.bool))
        wanted = min(count, MOST_NEW)
        id_BS = torch.from_numpy(np.stack([row.ids[-(wanted + window) :] for row in rows]).astype(np.int64))
        logit_BSLE, past = self.network.decode(self.network.known(id_BS), cross)
        kept = F.pad(past, (0, 0, max(window - past.shape[2], 0), 0))[:, :, -window:]
        for place, row in enumerate(rows):
            inputs = [pair[0][place] for pair in cross]
            self._states[row.key] = self._made_steps().begin(inputs, kept[place], len(row.ids))
        prob_BSLE = logit_BSLE[:, -wanted:].sigmoid().numpy()
        # Of a long part the last ids stand for all.
        return prob_BSLE[:, np.arange(count) % wanted]

    def _continue(self, rows: Sequence[Row]) -> np.ndarray:
        """One more id of each of these sequences."""
        id_B = np.array([row.ids[-1] for row in rows], np.int64)
        return self._made_steps().step([self._states[row.key] for row in rows], id_B)

    def _made_steps(self) -> Steps:
        if self._steps is None:
            self._steps = make_steps(self.network)
        return self._steps

    # files

    def save(self, path: str | Path) -> None:
        """Write the network and what it was made for, all or nothing."""
        settings = {name: getattr(self.settings, name) for name in Settings.__dataclass_fields__}
        files.write(
            path, self.kind, self.fingerprint, self.network.state_dict(), vocab_size=self.vocab_size, config=settings
        )

    @classmethod
    def restore(cls, fingerprint: Fingerprint, state: dict[str, Any]) -> Self:
        """From what was written. Raises DataError for settings and tensors that do not make a network."""
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        said = {name: value for name, value in state.items() if name not in tensors}
        if said.keys() != {"vocab_size", "config"} or not is_whole(said["vocab_size"]):
            raise DataError(f"settings are {shown(said)}; they must be a whole vocab_size, and config")
        try:
            settings = from_dict(Settings, said["config"], "settings.config")
        except ConfigError as error:
            raise DataError(str(error)) from None
        _check_sizes(fingerprint, said["vocab_size"], settings, tensors)
        # Sizes alone, which are those of tensors that are there.
        with torch.device("meta"):
            made = cls(fingerprint, said["vocab_size"], settings)
        wanted = {name: tuple(tensor.shape) for name, tensor in made.network.state_dict().items()}
        for name in sorted(wanted.keys() | tensors.keys()):
            given = tuple(tensors[name].shape) if name in tensors else None
            if given != wanted.get(name):
                raise DataError(f"{name} has shape {given}, and the network {wanted.get(name)}")
        made.network.load_state_dict(tensors, assign=True)
        return made


def _check_sizes(fingerprint: Fingerprint, vocab_size: int, settings: Settings, tensors: dict[str, Tensor]) -> None:
    """Raise DataError for sizes that are not those of the tensors, before anything is made of them."""
    layers = {name.split(".")[1] for name in tensors if name.startswith("encoder.") and name.count(".") > 1}
    found: dict[str, tuple[int, ...]] = {
        name: tuple(tensors[name].shape) if name in tensors else ()
        for name in ("embedding.weight", "heads.weight", "encoder_bias.table", "encoder.0.up.weight")
    }
    sizes, dim = fingerprint.num_experts, settings.dim
    wanted = {
        "embedding.weight": (vocab_size + 1, dim),
        "heads.weight": (len(sizes) * max(sizes), dim),
        "encoder_bias.table": (settings.heads, 2 * settings.window + 1),
        "encoder.0.up.weight": (settings.feed_forward, dim),
    }
    for name, shape in wanted.items():
        if found[name] != shape:
            raise DataError(f"{name} has shape {shown(found[name])}, and by the settings {shown(shape)}")
    if len(layers) != settings.depth:
        raise DataError(f"there are tensors of {len(layers)} layers, and by the settings of {settings.depth}")


class _Pieces:
    """Draws training pieces: a prompt and the ids after it; now and then ids of the prompt itself, as when one is read."""

    def __init__(self, routes: Routes, settings: Settings) -> None:
        self.routes, self.settings = routes, settings
        self.bounds = [(rows.start, rows.stop) for rows in routes.sequences() if rows.stop - rows.start >= 2]
        if not self.bounds:
            raise DataError("no sequence of these routes has two tokens or more")
        self.generator = np.random.default_rng(settings.seed)

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(input_BP, real_BP, id_BS, chosen_BSLE, weight_BS)."""
        chosen, batch, sizes = self.settings, self.settings.batch, self.routes.num_experts
        input_BP, real_BP = np.zeros((batch, chosen.max_input), np.int64), np.zeros((batch, chosen.max_input), bool)
        id_BS, weight_BS = np.zeros((batch, chosen.length), np.int64), np.zeros((batch, chosen.length), np.float32)
        chosen_BSLE = np.zeros((batch, chosen.length, len(sizes), max(sizes)), np.float32)
        for row in range(batch):
            begin, end = self.bounds[self.generator.integers(len(self.bounds))]
            cut = int(self.generator.integers(begin + 1, end))
            prompt = self.routes.token_N[max(begin, cut - chosen.max_input) : cut]
            first = cut if self.generator.random() > 0.2 else max(begin, cut - chosen.length)
            ids = self.routes.token_N[first : min(first + chosen.length, end)]
            input_BP[row, : len(prompt)], real_BP[row, : len(prompt)] = prompt, True
            id_BS[row, : len(ids)], weight_BS[row, : len(ids)] = ids, 1.0
            chosen_BSLE[row, : len(ids)] = self.routes.chosen(slice(first, first + len(ids)))
        arrays = (input_BP, real_BP, id_BS, chosen_BSLE, weight_BS)
        return tuple(map(torch.from_numpy, arrays))  # type: ignore[return-value]
