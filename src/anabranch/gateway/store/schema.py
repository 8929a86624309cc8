"""The schema, once for every database, and the steps that lead to it.

A step, once released, is never edited: what changes is added as a new one. The types are those that SQLite and PostgreSQL both know;
``{serial}`` is what counts up by itself.
"""

from collections.abc import Sequence

MIGRATIONS: list[Sequence[str]] = [
    (
        """CREATE TABLE keys (
            id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, name TEXT NOT NULL, hint TEXT NOT NULL, owner TEXT NOT NULL,
            team TEXT NOT NULL, tags TEXT NOT NULL, models TEXT NOT NULL, rpm BIGINT, tpm BIGINT, is_admin INTEGER NOT NULL,
            created_us BIGINT NOT NULL, expires_us BIGINT, revoked_us BIGINT)""",
        """CREATE TABLE budgets (
            id {serial}, subject TEXT NOT NULL, period TEXT NOT NULL, limit_nano BIGINT NOT NULL, spent_nano BIGINT NOT NULL,
            reserved_nano BIGINT NOT NULL, window_us BIGINT NOT NULL, UNIQUE (subject, period))""",
        """CREATE TABLE replicas (id TEXT PRIMARY KEY, seen_us BIGINT NOT NULL)""",
        """CREATE TABLE reservations (
            request_id TEXT PRIMARY KEY, replica TEXT NOT NULL, ts_us BIGINT NOT NULL, nano BIGINT NOT NULL, subjects TEXT NOT NULL,
            requested TEXT NOT NULL, strategy TEXT NOT NULL)""",
        """CREATE TABLE ledger (
            seq {serial}, request_id TEXT NOT NULL UNIQUE, ts_us BIGINT NOT NULL, key_id TEXT NOT NULL, owner TEXT NOT NULL,
            team TEXT NOT NULL, tags TEXT NOT NULL, requested TEXT NOT NULL, strategy TEXT NOT NULL, candidates TEXT NOT NULL,
            model TEXT NOT NULL, deployment TEXT NOT NULL, attempts BIGINT NOT NULL, prompt_tokens BIGINT NOT NULL,
            completion_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL, is_estimated INTEGER NOT NULL, price_input BIGINT,
            price_output BIGINT, price_cached BIGINT, cost_nano BIGINT NOT NULL, reserved_nano BIGINT NOT NULL, latency_us BIGINT,
            first_token_us BIGINT, overhead_us BIGINT, status TEXT NOT NULL, code TEXT NOT NULL,
            cache TEXT NOT NULL, flags TEXT NOT NULL)""",
        "CREATE INDEX ledger_by_time ON ledger (ts_us)",
        """CREATE TABLE decisions (
            request_id TEXT PRIMARY KEY, ts_us BIGINT NOT NULL, strategy TEXT NOT NULL, model TEXT NOT NULL, body TEXT NOT NULL)""",
        "CREATE INDEX decisions_by_time ON decisions (ts_us)",
        """CREATE TABLE feedback (
            seq {serial}, request_id TEXT NOT NULL, ts_us BIGINT NOT NULL, key_id TEXT NOT NULL, score DOUBLE PRECISION NOT NULL,
            comment TEXT NOT NULL)""",
        "CREATE INDEX feedback_by_request ON feedback (request_id)",
    ),
    # What was asked and answered, apart from why: most stores keep none of it, and nobody who looks at decisions reads it by the way.
    (
        "CREATE TABLE texts (request_id TEXT PRIMARY KEY, ts_us BIGINT NOT NULL, body TEXT NOT NULL)",
        "CREATE INDEX texts_by_time ON texts (ts_us)",
    ),
    # Calls that collecting has paid for, by what was asked of whom, so that none is paid for again. Their time is that of the request
    # of a user that they are about.
    (
        "CREATE TABLE collected (key TEXT PRIMARY KEY, ts_us BIGINT NOT NULL, body TEXT NOT NULL)",
        "CREATE INDEX collected_by_time ON collected (ts_us)",
    ),
    # What strategies learned while they served, as bytes.
    (
        """CREATE TABLE learned (
            strategy TEXT NOT NULL, made TEXT NOT NULL, writer TEXT NOT NULL, kind TEXT NOT NULL, version BIGINT NOT NULL,
            ts_us BIGINT NOT NULL, body BYTEA NOT NULL, PRIMARY KEY (strategy, made, writer))""",
        "CREATE TABLE erasures (seq BIGINT PRIMARY KEY, ts_us BIGINT NOT NULL, body TEXT NOT NULL)",
        """CREATE TABLE examples (
            strategy TEXT NOT NULL, made TEXT NOT NULL, key TEXT NOT NULL, writer TEXT NOT NULL, version BIGINT NOT NULL,
            ts_us BIGINT NOT NULL, body TEXT NOT NULL, vector BYTEA NOT NULL, PRIMARY KEY (strategy, made, key))""",
        "CREATE INDEX examples_by_version ON examples (strategy, made, version)",
    ),
    # Calls that a strategy makes for a request have rows of their own, which name it; its own row says how many, and what they cost.
    (
        "ALTER TABLE ledger ADD COLUMN parent_id TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE ledger ADD COLUMN purpose TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE ledger ADD COLUMN calls BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE ledger ADD COLUMN calls_nano BIGINT NOT NULL DEFAULT 0",
        "CREATE INDEX ledger_by_parent ON ledger (parent_id) WHERE parent_id <> ''",
    ),
    # How many requests a key may have under way. And names of keys differ: of those that were alike the oldest keeps its name, and the
    # others get their id behind it.
    (
        """UPDATE keys SET name = name || ' ' || id WHERE name <> '' AND revoked_us IS NULL AND EXISTS (
            SELECT 1 FROM keys AS older WHERE older.name = keys.name AND older.revoked_us IS NULL
            AND (older.created_us < keys.created_us OR (older.created_us = keys.created_us AND older.id < keys.id)))""",
        "CREATE UNIQUE INDEX keys_by_name ON keys (name) WHERE name <> '' AND revoked_us IS NULL",
        "ALTER TABLE keys ADD COLUMN max_in_flight BIGINT",
    ),
    # What somebody is told once, whichever process tells it.
    (
        """CREATE TABLE alerts (
            id TEXT PRIMARY KEY, period TEXT NOT NULL, ts_us BIGINT NOT NULL, next_us BIGINT NOT NULL, tries BIGINT NOT NULL,
            sent_us BIGINT NOT NULL, body TEXT NOT NULL)""",
    ),
    # For whom a key's requests may speak. Keys of before could name anybody, and budgets may rest on that: they still can, until somebody
    # narrows them; new ones cannot.
    (
        "ALTER TABLE keys ADD COLUMN speaks_for TEXT NOT NULL DEFAULT ''",
        "UPDATE keys SET speaks_for = ',*,' WHERE owner = ''",
        "UPDATE keys SET speaks_for = ',tag:*,' WHERE owner <> ''",
    ),
    # What a key has spent of late is asked by the key itself, as often as it likes: of its own rows alone, and of nothing beside the index.
    ("CREATE INDEX ledger_by_key ON ledger (key_id, ts_us, parent_id, cost_nano)",),
    # What nobody outside can know, so that none can work out on whom a draw falls.
    ("CREATE TABLE secrets (name TEXT PRIMARY KEY, value TEXT NOT NULL)",),
    # Whose answer somebody preferred to whose: no score, so that no mean of scores has to leave it out.
    (
        """CREATE TABLE preferences (
            seq {serial}, request_id TEXT NOT NULL, ts_us BIGINT NOT NULL, key_id TEXT NOT NULL, better TEXT NOT NULL,
            worse TEXT NOT NULL, comment TEXT NOT NULL)""",
        "CREATE INDEX preferences_by_request ON preferences (request_id)",
    ),
]

# What is in every store, of whatever version.
TABLES = frozenset(("keys", "budgets", "replicas", "reservations", "ledger", "decisions", "feedback"))

KEYS = (
    "id",
    "hash",
    "name",
    "hint",
    "owner",
    "team",
    "tags",
    "models",
    "rpm",
    "tpm",
    "is_admin",
    "created_us",
    "expires_us",
    "revoked_us",
    "max_in_flight",
    "speaks_for",
)
BUDGETS = ("id", "subject", "period", "limit_nano", "spent_nano", "reserved_nano", "window_us")
RESERVATIONS = ("request_id", "replica", "ts_us", "nano", "subjects", "requested", "strategy")
LEDGER = (
    "request_id",
    "ts_us",
    "key_id",
    "owner",
    "team",
    "tags",
    "requested",
    "strategy",
    "candidates",
    "model",
    "deployment",
    "attempts",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "is_estimated",
    "price_input",
    "price_output",
    "price_cached",
    "cost_nano",
    "reserved_nano",
    "latency_us",
    "first_token_us",
    "overhead_us",
    "status",
    "code",
    "cache",
    "flags",
    "parent_id",
    "purpose",
    "calls",
    "calls_nano",
)
DECISIONS = ("request_id", "ts_us", "strategy", "model", "body")
FEEDBACK = ("request_id", "ts_us", "key_id", "score", "comment")
PREFERENCES = ("request_id", "ts_us", "key_id", "better", "worse", "comment")
TEXTS = ("request_id", "ts_us", "body")
ALERTS = ("id", "period", "ts_us", "next_us", "tries", "sent_us", "body")
COLLECTED = ("key", "ts_us", "body")
LEARNED = ("strategy", "made", "writer", "kind", "version", "ts_us", "body")
EXAMPLES = ("strategy", "made", "key", "writer", "version", "ts_us", "body", "vector")
