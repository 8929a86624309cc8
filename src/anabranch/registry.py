"""Short names for interchangeable parts, resolved only when asked for.

A *family* is a seam (``score``, ``select``, ``balance``, ``feed_forward``, ...); a *kind* is one part that fits it. The table
below holds import paths, not classes, so a low layer can name a part of a higher one without importing it. A third-party
package adds a kind with an entry point in the group ``anabranch.<family>`` whose value is ``module:Class``.
"""

import difflib
import importlib
from functools import cache
from importlib.metadata import entry_points

from anabranch.errors import ConfigError

BUILTIN: dict[str, dict[str, str]] = {
    "score": {
        "linear": "anabranch.routing.score:LinearScore",
        "cosine": "anabranch.routing.score:CosineScore",
        "hash": "anabranch.routing.hash_score:HashScore",
        "relu": "anabranch.routing.relu:ReluScore",
        "glider": "anabranch.adapters.glider:GliderScore",
        "recurrent": "anabranch.experts.rmoe:RecurrentScore",
        "tempered": "anabranch.depth.duo_llm:TemperedScore",
    },
    "select": {
        "top_k": "anabranch.routing.select:TopK",
        "group_top_k": "anabranch.routing.select:GroupTopK",
        "top_p": "anabranch.routing.select:TopP",
        "threshold": "anabranch.routing.select:Threshold",
        "positive": "anabranch.routing.relu:Positive",
        "expert_choice": "anabranch.routing.select:ExpertChoice",
        "hybrid_entropy": "anabranch.routing.hybrid:HybridEntropy",
        "mixture": "anabranch.depth.duo_llm:Mixture",
        "soft_then_top_k": "anabranch.adapters:SoftThenTopK",
    },
    "balance": {
        "switch": "anabranch.routing.balance:SwitchLoss",
        "pool": "anabranch.routing.balance:PoolLoss",
        "z_loss": "anabranch.routing.balance:ZLoss",
        "importance": "anabranch.routing.balance:ImportanceLoss",
        "device": "anabranch.routing.balance:DeviceLoss",
        "entropy": "anabranch.routing.balance:EntropyLoss",
        "uncertainty": "anabranch.routing.uncertainty:UncertaintyLoss",
        "soft": "anabranch.routing.uncertainty:SoftLoss",
        "bias": "anabranch.routing.bias:BiasBalancer",
        "activation_rate": "anabranch.routing.rate:RateBalance",
        "budget": "anabranch.depth.duo_llm:BudgetLoss",
        "specialisation": "anabranch.adapters:SpecialisationLoss",
    },
    "candidates": {
        "psr": "anabranch.experts.rexmoe:ProgressiveScaling",
    },
    "feed_forward": {
        "swiglu": "anabranch.nn.feed_forward:SwiGLU",
        "mlp": "anabranch.nn.feed_forward:MLP",
        "moe": "anabranch.nn.moe:MoE",
        "rexmoe": "anabranch.experts.rexmoe:ReXMoE",
        "versatile": "anabranch.experts.versatile:VersatileFFN",
        "duo": "anabranch.depth.duo_llm:DuoFFN",
        "chain": "anabranch.experts.chain:Chain",
    },
    "attention": {
        "attention": "anabranch.nn.attention:SelfAttention",
        "latent": "anabranch.nn.latent_attention:LatentAttention",
        "routed_heads": "anabranch.heads:RoutedAttention",
    },
    "block": {
        "ladder": "anabranch.adapters.ladder:Ladder",
        "pre_norm": "anabranch.nn.block:PreNorm",
        "sandwich": "anabranch.nn.block:Sandwich",
    },
    "linear": {
        "dense": "anabranch.nn.linear:Dense",
        "low_rank": "anabranch.adapters:LowRank",
        "gated_low_rank": "anabranch.adapters.gated:GatedLowRank",
        "gated_bottleneck": "anabranch.adapters.gated:GatedBottleneck",
        "dora": "anabranch.adapters:Dora",
        "scaling": "anabranch.adapters:Scaling",
        "skilled_low_rank": "anabranch.adapters:SkilledLowRank",
        "routed_low_rank": "anabranch.adapters:RoutedLowRank",
        "mixed_low_rank": "anabranch.adapters:MixedLowRank",
        "multi_head_routed": "anabranch.adapters.mhr:MultiHeadRouted",
        "nested_low_rank": "anabranch.adapters:NestedLowRank",
        "bottleneck": "anabranch.adapters:Bottleneck",
        "sparse_bottleneck": "anabranch.adapters.sparse_bottleneck:SparseBottleneck",
        "sparse_delta": "anabranch.adapters:SparseDelta",
        "hashed_delta": "anabranch.adapters:HashedDelta",
        "serial_bottleneck": "anabranch.adapters:SerialBottleneck",
        "scale_shift": "anabranch.adapters:ScaleShift",
        "shift": "anabranch.adapters.after:Shift",
        "adapter_fusion": "anabranch.adapters.fusion:AdapterFusion",
        "adapter_mixture": "anabranch.adapters.adapter_mixture:AdapterMixture",
        "peft_tuner": "anabranch.adapters.tuners:PeftTuner",
        "moved_low_rank": "anabranch.adapters.tuners:MovedLowRank",
    },
    "streams": {
        "parscale": "anabranch.experts.parscale:ParScale",
        "front": "anabranch.adapters:Front",
    },
    "outcomes": {
        "store": "anabranch.gateway.store_outcomes:load_store",
    },
    "strategy": {
        "ranked": "anabranch.routers.contract.predictor:Ranked",
        "static": "anabranch.routers.strategies.fixed:Static",
        "random": "anabranch.routers.strategies.fixed:Random",
        "round_robin": "anabranch.routers.strategies.fixed:RoundRobin",
        "least_latency": "anabranch.routers.strategies.fixed:LeastLatency",
        "cheapest": "anabranch.routers.strategies.fixed:Cheapest",
        "oracle": "anabranch.routers.strategies.fixed:Oracle",
        "rules": "anabranch.routers.strategies.rules:Rules",
        "semantic": "anabranch.routers.strategies.semantic:Semantic",
        "prompt": "anabranch.routers.strategies.prompt:Prompt",
        "cascade": "anabranch.routers.strategies.cascade:Cascade",
        "automix": "anabranch.routers.strategies.automix:AutoMix",
        "consistency": "anabranch.routers.strategies.consistency:Consistency",
        "best_of": "anabranch.routers.strategies.best_of:BestOf",
        "logprob": "anabranch.routers.strategies.logprob:LogProb",
        "linucb": "anabranch.routers.strategies.bandit:LinUCB",
        "thompson": "anabranch.routers.strategies.bandit:Thompson",
        "eps_greedy": "anabranch.routers.strategies.bandit:EpsGreedy",
        "ic_cache": "anabranch.routers.ic_cache.strategy:ICCacheRouting",
        "scale": "anabranch.routers.scale.program:Scale",
        "router_r1": "anabranch.routers.router_r1.program:RouterR1",
    },
    "decomposer": {
        "prompt": "anabranch.routers.scale.decompose:Prompted",
        "identity": "anabranch.routers.scale.decompose:Identity",
        "given": "anabranch.routers.scale.decompose:Given",
    },
    "assessor": {
        "prompt": "anabranch.routers.scale.assess:PromptScore",
        "entropy": "anabranch.routers.scale.assess:Entropy",
        "disagreement": "anabranch.routers.scale.assess:Disagreement",
        "constant": "anabranch.routers.scale.assess:Constant",
        "probe": "anabranch.routers.scale.probe:Probe",
    },
    "mode_rule": {
        "threshold": "anabranch.routers.scale.rules:Threshold",
        "top_fraction": "anabranch.routers.scale.rules:TopFraction",
        "budgeted": "anabranch.routers.scale.rules:Budgeted",
    },
    "predictor": {
        "knn": "anabranch.routers.strategies.knn:Knn",
        "cluster": "anabranch.routers.strategies.cluster:Cluster",
        "sw_elo": "anabranch.routers.strategies.elo:SwElo",
        "ridge": "anabranch.routers.strategies.ridge:Ridge",
        "mlp": "anabranch.routers.strategies.mlp:Mlp",
        "mf": "anabranch.routers.strategies.mf:MatrixFactorisation",
        "hybrid": "anabranch.routers.strategies.hybrid:Hybrid",
        "irt": "anabranch.routers.strategies.irt:ItemResponse",
        "task": "anabranch.routers.strategies.task:TaskBest",
        "encoder": "anabranch.routers.strategies.encoder:Encoder",
        "coe": "anabranch.routers.coe.predictor:CompositionOfExperts",
        "graph": "anabranch.routers.graphrouter.predictor:GraphRouter",
    },
    "embedder": {
        "hashed": "anabranch.routers.embed.hashed:Hashed",
        "minilm": "anabranch.routers.embed.minilm:MiniLM",
    },
    "vector_index": {
        "exact": "anabranch.routers.retrieve.exact:Exact",
        "clustered": "anabranch.routers.retrieve.clustered:Clustered",
        "hnsw": "anabranch.routers.retrieve.hnsw:Hnsw",
    },
    "utility_proxy": {
        "similarity": "anabranch.routers.ic_cache.proxy:Similarity",
        "logistic": "anabranch.routers.ic_cache.proxy:Logistic",
        "mlp": "anabranch.routers.ic_cache.proxy:Mlp",
        "cross_encoder": "anabranch.routers.ic_cache.cross_encoder:CrossEncoder",
    },
    "provider": {
        "openai": "anabranch.gateway.providers.openai:OpenAI",
        "anthropic": "anabranch.gateway.providers.anthropic:Anthropic",
        "azure": "anabranch.gateway.providers.azure:Azure",
        "bedrock": "anabranch.gateway.providers.bedrock:Bedrock",
        "gemini": "anabranch.gateway.providers.gemini:Gemini",
        "ollama": "anabranch.gateway.providers.ollama:Ollama",
        "openrouter": "anabranch.gateway.providers.openrouter:OpenRouter",
        "vertex": "anabranch.gateway.providers.vertex:Vertex",
        "engine": "anabranch.gateway.providers.engine:Engine",
        "local": "anabranch.gateway.providers.local:Local",
        "mock": "anabranch.gateway.providers.mock:Mock",
        "record": "anabranch.gateway.providers.recorded:Record",
        "replay": "anabranch.gateway.providers.recorded:Replay",
    },
    "tokenizer": {
        "bytes": "anabranch.data.tokenizer:ByteTokenizer",
        "bpe": "anabranch.data.bpe:BpeTokenizer",
        "file": "anabranch.data.tokenizer:HuggingFaceTokenizer",
    },
    "corpus": {
        "stdlib": "anabranch.data.corpus:Stdlib",
        "files": "anabranch.data.corpus:Files",
        "table": "anabranch.data.corpus:Table",
        "named": "anabranch.data.named:Named",
        "mixture": "anabranch.data.corpus:Mixture",
    },
    "schedule": {
        "cosine": "anabranch.train.schedule:Cosine",
        "wsd": "anabranch.train.schedule:WarmupStableDecay",
        "constant": "anabranch.train.schedule:Constant",
    },
    "task": {
        "language_model": "anabranch.train.language_model:LanguageModel",
        "text": "anabranch.train.language_model:TextTask",
        "labelled_routes": "anabranch.depth.duo_llm:LabelledRoutes",
        "lora_mixer": "anabranch.adapters:MixtureTask",
        "adapt": "anabranch.adapters.adapt:AdaptTask",
        "pvchat": "anabranch.heads.pvchat.training:ClipTask",
        "speech": "anabranch.heads.whisper.task:SpeechTask",
        "ppo": "anabranch.rl:PPO",
        "grpo": "anabranch.rl:GRPO",
        "token_ppo": "anabranch.rl:TokenPPO",
        "imitation": "anabranch.rl.tokens.imitation:Imitation",
    },
    "token_world": {
        "two_hop": "anabranch.rl.router_r1:TwoHopWorld",
        "recorded": "anabranch.rl.router_r1:RecordedWorld",
        "live": "anabranch.rl.router_r1:LiveWorld",
        "answers": "anabranch.rl.tokens.answers:AnswersWorld",
    },
    "environment": {
        "gymnasium": "anabranch.rl:Gymnasium",
        "laneworld": "anabranch.rl:LaneWorld",
        "highway": "anabranch.rl:Highway",
    },
    "adapter_method": {
        "adapter-fusion": "anabranch.adapters.adapt.fusing:FusionMethod",
        "catalogue": "anabranch.adapters.adapt.catalogued:Catalogued",
        "dynmole": "anabranch.adapters.adapt.mixtures:Dynmole",
        "gate": "anabranch.adapters.glider.gates:GateMethod",
        "lora": "anabranch.adapters.adapt.lora:Lora",
        "lora_mixer": "anabranch.adapters.adapt.mixtures:LoraMixer",
        "mhr": "anabranch.adapters.mhr.method:Mhr",
        "poly": "anabranch.adapters.mhr.method:Poly",
    },
}


def kinds(family: str) -> list[str]:
    """All kinds of a family, built in and installed, sorted."""
    return sorted({*BUILTIN.get(family, {}), *(point.name for point in entry_points(group=f"anabranch.{family}"))})


@cache
def resolve(family: str, kind: str) -> type:
    """Return the class registered as ``kind`` in ``family``.

    Raises ConfigError, with the nearest names, if there is none.
    """
    target = BUILTIN.get(family, {}).get(kind)
    if target is None:
        target = next((point.value for point in entry_points(group=f"anabranch.{family}", name=kind)), None)
    if target is None:
        known = kinds(family)
        near = difflib.get_close_matches(kind, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"no {family} of kind {kind!r}; {hint}")
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
