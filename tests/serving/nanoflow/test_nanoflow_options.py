"""NanoFlow's choices for an engine: what they change, and that tokens stay as they are."""

import pytest

from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Sampling
from anabranch.serving.engine.llm import LLM
from anabranch.serving.nanoflow.hardware import Hardware
from anabranch.serving.nanoflow.options import NanoFlowConfig

FAST = Hardware(name="fast", memory_bytes=1e9, memory_bandwidth=1e14, compute=1e12)  # T_R far below 1
SLOW = Hardware(name="slow", memory_bytes=1e9, memory_bandwidth=1e6, compute=1e12)
SERVING = ServingConfig(num_blocks=24, block_tokens=4, max_seqs=4, max_positions=64)


@pytest.fixture(scope="module")
def model():
    return Decoder.Config(dim=32, num_layers=2, vocab_size=61).build(seed=1)


def tokens_of(model, config, hardware=None, serving=SERVING):
    serving, arguments = config.engine(model, serving, hardware)
    options = {
        name: getattr(serving, name)
        for name in ("num_blocks", "block_tokens", "max_seqs", "max_positions", "scheduling", "max_batched_tokens")
    }
    llm = LLM(model, **options, **arguments)
    prompts = [[(7 * number + at) % 61 for at in range(30)] for number in range(6)] * 2
    answers = llm.generate(prompts, Sampling(max_tokens=8, temperature=0))
    return [answer.tokens for answer in answers], llm, arguments


def test_every_choice_gives_the_same_tokens(model, tmp_path):
    expected, llm, arguments = tokens_of(model, NanoFlowConfig(overlap="off"))
    assert arguments == {}
    assert not llm.engine.is_async
    path = tmp_path / "pipeline.json"
    nano = NanoFlowConfig(
        overlap="nano", dense_batch=256, search_budget_s=1.0, pipeline=str(path), host_kv="8KiB", disk_kv="1MiB", folder=str(tmp_path),
        is_eager=True, admit_by_peak=True,
    )  # fmt: skip
    streams, llm, arguments = tokens_of(model, nano, FAST)
    assert streams == expected
    assert llm.engine.is_async
    assert set(arguments) == {"memory", "pool", "tier", "make_runner"}
    assert arguments["tier"].saved > 0
    assert arguments["pool"].spilled > 0
    assert llm.engine.scheduler.config.max_batched_tokens == 256
    before = path.read_text()
    assert tokens_of(model, nano, FAST)[0] == expected
    assert path.read_text() == before


@pytest.mark.parametrize(("hardware", "batch", "why"), [(SLOW, 256, "T_R is"), (FAST, 128, "below two tiles")])
def test_nano_batches_that_will_not_pay_are_warned_of(model, hardware, batch, why, caplog):
    serving, arguments = NanoFlowConfig(overlap="nano", dense_batch=batch).engine(model, SERVING, hardware)
    assert why in caplog.text
    assert "make_runner" not in arguments
    assert serving.scheduling == "async"


def test_sizes_are_read_with_units():
    with pytest.raises(ConfigError, match="host_kv is 'much'"):
        NanoFlowConfig(host_kv="much")
