"""LLMLingua and kvpress beside FTP: processes of their own, here with stand-ins for the packages, held to work and to keys."""

import sys
import textwrap

import pytest
import torch

pytest.importorskip("transformers")

from anabranch.data import ByteTokenizer
from anabranch.depth.ftp import evaluate_path, evaluate_shortened
from anabranch.depth.ftp.items import Item
from anabranch.depth.ftp.passes import dense_work
from anabranch.depth.stack import stack_of
from anabranch.errors import BackendError
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.studies.ftp_peers import HALVINGS, VARIABLES, by_kvpress, by_llmlingua, running

PACKAGES = {
    # Keeps the first words, by the rate.
    "llmlingua": """
        class PromptCompressor:
            def __init__(self, folder, device_map):
                import tiktoken
                self.count = tiktoken.encoding_for_model("gpt-3.5-turbo")
                print("noise")

            def compress_prompt(self, texts, *, rate, use_context_level_filter, iterative_size):
                assert (use_context_level_filter, iterative_size, len(texts)) == (False, 10, 1)
                words = texts[0].split(" ")
                assert self.count.encode(texts[0])
                return {"compressed_prompt": " ".join(words[: round(rate * len(words))])}
    """,
    "tiktoken": """
        def encoding_for_model(name):
            raise OSError("it would download")
    """,
    # Keeps the first keys.
    "kvpress": """
        import contextlib
        import os

        class ExpectedAttentionPress:
            def __init__(self, compression_ratio):
                self.ratio = compression_ratio

            @contextlib.contextmanager
            def __call__(self, model):
                def cut(module, given, named, out):
                    cache = out.past_key_values
                    for layer in cache.layers:
                        kept = int(layer.keys.shape[2] * (1 - self.ratio))
                        layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
                    if os.environ.get("BREAKS"):
                        out.logits.mul_(0)
                handle = model.register_forward_hook(cut, with_kwargs=True)
                yield
                handle.remove()
    """,
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The stand-ins, and how a Python that has them is called."""
    folder = tmp_path_factory.mktemp("packages")
    for name, code in PACKAGES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(code))
        (folder / f"{name}-0.1.dist-info").mkdir()
        (folder / f"{name}-0.1.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    return f"env PYTHONPATH={folder} {sys.executable}"


@pytest.fixture(scope="module")
def stack():
    config = Decoder.Config(
        dim=32,
        num_layers=3,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        init_std=0.3,
        feed_forward=SwiGLU.Config(hidden_dim=48),
        max_positions=128,
    )
    return stack_of(config.build(seed=0).eval())


TOKENIZER = ByteTokenizer()
ITEMS = [
    Item(tuple(TOKENIZER.encode(f"{asked}\n")), tuple(TOKENIZER.encode(answer)))
    for asked, answer in (
        ("two and three are how many in all ?", "five"),
        ("a b c d e f g h", "i"),
        ("what comes behind nine and one", "eleven, or ten"),
    )
]


def dense(stack, items):
    return sum(dense_work(stack, len(item.tokens) - 1) for item in items)


def shortened(rate):
    """By hand, as the stand-in does."""
    made = []
    for item in ITEMS:
        words = TOKENIZER.decode(list(item.prompt)).rstrip("\n").split(" ")
        kept = " ".join(words[: round(rate * len(words))])
        made.append(Item(tuple(TOKENIZER.encode(f"{kept}\n")), item.continuation))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_llmlingua_has_at_least_the_work_and_no_more_than_it_needs(stack, packages, monkeypatch, share):
    monkeypatch.setenv(VARIABLES["llmlingua"], packages)
    work = round(share * dense(stack, ITEMS))
    with running("llmlingua", stack, TOKENIZER) as peer:
        assert peer.versions.keys() == {"llmlingua", "transformers", "torch"}
        found = by_llmlingua(peer, stack, TOKENIZER, ITEMS, work)
    rates = [number / 2**HALVINGS for number in range(1, 2**HALVINGS)]
    enough = [made for made in map(shortened, rates) if dense(stack, made) >= work]
    least = min(enough, key=lambda made: dense(stack, made))
    assert found.work == dense(stack, least) >= work
    assert found == evaluate_shortened(stack, ITEMS, least)
    assert found.dense == dense(stack, ITEMS)


@pytest.mark.slow
def test_a_prompt_that_cannot_be_shortened_enough_stays(stack, packages, monkeypatch):
    monkeypatch.setenv(VARIABLES["llmlingua"], packages)
    with running("llmlingua", stack, TOKENIZER) as peer:
        found = by_llmlingua(peer, stack, TOKENIZER, ITEMS, dense(stack, ITEMS) + 1)
    assert found.nats == pytest.approx(evaluate_path(stack, ITEMS).nats)


@pytest.mark.slow
@torch.no_grad()
def test_kvpress_is_the_model_whose_later_tokens_do_not_see_what_was_dropped(stack, packages, monkeypatch):
    monkeypatch.setenv(VARIABLES["kvpress"], packages)
    with running("kvpress", stack, TOKENIZER) as peer:
        found = by_kvpress(peer, stack, ITEMS, 0.4)
        whole = by_kvpress(peer, stack, ITEMS, 0.0)
    ours = evaluate_path(stack, ITEMS)
    assert whole.nats == pytest.approx(ours.nats, rel=1e-4)
    assert (whole.work, whole.dense, whole.following) == (ours.work, ours.work, ours.following)
    # Decoding that sees the first keys alone, token by token, at their own places.
    nats, work = 0.0, 0
    for item in ITEMS:
        length = len(item.prompt)
        kept = int(length * 0.6)
        work += dense_work(stack, length) + sum(
            dense_work(stack, 1, past=kept + more) for more in range(len(item.continuation) - 1)
        )
        nats += naive(stack, item, kept)
    assert found.nats == pytest.approx(nats, rel=1e-4)
    assert found.work == work < ours.work
    # The token behind the prompt is decided before anything is dropped.
    assert found.following == ours.following


def naive(stack, item, kept):
    """Nats of the continuation, where tokens behind the prompt see its first ``kept`` and each other; by transformers' own masks."""
    import tempfile

    from transformers import AutoModelForCausalLM

    from anabranch.lm import export_huggingface

    with tempfile.TemporaryDirectory() as place:
        export_huggingface(f"{place}/model", stack.module, TOKENIZER)
        model = AutoModelForCausalLM.from_pretrained(
            f"{place}/model", dtype=torch.float32, attn_implementation="eager"
        ).eval()
    token_1L = torch.tensor([item.tokens[:-1]])
    length = token_1L.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[len(item.prompt) :, kept : len(item.prompt)] = False
    mask = torch.zeros(1, 1, length, length).masked_fill(~sees, torch.finfo(torch.float32).min)
    logits_LV = model(token_1L, attention_mask=mask).logits[0, len(item.prompt) - 1 :]
    return float(torch.nn.functional.cross_entropy(logits_LV, torch.tensor(item.continuation), reduction="sum"))


@pytest.mark.slow
def test_a_model_that_is_another_there_is_refused(stack, packages, monkeypatch):
    monkeypatch.setenv(VARIABLES["kvpress"], f"env BREAKS=1 {packages}")
    with running("kvpress", stack, TOKENIZER) as peer, pytest.raises(BackendError, match="they must be of one model"):
        by_kvpress(peer, stack, ITEMS, 0.4)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "ANABRANCH_KVPRESS is not set; name a Python that has kvpress"),
        ("/nowhere/python", "is '/nowhere/python', which cannot be started: No such file"),
        ("false", "the worker of kvpress ended with code 1"),
        # It has no packages at all.
        (f"{sys.executable} -I -S", "the worker of kvpress ended with code 1"),
    ],
)
def test_a_python_that_cannot_run_it(stack, monkeypatch, said, message):
    monkeypatch.delenv(VARIABLES["kvpress"], raising=False)
    if said is not None:
        monkeypatch.setenv(VARIABLES["kvpress"], said)
    with pytest.raises(BackendError, match=message), running("kvpress", stack, TOKENIZER):
        raise AssertionError("it started")


@pytest.mark.slow
def test_a_worker_that_ends_in_the_midst_is_told(stack, packages, monkeypatch):
    monkeypatch.setenv(VARIABLES["llmlingua"], packages)
    with running("llmlingua", stack, TOKENIZER) as peer:
        with pytest.raises(BackendError, match="the worker of llmlingua ended with code 1"):
            peer.ask(nothing=1)
        with pytest.raises(BackendError, match="the worker of llmlingua ended with code 1"):
            peer.ask(texts=["a"], rate=0.5)
