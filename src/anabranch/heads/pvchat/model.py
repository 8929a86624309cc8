"""`PVChat`: a small model that answers questions about clips, and learns to know new subjects of one reference each.

    patches = encoder(frames)
    x = query former([learned queries; personal tokens of the subjects asked about], patches)     # its upper layers have routed heads
    answer = decoder([x; question; answer so far])

"PVChat: Personalized Video Chat with One-Shot Learning", ICCV 2025, arXiv 2503.17069, at our scale: the paper's encoder of a billion
parameters is three convolutions and two layers here, its Q-former of 12 layers has 4, and its Mistral-7B is a decoder of two layers.
"""
# Shapes: B clips, K questions to each, L positions, F frames, Q queries, S subjects asked about, N personal tokens, D width

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.bounds import Size
from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass, from_dict, to_dict
from anabranch.errors import CheckpointError, ConfigError, InputError
from anabranch.files import atomic_folder, atomic_write_json, read_json
from anabranch.heads.config import HeadRouting
from anabranch.heads.pvchat import heads as heads_of
from anabranch.heads.pvchat.clips import Clip, fitted
from anabranch.heads.pvchat.layers import SPREAD, PatchEncoder, QueryFormer
from anabranch.heads.pvchat.vocabulary import END, PAD, Vocabulary
from anabranch.lm.decoder import Decoder
from anabranch.lm.shards import write_tensors
from anabranch.lm.tensors import Piece, check_amount, open_tensors, overwrite, state_once
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.registry import resolve
from anabranch.train.evaluate import evaluation_mode

__all__ = ["FORMAT", "PVChat"]

FORMAT, SCHEMA = "anabranch-pvchat", 1
_OURS = r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
# Words of the longest answer, and room.
_MOST_WORDS = 12


class PVChat(Part, nn.Module):
    """The model.

    Args:
        config: its sizes.
        vocabulary: words and the subjects that it knows; None for the words of questions and nobody.
        seed: of the first weights.

    Attributes:
        vocabulary: likewise.
        personal: [subjects, N, D]: the tokens by which each subject is asked for.
        encoder, queries, decoder: see the module.
    """

    @configclass
    class Config(BaseConfig):
        """Sizes.

        Attributes:
            frames, size: of clips, as of `Composer.Config`.
            dim: D of everything.
            vision_layers: of attention within frames.
            query_layers: of the query former; the upper half of them has routed heads.
            num_heads: of attention, in the query former and in vision.
            num_queries: that belong to no subject.
            personal_tokens: N, of each subject.
            decoder_layers, decoder_heads: of the decoder.
            lora_rank: of what learns beside the decoder's attention when a subject is learned; 0 for nothing.
            heads: which heads are routed, and how.
        """

        frames: Size = Field(default=8, ge=1, le=64)
        size: Size = Field(default=48, ge=16, le=512)
        dim: Size = Field(default=64, ge=8)
        vision_layers: int = Field(default=2, ge=1, le=64)
        query_layers: int = Field(default=4, ge=1, le=64)
        num_heads: Size = Field(default=8, ge=1)
        num_queries: Size = Field(default=16, ge=1)
        personal_tokens: Size = Field(default=16, ge=1)
        decoder_layers: int = Field(default=2, ge=1, le=64)
        decoder_heads: Size = Field(default=4, ge=1)
        lora_rank: int = Field(default=8, ge=0)
        heads: HeadRouting = HeadRouting(num_shared=5, routing="none", target=0.5)

        def __post_init__(self) -> None:
            if self.dim % self.num_heads:
                raise ConfigError(f"dim is {self.dim}, which is not a multiple of num_heads={self.num_heads}")
            if self.size % 8:
                raise ConfigError(f"size is {self.size}; it must be a multiple of 8, the side of a patch")
            self.heads.check(self.num_heads)
            self.decoder(1)

        def decoder(self, words: int) -> Decoder.Config:
            """That of the decoder, with so many words."""
            linears: Any = {}
            if self.lora_rank:
                # By its name: adapters stand beside heads, and neither imports the other.
                low_rank: Any = resolve("linear", "low_rank")
                linears = {"blocks.*.attention.*": low_rank.Config(rank=self.lora_rank, alpha=2.0 * self.lora_rank)}
            return Decoder.Config(
                vocab_size=words,
                dim=self.dim,
                num_layers=self.decoder_layers,
                attention=SelfAttention.Config(num_heads=self.decoder_heads),
                feed_forward=SwiGLU.Config(hidden_dim=8 * ((8 * self.dim // 3 + 7) // 8)),
                linears=linears,
                tie_embeddings=True,
                max_positions=1024,
            )

    def __init__(self, config: Config, vocabulary: Vocabulary | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary() if vocabulary is None else vocabulary
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            dim = config.dim
            self.encoder = PatchEncoder(dim, config.vision_layers, config.num_heads, config.frames, config.size)
            self.queries = QueryFormer(dim, config.query_layers, config.num_heads, config.num_queries)
            self.projector = nn.Linear(dim, dim)
            count = len(self.vocabulary.names)
            self.personal = nn.Parameter(SPREAD * torch.randn(count, config.personal_tokens, dim))
        self.decoder: Decoder = config.decoder(len(self.vocabulary)).build(seed=seed)
        heads_of.put_on(self.queries, config.heads, seed=seed)

    # Subjects

    @torch.no_grad()
    def add_subject(self, name: str, *, seed: int = 0) -> int:
        """Take up a new subject; returns its number.

        Its word and its tokens begin at the mean of those of the other subjects (of all words where there is none), each with a little
        noise so that no two are the same. Nothing else changes. Raises ConfigError for a name that is none, or is taken.
        """
        digest = blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        names = [self.vocabulary.word(known) for known in self.vocabulary.names]
        self.vocabulary.add(name)
        old_VD = self.decoder.embedding.weight
        like_D = (old_VD[names] if names else old_VD).mean(0)
        noise_D = old_VD.std() * torch.randn(len(like_D), generator=generator).to(old_VD)
        grown = nn.Embedding.from_pretrained(torch.cat([old_VD, (like_D + noise_D)[None]]), freeze=False)
        self.decoder.embedding = grown
        self.decoder.config = self.decoder.config.replace(vocab_size=len(self.vocabulary))
        old_SND = self.personal
        shape = old_SND.shape[1:]
        start_ND = old_SND.mean(0) if len(old_SND) else torch.zeros_like(old_SND.new_empty(shape))
        spread = float(old_SND.std()) if len(old_SND) else SPREAD
        noise_ND = 0.1 * spread * torch.randn(shape, generator=generator).to(old_SND)
        self.personal = nn.Parameter(torch.cat([old_SND, (start_ND + noise_ND)[None]]))
        return len(self.vocabulary.names) - 1

    @torch.no_grad()
    def drop_subjects(self, count: int) -> None:
        """Take the last ``count`` subjects off again, with their words and tokens. Nothing else changes."""
        self.vocabulary.drop(count)
        kept_VD = self.decoder.embedding.weight[: len(self.vocabulary)].detach().clone()
        self.decoder.embedding = nn.Embedding.from_pretrained(kept_VD, freeze=False)
        self.decoder.config = self.decoder.config.replace(vocab_size=len(self.vocabulary))
        self.personal = nn.Parameter(self.personal[: len(self.vocabulary.names)].detach().clone())

    def rows_of(self, names: Iterable[str]) -> tuple[list[int], list[int]]:
        """(numbers of words, numbers of subjects) of ``names``. Raises InputError for one that is not known."""
        names = list(names)
        return [self.vocabulary.word(name) for name in names], [self.vocabulary.subject(name) for name in names]

    def with_heads(self, heads: HeadRouting, *, seed: int = 0) -> Self:
        """Put routed heads onto a model whose heads are all plain, in place. Raises ConfigError where they are not."""
        if self.config.heads.routing != "none":
            raise ConfigError(f"heads of this model are routed already ({self.config.heads.routing})")
        heads.check(self.config.num_heads)
        self.config = self.config.replace(heads=heads)
        heads_of.put_on(self.queries, heads, seed=seed)
        return self

    # Passes

    def look(self, frame_BFCHW: Tensor, subject_BS: Tensor) -> Tensor:
        """x_BQD: what there is to say about clips, to who asks for these subjects; -1 is nobody.

        Raises InputError for more frames than the model takes, or frames of another size.
        """
        frames, size = frame_BFCHW.shape[1], tuple(frame_BFCHW.shape[-2:])
        if not 1 <= frames <= self.config.frames or size != (self.config.size,) * 2:
            raise InputError(
                f"clips of {frames} frames of {size[0]} x {size[1]}; this model takes 1 to {self.config.frames} of "
                f"{self.config.size} x {self.config.size}, see anabranch.heads.pvchat.fitted"
            )
        hidden_BN = None
        personal_BSND = self.personal[subject_BS.clamp_min(0)] if len(self.personal) else None
        if personal_BSND is None:
            personal_BND = self.queries.query.new_zeros(len(frame_BFCHW), 0, self.config.dim)
        else:
            personal_BND = personal_BSND.flatten(1, 2)
            if bool((subject_BS < 0).any()):
                hidden_BN = (subject_BS < 0).repeat_interleave(self.config.personal_tokens, dim=1)
        return self.projector(self.queries(self.encoder(frame_BFCHW), personal_BND, hidden_BN))

    def logits(self, look_BQD: Tensor, token_BKL: Tensor) -> Tensor:
        """logits_BKLV of the positions of words that come behind what is seen."""
        (batch, asked, length), seen = token_BKL.shape, look_BQD.shape[1]
        token_NL = token_BKL.flatten(0, 1)
        front_NQD = look_BQD.repeat_interleave(asked, 0)
        x_NLD = torch.cat([front_NQD, self.decoder.embed(token_NL).to(front_NQD.dtype)], 1)
        y_NLD = self._decoded(x_NLD)[:, seen:]
        return self.decoder.logits(y_NLD).view(batch, asked, length, -1)

    def _decoded(self, x_NLD: Tensor, cache: Any = None) -> Tensor:
        """What the decoder makes of vectors in the place of words."""
        # Whatever stands for them: nothing in this decoder looks at it.
        token_NL = torch.zeros(x_NLD.shape[:2], dtype=torch.long, device=x_NLD.device)
        context = self.decoder.context(token_NL, cache=cache)
        for block in self.decoder.blocks:
            x_NLD = block(x_NLD, context)
        if cache is not None:
            cache.advance(x_NLD.shape[1])
        x_NLD = self.decoder.norm(x_NLD)
        context.commit()
        return x_NLD

    def forward(
        self, frame_BFCHW: Tensor, subject_BS: Tensor, token_BKL: Tensor, target_BKL: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logits_BKLV, nats_BK): nats of the answers, the mean over their words; zeros without targets (-100: not asked for)."""
        logits_BKLV = self.logits(self.look(frame_BFCHW, subject_BS), token_BKL)
        if target_BKL is None:
            return logits_BKLV, logits_BKLV.new_zeros(token_BKL.shape[:2])
        nats = F.cross_entropy(
            logits_BKLV.flatten(0, 2).float(), target_BKL.flatten(), ignore_index=-100, reduction="none"
        ).view(target_BKL.shape)
        asked = target_BKL != -100
        return logits_BKLV, nats.sum(-1) / asked.sum(-1).clamp_min(1)

    def head_losses(self) -> Tensor:
        """The sum of what routed heads add to the loss of the last pass; 0 where none are routed."""
        found = [module.losses() for module in self.routed()]
        return sum(found, start=self.queries.query.new_zeros(()))

    def routed(self) -> list[Any]:
        """The attentions whose heads are routed."""
        return heads_of.routed(self.queries)

    # Use

    def ask(self, clip: Clip, text: str) -> str:
        """The answer to a question, in words; it names one subject or more. Raises InputError for one that is not known, or none."""
        subjects = self.vocabulary.subjects_in(text)
        if not subjects:
            raise InputError(f"{text!r} names nobody; ask about a subject by its name, such as <Ab>")
        return self.answers([clip], [subjects], [[text]])[0][0]

    @torch.no_grad()
    def answers(
        self, clips: Sequence[Clip], subjects: Sequence[Sequence[int]], questions: Sequence[Sequence[str]]
    ) -> list[list[str]]:
        """The likeliest answers, word by word, to the questions about each clip.

        Args:
            clips: any; they are fitted to the model.
            subjects: numbers of those that are asked about, of each clip.
            questions: of each clip.
        """
        found = [[""] * len(asked) for asked in questions]
        device = self.queries.query.device
        with evaluation_mode(self):
            for number, clip in enumerate(clips):
                frame = fitted(clip, self.config.frames, self.config.size)[None].to(device)
                subject_1S = torch.tensor([list(subjects[number])], dtype=torch.long, device=device)
                look_1QD = self.look(frame, subject_1S)
                for place, text in enumerate(questions[number]):
                    found[number][place] = self.vocabulary.decode(self._said(look_1QD, self.vocabulary.encode(text)))
        return found

    def _said(self, look_1QD: Tensor, ids: list[int]) -> list[int]:
        """The words of one answer."""
        if not ids:
            raise InputError("the question is empty; ask something, such as: where is <Ab> ?")
        if look_1QD.shape[1] + len(ids) + _MOST_WORDS > self.decoder.config.max_positions:
            raise InputError(f"the question has {len(ids)} words; ask a shorter one")
        cache = self.decoder.new_cache(look_1QD.shape[1] + len(ids) + _MOST_WORDS)
        token_1L = torch.tensor([ids], device=look_1QD.device)
        x_1LD = torch.cat([look_1QD, self.decoder.embed(token_1L).to(look_1QD.dtype)], 1)
        said: list[int] = []
        while len(said) < _MOST_WORDS:
            logits_V = self.decoder.logits(self._decoded(x_1LD, cache)[0, -1])
            logits_V[PAD] = -torch.inf
            word = int(logits_V.argmax())
            if word == END:
                break
            said.append(word)
            x_1LD = self.decoder.embed(torch.tensor([[word]], device=look_1QD.device)).to(look_1QD.dtype)
        return said

    # Files

    def save(self, folder: str | Path) -> None:
        """Write the model, its words and subjects into a folder, all or nothing. Raises DataError where that holds other things."""
        with atomic_folder(folder, replacing=_OURS) as temporary:
            self.write(temporary)

    def write(self, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
        """The files of `save`, into a folder that is there; ``tensors`` where they are not the model's own."""
        write_tensors(folder, state_once(self) if tensors is None else tensors)
        atomic_write_json(folder / "config.json", self.description())

    def description(self) -> dict[str, Any]:
        """What ``config.json`` says."""
        return {
            "schema": SCHEMA,
            "format": FORMAT,
            "model": to_dict(self.config),
            "words": self.vocabulary.words,
            "names": self.vocabulary.names,
        }

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote. Raises CheckpointError for a folder that holds something else, or is damaged."""
        folder = Path(folder)
        table = read_json(folder / "config.json")
        if table.get("format") != FORMAT:
            raise CheckpointError(f"{folder} holds no PVChat model (its format is {table.get('format')!r})")
        if table.get("schema") != SCHEMA:
            raise CheckpointError(
                f"schema in {folder / 'config.json'} is {table.get('schema')!r}; this version reads {SCHEMA}"
            )
        words, names = table.get("words"), table.get("names")
        if not all(isinstance(part, list) and all(isinstance(word, str) for word in part) for part in (words, names)):
            raise CheckpointError(f"{folder / 'config.json'} has no lists of words and names")
        try:
            config = from_dict(cls.Config, table.get("model"), "model")
            vocabulary = Vocabulary(names, words)  # type: ignore[arg-type]
        except ConfigError as error:
            raise CheckpointError(f"{folder / 'config.json'} does not describe a model: {error}") from None
        source = open_tensors(folder)
        check_amount(_least_numbers(config, len(vocabulary)), source, folder)
        model = cls(config, vocabulary)
        overwrite(model, source, {name: [Piece(name)] for name in state_once(model)}, where=folder)
        return model


def _least_numbers(config: PVChat.Config, words: int) -> int:
    """Numbers that such a model has at least, known without making it."""
    layers = config.vision_layers + config.query_layers + config.decoder_layers
    return (12 * layers * config.dim + words + config.num_queries) * config.dim


# What a stage of training names, by the beginning of a parameter's name.
PartName = Literal["vision", "upper_vision", "projector", "queries", "router", "personal", "words", "lora", "decoder"]


def parts_of(model: PVChat) -> dict[str, PartName]:
    """Which part of the model each parameter belongs to, by its name."""
    routers = heads_of.router_parameters(model.queries)
    low_rank = {
        id(parameter)
        for module in model.decoder.modules()
        if getattr(module, "kind", None) == "low_rank"
        for parameter in module.parameters()
    }
    upper = [
        f"encoder.layers.{number}." for number in range(model.config.vision_layers // 2, model.config.vision_layers)
    ]

    def part(name: str, parameter: nn.Parameter) -> PartName:
        if id(parameter) in routers:
            return "router"
        if id(parameter) in low_rank:
            return "lora"
        if name.startswith("encoder."):
            is_upper = name.startswith((*upper, "encoder.norm."))
            return "upper_vision" if is_upper else "vision"
        for beginning, found in _BEGINNINGS.items():
            if name.startswith(beginning):
                return found
        return "decoder"

    return {name: part(name, parameter) for name, parameter in model.named_parameters()}


_BEGINNINGS: dict[str, PartName] = {
    "queries.": "queries",
    "projector.": "projector",
    "personal": "personal",
    "decoder.embedding.": "words",
}
