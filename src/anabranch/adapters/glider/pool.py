"""`GliderPool`: LoRA adapters that were trained apart, and two routers over them: by the query as a whole, and by each token.

pool = GliderPool()
pool.add("sql-lora", instruction="Write SQL that answers a question about a table.")
pool.add("law-lora", gate=gates, instruction=["Say which law applies.", "Name the statute that a case falls under."])
pool.onto(model)
model(token_BL, state=pool.rows(["how many users are there?", None], token_BL.shape[1]))
with pool.answering(queries):
    generate(model, prompts)
"""
# Shapes: B rows, L positions, E experts, C inputs

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from anabranch.adapters.attach import unload
from anabranch.adapters.attached import ATTACHED, attached_on
from anabranch.adapters.base_name import BASE, how_vague
from anabranch.adapters.by_row import telling
from anabranch.adapters.glider.calibration import Calibration
from anabranch.adapters.glider.choosing import GliderConfig
from anabranch.adapters.glider.embed import TextEmbedder
from anabranch.adapters.glider.folder import check_bases, expert_folders, read_described, texts_of
from anabranch.adapters.glider.giving import give_vectors
from anabranch.adapters.glider.matcher import Match, Matcher
from anabranch.adapters.glider.pool_file import named_by, pool_file, settings_in
from anabranch.adapters.glider.score import bias_rows
from anabranch.adapters.glider.settings import Plugins
from anabranch.adapters.glider.vectors import check_gates
from anabranch.adapters.glider.writing import Example, prompt_of
from anabranch.adapters.lora_mixer import MixedLowRank, load_mixture, mixed_layers
from anabranch.adapters.peft_place import CONFIG, check_there
from anabranch.errors import ConfigError
from anabranch.files import read_json
from anabranch.lm.decoder import Decoder

__all__ = ["GliderPool"]

_TOLD = "glider.rows"


@dataclass(frozen=True, eq=False)
class _Expert:
    folder: Path
    base: str | None
    # As they were told; None for those in the folder, which are read when they are put on a model, as all numbers of it are.
    told: Mapping[str, Tensor] | None = None

    @property
    def gates(self) -> dict[str, Tensor]:
        return dict((read_described(self.folder).gates if self.told is None else self.told) or {})


class GliderPool:
    """Experts by name, what finds them, and the model that they are on.

    Args:
        config: how they are chosen.
        embedder: of instructions, see `embedded`; None for `TextFeatures`, which needs nothing.
        writer: makes an instruction of a query, or of an expert's examples: a text in, a text out. None takes the query itself.
        cached: queries whose vectors are kept.
    """

    def __init__(
        self,
        config: GliderConfig | None = None,
        *,
        embedder: TextEmbedder | Callable[[Sequence[str]], Any] | None = None,
        writer: Callable[[str], str] | None = None,
        cached: int = 4096,
    ) -> None:
        self.config = GliderConfig() if config is None else config
        self.matcher = Matcher(embedder, writer, cached=cached)
        self._experts: dict[str, _Expert] = {}
        # That the experts are on, what it remembers of them, and which they are.
        self._model: Decoder | None = None
        self._attached: Any = None
        self._there: dict[str, _Expert] = {}
        self._family: str | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        config: GliderConfig | None = None,
        *,
        embedder: TextEmbedder | Callable[[Sequence[str]], Any] | None = None,
        writer: Callable[[str], str] | None = None,
        **options: Any,
    ) -> Self:
        """The pool of all adapters in ``folder``, each with what `describe_expert` wrote; the embedder is fitted to their instructions.

        Args:
            folder: of the folders of adapters.
            config: how they are chosen; None for what the folder's ``pool.json`` says of that, of the embedder and of the writer, which is
                what commands and servers read. Without a file, or with a config, all is as for `GliderPool`.
            embedder, writer: go before those of the file.
            options: as for `GliderPool`.

        Raises as `add`, CheckpointError where there are none, or a file that cannot be read; ConfigError for settings that cannot be, and
        for an embedder ``hidden-states``, of a model, where none is given (``HiddenStates(model, tokenizer)``).
        """
        folders = expert_folders(folder)
        plugins = Plugins(embedder, writer)
        if config is None:
            settings = settings_in(Path(folder), len(folders))
            config = settings.choice
            with named_by(pool_file(Path(folder))):
                plugins = settings.plugins(given=plugins)
        return cls.of(folders, config, embedder=plugins.embedder, writer=plugins.writer, **options)

    @classmethod
    def of(cls, folders: Mapping[str, Path], config: GliderConfig | None = None, **options: Any) -> Self:
        """The pool of these folders, by name; as `load`, of no file. All instructions are embedded in one call."""
        pool = cls(config, **options)
        bases = {name: read_json(place / CONFIG).get(BASE) for name, place in folders.items()}
        check_bases(bases)
        pool.matcher.fill({name: read_described(place).instructions for name, place in folders.items()})
        for name, place in folders.items():
            pool._experts[name] = _Expert(place, base if isinstance(base := bases[name], str) else None, None)
        return pool

    # Experts

    @property
    def names(self) -> tuple[str, ...]:
        """In the order they were added, which is that of their numbers."""
        return tuple(self._experts)

    @property
    def base(self) -> str | None:
        """What its experts call the model that they were trained on; None where none says."""
        return next((expert.base for expert in self._experts.values() if expert.base), None)

    def __len__(self) -> int:
        return len(self._experts)

    def add(
        self,
        lora: str | Path,
        gate: Mapping[str, Tensor] | None = None,
        instruction: str | Sequence[str] | None = None,
        examples: Sequence[Example] | None = None,
        *,
        name: str | None = None,
    ) -> str:
        """An expert more; no other expert's vectors change. Returns its name.

        Where the model is on already (`onto`), the expert is put beside it.

        Args:
            lora: a folder of peft's with plain LoRA.
            gate: of each linear layer by the name of transformers' module, as they were trained, ``[C]``; None for those in the folder, and
                Arrow prototypes where there are none.
            instruction: what its task is, in a sentence or two; further ones are other wordings, by which the pool is calibrated. None for
                those in the folder; without any, the global score of the expert is 0.
            examples: (input, output) pairs of its task, from which the writer makes the instruction.
            name: None for the folder's.

        Raises:
            ConfigError: a name that there is already, another base model than the others', gates that do not fit, both an instruction and
                examples, examples without a writer, an embedder that gives other vectors.
            CheckpointError: no adapter there, or a damaged one; gates in the folder that do not fit it.

        Pool and model are then as they were.
        """
        folder = Path(lora)
        name = folder.name if name is None else name
        if name in self._experts:
            raise ConfigError(f"expert {name!r} is in the pool already; remove it first, or give the other a name")
        check_there(folder)
        # The others were compared with this one.
        told = {other: expert.base for other, expert in self._experts.items() if expert.base}
        first = sorted(told, key=lambda other: how_vague(told[other]))[:1]
        check_bases({**{other: told[other] for other in first}, name: read_json(folder / CONFIG).get(BASE)})
        return self._add(folder, name, gate, instruction, examples)

    def _add(
        self,
        folder: Path,
        name: str,
        gate: Mapping[str, Tensor] | None,
        instruction: str | Sequence[str] | None,
        examples: Sequence[Example] | None,
    ) -> str:
        """`add`, once it is known to be of their base."""
        base = read_json(folder / CONFIG).get(BASE)
        if instruction is not None and examples is not None:
            raise ConfigError(f"expert {name!r} has an instruction and examples to make one of; give one of them")
        found = read_described(folder)
        if gate is not None:
            check_gates(gate, folder)
        if examples is not None:
            if self.matcher.writer is None:
                raise ConfigError(
                    f"expert {name!r} has examples, and the pool has no writer to make an instruction of them"
                )
            instruction = self.matcher.writer(prompt_of(examples))
        texts = found.instructions if instruction is None else texts_of(instruction, f"expert {name!r}")
        self.matcher.add(name, texts)
        self._experts[name] = _Expert(
            folder, base if isinstance(base, str) else None, None if gate is None else dict(gate)
        )
        try:
            self._put_again()
        except BaseException:
            del self._experts[name]
            self.matcher.remove(name)
            raise
        return name

    def remove(self, name: str) -> None:
        """One expert less; no other expert's vectors change.

        The model that they were put on loses it too; the last one leaves the base.

        Raises ConfigError for a name that there is not, and where a model has the experts and would keep fewer than ``top_k``; as `onto`
        where folders of others are gone by now. Pool and model are then as they were.
        """
        if name not in self._experts:
            known = ", ".join(map(repr, self._experts)) or "none"
            raise ConfigError(f"expert {name!r} is not in the pool; there are {known}")
        before, left = self._experts, {other: expert for other, expert in self._experts.items() if other != name}
        if self._on is not None and 0 < len(left) < (self.config.top_k or 1):
            raise ConfigError(
                f"top_k is {self.config.top_k}, and without expert {name!r} the model would have {len(left)}; add another first, or take "
                "them off the model (unload)"
            )
        self._experts = left
        try:
            self._put_again()
        except BaseException:
            self._experts = before
            raise
        self.matcher.remove(name)

    # On a model

    def onto(self, model: Decoder, *, family: str | None = None) -> Decoder:
        """Put the experts beside the matrices of ``model``, in place, each with its vector, and return the model.

        Rows that are told nothing are routed by token alone. Rows may still be told their experts (`rows_for`), which has precedence. The
        pool goes on with this model alone, if it was on another.

        Raises ConfigError for a model that is none of ours, an empty pool, ``top_k`` above the number of experts, and as `load_mixture`.
        The model is then as it was.
        """
        # `load_mixture` takes other modules too, but queries are told in the state of a pass, which these have not.
        if not isinstance(model, Decoder):
            kind = f"{type(model).__module__}.{type(model).__name__}"
            raise ConfigError(
                f"a pool goes onto a Decoder, and model is a {kind}; open it with anabranch.lm.load_model"
            )
        if not self._experts:
            raise ConfigError("the pool has no experts; add one first")
        self.config.router(len(self))
        was_on, there, old_family = self._on is model, self._there, self._family
        if was_on:
            # What is wrong with folders by now is told while the model still has what it had.
            for expert in self._experts.values():
                check_gates(expert.gates, expert.folder)
            unload(model)
        try:
            self._put(self._experts, model, family)
        except BaseException:
            if was_on:
                self._put(there, model, old_family)
            raise
        return model

    def _put(self, experts: Mapping[str, _Expert], model: Decoder, family: str | None) -> None:
        """These experts onto a bare model, which stays bare where that fails."""
        before = getattr(model, ATTACHED, None)
        folders = {name: expert.folder for name, expert in experts.items()}
        try:
            router = self.config.router(len(experts))
            load_mixture(folders, model, router=router, groups={}, family=family, draws=False)
            gates = {name: expert.gates for name, expert in experts.items()}
            give_vectors(model, gates, self.config.local, self.config.clusters)
        except BaseException:
            # Not what somebody else put on, for which this was refused.
            if getattr(model, ATTACHED, None) is not before:
                unload(model)
            raise
        self._model, self._family = model, family
        self._attached, self._there = attached_on(model), dict(experts)

    @property
    def _on(self) -> Decoder | None:
        model = self._model
        # By now somebody else's adapter may be there.
        return model if model is not None and getattr(model, ATTACHED, None) is self._attached else None

    def leave(self) -> None:
        """Know no more of the model that the experts are on, which keeps them; the pool goes on comparing queries."""
        self._model = self._attached = self._family = None
        self._there = {}

    @property
    def model(self) -> Decoder:
        """That the experts are on. Raises ConfigError where they are on none."""
        if self._on is None:
            raise ConfigError("the experts of the pool are on no model; put them on with onto(model)")
        return self._on

    def layers(self) -> dict[str, MixedLowRank]:
        """The routed layers of the model by what they stand beside."""
        return mixed_layers(self.model)

    def _put_again(self) -> None:
        """The experts as they are now onto the model that has them, if one has."""
        model = self._on
        if model is not None and self._experts:
            self.onto(model, family=self._family)
        elif model is not None:
            unload(model)

    # By the query

    def calibrate(self) -> Calibration:
        """The threshold that the pool itself suggests, with its curve. Raises ConfigError where fewer than two have instructions."""
        return self.matcher.calibration()

    def weight(self, cosines: Mapping[str, float]) -> float:
        """a for a query with these cosines: of experts with an instruction, whose vector has a length, the best decides."""
        return self._weight([cosines[name] for name in self.matcher.members()[0]])

    def _weight(self, known: Sequence[float] | np.ndarray) -> float:
        """`weight`, by the cosines of the members alone."""
        config = self.config
        if config.weight is not None:
            return config.weight
        if not len(known):
            return 0.0
        return config.beta + (config.gamma if self._has_task(known) else 0.0)

    @property
    def threshold(self) -> float | None:
        """p: as the config tells it, or as the pool suggests; None where there is nobody to be left out, and nobody to be mistaken for."""
        if self.config.threshold is not None:
            return self.config.threshold
        return self.calibrate().threshold if len(self.matcher.members()[0]) > 1 else None

    def has_task(self, cosines: Mapping[str, float]) -> bool:
        """Whether a query with these cosines is of a task of the pool: the best is at least the `threshold`, whatever weight it has."""
        return self._has_task([cosines[name] for name in self.matcher.members()[0]])

    def _has_task(self, known: Sequence[float] | np.ndarray) -> bool:
        threshold = self.threshold if len(known) else None
        return threshold is not None and bool(np.max(known) >= threshold)

    def bias(self, queries: Sequence[str | None], instructions: Sequence[str | None] | None = None) -> Tensor:
        """bias_BE: a times the cosine of each row's query and each expert's instruction; 0 for a row without a query.

        Args:
            queries: of each row; None for token by token alone.
            instructions: of each query, in the place of what the writer would write: a system prompt, say.
        """
        told = [None] * len(queries) if instructions is None else list(instructions)
        if len(told) != len(queries):
            raise ConfigError(f"there are {len(told)} instructions for {len(queries)} queries; give one for each")
        bias_BE = np.zeros((len(queries), len(self)), np.float32)
        for row, (query, instruction) in enumerate(zip(queries, told, strict=True)):
            if self.config.instruction and (query is not None or instruction is not None):
                a, cosine_E = self.terms(query or "", instruction)
                bias_BE[row] = a * cosine_E
        return torch.from_numpy(bias_BE)

    def terms(self, query: str, instruction: str | None = None, *, asker: str = "") -> tuple[float, np.ndarray]:
        """(a, cosine_E) of a query; see `bias`, and of ``asker`` `Matcher.instruct`."""
        cosine_E = self.matcher.cosine_array(query, instruction, asker=asker)
        return self._weight(cosine_E[self.matcher.member_M]), cosine_E

    def rows(
        self, queries: Sequence[str | None], length: int, *, instructions: Sequence[str | None] | None = None
    ) -> dict[str, Tensor]:
        """The ``state`` of a forward pass of L positions whose rows ask these; see `bias`."""
        device = self.model.embedding.weight.device
        return bias_rows(self.bias(queries, instructions).to(device), length)

    @contextmanager
    def answering(
        self, queries: Sequence[str | None], *, instructions: Sequence[str | None] | None = None
    ) -> Iterator[None]:
        """Every pass of the model in this block has rows that ask these, through caches too: for `generate` and whoever else calls it."""
        bias_BE = self.bias(queries, instructions)
        with telling(self.model, _TOLD, bias_BE, bias_rows, what="queries"):
            yield

    def retrieve(
        self, query: str, k: int = 1, *, instruction: str | None = None, exact: bool | None = None
    ) -> list[Match]:
        """The experts whose instructions are nearest to the query's, for servers that take one adapter per request; see `Matcher`."""
        return self.matcher.retrieve(query, k, instruction=instruction, exact=exact)
