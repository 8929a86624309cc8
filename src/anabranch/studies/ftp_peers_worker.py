"""LLMLingua or kvpress as a contestant of FTP: this file runs in an environment of theirs, and is spoken to through pipes.

    python ftp_peers_worker.py llmlingua|kvpress MODEL

MODEL is a folder of transformers. A request is a line of JSON on stdin, its answer one on stdout; it says ``{"ready": versions}`` first.

    llmlingua   {"texts": [...], "rate": r}                     -> {"texts": [...]}
    kvpress     {"items": [[prompt, continuation], ...], "ratio": r} -> {"nats": [...], "following": [...], "stored": [...]}

Nothing of anabranch is imported.
"""

import importlib.metadata
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

# LLMLingua reads a prompt in pieces of so many tokens, and leaves whole what fills none: at its default, 200, questions stay as they are.
PIECE = 10


def llmlingua(folder: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Prompts without the tokens that its model finds likeliest (arXiv 2310.05736), by the same model that is then asked."""
    import tiktoken
    from transformers import AutoTokenizer

    # It counts tokens for its own report by OpenAI's tokenizer, which it would download; nothing that is kept depends on it.
    words = AutoTokenizer.from_pretrained(folder)
    tiktoken.encoding_for_model = lambda name: words
    from llmlingua import PromptCompressor

    made = PromptCompressor(folder, device_map="cpu")

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        settings = {"rate": asked["rate"], "use_context_level_filter": False, "iterative_size": PIECE}
        return {"texts": [made.compress_prompt([text], **settings)["compressed_prompt"] for text in asked["texts"]]}

    return answer


def kvpress(folder: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Keys and values dropped behind a dense prefill, by what attention later queries are expected to give them: kvpress's own press."""
    import torch
    from kvpress import ExpectedAttentionPress
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # By its name in the versions of before 5.24, and since.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    @torch.no_grad()
    def one(prompt: list[int], continuation: list[int], ratio: float) -> tuple[float, int, int]:
        """(nats of the continuation, the likeliest token behind the prompt, keys that each layer holds of it)."""
        cache = DynamicCache()
        with ExpectedAttentionPress(compression_ratio=ratio)(model):
            logits = [model(torch.tensor([prompt]), use_cache=True, **{name: cache}).logits[0, -1:]]
        stored = int(cache.get_seq_length())
        if len(continuation) > 1:
            place = torch.arange(len(prompt), len(prompt) + len(continuation) - 1).unsqueeze(0)
            given = torch.tensor([continuation[:-1]])
            logits.append(model(given, position_ids=place, use_cache=True, **{name: cache}).logits[0])
        behind = torch.cat(logits).float().log_softmax(-1)
        nats = -behind[torch.arange(len(continuation)), torch.tensor(continuation)].sum()
        return float(nats), int(behind[0].argmax()), stored

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        found = [one(prompt, continuation, asked["ratio"]) for prompt, continuation in asked["items"]]
        nats, following, stored = (list(each) for each in zip(*found, strict=True))
        return {"nats": nats, "following": following, "stored": stored}

    return answer


def main() -> None:
    """Answer lines until there are no more."""
    name, folder = sys.argv[1:]
    # What the packages print goes where it is no answer.
    out, sys.stdout = sys.stdout, sys.stderr
    answer = {"llmlingua": llmlingua, "kvpress": kvpress}[name](folder)
    versions = {package: importlib.metadata.version(package) for package in (name, "transformers", "torch")}
    print(json.dumps({"ready": versions}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
