"""Tables of the jobs' database, as they came to be."""

from __future__ import annotations

from esperd.daemon import attempts, usage

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY,            -- order of admission
        id TEXT NOT NULL UNIQUE,
        idempotency_key TEXT NOT NULL UNIQUE,
        payload_sha256 TEXT NOT NULL,
        payload BLOB NOT NULL,                 -- the job, msgpack
        name TEXT NOT NULL,
        state TEXT NOT NULL,
        generation INTEGER NOT NULL,           -- leases given; fences every write of a worker
        lost INTEGER NOT NULL,                 -- workers lost
        resumed INTEGER NOT NULL,              -- leases given with a checkpoint
        wish TEXT CHECK (wish IN ('pause', 'cancel')),
        submitted_at REAL NOT NULL,
        started_at REAL,
        finished_at REAL,
        retry_at REAL,
        epoch INTEGER,
        checkpoint TEXT,
        error BLOB                             -- a JobError, msgpack
    ) STRICT;
    CREATE INDEX jobs_by_state ON jobs (state, number);
    CREATE TABLE artifacts (
        job TEXT NOT NULL REFERENCES jobs (id),
        position INTEGER NOT NULL,
        name TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        PRIMARY KEY (job, name)
    ) STRICT, WITHOUT ROWID
    """,
    f"""
    ALTER TABLE jobs ADD COLUMN previous_checkpoint TEXT;  -- of the last but one: what the job goes back to
    ALTER TABLE jobs ADD COLUMN previous_epoch INTEGER;
    {attempts.SCHEMA}
    """,
    usage.SCHEMA,
)
"""Schema, one step a version; only ever append."""
