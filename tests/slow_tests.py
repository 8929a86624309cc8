"""Which tests ``make test`` leaves to ``make test-all`` for the time they take: the list beside this file, and how it is made.

``make test-all ARGS="--record-durations FILE"``, then ``python tests/slow_tests.py FILE`` writes the list anew. A test keeps as many of its
variants, the first ones, as run in `EACH` seconds, and at least one; one whose first variant alone takes longer than `ALONE` is left out,
unless it is one of `KEPT`, or the quickest of a file of which nothing else would be left, and takes no longer than `LAST`. A mark ``slow``
beside a test stays the way to say that it is slow by its nature. Tests of docs and of frozen studies run whole in ``make check``.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")

# Seconds.
EACH, ALONE, LAST = 0.05, 0.3, 1.0

ALL = 1000
# A way through most front doors, and what would cost users most, whatever it takes: -> how many variants. Commands that take longer
# (`adapters fuse`, `cluster elastic`, ...) run in ``make test-all`` alone.
KEPT = {
    "tests/cli/test_adapt.py::test_adapters_are_weighed_by_rows": 1,
    "tests/cli/test_adapters.py::test_a_mixture_is_exported": 1,
    "tests/cli/test_adapters.py::test_a_model_is_measured_with_the_sum_of_two_adapters": 1,
    "tests/cli/test_adapters_report.py::test_a_page_for_each_kind": 1,
    "tests/cli/test_help.py::test_help_is_shown_whole": 1,
    "tests/cli/test_kept.py::test_every_option_that_names_a_place_is_gone_over": 1,
    "tests/cli/test_loading.py::test_an_adapter_is_served_on_the_base_that_it_learned_beside": 1,
    "tests/cli/test_rl_answers.py::test_a_model_learns_what_is_right": 1,
    "tests/cli/test_rl_own.py::test_from_questions_and_an_endpoint_to_a_router": 1,
    "tests/cli/test_train_routes.py::test_a_run_goes_on_to_the_bit": 1,
    "tests/gateway/test_fallbacks_served.py::test_what_is_the_request_s_own_is_asked_of_the_next_model_without_any_budget": 1,
    "tests/cli/test_cluster.py::test_a_plan_is_told_as_json_and_drawn": 1,
    "tests/cli/test_cluster_coordinate.py::test_it_says_where_it_is_keeps_strangers_out_and_is_stopped": 1,
    "tests/cli/test_cluster_master.py::test_peers_reduce_it_is_killed_started_again_and_stopped": 1,
    "tests/cli/test_fabric.py::test_as_a_program": 1,
    "tests/cli/test_gateway_referee.py::test_fit_then_eval_judges_on_what_was_held_out": 1,
    "tests/cli/test_gateway_referee.py::test_route_explains_one_query": 1,
    "tests/cli/test_graph.py::test_embed_trains_tests_and_draws": 1,
    "tests/cli/test_graph.py::test_index_and_search_find_what_the_library_finds": 1,
    "tests/cli/test_graph.py::test_elements_are_taken_out_brought_in_and_moved": 1,
    "tests/cli/test_graph.py::test_ppr_of_one_node_and_of_weighted_ones": 1,
    "tests/cli/test_graph.py::test_rank_counts_clicks": 1,
    "tests/cli/test_graph.py::test_walks_are_indexed_and_asked": 1,
    "tests/cli/test_graph_models.py::test_features_of_new_nodes": 1,
    "tests/cli/test_oracle.py::test_the_table_is_the_oracle_of_the_library_and_labels_are_its_routes": 1,
    "tests/cli/test_researcher.py::test_train_and_compare_read_it": 1,
    "tests/cli/test_gateway_store_cli.py::test_a_key_lives_and_ends": 1,
    "tests/cli/test_gateway_store_cli.py::test_budgets": 1,
    "tests/cli/test_gateway_store_cli.py::test_ledger_list_and_spend": 1,
    "tests/cli/test_end_to_end.py::test_resume_ends_where_an_uninterrupted_run_does": 1,
    "tests/cli/test_end_to_end.py::test_train_prints_one_json_object_and_makes_a_run": 1,
    "tests/cli/test_end_to_end.py::test_generate_gives_what_the_library_gives": 1,
    "tests/cli/test_end_to_end.py::test_convert_there_and_back_evaluates_the_same": 1,
    "tests/cli/test_end_to_end.py::test_eval_is_the_mean_over_consecutive_windows": 1,
    "tests/cli/test_end_to_end.py::test_a_report_is_a_page_its_trace_and_numbers": 1,
    "tests/cli/test_depth.py::test_from_text_to_a_report": 1,
    "tests/cli/test_heads.py::test_a_trained_model_goes_on_with_routed_heads": 1,
    "tests/cli/test_pvchat.py::test_from_drawings_to_an_answer": 1,
    "tests/gateway/test_gateway_learns.py::test_from_requests_and_feedback_to_a_router_that_serves": 1,
    "tests/gateway/test_invoice.py::test_two_thousand_requests_on_a_bad_day": 1,
    "tests/gateway/test_gateway_hostile.py::test_a_wrong_body_is_a_400": 1,
    "tests/gateway/test_gateway_bounds.py::test_what_goes_out_bounds_the_bill_by_what_was_reserved": 1,
    "tests/gateway/test_gateway_openai_client.py::test_responses_with_tools": 1,
    "tests/gateway/test_gateway_serve.py::test_it_starts_small_quick_and_without_torch": 1,
    "tests/gateway/test_gateway_life.py::test_spent_and_reserved_stay_within_the_limit": 1,
    "tests/gateway/test_gateway_openai_client.py::test_tools": 1,
    "tests/gateway/test_gateway_redact.py::test_no_secret_is_shown_wherever_it_is": 1,
    "tests/gateway/test_gateway_security.py::test_clients_are_not_told_where_upstreams_are": 1,
    "tests/gateway/test_gateway_store_outages.py::test_the_gateway_says_503_and_is_back": 1,
    "tests/graph/test_array_file.py::test_every_truncation_and_every_longer_file_is_detected": 1,
    "tests/graph/test_live_log.py::test_a_log_ends_anywhere_in_its_last_frame_and_nothing_before_is_lost": 1,
    "tests/serving/http/test_serving_http_engine.py::test_the_official_client_and_tools": 1,
    "tests/serving/http/test_serving_http_page.py::test_a_token_tells_its_experts": 1,
    "tests/train/test_task_contract.py::test_the_language_model_keeps_it": 1,
    "tests/train/test_trainer.py::test_a_second_signal_does_not_wait": 1,
    "tests/train/test_trainer.py::test_a_signal_saves_and_stops": 1,
    # What all parts of a kind keep, and what a change anywhere may break.
    "tests/adapters/adapt/test_choices.py::test_the_contract_of_tasks": 1,
    "tests/gateway/test_cloud_contract.py::test_contract": 1,
    "tests/gateway/test_local.py::test_it_keeps_the_contract_of_providers": 1,
    "tests/rl/test_ppo.py::test_contract": 1,
    "tests/rl/tokens/test_token_task.py::test_the_contract_of_tasks": 1,
    "tests/routers/test_strategy_contract.py::test_predictor": 1,
    "tests/studies/test_contract.py::test_what_reads_is_found_whichever_way_it_reads": 1,
    "tests/test_assertions.py::test_every_test_checks_something": 1,
    "tests/test_benchmarks.py::test_versions_of_peers_are_kept": 1,
    "tests/test_benchmarks.py::test_what_was_measured_is_in_the_history": 1,
    "tests/test_cache_folder.py::test_nobody_has_a_rule_of_his_own": 1,
    "tests/test_cuda_table.py::test_every_file_that_speaks_of_a_gpu_is_there": 1,
    "tests/test_extras.py::test_commands_that_read_files_need_no_more_than_their_extra": 1,
    "tests/test_files.py::test_killed_process_leaves_a_whole_folder": 1,
    "tests/test_files.py::test_no_path_of_one_machine_stands_in_the_code": 1,
    "tests/test_files.py::test_what_is_written_is_apart_from_what_is_read": 1,
    "tests/test_guides.py::test_a_command_is_refused_what_is_not_installed": 1,
    "tests/test_guides.py::test_a_guide_names_the_extras_of_its_commands": ALL,
    "tests/test_jail.py::test_nothing_can_be_written_so_that_no_number_of_files_fills_the_memory": 1,
    "tests/test_jail.py::test_nothing_of_the_machine_is_seen_but_a_python": 1,
    "tests/test_modes.py::test_nobody_puts_modes_back_by_hand": 1,
    "tests/test_public_api.py::test_public_names_are_the_pinned_ones": ALL,
    "tests/test_public_api.py::test_public_names_are_there_and_documented": ALL,
    "tests/test_slow_tests.py::test_every_test_of_the_list_is_there": 1,
    "tests/test_waiting.py::test_tests_wait_for_what_they_assert": 1,
    "tests/train/test_task_contract.py::test_an_image_classifier_keeps_it": 1,
    "tests/train/test_task_contract.py::test_broken_tasks_are_found": 1,
    "tests/web/test_own_task.py::test_no_error_is_told_to_nobody": ALL,
    "tests/web/test_own_task.py::test_the_end_of_the_loop_ends_it": ALL,
}


def function_of(node: str) -> str:
    """Of a test's node id: without its variant."""
    return node.partition("[")[0]


def read() -> dict[str, int]:
    """Function -> how many of its first variants run in ``make test``."""
    lines = LIST.read_text().splitlines() if LIST.exists() else []
    return {function: int(count) for count, _, function in (line.partition(" ") for line in lines)}


def slow_ones(nodes: Iterable[str], kept: dict[str, int]) -> list[bool]:
    """Which tests, in the order of their collection, are left to ``make test-all``."""
    seen: Counter[str] = Counter()
    found = []
    for node in nodes:
        function = function_of(node)
        seen[function] += 1
        found.append(function in kept and seen[function] > kept[function])
    return found


def chosen(seconds: dict[str, float]) -> dict[str, int]:
    """The list, from seconds of every test, in the order of their collection."""
    by_function: dict[str, list[float]] = {}
    for node, took in seconds.items():
        by_function.setdefault(function_of(node), []).append(took)
    counts = {function: KEPT.get(function) or _variants(times) for function, times in by_function.items()}
    by_file: dict[str, list[str]] = {}
    for function in by_function:
        by_file.setdefault(function.partition("::")[0], []).append(function)
    for functions in by_file.values():
        quickest = min(functions, key=lambda function: by_function[function][0])
        if not any(counts[function] for function in functions) and by_function[quickest][0] <= LAST:
            counts[quickest] = 1
    return {function: count for function, count in counts.items() if count < len(by_function[function])}


def _variants(times: list[float]) -> int:
    """How many of the first run."""
    if sum(times) <= EACH:
        return len(times)
    if times[0] > ALONE:
        return 0
    count, total = 1, times[0]
    while count < len(times) and total + times[count] <= EACH:
        total += times[count]
        count += 1
    return count


def main() -> None:
    seconds = {}
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        took, _, node = line.partition(" ")
        seconds[node] = float(took)
    found, count = chosen(seconds), Counter(map(function_of, seconds))
    for function, kept in read().items():
        # What is on the list keeps its place where the record was made without its other variants, or without any.
        if count[function] <= kept:
            found[function] = min(kept, found.get(function, kept))
    LIST.write_text(
        "".join(f"{kept} {function}\n" for function, kept in sorted(found.items())),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
