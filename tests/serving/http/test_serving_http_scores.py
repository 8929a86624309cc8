"""``echo`` with ``logprobs`` over HTTP: what evaluators ask for, whole and streamed, by scripted and real engines."""

import asyncio

import pytest
import tokenizers
import torch
from tokenizers.processors import TemplateProcessing

from anabranch.data import ByteTokenizer, train_bpe
from anabranch.data.tokenizer import HuggingFaceTokenizer
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Finish, Output, TokenLogprob
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.scores import PromptScores
from fake_engine import FakeEngine, Script
from serving_models import small_moe
from serving_thread import events, serving

openai = pytest.importorskip("openai")
MODEL = "small"
CLOSE = 1e-4
NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture(scope="module")
def fake():
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def model():
    return small_moe()


@pytest.fixture(scope="module")
def server(model):
    config = ServingConfig(
        num_blocks=256, name=MODEL, dtype="float32", max_seqs=8, max_batched_tokens=16, block_tokens=4, max_positions=64
    )

    def make():
        return LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer()))

    with serving(make) as running:
        yield running


def ask(server, **fields):
    return server.ask("/v1/completions", {"model": MODEL, "prompt": "hello", "temperature": 0, "echo": True, **fields})


def scores_of(model, tokens):
    """Log probabilities of tokens after the first by one pass, and the best of each row."""
    with torch.no_grad():
        log_LV = model(torch.tensor([tokens])).logits_BLV[0].float().log_softmax(-1)
    own = [row_V[token].item() for row_V, token in zip(log_LV, tokens[1:], strict=False)]
    return own, log_LV[: len(own)].max(-1).values.tolist()


def put_together(raw):
    """Choices of a stream as those of a whole answer."""
    made = {}
    for chunk in events(raw):
        for part in chunk["choices"] if chunk != "[DONE]" else ():
            choice = made.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                told = choice["logprobs"] = choice["logprobs"] or {name: [] for name in NAMES}
                for name in NAMES:
                    told[name] += part["logprobs"][name]
    return [made[index] for index in sorted(made)]


def test_the_prompt_comes_before_the_answer(fake):
    body = fake.complete(prompt="abc", echo=True, max_tokens=2, logprobs=1)[2]
    [choice] = body["choices"]
    assert choice["text"] == "abcab"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "a", "b"],
        "token_logprobs": [None, -1.0, -2.0, -0.5, -0.5],
        "top_logprobs": [None, {"b": 0.0}, {"c": 0.0}, {"a": -0.5}, {"b": -0.5}],
        "text_offset": [0, 1, 2, 3, 4],
    }
    assert body["usage"]["completion_tokens"] == 2


def test_the_prompt_alone_of_several(fake):
    before = fake.metrics()["prompt_tokens_total"]
    body = fake.complete(prompt=["abc", [100]], echo=True, max_tokens=0, logprobs=0)[2]
    first, second = body["choices"]
    assert (first["text"], first["finish_reason"]) == ("abc", "length")
    assert first["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [None, {}, {}],
        "text_offset": [0, 1, 2],
    }
    assert second["logprobs"]["token_logprobs"] == [None]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 0,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert fake.metrics()["prompt_tokens_total"] == before + 4
    assert {request.sampling.max_tokens for request in fake.script.requests[-2:]} == {0}


def test_choices_of_one_prompt_share_its_scores(fake):
    body = fake.complete(prompt=["abc", "xy"], echo=True, max_tokens=1, logprobs=1, n=3)[2]
    asked = sorted(fake.script.requests[-6:], key=lambda request: int(request.id.rpartition("-")[2]))
    assert [request.sampling.prompt_logprobs for request in asked] == [1, None, None] * 2
    told = [choice["logprobs"]["token_logprobs"] for choice in body["choices"]]
    assert told == [[None, -1.0, -2.0, -0.5]] * 3 + [[None, -1.0, -0.5]] * 3


def test_the_first_chunk_has_the_prompt(fake):
    raw = fake.complete(prompt="abc", echo=True, max_tokens=2, logprobs=1, stream=True)[2]
    first, *later = [event["choices"][0] for event in events(raw)[:-1]]
    assert first["text"].startswith("abc")
    assert first["logprobs"]["token_logprobs"][:3] == [None, -1.0, -2.0]
    assert all(None not in part["logprobs"]["token_logprobs"] for part in later)


def test_without_logprobs_nothing_is_scored(fake):
    fake.complete(prompt="abc", echo=True, max_tokens=2)
    assert fake.script.requests[-1].sampling.prompt_logprobs is None
    fake.complete(prompt="abc", logprobs=2, max_tokens=2)
    assert fake.script.requests[-1].sampling.prompt_logprobs is None


def test_an_empty_text_is_the_beginning_of_one(fake):
    for is_stream in (False, True):
        body = fake.complete(prompt="", echo=True, max_tokens=0, logprobs=1, stream=is_stream)[2]
        [choice] = put_together(body) if is_stream else body["choices"]
        assert choice["text"] == ""
        assert choice["logprobs"]["token_logprobs"] == [None]


def test_a_token_that_cannot_be_has_the_least_number():
    """JSON has no infinity."""

    class Sure(FakeEngine):
        async def submit(self, request):
            told = TokenLogprob(token=request.prompt[1], logprob=-float("inf"), top=((5, 0.0), (6, -float("inf"))))
            yield Output(id=request.id, prompt_logprobs=(told,), finish=Finish.LENGTH)

    with serving(lambda: Sure(Script())) as running:
        told = running.complete(prompt="ab", echo=True, max_tokens=0, logprobs=2)[2]["choices"][0]["logprobs"]
    assert told["token_logprobs"] == [None, -9999.0]
    assert sorted(told["top_logprobs"][1].values()) == [-9999.0, 0.0]


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_numbers_are_those_of_one_pass(server, model, max_tokens):
    status, _, body = ask(server, prompt="how are you, and how is it going?", max_tokens=max_tokens, logprobs=1)
    assert status == 200
    [choice] = body["choices"]
    told = choice["logprobs"]
    prompt = ByteTokenizer().encode("how are you, and how is it going?")
    size = len(prompt)
    assert "".join(told["tokens"][:size]) == "how are you, and how is it going?"
    own, best = scores_of(model, prompt)
    assert told["token_logprobs"][0] is None
    assert told["token_logprobs"][1:size] == pytest.approx(own, abs=CLOSE)
    assert [max(top.values()) for top in told["top_logprobs"][1:size]] == pytest.approx(best, abs=CLOSE)
    assert len(told["tokens"]) == size + body["usage"]["completion_tokens"]
    assert told["text_offset"][:size] == list(range(size))
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert ask(server, prompt=prompt, max_tokens=max_tokens, logprobs=1)[2]["choices"] == body["choices"]


@pytest.mark.parametrize("logprobs", [0, 1, 5])
@pytest.mark.parametrize("max_tokens", [0, 7])
def test_a_stream_says_what_the_whole_answer_says(server, max_tokens, logprobs):
    fields = {"prompt": ["naïve 水", "b", [1, 2, 3]], "n": 2, "max_tokens": max_tokens, "logprobs": logprobs}
    whole = ask(server, **fields)[2]["choices"]
    streamed = put_together(ask(server, stream=True, **fields)[2])
    assert len(whole) == len(streamed) == 6
    for one, other in zip(whole, streamed, strict=True):
        assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])
        for name in ("tokens", "text_offset"):
            assert one["logprobs"][name] == other["logprobs"][name]
        assert one["logprobs"]["token_logprobs"][0] is None
        numbers = [part["logprobs"]["token_logprobs"][1:] for part in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=CLOSE)


def test_the_official_client_as_an_evaluator_uses_it(server, model):
    """lm-evaluation-harness: context and continuation as token ids, of which the continuation's scores are added up."""
    pairs = [("2 + 2 =", " 4"), ("the sky is", " blue")]
    ids = [ByteTokenizer().encode(context + more) for context, more in pairs]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0, timeout=60) as client:
        answer = client.completions.create(
            model=MODEL, prompt=ids, max_tokens=1, logprobs=1, temperature=0, echo=True, seed=1234
        )
        parts = client.completions.create(
            model=MODEL, prompt=ids[0], max_tokens=1, logprobs=1, temperature=0, echo=True, stream=True
        )
        first = next(iter(parts)).choices[0].logprobs
    for choice, (context, _), tokens in zip(answer.choices, pairs, ids, strict=True):
        start = len(ByteTokenizer().encode(context))
        own, best = scores_of(model, tokens)
        told = choice.logprobs.token_logprobs[start:-1]
        assert sum(told) == pytest.approx(sum(own[start - 1 :]), abs=CLOSE)
        tops = [max(top.values()) for top in choice.logprobs.top_logprobs[start:-1]]
        assert tops == pytest.approx(best[start - 1 :], abs=CLOSE)
    assert first.token_logprobs[: len(ids[0])] == answer.choices[0].logprobs.token_logprobs[: len(ids[0])]


def test_a_prompt_alone_may_fill_the_model(server):
    status, _, body = ask(server, prompt="x" * 64, max_tokens=0, logprobs=1)
    assert status == 200
    assert len(body["choices"][0]["logprobs"]["tokens"]) == 64
    for fields in ({"prompt": "x" * 65, "max_tokens": 0}, {"prompt": "x" * 64, "max_tokens": 1}):
        status, _, body = ask(server, logprobs=1, **fields)
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


def test_offsets_count_characters_and_special_tokens():
    reader, tokenizer = Reader(ByteTokenizer()), ByteTokenizer()
    assert list(reader.offsets(tokenizer.encode("aé水b"), "aé水b")) == [0, 1, 1, 2, 2, 2, 3]
    name = reader.token_text(tokenizer.eos_id)[0]
    tokens = [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]
    assert list(reader.offsets(tokens, reader.decode(tokens))) == [0, 1, 1 + len(name)]
    assert list(reader.offsets([tokenizer.eos_id], "")) == [0]


def begun():
    """A tokenizer that puts a beginning, <bos>, before prompts."""
    backend = tokenizers.Tokenizer.from_str(train_bpe(["how are you"], 257)._backend.to_str())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return HuggingFaceTokenizer(backend, bos_id=bos, eos_id=256, chat_template="{{ messages[0].content }}")


def test_a_beginning_that_is_put_before_a_text_takes_no_room_in_it():
    tokenizer = begun()
    reader, bos = Reader(tokenizer), tokenizer.bos_id
    assert reader.encode("ab") == (bos, *tokenizer.encode("ab"))
    assert reader.encode_chat("ab") == tuple(tokenizer.encode("ab"))
    assert reader.encode("") == (bos,)
    assert list(reader.offsets(reader.encode("ab"), "ab")) == [0, 0, 1]
    assert list(reader.offsets(reader.encode("<bos>ab"), "<bos>ab")) == [0, 5, 6]


def test_raw_prompts_have_a_beginning_and_conversations_what_their_template_writes():
    said = {"messages": [{"role": "user", "content": "ab"}]}
    with serving(reader=Reader(begun())) as server:
        chat = server.ask("/tokenize", said)[2]["tokens"]
        assert server.ask("/tokenize", {"prompt": "ab"})[2]["tokens"] == [begun().bos_id, *chat]
        assert server.complete(prompt="ab", max_tokens=1)[2]["usage"]["prompt_tokens"] == 3
        assert server.chat(max_tokens=1, **said)[2]["usage"]["prompt_tokens"] == 2


def test_scores_wait_until_all_are_there():
    async def run():
        scores = PromptScores(3)
        waiting = asyncio.create_task(scores.wait())
        scores.add([TokenLogprob(token=1, logprob=-1.0)])
        await asyncio.sleep(0)
        assert not waiting.done()
        scores.add([TokenLogprob(token=2, logprob=-1.0)])
        await waiting
        assert scores.is_complete
        assert PromptScores(1).is_complete

    asyncio.run(run())
