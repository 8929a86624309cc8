"""Moving in from LiteLLM: every setting that LiteLLM documents, and what comes of it: taken, told, or so here by itself; none is dropped.

The names are those of LiteLLM's list of settings and of the classes by which it reads them.
"""

import functools
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.gateway.config import import_litellm
from gateway_litellm import clear, fields, moved

# Two of one model and a third, so that every setting can make a difference.
ENTRIES = ({"model": "openai/a"}, {"model": "openai/b"}, {"model": "azure/c", "api_base": "https://a.b"})
# Section, name, a value; and what it makes: a field of ours, by its path, and its value.
TAKEN = [
    ("router_settings", "routing_strategy", "least-busy", "balance", "least_in_flight"),
    ("router_settings", "num_retries", 4, "retries.attempts", 5),
    ("router_settings", "timeout", 700, "models.0.deployments.0.timeout_s", 700.0),
    ("router_settings", "timeout", 700, "deadline_s", 2100.0),
    ("router_settings", "stream_timeout", 7, "models.2.deployments.0.first_token_timeout_s", 7.0),
    ("router_settings", "allowed_fails", 3, "breaker.failures", 4),
    ("router_settings", "cooldown_time", 9, "breaker.open_s", 9.0),
    ("router_settings", "default_max_parallel_requests", 9, "models.0.deployments.0.max_in_flight", 9),
    ("router_settings", "fallbacks", [{"m0": ["m1"]}], "fallbacks", {"m0": ["m1"]}),
    ("router_settings", "default_fallbacks", ["m1"], "fallbacks.m2", ["m1"]),
    ("router_settings", "context_window_fallbacks", [{"m0": ["m1"]}], "context_fallbacks", {"m0": ["m1"]}),
    ("router_settings", "content_policy_fallbacks", [{"m0": ["m1"]}], "filter_fallbacks", {"m0": ["m1"]}),
    ("router_settings", "model_group_alias", {"a": "m0"}, "models.0.aliases", ["a"]),
    ("router_settings", "redis_url", "redis://cache:7/2", "shared.url", "redis://cache:7/2"),
    ("router_settings", "redis_host", "cache", "shared.url", "redis://cache:6379/0"),
    ("litellm_settings", "request_timeout", 700, "models.0.deployments.0.timeout_s", 700.0),
    ("litellm_settings", "num_retries", 4, "retries.attempts", 5),
    ("litellm_settings", "allowed_fails", 3, "breaker.failures", 4),
    ("litellm_settings", "fallbacks", [{"m0": ["m1"]}], "fallbacks", {"m0": ["m1"]}),
    ("litellm_settings", "default_fallbacks", ["m1"], "fallbacks.m2", ["m1"]),
    ("litellm_settings", "context_window_fallbacks", [{"m0": ["m1"]}], "context_fallbacks", {"m0": ["m1"]}),
    ("litellm_settings", "content_policy_fallbacks", [{"m0": ["m1"]}], "filter_fallbacks", {"m0": ["m1"]}),
    ("general_settings", "global_max_parallel_requests", 9, "limits.in_flight", 9),
    ("general_settings", "max_request_size_mb", 2, "limits.body_bytes", 2 << 20),
    ("general_settings", "store_prompts_in_spend_logs", True, "log.prompts", True),
    ("general_settings", "maximum_spend_logs_retention_period", "30d", "log.keep_days", 30),
    ("general_settings", "enable_jwt_auth", True, "require_key", True),
    ("general_settings", "key_management_system", "aws_kms", "require_key", True),
    ("general_settings", "allowed_ips", ["10.0.0.1"], "require_key", True),
    ("litellm_params", "api_key", "os.environ/K", "models.0.deployments.0.provider.key_env", "K"),
    ("litellm_params", "api_base", "http://a/v1", "models.0.deployments.0.provider.base_url", "http://a/v1"),
    ("litellm_params", "base_url", "http://a/v1", "models.0.deployments.0.provider.base_url", "http://a/v1"),
    ("litellm_params", "custom_llm_provider", "groq", "models.0.deployments.0.provider.key_env", "GROQ_API_KEY"),
    ("litellm_params", "organization", "o", "models.0.deployments.0.provider.headers", {"OpenAI-Organization": "o"}),
    ("litellm_params", "extra_headers", {"X-A": "b"}, "models.0.deployments.0.provider.headers", {"X-A": "b"}),
    ("litellm_params", "headers", {"X-A": "b"}, "models.0.deployments.0.provider.headers", {"X-A": "b"}),
    ("litellm_params", "rpm", 9, "models.0.deployments.0.rpm", 9),
    ("litellm_params", "tpm", 9, "models.0.deployments.0.tpm", 9),
    ("litellm_params", "weight", 9, "models.0.deployments.0.weight", 9.0),
    ("litellm_params", "max_parallel_requests", 9, "models.0.deployments.0.max_in_flight", 9),
    ("litellm_params", "timeout", 9, "models.0.deployments.0.timeout_s", 9.0),
    ("litellm_params", "request_timeout", 9, "models.0.deployments.0.timeout_s", 9.0),
    ("litellm_params", "stream_timeout", 9, "models.0.deployments.0.first_token_timeout_s", 9.0),
    ("litellm_params", "max_tokens", 9, "models.0.max_tokens", 9),
    ("litellm_params", "base_model", "openai/gpt-4o", "models.0.deployments.0.price.input", 2_500_000_000),
    ("model_info", "base_model", "openai/gpt-4o", "models.0.deployments.0.price.input", 2_500_000_000),
    ("model_info", "id", "east", "models.0.deployments.0.name", "east"),
    ("model_info", "max_tokens", 9, "models.0.max_tokens", 9),
    ("model_info", "max_output_tokens", 9, "models.0.max_tokens", 9),
    ("model_info", "max_input_tokens", 9, "models.0.context", 9),
]
# What changes nothing, since it is so here by itself, or says to clients what a model can.
BY_ITSELF = [
    ("router_settings", "enable_pre_call_checks", True),
    ("litellm_settings", "callbacks", ["prometheus"]),
    ("litellm_settings", "success_callback", ["prometheus"]),
    ("litellm_settings", "failure_callback", ["prometheus"]),
    ("litellm_settings", "failure_callback", []),
    ("model_info", "mode", "chat"),
    ("model_info", "mode", "image_generation"),
    ("model_info", "supports_vision", True),
    ("model_info", "supports_function_calling", True),
]
# What has no counterpart, or another that is set elsewhere.
TOLD = {
    "litellm_settings": """success_callback failure_callback callbacks service_callbacks turn_off_message_logging modify_params
        enable_preview_features LITELLM_DISABLE_STOP_SEQUENCE_LIMIT redact_user_api_key_info mcp_aliases langfuse_default_tags
        set_verbose json_logs force_ipv4 cache cache_params disable_end_user_cost_tracking key_generation_settings
        disable_end_user_cost_tracking_prometheus_only disable_add_transform_inline_image_block disable_hf_tokenizer_download
        use_chat_completions_url_for_anthropic_messages enable_json_schema_validation enable_key_alias_format_validation
        disable_copilot_system_to_assistant drop_params max_budget budget_duration default_internal_user_params ssl_verify telemetry
        api_base api_key openai_key vertex_project vertex_location default_team_settings upperbound_key_generate_params""",
    "router_settings": """enable_pre_call_check enable_tag_filtering tag_filtering_match_any disable_cooldowns retry_policy
        allowed_fails_policy default_priority polling_interval max_fallbacks default_litellm_params debug_level client_ttl cache_kwargs
        routing_strategy_args caching_groups alerting_config assistants_config set_verbose retry_after provider_budget_config
        model_group_retry_policy cache_responses router_general_settings optional_pre_call_checks deployment_affinity_ttl_seconds
        ignore_invalid_deployments search_tools guardrail_list redis_password redis_port redis_db max_retries weights
        routing_groups model_group_affinity_config enable_weighted_failover fallback_on_unsupported_params""",
    "general_settings": """completion_model disable_spend_logs disable_spend_updates disable_master_key_return
        disable_retry_on_max_parallel_request_limit_error disable_reset_budget disable_adding_master_key_hash_to_db
        disable_responses_id_security enable_jwt_auth enforce_user_param reject_clientside_metadata_tags allowed_routes
        key_management_system master_key database_url database_connection_pool_limit database_connection_timeout
        allow_requests_on_db_unavailable custom_auth max_parallel_requests infer_model_from_keys background_health_checks
        health_check_interval alerting alerting_threshold use_client_credentials_pass_through_routes health_check_details public_routes
        alert_types enforced_params enable_oauth2_auth use_x_forwarded_for service_account_settings image_generation_model
        store_model_in_db supported_db_objects user_mcp_management_mode max_response_size_mb proxy_budget_rescheduler_min_time
        proxy_budget_rescheduler_max_time proxy_batch_write_at proxy_batch_polling_interval alerting_args custom_key_generate
        allowed_ips embedding_model default_team_disabled alert_to_webhook_url key_management_settings allow_user_auth
        user_api_key_cache_ttl disable_prisma_schema_update litellm_key_header_name moderation_model custom_sso
        allow_client_side_credentials admin_only_routes use_azure_key_vault use_google_kms spend_report_frequency ui_access_mode
        litellm_jwtauth litellm_license oauth2_config_mappings pass_through_endpoints enable_oauth2_proxy_auth forward_openai_org_id
        forward_client_headers_to_llm_api maximum_spend_logs_retention_interval""",
    "litellm_params": """max_retries num_retries drop_params additional_drop_params configurable_clientside_auth_params
        litellm_credential_name litellm_trace_id max_file_size_mb max_budget budget_duration use_in_pass_through use_litellm_proxy
        merge_reasoning_content_in_choices mock_response tags order cooldown_time region_name api_version azure_ad_token tenant_id
        client_id client_secret azure_scope vertex_project vertex_location vertex_credentials aws_access_key_id aws_region_name
        aws_role_name aws_session_name watsonx_region_name temperature top_p seed stop reasoning_effort thinking response_format
        extra_body extra_query cache caching input_cost_per_second output_cost_per_second auto_router_config timeout_by_service_tier""",
    "model_info": """db_model tier team_id team_public_model_name access_groups access_windows blocked input_cost_per_second
        input_cost_per_token_above_200k_tokens output_cost_per_image input_cost_per_query output_vector_size litellm_provider rpm tpm""",
    "": "guardrails credential_list include callback_settings mcp_servers prompts vector_store_registry search_tools files_settings",
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    clear(monkeypatch)


@pytest.fixture
def move(tmp_path):
    return functools.partial(moved, tmp_path)


def made(move, section, name, value):
    """What a file makes in which the setting is all there is."""
    if section == "litellm_params":
        return move(ENTRIES[0] | {name: value}, *ENTRIES[1:])
    if section == "model_info":
        return move(ENTRIES[0], info={name: value})
    return move(*ENTRIES, **({section: {name: value}} if section else {name: value}))


def at(config, path):
    for name in path.split("."):
        config = config[int(name)] if name.isdigit() else config[name]
    return config


@pytest.mark.parametrize(("section", "name", "value", "path", "ours"), TAKEN)
def test_what_is_taken(move, section, name, value, path, ours):
    done = made(move, section, name, value)
    found = at(to_dict(done.config), path)
    assert (list(found) if isinstance(found, tuple) else found) == ours
    if ours is not True or path != "require_key":
        assert done.left == ()


@pytest.mark.parametrize(("section", "name", "value"), BY_ITSELF)
def test_what_is_so_by_itself(move, section, name, value):
    assert made(move, section, name, value).left == ()


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section, names in TOLD.items() for name in names.split()]
)
@pytest.mark.parametrize("value", [True, "hush", 7])
def test_what_is_told(move, tmp_path, section, name, value):
    done = made(move, section, name, value)
    where = {"litellm_params": "model_list.0.litellm_params.", "model_info": "model_list.0.model_info."}
    field = f"{where.get(section, f'{section}.' if section else '')}{name}"
    assert field in fields(done.left, tmp_path / "config.yaml")


def test_each_setting_is_in_the_table_once():
    """One that is taken may be told too, for what of it is not."""
    for section, names in TOLD.items():
        found = names.split()
        assert len(found) == len(set(found)), section


# Whatever a file says.

NAMES = sorted(
    {(section, name) for section, name, *_ in TAKEN}
    | {(section, name) for section, name, *_ in BY_ITSELF}
    | {(section, name) for section, names in TOLD.items() for name in names.split()}
    | {("router_settings", name) for name in ("anything", "else")}
)
WORDS = st.sampled_from(["m0", "m1", "*", "gone", "a", "os.environ/OWN", "7", "", "chat", "http://a.b"])
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 10**7) | st.floats() | WORDS | st.text(string.printable, max_size=5)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2), max_leaves=5
)


def said(path):
    """What an import of a file says: what was left out, or why nothing was taken."""
    try:
        return import_litellm(path).left
    except ConfigError as error:
        return (str(error),)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=6))
def test_no_value_of_any_setting_is_dropped_or_breaks_the_import(tmp_path_factory, chosen):
    """Each is one of those that are taken, or is told; and what is told names the file."""
    base = {"model_list": [{"model_name": f"m{at}", "litellm_params": dict(entry)} for at, entry in enumerate(ENTRIES)]}
    path = tmp_path_factory.mktemp("any") / "config.yaml"
    for (section, name), value in chosen.items():
        if section in ("litellm_params", "model_info"):
            base["model_list"][0].setdefault(section, {})[name] = value
        elif section:
            base.setdefault(section, {})[name] = value
        else:
            base[name] = value
    path.write_text(yaml.safe_dump(base))
    left = said(path)
    assert all(line.startswith(str(path)) for line in left)
    known = {(section, name) for section, name, *_ in (*TAKEN, *BY_ITSELF)}
    for (section, name), value in chosen.items():
        if value is not None and (section, name) not in known and section.endswith("_settings"):
            assert any(f"{section}.{name} " in line for line in left), (section, name, value)
