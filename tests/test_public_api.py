"""The public face of each package is what its ``__init__`` lists. A change here is a change for users: say so in the changelog.

To print the list of a package: ``python -c "import anabranch.routing as p; print(*p.__all__)"``.
"""

import importlib
import inspect

import pytest

PUBLIC = {
    "anabranch.config": "Config Field Part Repeats Seed Size configclass from_dict override parse_assignment to_dict",
    "anabranch.routing": """
        UNUSED Balancer BiasBalancer Candidates CosineScore Decisions DeviceLoss DispatchPlan ExpertChoice GroupTopK HashScore
        EntropyLoss HybridEntropy OfPass SoftLoss UncertaintyLoss uncertainty
        ImportanceLoss LinearScore Override PoolLoss Recorder Router Routing RoutingContext RoutingTrace Score Select SwitchLoss Threshold
        TopK TopP TraceBuilder TraceLayer TraceWriter WeightField ZLoss capacity_of combine count_destinations discard_loads dispatch
        export_correction_bias export_history import_correction_bias
        HeadActivation Positive RateBalance ReMoEController ReluScore SmoothProximity
        limit_capacity override_routing pad_rows plan_dispatch record_routing replay_routing sync_loads unpad_rows
    """,
    "anabranch.data": """
        Batch BpeTokenizer ByteTokenizer Corpus Data DataConfig Document Domain Files HuggingFaceTokenizer Lane
        Mixture Named Stdlib StreamDecoder Table TokenStore TokenStream Tokenizer Windows cache_folder corpus_at
        corpus_windows load_tokenizer text_windows train_bpe
    """,
    "anabranch.routers": """
        Answered Arm Ask Candidate Decision Done FittedRouter Model Outcome Pool Prediction Predictor Program ProgramRequest Query Ranked
        Recorded Said Shown Step Strategy load_outcomes strategies
    """,
    "anabranch.routers.contract": """
        Answered Arm Ask Candidate Decision Done Model Outcome Played Pool Prediction Predictor Program ProgramRequest Query Ranked
        Recorded Said Shown Step Strategy
    """,
    "anabranch.routers.coe": """
        CategoryRouter ExpertMap ExpertQueue ExpertStore Judgement Lease Limits QualityTable frontier_of_budget
        frontier_of_trade_off solve_map
    """,
    "anabranch.routers.data": """
        SETS UNITS Columns RoutingSet check_disjoint deduplicated folds groups is_store llmrouter load_csv load_jsonl
        load_judgements load_outcomes measured_in merged pool_of pooled read_joules read_prices routellm_mmlu split
    """,
    "anabranch.routers.embed": "Embedder dim_of embed_cached embed_of unit_vectors",
    "anabranch.routers.router_r1": """
        CostWindow Episode FunctionPool MultiRoundRouteEnv Price RecordedPool Reply RouterR1 Rules Tokens TwoHop exact_match faults
        raw_cost token_f1 total_reward
    """,
    "anabranch.routers.scale": """
        Assessor Budget Budgeted ClientAsk Constant Decomposer Disagreement EngineAsk Entropy Given Identity Oracle Probe Problem
        PromptScore Prompted Rule Scale Score SelectiveReasoner Settings System Threshold TopFraction Trace
    """,
    "anabranch.routers.referee": """
        Interval Recovery Replay Replayed Report Standing Trial Verdict aiq bootstrap cost_save decision_latency evaluate holm hull
        pareto_distance preference recovery recovery_in_bins replay routerbench_aiq try_out with_cheapest
    """,
    "anabranch.test_time": """
        TTSPM Allowance BetaTTSPM BudgetController CodeVerifier CostModel Curve History ParallelCost Priors
        Reason Sample Sampled SequentialCost Spent TwoStateTTSPM best_judged best_mix effective_samples
        ends_at_first first_counts first_verified fit_many gsm8k_answer hit_at hit_curve is_decided
        is_gsm8k_right logprob_weighted majority mixed parallel play_fixed play_global play_oracle
        play_question play_votes regret sequential survival_curve verified_accuracy vote_curve
        vote_probability
    """,
    "anabranch.graph": """
        FastRP FullyPPR GRank Graph GraphVite HNSW PageRank PowerWalk TypedGraph as_graph fully_ppr
        load_dataset read_graph write_graph
    """,
    "anabranch.graph.disk": "DiskIndex build from_hnsw is_on_disk",
    "anabranch.graph.live": "LiveIndex NoRoomError check_unchanged live_folder open_index open_named replacing",
    "anabranch.graph.serve": "Limits Sources Writes create_app run",
    "anabranch.cluster": """
        Communicator ContextParallel Coordinator DiLoCo Durations ElasticTrainer GPipe KeyedDropout LayerCost Master MessageLog Partition
        PeerLost Plan Pop SCHEDULES SavedBytes Schedule SharedState Slot Stash Timeline context_parallel_attention keyed_uniform
        partition plan plan_attention random_key ring_attention schedule simulate
        token_ring_attention
    """,
    "anabranch.cluster.pccl": """
        CollectiveError Communicator DiLoCo Kicked Master MasterLost Mismatch PeerLost Quantiser Reduced Reduction Refused
        RevisionError Round Shared SharedState TagInUse TopologyFailed best_tour
    """,
    "anabranch.cluster.ring": """
        AttentionPlan ContextOutput ContextParallel Layout Placement RingOptions Run SCHEMES SchemeCost ShardedCache Topology Traffic
        average_gradients context_parallel_attention measure_topology placed_attention plan_attention ring_attention simulated_attention
        simulated_placed_attention token_ring_attention
    """,
    "anabranch.cluster.elastic": """
        Compared Coordinator ElasticPlan ElasticTrainer FrequencyControl Grid Layout Memory Move NvmlFrequency Policy
        SimulatedFrequency UnrecoverableError bounds census compare moves plan recut
    """,
    "anabranch.cluster.fabric": """
        ALGORITHMS SCHEMES SPREAD Equivalence Flows FluidResult LinkEvent PacketConfig PacketResult PathHealth Piece Plan Routes
        Topology busiest check check_equivalence collective_flows dispatch_matrix exact_loads good_paths loads lower_bound
        max_min_rates moe_dispatch plan plan_trace routes simulate simulate_packets
    """,
    "anabranch.depth": """
        BlockStack DepthReport DepthRouter EXECUTE REPEAT RoutedPass SKIP check_depth_path decisions_of path_of routed_pass run_path
        stack_of
    """,
    "anabranch.adapters": """
        Adapter Bottleneck Combined Dora DynMoLE Exported Front HashedDelta Labelled LowRank LowRankPool MixedLowRank
        MixtureReport MixtureTask NestedLowRank Pair RoutedLowRank ScaleShift Scaling SerialBottleneck SkilledLowRank
        SoftThenTopK SparseDelta SpecialisationLoss adapter_of chosen_rows combine export_mixture fit_joint fit_router
        labelled_rows load_fitted load_mixture load_peft load_pool lora_moe merge mixture_report mola mu read_peft rows_for save_peft
        static_mixture unload unmerge write_peft
    """,
    "anabranch.rl": """
        Actions ActorCritic Agent Beta Categorical Clipped Distribution Ends Environment Episodes Film Gymnasium Highway
        GRPO Kind LaneWorld Layout Normal PPO PRESETS Preset Rollout Rollouts Samples Sumo TokenPPO World advantages clipped_losses
        episode_seed judge load_agent record training
    """,
    "anabranch.rl.router_r1": """
        LiveWorld PoolModel PoolPrice RecordedWorld Routed RoutedPlay RoutedWorld Router Training TwoHopPlay TwoHopWorld judge_router
        load_router own_router_training router_training warm_model warm_up word_tokenizer
    """,
    "anabranch.rl.tokens": """
        Drawn Outcome Play PolicyEngine Samples Told TokenPolicy TokenRollouts TokenTask TokenWorld Trajectory divergence_of
        group_advantages mean_over padded rewards_by_token surrogate token_advantages value_loss whitened
    """,
    "anabranch.heads": """
        HeadActivation HeadGate HeadRouting RateBalance ReMoEController RoutedAttention RoutedHeads SmoothProximity head_losses
        head_report load_heads put_heads routed_heads_of save_heads take_off_heads with_heads
    """,
    "anabranch.heads.pvchat": """
        Actor Balance Clip ClipTask Composed Composer Embedder Generator InkEmbedder KindScore Learned Learning OneShotSet PVChat
        Part Portrait Pretraining Questions Rates Row Score Seen Subject Trial Vocabulary Warped Ways ask_all cut_out exam fitted
        learn look_alikes measure nearest odds portraits pretrain read_clip read_drawing read_drawings read_reference read_trials
        rows_learning ways write_clip
    """,
    "anabranch.heads.whisper": """
        CROSS Piece Speech SpeechTask Utterance Words is_whisper measure open_whisper read_sound read_speech save_whisper transcribe
        transcribe_sound
    """,
    "anabranch.depth.dr_llm": """
        BankConfig ExactMatch Features FitConfig FitReport FlipReport Labels Measured NextToken OptionLikelihood PathRow PathRun
        PathRunner Question RouterBank SearchConfig SearchReport TreeSearch baselines_at class_balance collect_features compare contexts
        controlled decide_prompts early_exit find_reward fit_routers influence_of is_bank labels_of measure measure_paths moves_of
        pool_windows random_skip read_paths read_questions reference_of routing_loss search_paths search_question shortgpt spread
        train_routers
    """,
    "anabranch.depth.ftp": """
        BlockCache Contestant Evaluation FactorConfig FitConfig Fitted Item Prefilled Redundancy RouterConfig Schedule
        ScheduleConfig Searched SkipCache SkipReport TokenRouter TokenSkipper TrainingConfig calibration_loss column_means compare
        equal_work_path evaluate evaluate_items evaluate_path evaluate_shortened evaluate_truncated factors_of finetune_schedule
        fit_skipper kl_loss perplexity project random_keep redundancy_report search_schedule skip_count sparsity_loss static_keep
        train_router uniform_schedule
    """,
    "anabranch.lm": """
        Decoder DecoderOutput KeyValueCache SamplingConfig average convert export_huggingface generate load_config
        load_model load_weights save_model stream upcycle write_model
    """,
    "anabranch.nn": """
        Attention Block BuildContext Count Dense ExpertPool FeedForward ForwardContext LatentAttention Linear MLP MoE PreNorm RMSNorm Rotary
        Sandwich SelfAttention SwiGLU
    """,
    "anabranch.report": """
        CacheFacts LayerFacts PoolFacts Summary explain summarize write_report
    """,
    "anabranch.serving": """
        EngineClient EngineInfo EngineStats Finish LLM LocalEngine Output ProcessEngine Request Sampling ServingConfig
    """,
    "anabranch.serving.elasticmoe": """
        Coordinator ElasticConfig Group Placement Policy ScalePlan ScaleReport place plan_scale
    """,
    "anabranch.testing": """
        DEVICES Hosts NoHostsError RankError Ranks can_make_hosts check_attention check_balancer check_block check_feed_forward
        check_linear check_parallel check_pool check_provider check_router check_routing check_score check_select check_strategy
        check_streams check_task hosts run_ranks
    """,
    "anabranch.train": """
        Constant Cosine DecoderTask Evaluation Event Examples LanguageModel Losses RunConfig Schedule StepHooks Stream
        Task TaskContext TaskRunConfig TextTask TrainConfig TrainResult Trainer WarmupStableDecay
        checkpoints evaluate follow_steps read_metrics read_run_config read_task_run_config
    """,
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_the_pinned_ones(package):
    assert sorted(importlib.import_module(package).__all__) == sorted(PUBLIC[package].split())


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_there_and_documented(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"
