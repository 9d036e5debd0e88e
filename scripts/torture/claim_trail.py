"""Who had the claim when an event was written: a table that triggers of the database fill, in order."""

from __future__ import annotations

from collections.abc import Iterator

import releasectl as rc

from .figures import Finding

# What comes with the first claim (started, renumbered) is written before it, and a rollback by itself is created by who
# had the claim of another release: these are left out.
STATEMENTS = {
    "sqlite": (
        """CREATE TABLE torture_trail (id INTEGER PRIMARY KEY AUTOINCREMENT, release_id INTEGER,
               owner TEXT, fence INTEGER, event TEXT)""",
        """CREATE TRIGGER torture_claims AFTER UPDATE OF claim_fence ON release_tasks
           WHEN NEW.claim_fence <> OLD.claim_fence BEGIN
               INSERT INTO torture_trail (release_id, owner, fence, event)
               VALUES (NEW.id, NEW.claim_owner, NEW.claim_fence, ''); END""",
        """CREATE TRIGGER torture_events AFTER INSERT ON release_events
           WHEN NEW.event NOT IN ('started', 'renumbered', 'created') BEGIN
               INSERT INTO torture_trail (release_id, owner, fence, event)
               VALUES (NEW.release_task_id, NEW.actor, 0, NEW.event || ' ' || NEW.id); END"""),
    "postgresql": (
        """CREATE TABLE torture_trail (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, release_id BIGINT,
               owner TEXT, fence BIGINT, event TEXT)""",
        """CREATE FUNCTION torture_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               INSERT INTO torture_trail (release_id, owner, fence, event)
               VALUES (NEW.id, NEW.claim_owner, NEW.claim_fence, ''); RETURN NULL; END $$""",
        """CREATE FUNCTION torture_event() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               INSERT INTO torture_trail (release_id, owner, fence, event)
               VALUES (NEW.release_task_id, NEW.actor, 0, NEW.event || ' ' || NEW.id); RETURN NULL; END $$""",
        """CREATE TRIGGER torture_claims AFTER UPDATE OF claim_fence ON release_tasks FOR EACH ROW
           WHEN (NEW.claim_fence <> OLD.claim_fence) EXECUTE FUNCTION torture_claim()""",
        """CREATE TRIGGER torture_events AFTER INSERT ON release_events FOR EACH ROW
           WHEN (NEW.event NOT IN ('started', 'renumbered', 'created')) EXECUTE FUNCTION torture_event()"""),
}


def begin_trail(database: rc.Database) -> None:
    """Let the database note who writes what under whose claim. Its schema must be there."""
    with database.transaction(write=True) as tx:
        for statement in STATEMENTS[database.engine.name]:
            tx.execute(statement)


def check_trail(database: rc.Database) -> Iterator[Finding]:
    """Yield every event that a process wrote while another one had the claim."""
    with database.transaction() as tx:
        rows = tx.rows("SELECT release_id, owner, fence, event FROM torture_trail ORDER BY id")
    owners: dict[int, tuple[str, int]] = {}
    for release_id, owner, fence, event in rows:
        if not event:
            if fence <= owners.get(release_id, ("", 0))[1]:
                yield Finding("owners", f"release {release_id}: fence {fence} after {owners[release_id]}")
            owners[release_id] = (owner, fence)
        # of the actors only processes have names of this form, HOST:PID:RANDOM
        elif owner.count(":") == 2 and owner != owners.get(release_id, ("", 0))[0]:
            yield Finding("owners", f"release {release_id}: event {event} is by {owner}, the claim was with "
                                    f"{owners.get(release_id)}")
