"""Dr.LLM: a small router on each block of a frozen model says whether a sequence skips the block, runs it, or runs it twice.

"Dr.LLM: Dynamic Layer Routing in LLMs", 2025, arXiv 2510.12773. Paths are searched offline (`search_paths`), the shortest right ones
become labels (`labels_of`), routers learn them (`train_routers`) and decide once for each prompt (`anabranch.depth.DepthRouter`).
`compare` holds them against skipping at random, removing blocks, and leaving early. Whether a wrong answer that became right is more than
luck is asked by the null control in `flips`. Evidence: ``anabranch study dr_llm``.
"""

from anabranch.depth.dr_llm.bank import BankConfig, RouterBank, is_bank
from anabranch.depth.dr_llm.baselines import early_exit, random_skip, shortgpt, spread
from anabranch.depth.dr_llm.compare import baselines_at, compare, influence_of
from anabranch.depth.dr_llm.control import controlled
from anabranch.depth.dr_llm.evaluate import Measured, measure, measure_paths, reference_of
from anabranch.depth.dr_llm.features import Features, collect_features
from anabranch.depth.dr_llm.fitting import FitConfig, FitReport, fit_routers, train_routers
from anabranch.depth.dr_llm.flips import FlipReport
from anabranch.depth.dr_llm.labels import Labels, labels_of
from anabranch.depth.dr_llm.loss import class_balance, routing_loss
from anabranch.depth.dr_llm.mcts import TreeSearch
from anabranch.depth.dr_llm.moves import moves_of
from anabranch.depth.dr_llm.questions import Question, contexts, read_questions
from anabranch.depth.dr_llm.records import PathRow, read_paths
from anabranch.depth.dr_llm.rewards import ExactMatch, NextToken, OptionLikelihood, find_reward
from anabranch.depth.dr_llm.routed import decide_prompts
from anabranch.depth.dr_llm.runner import PathRun, PathRunner
from anabranch.depth.dr_llm.search import SearchReport, search_paths, search_question
from anabranch.depth.dr_llm.settings import SearchConfig
from anabranch.depth.dr_llm.windows import pool_windows

__all__ = [
    "BankConfig",
    "ExactMatch",
    "Features",
    "FitConfig",
    "FitReport",
    "FlipReport",
    "Labels",
    "Measured",
    "NextToken",
    "OptionLikelihood",
    "PathRow",
    "PathRun",
    "PathRunner",
    "Question",
    "RouterBank",
    "SearchConfig",
    "SearchReport",
    "TreeSearch",
    "baselines_at",
    "class_balance",
    "collect_features",
    "compare",
    "contexts",
    "controlled",
    "decide_prompts",
    "early_exit",
    "find_reward",
    "fit_routers",
    "influence_of",
    "is_bank",
    "labels_of",
    "measure",
    "measure_paths",
    "moves_of",
    "pool_windows",
    "random_skip",
    "read_paths",
    "read_questions",
    "reference_of",
    "routing_loss",
    "search_paths",
    "search_question",
    "shortgpt",
    "spread",
    "train_routers",
]
