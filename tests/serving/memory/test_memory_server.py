"""``anabranch serve --memory SIZE`` as a process, on each rung of the ladder: what its processes really take, and the tokens they give."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, save_model
from anabranch.nn import MoE, SelfAttention, kernels
from anabranch.routing import Router, TopK
from anabranch.serving import LLM, Sampling
from anabranch.serving.config import ServingConfig
from anabranch.serving.memory.plan import Ladder
from server_process import started

openai = pytest.importorskip("openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure by"),
    pytest.mark.skipif(kernels.load() is None, reason="no compiler"),
]

MIB = 1 << 20
RUNGS = {
    ("none", False): "as stored or in the type of the model, all in memory",
    ("int8", False): "in int8, all in memory",
    ("int4", False): "in int4, all in memory",
    ("int4", True): "in int4, experts on disk",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture of experts of 310 MB in bfloat16."""
    router = Router.Config(select=TopK.Config(top_k=4))
    config = Decoder.Config(
        vocab_size=257,
        dim=512,
        num_layers=4,
        attention=SelfAttention.Config(num_heads=8, num_kv_heads=4),
        feed_forward=MoE.Config(num_experts=48, hidden_dim=512, router=router),
        max_positions=2048,
        init_std=0.2,
    )
    path = tmp_path_factory.mktemp("models") / "mixture"
    save_model(path, config.build(seed=0).bfloat16(), ByteTokenizer())
    return str(path)


@pytest.fixture(scope="module")
def tightest(folder):
    """The least memory of each rung, to 4 MiB."""
    ladder = Ladder(ServingConfig(model=folder, dtype="bfloat16"))
    most, found = ladder.plan(1 << 40).total, {}
    for memory in range(most + 4 * MIB, 0, -4 * MIB):
        plan = ladder.plan(memory)
        if not plan.fits:
            return found
        found[plan.config.quantize, plan.config.expert_budget is not None] = memory
    raise AssertionError("something always takes memory")


@pytest.fixture(scope="module")
def greedy(folder):
    """Tokens of a prompt by the bits of the weights, all of which are in memory."""
    made: dict[str, str] = {}

    def of(bits):
        if bits not in made:
            llm = LLM(folder, quantize=bits, dtype="bfloat16", kv_memory="64MiB")
            made[bits] = llm.generate(["hello"], Sampling(max_tokens=48, temperature=0, ignore_eos=True))[0].text
            llm.close()
        return made[bits]

    return of


def peaks(process):
    """The most memory that a process and all it has started have each had at a time."""
    found, left = {}, [process]
    while left:
        here = Path(f"/proc/{left.pop()}")
        found[here.name] = 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", (here / "status").read_text(), re.MULTILINE)[1])
        left += [child for task in (here / "task").iterdir() for child in (task / "children").read_text().split()]
    return found


def load(client, model):
    """As many requests as a step takes, long enough to fill the cache; and a prompt that is scored."""
    letters = random.Random(0)
    prompts = ["".join(letters.choices("abcdefgh ijklmnop", k=1500)) for _ in range(17)]

    def ask(prompt):
        return client.completions.create(
            model=model, prompt=prompt, max_tokens=24, temperature=0.9, top_p=0.9, logprobs=5
        )

    shape = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "shape", "schema": shape}}

    def ask_in_form(prompt):
        # What is constrained is tried out by helpers.
        return client.completions.create(
            model=model, prompt=prompt, max_tokens=24, extra_body={"response_format": form}
        )

    with ThreadPoolExecutor(16) as threads:
        assert all(answer.choices[0].text.startswith("{") for answer in threads.map(ask_in_form, prompts[:16]))
        assert all(answer.usage.prompt_tokens == 1500 for answer in threads.map(ask, prompts[:16]))
    scored = client.completions.create(model=model, prompt=prompts[16], max_tokens=0, echo=True, logprobs=1)
    assert len(scored.choices[0].logprobs.token_logprobs) == 1500


@pytest.mark.parametrize("rung", RUNGS)
def test_a_server_stays_within_its_memory_on_each_rung(rung, folder, tightest, greedy):
    memory = tightest[rung]
    words = ("serve", folder, "--memory", str(memory), "--set", "engine.dtype=bfloat16")
    with started(*words) as server:
        assert f"weights {RUNGS[rung]}\n" in server.log.read_text()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=250)
        with client:
            model = client.models.list().data[0].id
            answer = client.completions.create(
                model=model, prompt="hello", max_tokens=48, temperature=0, extra_body={"ignore_eos": True}
            )
            load(client, model)
        found = peaks(server.process.pid)
    # The two and at least one helper.
    assert len(found) >= 3
    assert sum(found.values()) <= memory, found
    # And not because all is thought to take twice what it does.
    assert sum(found.values()) > memory - 256 * MIB, found
    assert answer.choices[0].text == greedy(rung[0])


def test_the_measured_program_is_that_of_the_processes(folder):
    plan = Ladder(ServingConfig(model=folder, dtype="bfloat16")).plan(1 << 40)
    assert 300 * MIB < plan.program < 1500 * MIB
    alone = Ladder(ServingConfig(model=folder, dtype="bfloat16", process=False)).plan(1 << 40)
    assert 0.4 * plan.program < alone.program < 0.6 * plan.program
