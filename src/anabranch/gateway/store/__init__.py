"""What a gateway remembers: keys, budgets with reservations, the ledger, decisions and feedback, in SQLite or PostgreSQL."""

from anabranch.errors import BudgetError, RateError
from anabranch.gateway.store.calibration import Calibration
from anabranch.gateway.store.limits import Bucket, RateLimits, refill, take
from anabranch.gateway.store.opening import open_store
from anabranch.gateway.store.period import PERIODS, Period, window
from anabranch.gateway.store.queries import GROUPS
from anabranch.gateway.store.records import (
    COLLECT,
    LEARNING,
    OUR_TAGS,
    SHADOW,
    Budget,
    CollectedRow,
    DecisionRow,
    FeedbackRow,
    KeyRecord,
    LedgerQuery,
    LedgerRow,
    PreferenceRow,
    Reservation,
    SaidBeforeError,
    Spend,
    subjects_of,
)
from anabranch.gateway.store.store import Store

__all__ = [
    "COLLECT",
    "GROUPS",
    "LEARNING",
    "OUR_TAGS",
    "PERIODS",
    "SHADOW",
    "Bucket",
    "Budget",
    "BudgetError",
    "Calibration",
    "CollectedRow",
    "DecisionRow",
    "FeedbackRow",
    "KeyRecord",
    "LedgerQuery",
    "LedgerRow",
    "Period",
    "PreferenceRow",
    "RateError",
    "RateLimits",
    "Reservation",
    "SaidBeforeError",
    "Spend",
    "Store",
    "open_store",
    "refill",
    "subjects_of",
    "take",
    "window",
]
