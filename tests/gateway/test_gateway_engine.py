"""Our own engine behind our own gateway: a small model on this machine, a scripted strong one, streams, and what if the engine dies."""

import os
import signal

import openai
import pytest

from gateway_process import served
from serving_models import serve_process

CONFIG = """
require_key = false
store = "{store}"
deadline_s = 20
[cache]
exact = false
[fallbacks]
local = ["strong"]
[strategies.tools]
kind = "rules"
otherwise = "small"
rules = [{{ name = "tools", has_tools = true, size = "large" }}]
[[models]]
name = "local"
max_tokens = 64
price = {{ input_usd = 0, output_usd = 0 }}
deployments = [{{ provider = {{ kind = "engine", model = "small-moe", base_url = "{url}/v1" }} }}]
[[models]]
name = "strong"
max_tokens = 64
price = {{ input_usd = 5, output_usd = 20 }}
deployments = [{{ provider = {{ kind = "mock", tokens = 6 }} }}]
"""
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ASKED = [{"role": "user", "content": "where does this river go?"}]


@pytest.mark.slow
def test_a_local_engine_a_strong_model_and_what_if_the_engine_dies(tmp_path):
    path = tmp_path / "gateway.toml"
    with serve_process("--set", "engine.process=false") as engine:
        path.write_text(CONFIG.format(store=tmp_path / "g.db", url=engine.url))
        with (
            served("--config", str(path)) as gateway,
            openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
        ):

            def ask(**fields):
                raw = client.chat.completions.with_raw_response.create(
                    **{"model": "auto/tools", "messages": ASKED, "max_tokens": 12, "temperature": 0, **fields}
                )
                return raw.headers["x-route-model"], raw.parse()

            model, answer = ask()
            assert model == "local"
            assert answer.usage.completion_tokens <= 12
            stream = client.chat.completions.create(
                model="auto/tools", messages=ASKED, max_tokens=12, temperature=0, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            assert text == answer.choices[0].message.content
            assert ask(tools=[TOOL])[0] == "strong"
            os.kill(engine.process.pid, signal.SIGKILL)
            model, answer = ask()
            assert model == "strong"  # the fallback, within the same request
            assert answer.choices[0].finish_reason == "stop"
