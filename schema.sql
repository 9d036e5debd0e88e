-- The tables of releasectl (contract section 2), for SQLite 3.26 and PostgreSQL 13 or newer.
--
--   sqlite3 new.db < schema.sql          works as it stands
--   python releasectl.py migrate         does the same for either engine, and brings an older
--                                        database up to date, one transaction a step
--
-- It grows by steps: never edit a step that was released, append the next one. A step begins at
-- its "-- step N" line and ends with the row that says it was done. Two things are SQLite's and
-- are put into PostgreSQL's words by releasectl.py (PostgresEngine.ddl): the id column and the
-- default of a time. A statement ends with a semicolon at the end of a line.

-- step 1: nodes, releases, their nodes, their history

CREATE TABLE schema_version (
    version    INTEGER NOT NULL PRIMARY KEY,
    applied_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);

CREATE TABLE nodes (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    name           TEXT NOT NULL UNIQUE,
    main_ip        TEXT NOT NULL,
    agent_port     INTEGER NOT NULL DEFAULT 8443 CHECK (agent_port BETWEEN 1 AND 65535),
    agent_protocol TEXT NOT NULL DEFAULT 'tasks' CHECK (agent_protocol IN ('tasks', 'execute')),
    labels         TEXT NOT NULL DEFAULT '{}',
    enabled        INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    status         TEXT NOT NULL DEFAULT 'online' CHECK (status IN ('online', 'offline', 'maintenance')),
    created_at     TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    updated_at     TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);

CREATE TABLE release_tasks (
    id               INTEGER PRIMARY KEY AUTOINCREMENT,
    type             TEXT NOT NULL DEFAULT 'apply_config',
    target           TEXT NOT NULL DEFAULT 'cdn',
    version          BIGINT NOT NULL UNIQUE CHECK (version BETWEEN 1 AND 9007199254740992),
    status           TEXT NOT NULL DEFAULT 'pending' CHECK (status IN
                     ('pending', 'running', 'paused', 'cancelling', 'success', 'partial', 'failed', 'cancelled')),
    status_reason    TEXT NOT NULL DEFAULT '',
    reason           TEXT NOT NULL DEFAULT '',
    payload          TEXT NOT NULL DEFAULT '{}',
    strategy         TEXT NOT NULL DEFAULT '{}',
    retry_of         BIGINT REFERENCES release_tasks (id),
    rollback_of      BIGINT REFERENCES release_tasks (id),
    total_nodes      INTEGER NOT NULL DEFAULT 0,
    success_nodes    INTEGER NOT NULL DEFAULT 0,
    failed_nodes     INTEGER NOT NULL DEFAULT 0,
    error_msg        TEXT NOT NULL DEFAULT '' CHECK (length(error_msg) <= 255),
    -- The claim: who works on the release, the number that grows with every take-over, and
    -- until when the silent owner keeps it. Without an expiry nobody has it.
    claim_owner      TEXT NOT NULL DEFAULT '',
    claim_fence      BIGINT NOT NULL DEFAULT 0,
    claim_expires_at TEXT,
    created_at       TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    started_at       TEXT,
    finished_at      TEXT,
    updated_at       TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);

-- The list by status, and the look for work: what is not terminal.
CREATE INDEX release_tasks_by_status ON release_tasks (status, id);

CREATE TABLE release_task_nodes (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    release_task_id BIGINT NOT NULL REFERENCES release_tasks (id),
    node_id         BIGINT NOT NULL REFERENCES nodes (id),
    batch           INTEGER NOT NULL CHECK (batch >= 1),
    status          TEXT NOT NULL DEFAULT 'pending' CHECK (status IN
                    ('pending', 'running', 'success', 'failed', 'skipped')),
    task_id         TEXT NOT NULL DEFAULT '',
    attempts        INTEGER NOT NULL DEFAULT 0,
    error_kind      TEXT NOT NULL DEFAULT '' CHECK (error_kind IN
                    ('', 'unreachable', 'tls', 'timeout', 'http', 'protocol', 'rejected', 'agent_failed',
                     'verify', 'deadline', 'abandoned')),
    error_msg       TEXT NOT NULL DEFAULT '' CHECK (length(error_msg) <= 255),
    -- An execute agent may be busy with our last request until then: send it nothing before.
    hold_until      TEXT,
    started_at      TEXT,
    finished_at     TEXT,
    created_at      TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    updated_at      TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    UNIQUE (release_task_id, node_id)
);

-- The counters, the current batch, the running nodes of one release.
CREATE INDEX release_task_nodes_by_status ON release_task_nodes (release_task_id, status, batch);

-- Is a node named by a release (so that it can't be deleted).
CREATE INDEX release_task_nodes_by_node ON release_task_nodes (node_id, release_task_id);

-- Rule 2: no node has tasks of two releases in flight, whoever writes.
CREATE UNIQUE INDEX release_task_nodes_one_running ON release_task_nodes (node_id) WHERE status = 'running';

-- Which nodes may still be busy with a request whose answer was lost.
CREATE INDEX release_task_nodes_held ON release_task_nodes (node_id) WHERE hold_until IS NOT NULL;

CREATE TABLE release_events (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    release_task_id BIGINT NOT NULL REFERENCES release_tasks (id),
    node_id         BIGINT REFERENCES nodes (id),
    at              TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    actor           TEXT NOT NULL DEFAULT '',
    event           TEXT NOT NULL,
    from_status     TEXT NOT NULL DEFAULT '',
    to_status       TEXT NOT NULL DEFAULT '',
    detail          TEXT NOT NULL DEFAULT ''
);

-- The history of one release, in order.
CREATE INDEX release_events_by_release ON release_events (release_task_id, id);

-- One row that a look at the health of the database writes: only a commit shows that it can.
CREATE TABLE health_probe (
    id INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);

INSERT INTO health_probe (id) VALUES (1);

INSERT INTO schema_version (version) VALUES (1);

-- step 2: what an Idempotency-Key made, kept for a day

CREATE TABLE idempotency_keys (
    actor           TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    request_sha256  TEXT NOT NULL,
    release_task_id BIGINT NOT NULL REFERENCES release_tasks (id),
    created_at      TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    PRIMARY KEY (actor, idempotency_key)
);

-- Those that are older than a day.
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

INSERT INTO schema_version (version) VALUES (2);

-- step 3: what a strategy has reached, failures that a person accepted, and the freeze

-- Up to which batch all is over (soak, second look, pause), until when a batch soaks, and who
-- paused the release.
ALTER TABLE release_tasks ADD COLUMN passed_batch INTEGER NOT NULL DEFAULT 0;

ALTER TABLE release_tasks ADD COLUMN soak_until TEXT;

ALTER TABLE release_tasks ADD COLUMN paused_by TEXT NOT NULL DEFAULT '';

-- 1: counts against no limit any more.
ALTER TABLE release_task_nodes ADD COLUMN accepted INTEGER NOT NULL DEFAULT 0 CHECK (accepted IN (0, 1));

-- One row: while frozen is 1 nothing new is dispatched, by any process.
CREATE TABLE release_freeze (
    id     INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    frozen INTEGER NOT NULL DEFAULT 0 CHECK (frozen IN (0, 1)),
    reason TEXT NOT NULL DEFAULT '',
    actor  TEXT NOT NULL DEFAULT '',
    at     TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);

INSERT INTO release_freeze (id) VALUES (1);

INSERT INTO schema_version (version) VALUES (3);

-- step 4: prune asks of what a release is a retry or a rollback

CREATE INDEX release_tasks_by_retry_of ON release_tasks (retry_of);

CREATE INDEX release_tasks_by_rollback_of ON release_tasks (rollback_of);

INSERT INTO schema_version (version) VALUES (4);

-- step 5: what is said of a node is what happened there

-- The highest version that was ever sent to a node: raised in the transaction that writes a dispatch down.
ALTER TABLE nodes ADD COLUMN last_version BIGINT NOT NULL DEFAULT 0;

-- Eight hex digits of each release in its tasks' ids. '': a person wrote the row, and the claim draws it.
ALTER TABLE release_tasks ADD COLUMN tag TEXT NOT NULL DEFAULT '';

-- soak_until by the clock that nobody sets: BOOT-ID SECONDS. The same for hold_until and started_at of a node.
ALTER TABLE release_tasks ADD COLUMN soak_clock TEXT NOT NULL DEFAULT '';

ALTER TABLE release_task_nodes ADD COLUMN hold_clock TEXT NOT NULL DEFAULT '';

ALTER TABLE release_task_nodes ADD COLUMN started_clock TEXT NOT NULL DEFAULT '';

-- 0: no try of the release has reached the agent, as far as is known.
ALTER TABLE release_task_nodes ADD COLUMN reached INTEGER NOT NULL DEFAULT 1 CHECK (reached IN (0, 1));

-- For how long pauses and freezes kept the node from its dispatch: no part of its deadline.
ALTER TABLE release_task_nodes ADD COLUMN waited_sec DOUBLE PRECISION NOT NULL DEFAULT 0;

-- The node as it was when the release was made. '' and 0: a person wrote the row, and the claim fills it.
ALTER TABLE release_task_nodes ADD COLUMN node_name TEXT NOT NULL DEFAULT '';

ALTER TABLE release_task_nodes ADD COLUMN main_ip TEXT NOT NULL DEFAULT '';

ALTER TABLE release_task_nodes ADD COLUMN agent_port INTEGER NOT NULL DEFAULT 0;

-- Who was left out of what the key made, as JSON.
ALTER TABLE idempotency_keys ADD COLUMN left_out TEXT NOT NULL DEFAULT '[]';

-- One row: from which version on releases are numbered (migrate --first-version); the highest version that a
-- release may have had that is lost; which timeline of the server a writer saw (PostgreSQL: a failover begins a
-- new one); and when it was found last that the database went back or moved to another server.
CREATE TABLE database_state (
    id            INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    first_version BIGINT NOT NULL DEFAULT 1 CHECK (first_version BETWEEN 1 AND 9007199254740992),
    lost_version  BIGINT NOT NULL DEFAULT 0 CHECK (lost_version BETWEEN 0 AND 9007199254740992),
    timeline      BIGINT NOT NULL DEFAULT 0,
    moved_at      TEXT
);

INSERT INTO database_state (id) VALUES (1);

UPDATE release_task_nodes
SET (node_name, main_ip, agent_port) =
    (SELECT h.name, h.main_ip, h.agent_port FROM nodes h WHERE h.id = release_task_nodes.node_id)
WHERE node_id IN (SELECT id FROM nodes);

UPDATE nodes
SET last_version = COALESCE((SELECT MAX(r.version)
                             FROM release_task_nodes n
                             JOIN release_tasks r ON r.id = n.release_task_id
                             WHERE n.node_id = nodes.id AND n.attempts > 0), 0);

-- The next version is above every one that a node was sent.
CREATE INDEX nodes_by_last_version ON nodes (last_version);

-- What was sent to an address, whatever rows name it.
CREATE INDEX nodes_by_address ON nodes (main_ip, agent_port);

-- The pauses and freezes of one release, among the events of its nodes.
CREATE INDEX release_events_of_releases ON release_events (release_task_id, id) WHERE node_id IS NULL;

INSERT INTO schema_version (version) VALUES (5);

-- step 6: who did what

-- One row for every act that changes anything, and for each release's end; nothing earlier is made up. Its id is the
-- one of the row before it and one; hash is the SHA-256 of the row and of the hash before it (docs/SECURITY.md).
CREATE TABLE audit_log (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    at          TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    actor       TEXT NOT NULL DEFAULT '',
    via         TEXT NOT NULL DEFAULT 'cli' CHECK (via IN ('cli', 'api', 'executor')),
    token       TEXT NOT NULL DEFAULT '',
    certificate TEXT NOT NULL DEFAULT '',
    address     TEXT NOT NULL DEFAULT '',
    request_id  TEXT NOT NULL DEFAULT '',
    action      TEXT NOT NULL,
    object      TEXT NOT NULL DEFAULT '',
    before      TEXT NOT NULL DEFAULT '',
    after       TEXT NOT NULL DEFAULT '',
    hash        TEXT NOT NULL DEFAULT ''
);

-- On SQLite it only grows; on PostgreSQL grants see to that (docs/OPERATIONS.md), and triggers are left out there. A
-- trigger stands in one line, so that its inner semicolons end no statement.

CREATE TRIGGER audit_log_no_update BEFORE UPDATE ON audit_log BEGIN SELECT RAISE(ABORT, 'audit_log only grows'); END;

CREATE TRIGGER audit_log_no_delete BEFORE DELETE ON audit_log BEGIN SELECT RAISE(ABORT, 'audit_log only grows'); END;

-- INSERT OR REPLACE deletes without the trigger above.
CREATE TRIGGER audit_log_no_replace BEFORE INSERT ON audit_log WHEN NEW.id IN (SELECT id FROM audit_log) BEGIN SELECT RAISE(ABORT, 'audit_log only grows'); END;

INSERT INTO schema_version (version) VALUES (6);

-- step 7: what went out, told apart at once

-- The SHA-256 of the payload without its version (docs/SECURITY.md); migrate fills it. '': a person wrote the row, and
-- the claim fills it. Whoever changes a payload sets it to '' too.
ALTER TABLE release_tasks ADD COLUMN payload_sha256 TEXT NOT NULL DEFAULT '';

INSERT INTO schema_version (version) VALUES (7);

-- step 8: for whom a release is, and what each node runs

-- Whom it was for: {} all nodes, or the keys of its request. {"nodesOf": N}: the nodes that release N has; so it is for
-- releases from before this step (a retry: those of the first one), and for those that a person wrote.
ALTER TABLE release_tasks ADD COLUMN selection TEXT NOT NULL DEFAULT '{}';

-- Of which release this one brings the payload to nodes that are behind.
ALTER TABLE release_tasks ADD COLUMN catch_up_of BIGINT REFERENCES release_tasks (id);

UPDATE release_tasks
SET selection = '{"nodesOf":' || (
    WITH RECURSIVE chain (id, first) AS (
        SELECT r.id, r.retry_of FROM release_tasks r WHERE r.id = release_tasks.id
        UNION
        SELECT p.id, p.retry_of FROM release_tasks p JOIN chain c ON p.id = c.first)
    SELECT MIN(id) FROM chain) || '}';

-- The highest version that the nodes of that time may have, and of which nothing is known here: agents had releases of
-- another database (migrate --first-version), or a release was lost.
ALTER TABLE database_state ADD COLUMN unsure_version BIGINT NOT NULL DEFAULT 0;

ALTER TABLE database_state ADD COLUMN unsure_at TEXT NOT NULL DEFAULT '';

UPDATE database_state
SET unsure_version = first_version - 1, unsure_at = COALESCE((SELECT MAX(created_at) FROM nodes), '');

CREATE INDEX release_tasks_by_catch_up_of ON release_tasks (catch_up_of);

-- The newest success of a node, and its failures since.
CREATE INDEX release_task_nodes_succeeded ON release_task_nodes (node_id, release_task_id) WHERE status = 'success';

CREATE INDEX release_task_nodes_failed ON release_task_nodes (node_id, release_task_id) WHERE status = 'failed';

-- What was done to one node.
CREATE INDEX audit_log_by_object ON audit_log (object, id);

INSERT INTO schema_version (version) VALUES (8);

-- step 9: who looks for work

-- One row for each process that does, or did within a day: an old one says when somebody last looked.
CREATE TABLE executors (
    owner      TEXT NOT NULL PRIMARY KEY,
    host       TEXT NOT NULL,
    kind       TEXT NOT NULL DEFAULT 'serve' CHECK (kind IN ('serve', 'tick')),
    started_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    seen_at    TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    -- It is seen again within this time; 0: it was stopped.
    period_sec DOUBLE PRECISION NOT NULL DEFAULT 0,
    -- Why it can dispatch nothing; '' where it can.
    error      TEXT NOT NULL DEFAULT ''
);

INSERT INTO schema_version (version) VALUES (9);

-- step 10: messages that are still to go

-- One row for each, written in the transaction of what it tells, and deleted when every receiver has it.
CREATE TABLE notifications (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    kind            TEXT NOT NULL,
    -- NULL: it is of the freeze.
    release_task_id BIGINT REFERENCES release_tasks (id),
    at              TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    detail          TEXT NOT NULL DEFAULT '',
    -- The message, the same at each try; '' before the first one.
    body            TEXT NOT NULL DEFAULT '',
    -- The receivers that have it, with a space between.
    sent_to         TEXT NOT NULL DEFAULT '',
    attempts        INTEGER NOT NULL DEFAULT 0,
    -- Nobody tries it before; who begins a try moves it ahead.
    next_at         TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    last_error      TEXT NOT NULL DEFAULT ''
);

CREATE INDEX notifications_by_next ON notifications (next_at);

-- prune leaves a release alone of which something is to be told.
CREATE INDEX notifications_by_release ON notifications (release_task_id);

-- The kinds of notifications that the executor has a receiver for, with a comma between.
ALTER TABLE executors ADD COLUMN notify_on TEXT NOT NULL DEFAULT '';

INSERT INTO schema_version (version) VALUES (10);

-- step 11: the list of releases by target, and since when

CREATE INDEX release_tasks_by_target ON release_tasks (target, id);

CREATE INDEX release_tasks_by_created ON release_tasks (created_at);

INSERT INTO schema_version (version) VALUES (11);

-- step 12: how many nodes of a rack, or of a region, may be in flight

-- The labels of the node that the strategy's maxParallelPer needs, as they were when the release was made, as JSON. '':
-- an older row, or one that a person wrote: those of the node now.
ALTER TABLE release_task_nodes ADD COLUMN labels TEXT NOT NULL DEFAULT '';

-- What the caller was told about what the key made, as JSON.
ALTER TABLE idempotency_keys ADD COLUMN warnings TEXT NOT NULL DEFAULT '[]';

INSERT INTO schema_version (version) VALUES (12);

-- step 13: a freeze of one target, and its end; a preflight; who made a release, and who approved it

-- When the freeze of everything is over; NULL: when somebody lifts it.
ALTER TABLE release_freeze ADD COLUMN until TEXT;

-- The name by which one person is told from another (docs/SECURITY.md, "Four eyes"). '': a person wrote the row.
ALTER TABLE release_freeze ADD COLUMN setter TEXT NOT NULL DEFAULT '';

-- With APPROVALS=1: who else than its setter wants the freeze lifted, which takes a second person; '': nobody.
ALTER TABLE release_freeze ADD COLUMN lift_wanted_by TEXT NOT NULL DEFAULT '';

ALTER TABLE release_freeze ADD COLUMN lift_wanted_at TEXT;

-- One row for each target that is frozen by itself: nothing new is dispatched to its releases, by any process. Its
-- columns are those of release_freeze.
CREATE TABLE target_freezes (
    target         TEXT NOT NULL PRIMARY KEY,
    reason         TEXT NOT NULL DEFAULT '',
    actor          TEXT NOT NULL DEFAULT '',
    at             TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    until          TEXT,
    setter         TEXT NOT NULL DEFAULT '',
    lift_wanted_by TEXT NOT NULL DEFAULT '',
    lift_wanted_at TEXT
);

-- Whether this executor has APPROVALS=1: then a process without it lifts nobody else's freeze alone either.
ALTER TABLE executors ADD COLUMN approvals INTEGER NOT NULL DEFAULT 0;

-- 1: a person resumed a release that its preflight had paused, and accepted that; its agents are not asked again.
ALTER TABLE release_tasks ADD COLUMN preflight_accepted INTEGER NOT NULL DEFAULT 0;

-- Before those of its target that have not started, whatever their versions.
ALTER TABLE release_tasks ADD COLUMN goes_first INTEGER NOT NULL DEFAULT 0 CHECK (goes_first IN (0, 1));

-- A freeze does not hold it.
ALTER TABLE release_tasks ADD COLUMN during_freeze INTEGER NOT NULL DEFAULT 0 CHECK (during_freeze IN (0, 1));

-- The releases that were cancelled by what the key made, as JSON.
ALTER TABLE idempotency_keys ADD COLUMN superseded TEXT NOT NULL DEFAULT '[]';

-- The name by which one person is told from another (docs/SECURITY.md, "Four eyes"). '': a person wrote the row.
ALTER TABLE release_tasks ADD COLUMN author TEXT NOT NULL DEFAULT '';

-- wanted: it waits for an approval by somebody else than its author. emergency: somebody let it go without one.
-- automatic: the program made it itself. '': nobody has asked for one; an executor with APPROVALS=1 does before it starts.
ALTER TABLE release_tasks ADD COLUMN approval TEXT NOT NULL DEFAULT ''
    CHECK (approval IN ('', 'wanted', 'given', 'emergency', 'automatic'));

-- Who gave it, or let the release go without.
ALTER TABLE release_tasks ADD COLUMN approved_by TEXT NOT NULL DEFAULT '';

ALTER TABLE release_tasks ADD COLUMN approved_at TEXT;

INSERT INTO schema_version (version) VALUES (13);
