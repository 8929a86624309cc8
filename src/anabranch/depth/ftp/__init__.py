"""FTP: the tokens of a prompt that a block of a frozen model computes, chosen block by block.

"FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing", 2024, arXiv 2412.11494. Step 1 searches how much each
block passes over, with a router by places alone (`search_schedule`); step 2 learns a router of 450 parameters for all blocks while the
model is frozen (`train_router`); step 3 searches on with it (`finetune_schedule`); `fit_skipper` does all three. `TokenSkipper` then runs
prompts so, and decodes on; `evaluate` says what it costs. Evidence: ``anabranch study ftp``.
"""

from anabranch.depth.ftp.attention_scores import column_means
from anabranch.depth.ftp.baselines import Contestant, compare, equal_work_path
from anabranch.depth.ftp.cache import BlockCache, SkipCache
from anabranch.depth.ftp.decider import Schedule
from anabranch.depth.ftp.evaluate import (
    Evaluation,
    calibration_loss,
    evaluate,
    evaluate_items,
    evaluate_path,
    evaluate_shortened,
    evaluate_truncated,
    kl_loss,
    perplexity,
)
from anabranch.depth.ftp.features import FactorConfig, factors_of
from anabranch.depth.ftp.fitting import FitConfig, Fitted, fit_skipper
from anabranch.depth.ftp.items import Item
from anabranch.depth.ftp.redundancy import Redundancy, redundancy_report
from anabranch.depth.ftp.report import SkipReport
from anabranch.depth.ftp.router import RouterConfig, TokenRouter
from anabranch.depth.ftp.schedule import ScheduleConfig, Searched, project, uniform_schedule
from anabranch.depth.ftp.search import finetune_schedule, search_schedule
from anabranch.depth.ftp.skipper import Prefilled, TokenSkipper
from anabranch.depth.ftp.static import random_keep, skip_count, static_keep
from anabranch.depth.ftp.training import TrainingConfig, sparsity_loss, train_router

__all__ = [
    "BlockCache",
    "Contestant",
    "Evaluation",
    "FactorConfig",
    "FitConfig",
    "Fitted",
    "Item",
    "Prefilled",
    "Redundancy",
    "RouterConfig",
    "Schedule",
    "ScheduleConfig",
    "Searched",
    "SkipCache",
    "SkipReport",
    "TokenRouter",
    "TokenSkipper",
    "TrainingConfig",
    "calibration_loss",
    "column_means",
    "compare",
    "equal_work_path",
    "evaluate",
    "evaluate_items",
    "evaluate_path",
    "evaluate_shortened",
    "evaluate_truncated",
    "factors_of",
    "finetune_schedule",
    "fit_skipper",
    "kl_loss",
    "perplexity",
    "project",
    "random_keep",
    "redundancy_report",
    "search_schedule",
    "skip_count",
    "sparsity_loss",
    "static_keep",
    "train_router",
    "uniform_schedule",
]
