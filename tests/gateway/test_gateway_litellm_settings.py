"""Moving in from LiteLLM: the order of fallbacks, how long calls may take, what models may be asked, and what is sent with each call."""

import functools

import pytest

from anabranch.config import to_dict
from anabranch.errors import ConfigError
from gateway_litellm import clear, moved


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    clear(monkeypatch)


@pytest.fixture
def move(tmp_path):
    return functools.partial(moved, tmp_path)


THREE = tuple({"model": f"openai/{name}"} for name in "abc")


# Fallbacks


@pytest.mark.parametrize(
    ("sections", "chains"),
    [
        ({"litellm_settings": {"default_fallbacks": ["m2"]}}, {"m0": "m2", "m1": "m2"}),
        # Whichever is written first, a model's own chain is all that is asked after it.
        (
            {"litellm_settings": {"default_fallbacks": ["m2"], "fallbacks": [{"m0": ["m1"]}]}},
            {"m0": "m1", "m1": "m2"},
        ),
        (
            {"litellm_settings": {"fallbacks": [{"m0": ["m1"]}], "default_fallbacks": ["m2"]}},
            {"m0": "m1", "m1": "m2"},
        ),
        ({"litellm_settings": {"fallbacks": [{"m0": []}], "default_fallbacks": ["m2"]}}, {"m1": "m2"}),
        (
            {"router_settings": {"fallbacks": [{"*": ["m2", "m1"]}, {"m1": ["m0"]}]}},
            {"m0": "m2 m1", "m1": "m0", "m2": "m1"},
        ),
        (
            {"router_settings": {"fallbacks": [{"*": ["m1"]}]}, "litellm_settings": {"default_fallbacks": ["m2"]}},
            {"m0": "m2", "m1": "m2"},
        ),
        # router_settings replaces what litellm_settings says of the same.
        (
            {
                "router_settings": {"fallbacks": [{"m0": ["m1"]}]},
                "litellm_settings": {"fallbacks": [{"m0": ["m2"]}, {"m1": ["m2"]}]},
            },
            {"m0": "m1"},
        ),
        ({"router_settings": {"fallbacks": []}, "litellm_settings": {"fallbacks": [{"m0": ["m2"]}]}}, {"m0": "m2"}),
        (
            {"router_settings": {"default_fallbacks": ["m1"]}, "litellm_settings": {"default_fallbacks": ["m2"]}},
            {"m0": "m1", "m2": "m1"},
        ),
        # Of one model the first chain counts.
        ({"router_settings": {"fallbacks": [{"m0": ["m1"]}, {"m0": ["m2"]}]}}, {"m0": "m1"}),
        ({"router_settings": {"fallbacks": [{"m0": ["m1", "m0", "m1", "m2"]}]}}, {"m0": "m1 m2"}),
        # By another name.
        (
            {
                "router_settings": {
                    "model_group_alias": {"four": "m0", "five": {"model": "m2"}},
                    "fallbacks": [{"four": ["five"]}],
                }
            },
            {"m0": "m2"},
        ),
        (
            {"router_settings": {"model_group_alias": {"four": "m0"}, "fallbacks": [{"four": ["m1"]}, {"m0": ["m2"]}]}},
            {"m0": "m2"},
        ),
        ({"router_settings": {"fallbacks": [{"m0": [{"model": "m1"}, "m2"]}]}}, {"m0": "m1 m2"}),
    ],
)
def test_fallbacks_are_in_the_order_they_have_there(move, sections, chains):
    done = move(*THREE, **sections)
    assert {name: " ".join(others) for name, others in done.config.fallbacks.items()} == chains
    assert done.left == ()


@pytest.mark.parametrize("theirs", ["context_window_fallbacks", "content_policy_fallbacks"])
def test_those_of_prompts_and_filters_likewise(move, theirs):
    ours = {"context_window_fallbacks": "context_fallbacks", "content_policy_fallbacks": "filter_fallbacks"}[theirs]
    sections = {"router_settings": {theirs: [{"m0": ["m1"]}]}, "litellm_settings": {theirs: [{"m0": ["m2"]}]}}
    done = move(*THREE, **sections)
    assert getattr(done.config, ours) == {"m0": ("m1",)}
    assert any(
        f"litellm_settings.{theirs} is not looked at, since router_settings.{theirs} is given" in line
        for line in done.notes
    )


@pytest.mark.parametrize(
    ("router", "why"),
    [
        (
            {"fallbacks": [{"m0": [{"model": "m1", "temperature": 0}]}]},
            "fallbacks.0.m0.0 sets temperature of the request",
        ),
        ({"fallbacks": [{"m0": [{"messages": []}]}]}, "fallbacks.0.m0.0 is None, which names no model"),
        ({"fallbacks": [{"m0": [7]}]}, "fallbacks.0.m0.0 is 7, which names no model"),
        ({"fallbacks": [{"m0": "m1"}]}, "fallbacks.0.m0 is no list"),
        ({"fallbacks": '[{"m0": ["m1"]}]'}, "fallbacks is no list"),
        ({"fallbacks": ["m1"]}, "fallbacks.0 is no table"),
        ({"default_fallbacks": "m1"}, "default_fallbacks is no list"),
        ({"default_fallbacks": ["gone"]}, "default_fallbacks names 'gone', which is no model that was taken over"),
        ({"fallbacks": [{"gone": ["m1"]}]}, "fallbacks.0.gone names 'gone', which is no model that was taken over"),
    ],
)
def test_a_fallback_that_is_not_taken_over_is_told(move, router, why):
    assert any(why in line for line in move(*THREE, router_settings=router).left)


# Timeouts


@pytest.mark.parametrize(
    ("sections", "entry", "times"),
    [
        # timeout_s, first_token_timeout_s, deadline_s: of three attempts by default, and never less than the usual.
        ({"litellm_settings": {"request_timeout": 60}}, {}, (60, None, 180)),
        ({"litellm_settings": {"request_timeout": 6}}, {}, (6, None, 120)),
        ({"router_settings": {"timeout": 60, "num_retries": 0}}, {}, (60, None, 120)),
        ({"router_settings": {"timeout": 600, "num_retries": 0}}, {}, (600, None, 600)),
        ({"router_settings": {"timeout": 600, "num_retries": 1}}, {}, (600, None, 1200)),
        (
            {"router_settings": {"timeout": 60, "num_retries": 0, "fallbacks": [{"m0": ["m1", "m2"]}]}},
            {},
            (60, None, 180),
        ),
        (
            {
                "router_settings": {
                    "timeout": 60,
                    "num_retries": 0,
                    "context_window_fallbacks": [{"m0": ["m1"]}],
                    "fallbacks": [{"m0": ["m2"]}],
                }
            },
            {},
            (60, None, 180),
        ),
        # What an entry says comes first, and of sections that which does there.
        ({"router_settings": {"timeout": 60}}, {"timeout": 100}, (100, None, 300)),
        ({"router_settings": {"timeout": 60}}, {"request_timeout": 100}, (100, None, 300)),
        ({"router_settings": {"timeout": 60}, "litellm_settings": {"request_timeout": 90}}, {}, (90, None, 270)),
        ({"router_settings": {"timeout": 60, "stream_timeout": 9}}, {}, (60, 9, 180)),
        ({"router_settings": {"timeout": 60, "stream_timeout": 9}}, {"stream_timeout": 7}, (60, 7, 180)),
        # A call of one entry may take long, and that is not cut short either.
        ({}, {"timeout": 600}, (600, None, 1800)),
        ({}, {}, (None, None, 120)),
    ],
)
def test_a_timeout_is_of_each_attempt_and_a_request_has_time_for_all(move, sections, entry, times):
    done = move(THREE[0] | entry, *THREE[1:], **sections)
    one = done.config.models[0].deployments[0]
    assert (one.timeout_s, one.first_token_timeout_s, done.config.deadline_s) == times
    assert done.left == ()
    # Where nothing is said LiteLLM waits for ever, as good as.
    assert any("deadline_s = 120" in line for line in done.notes) == (times[0] is None)


def test_a_timeout_of_the_environment(move, monkeypatch):
    monkeypatch.setenv("REQUEST_TIMEOUT", "70")
    done = move(*THREE)
    assert done.config.models[0].deployments[0].timeout_s == 70
    assert any("is that of REQUEST_TIMEOUT now" in line for line in done.notes)
    done = move(*THREE, litellm_settings={"request_timeout": 60})
    assert done.config.models[0].deployments[0].timeout_s == 60


def test_a_wait_for_a_token_that_is_cut_short_is_told(move):
    done = move(*THREE, router_settings={"timeout": 30, "stream_timeout": 60})
    assert any("router_settings.stream_timeout is longer than timeout" in line for line in done.notes)


def test_retries_beyond_what_there_can_be_are_told(move):
    done = move(*THREE, router_settings={"num_retries": 30})
    assert done.config.retries.attempts == 20
    assert "num_retries is 30; here it is 19" in done.left[0]


# What models may be asked


@pytest.mark.parametrize(
    "mode",
    [
        "chat",
        "completion",
        "embedding",
        "responses",
        "image_generation",
        "image_edit",
        "audio_speech",
        "audio_transcription",
        "moderation",
        "rerank",
    ],
)
def test_a_mode_that_the_gateway_serves_is_kept(move, mode):
    done = move({"model": "openai/x"}, info={"mode": mode})
    assert [model.name for model in done.config.models] == ["m0"]
    assert not any("does not serve" in line for line in done.left)


@pytest.mark.parametrize(
    ("model", "mode", "why"),
    [
        ("openai/sora-2", "video_generation", "which the gateway does not serve"),
        ("openai/x", "realtime", "which the gateway does not serve"),
        ("openai/x", ["chat"], "which the gateway does not serve"),
        ("gemini/imagen", "image_generation", "which a provider of kind gemini does not serve"),
        ("anthropic/x", "rerank", "which a provider of kind anthropic does not serve"),
    ],
)
def test_a_mode_that_is_not_served_is_told(move, model, mode, why):
    with pytest.raises(ConfigError, match=f"model_list.0.model_info.mode is .*, {why}"):
        move({"model": model}, info={"mode": mode})


# What is sent with each call


@pytest.mark.parametrize("field", ["extra_headers", "headers"])
@pytest.mark.parametrize(
    "entry",
    [
        {"model": "openai/x"},
        {"model": "anthropic/x"},
        {"model": "azure/x", "api_base": "https://a.b"},
        {"model": "bedrock/x", "aws_region_name": "eu-west-3"},
        {"model": "gemini/x"},
        {"model": "ollama/x"},
        {"model": "openrouter/x"},
        {"model": "vertex_ai/gemini-x", "vertex_project": "acme-1"},
    ],
)
def test_headers_of_an_entry_are_headers_here(move, entry, field):
    done = move(entry | {field: {"HTTP-Referer": "https://a.b"}})
    assert done.config.models[0].deployments[0].provider.headers == {"HTTP-Referer": "https://a.b"}
    assert done.left == ()


def test_an_organization_is_a_header(move):
    found = move({"model": "openai/x", "organization": "org-1"}).config.models[0].deployments[0].provider
    assert found.headers == {"OpenAI-Organization": "org-1"}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("Authorization", "Bearer hush", "looks like a secret (not shown)"),
        ("cf-aig-authorization", "hush", "looks like a secret (not shown)"),
        ("X-Subscription-Key", "hush", "looks like a secret (not shown)"),
        ("X-A", "os.environ/hush", "looks like a secret (not shown)"),
        ("X-A", 7, "is 7, which is no text"),
        ("X A", "a", "cannot be taken over"),
        ("Host", "a", "cannot be taken over"),
    ],
)
def test_a_header_that_is_not_taken_over_is_told(move, name, value, why):
    done = move({"model": "openai/x", "extra_headers": {name: value}})
    assert done.config.models[0].deployments[0].provider.headers == {}
    (line,) = done.left
    assert why in line
    assert "hush" not in f"{line}{to_dict(done.config)}"


# Where answers end


@pytest.mark.parametrize(
    ("entry", "info", "is_told"),
    [
        ({}, {}, True),
        ({}, {"mode": "chat"}, True),
        ({"max_tokens": 100}, {}, False),
        ({}, {"max_output_tokens": 100}, False),
        ({}, {"mode": "embedding"}, False),
        ({}, {"mode": "audio_speech"}, False),
    ],
)
def test_where_answers_end_is_told_once(move, entry, info, is_told):
    """LiteLLM sends no limit where a request names none; the gateway reserves for one, and sends it."""
    done = move(*(one | entry for one in THREE), info=info)
    lines = [line for line in done.notes if "limits.max_tokens" in line]
    assert len(lines) == is_told
    assert all("m0, m1, m2" in line and "4,096" in line for line in lines)
