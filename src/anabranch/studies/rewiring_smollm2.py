"""The arm ``smollm2`` of the study of Rewiring: SmolLM2 upcycled to a mixture of experts, and text in other languages."""
# Shapes: B rows, L positions

import gzip
import hashlib
import random
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from anabranch.adapters.rewiring import Rewiring
from anabranch.data import Tokenizer
from anabranch.files import parse_json, sha256_of
from anabranch.lm import Decoder, upcycle
from anabranch.nn import MoE
from anabranch.places import data_file
from anabranch.routing import Router, SwitchLoss, TopK, ZLoss
from anabranch.studies.harness import Metrics, Progress
from anabranch.studies.rewiring_small import Stream, main_metrics
from anabranch.studies.small_model import SHA256, find_weights

if TYPE_CHECKING:
    from anabranch.studies.rewiring import Size

LANGUAGES = ("german", "french", "finnish", "swedish", "portuguese")
RATE, BATCH, ACTIVE, DRAWN_ANEW = 1e-4, 4, 2, 0.5


def inputs(size: "Size") -> str:
    """Names what is read: weights, documentation, and the files of the data folder."""
    from anabranch.studies.rewiring import FOREIGN, QUESTIONS

    documentation = hashlib.sha256("\0".join(_sections()).encode()).hexdigest()
    told = f"{SHA256} {documentation}"
    told += f" {sha256_of(data_file(QUESTIONS))} {sha256_of(data_file(FOREIGN))}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def run(size: "Size", seed: int, progress: Progress) -> Metrics:
    """Upcycle, train experts and routers, and measure with all defaults."""
    from anabranch.lm.gguf import load_gguf

    torch.set_num_threads(1)
    progress("loading SmolLM2")
    dense, tokenizer = load_gguf(find_weights(), dtype=torch.float32)
    assert tokenizer is not None, "the file has one"
    balance = (SwitchLoss.Config(alpha=0.01), ZLoss.Config())
    router = Router.Config(select=TopK.Config(top_k=ACTIVE, normalize="sum"), balance=balance)
    feed_forward: Any = dense.config.feed_forward
    moe = MoE.Config(num_experts=size.upcycled_experts, hidden_dim=feed_forward.hidden_dim, router=router)
    model = upcycle(dense, moe, reinit=DRAWN_ANEW, seed=seed)
    del dense
    learned, held_out = _texts(tokenizer, size)
    _train(model, learned, size, seed, progress)
    model.eval().requires_grad_(False)
    progress("unseen and trained text")
    unseen = _foreign(tokenizer, size)
    return main_metrics(model, {"english": held_out}, unseen, Rewiring(interval=None))


def _train(model: Decoder, tokens: Sequence[int], size: "Size", seed: int, progress: Progress) -> None:
    """Experts and routers, with AdamW at one rate; all else stays."""
    model.requires_grad_(False)
    learns = [one for name, one in model.named_parameters() if ".feed_forward." in name]
    for one in learns:
        one.requires_grad_(True)
    optimizer = torch.optim.AdamW(learns, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    draw, length = random.Random(seed), size.upcycled_length
    model.train()
    for step in range(size.upcycled_steps):
        if step % 10 == 0:
            progress(f"step {step} of {size.upcycled_steps}")
        starts = [draw.randrange(len(tokens) - length) for _ in range(BATCH)]
        token_BL = torch.tensor([tokens[start : start + length + 1] for start in starts])
        optimizer.zero_grad()
        loss = model(token_BL[:, :-1], token_BL[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()


def _texts(tokenizer: Tokenizer, size: "Size") -> tuple[list[int], list[Stream]]:
    """(tokens to learn, streams of other text of the same kinds)."""
    sections, questions = _sections(), _questions()
    random.Random(0).shuffle(sections)
    held = max(1, len(sections) // 10)
    learned = [token for text in [*sections[held:], *questions[1000:2500]] for token in tokenizer.encode(text + "\n\n")]
    others = [token for text in [*sections[:held], *questions[:300]] for token in tokenizer.encode(text + "\n\n")]
    return learned, _streams(others, size)


def _foreign(tokenizer: Tokenizer, size: "Size") -> list[Stream]:
    """Streams of Genesis, from each language in turn."""
    from anabranch.studies.rewiring import FOREIGN

    streams: list[Stream] = []
    with zipfile.ZipFile(data_file(FOREIGN)) as file:
        for number, language in enumerate(LANGUAGES):
            name = next(name for name in file.namelist() if name.endswith(f"{language}.txt"))
            text = file.read(name).decode("utf-8", "replace")[:40_000]
            wanted = len(range(number, size.upcycled_streams, len(LANGUAGES)))
            streams += _streams(tokenizer.encode(text), size)[:wanted]
    return streams


def _streams(tokens: Sequence[int], size: "Size") -> list[Stream]:
    """As many as are wanted, spread evenly."""
    length = size.upcycled_context + size.upcycled_follows
    count = min(size.upcycled_streams, len(tokens) // length)
    stride = (len(tokens) - length) // max(count, 1)
    cut = [list(tokens[place * stride : place * stride + length]) for place in range(count)]
    return [(one[: size.upcycled_context], one[size.upcycled_context :]) for one in cut]


def _sections() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _questions() -> list[str]:
    from anabranch.studies.rewiring import QUESTIONS

    with gzip.open(data_file(QUESTIONS), "rt", encoding="utf-8") as file:
        rows = [parse_json(line) for line in file if line.strip()]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
