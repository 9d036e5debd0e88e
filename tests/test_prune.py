"""`prune`: what goes, and what stays because a rollback or a link needs it (issue 8, point 5)."""
from __future__ import annotations

import time

import pytest
from lab import add_nodes, new_release, statuses

import releasectl as rc

DAY_S = 86400.0


class Past:
    """Releases in a store that ended some days ago."""

    def __init__(self, store: rc.Store):
        self.store = store
        add_nodes(store, 2)

    def release(self, status: str, days_ago: float, **fields) -> int:
        """Make a release that ended so; return its id. With retry_of or rollback_of it is linked."""
        made = new_release(self.store, **fields)
        at = rc.utc_text(time.time() - days_ago * DAY_S)
        with self.store.database.transaction(write=True) as tx:
            tx.execute("UPDATE release_tasks SET status = ?, finished_at = ?, updated_at = ? WHERE id = ?", status,
                       at if status in rc.TERMINAL else None, at, made.id)
            if status in (rc.SUCCESS, rc.FAILED):
                tx.execute("UPDATE release_task_nodes SET status = ? WHERE release_task_id = ?", status, made.id)
        return made.id

    def many(self, *what: tuple[str, float]) -> list[int]:
        return [self.release(status, days) for status, days in what]

    def ids(self) -> list[int]:
        return sorted(r.id for r in self.store.releases.page(size=100).items)

    def prune(self, older_than_days: float = 90, keep: int = 1) -> list[int]:
        """Delete what prune would, in one go; return the ids that are left."""
        found = [r.id for r in self.store.history.prunable(older_than_days * DAY_S, keep)]
        assert found == sorted(found, reverse=True)
        assert self.store.history.delete(found) == found[::-1]
        return self.ids()


@pytest.fixture
def past(store):
    return Past(store)


def test_prune_keeps_the_newest_and_the_success_before_them(past):
    past.many(("success", 200), ("success", 199), ("failed", 198), ("failed", 197), ("failed", 196))
    assert past.prune(keep=2) == [2, 4, 5]


def test_prune_never_deletes_the_last_success_though_it_is_old(past):
    past.release("success", 500, payload={"site": "good"})
    past.many(*[("failed", 400)] * 5)
    assert past.prune(keep=1) == [1, 6]
    assert rc.parse_json(past.store.releases.rollback(6, "test")[0].payload)["site"] == "good"


def test_a_rollback_of_whatever_stays_has_what_it_had_before(past):
    for number, days in enumerate((400, 300, 200, 50, 10)):
        past.release("success", days, payload={"site": number})
    assert past.prune(keep=1) == [3, 4, 5]  # 4 and 5 are not older, 3 is what a rollback of 4 brings back
    assert rc.parse_json(past.store.releases.rollback(4, "test", rc.Again(over_newer=True))[0].payload)["site"] == 2


@pytest.mark.parametrize("status", ["pending", "running", "paused", "cancelling"])
def test_prune_never_deletes_what_is_not_at_its_end(past, status):
    past.many(("failed", 400), (status, 400), ("failed", 400))
    assert past.prune() == [2, 3]


def test_prune_counts_each_target_for_itself(past):
    for target in ("cdn", "dns", "cdn", "dns", "cdn"):
        past.release("failed", 400, target=target)
    assert past.prune() == [4, 5]


def test_prune_keeps_what_a_release_that_stays_is_linked_to(past):
    first = past.release("failed", 400)
    again = past.release("failed", 400, retry_of=first)
    past.release("failed", 400)
    past.release("failed", 1, rollback_of=again)
    assert past.prune() == [1, 2, 4]


def test_prune_deletes_both_ends_of_a_link_that_nobody_needs(past):
    first = past.release("failed", 400)
    past.release("failed", 400, retry_of=first)
    past.release("failed", 400)
    assert past.prune() == [3]


def test_a_release_that_somebody_retried_meanwhile_stays(past):
    first = past.release("failed", 400)
    past.release("failed", 400, retry_of=first)
    past.many(("success", 400), ("failed", 400))
    found = [r.id for r in past.store.history.prunable(90 * DAY_S, 1)]
    assert found == [2, 1]
    past.store.releases.retry(2, "test", rc.Again(over_newer=True))
    assert past.store.history.delete(found) == []
    assert past.ids() == [1, 2, 3, 4, 5]


def test_versions_are_never_used_again_after_prune(past):
    past.many(*[("failed", 400)] * 4)
    assert past.prune() == [4]
    assert new_release(past.store).version == 5
    assert new_release(past.store, target="dns").version == 6


def test_prune_takes_nodes_events_and_keys_with_it(past):
    past.many(("failed", 400), ("failed", 400))
    with past.store.database.transaction(write=True) as tx:
        tx.execute("INSERT INTO idempotency_keys (actor, idempotency_key, request_sha256, release_task_id) "
                   "VALUES ('api', 'k', '', 1)")
    assert past.prune() == [2]
    with past.store.database.transaction() as tx:
        for name in ("release_events", "release_task_nodes", "idempotency_keys"):
            assert tx.value(f"SELECT COUNT(*) FROM {name} WHERE release_task_id = 1") == 0
        assert tx.value("SELECT COUNT(*) FROM release_task_nodes WHERE release_task_id = 2") == 2
    with pytest.raises(rc.AppError, match="release 1 does not exist"):
        past.store.releases.get(1)
    assert statuses(past.store, 2) == ["failed", "failed"]


def test_dry_run_shows_what_prune_would_delete_and_deletes_nothing(quick, database_url, open_store):
    past = Past(open_store(database_url))
    quick.settings["DATABASE_URL"] = database_url
    past.many(("success", 400), ("failed", 400), ("failed", 400))
    shown = quick.ok("prune", "--older-than", "90d", "--keep", "1", "--dry-run", "--json").json
    assert (shown["dryRun"], shown["total"], [r["id"] for r in shown["items"]]) == (True, 1, [2])
    assert shown["items"][0].keys() == {"id", "version", "target", "status", "totalNodes", "endedAt"}
    text = quick.ok("prune", "--older-than", "90d", "--keep", "1", "--dry-run").out
    assert text.splitlines()[-1] == "releases to be deleted: 1"
    assert past.ids() == [1, 2, 3]
    assert quick.ok("prune", "--older-than", "90d", "--keep", "1").out == "releases deleted: 1\n"
    assert past.ids() == [1, 3]
    assert quick.ok("prune", "--older-than", "90d", "--keep", "1").out == "releases deleted: 0\n"


@pytest.mark.parametrize("arguments", [
    (), ("--older-than", "23h"), ("--older-than", "40000d"), ("--older-than", "90d", "--keep", "0")])
def test_prune_refuses_what_would_delete_too_much(quick, arguments):
    quick.refused(rc.EXIT_USAGE, "prune", *arguments)


def test_prune_deletes_in_parts_so_that_no_transaction_is_long(quick, sqlite_url, open_store, monkeypatch):
    past = Past(open_store(sqlite_url))
    quick.settings["DATABASE_URL"] = sqlite_url
    past.many(*[("failed", 400)] * 7)
    parts = []
    forget = rc.History.delete
    monkeypatch.setattr(rc.History, "delete", lambda store, ids, _by: parts.append(list(ids)) or forget(store, ids))
    monkeypatch.setattr(rc, "PRUNE_NODES", 4)
    quick.ok("prune", "--older-than", "90d", "--keep", "1")
    assert parts == [[6, 5], [4, 3], [2, 1]]  # two nodes each
    assert past.ids() == [7]


def test_prune_deletes_many_releases_with_the_retries_and_rollbacks_of_each(store):
    past = Past(store)
    past.many(("success", 500))
    for _ in range(15):
        failed = past.release("failed", 400)
        past.release("failed", 400, retry_of=failed)
        past.release("failed", 400, rollback_of=failed)
    past.many(("success", 1))
    assert past.prune(keep=1) == [47]


def test_prune_of_a_large_fleet_compares_no_node_with_all_others():
    """With a copy of what is known for each of 30,000 nodes this would take minutes."""
    nodes = frozenset(range(30_000))
    releases = [rc.OldRelease(n, "cdn", n, "success", None, None, len(nodes), "2026-01-01") for n in (1, 2, 3)]
    content = rc.Content("", nodes, nodes)
    assert [r.id for r in rc.prunable(releases, "2026-02-01", 1, lambda r: content._replace(digest=str(r.id)))] == [1]
