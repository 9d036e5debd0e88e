"""/metrics: what it says, that it stays small and quick, and that Prometheus' own tools can read it."""
from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import leave_out
from lab import (
    ROOT,
    Cli,
    eventually,
    free_port,
    make_certs,
    new_release,
    nothing_committed,
    serving,
    settings_for,
    sql,
    take_away,
)

import releasectl as rc

METRICS = {metric.name: metric for metric in rc.METRICS}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def parse(text: str) -> dict[tuple[str, ...], float]:
    """Return name and label values of each sample, by the official client's parser."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        leave_out("prometheus-client")
    samples = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        metric = METRICS[name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        for sample in family.samples:
            labels = dict(sample.labels)
            bucket = (labels.pop("le"),) if "le" in labels else ()
            assert set(labels) == set(metric.labels)
            key = (sample.name, *(labels[label] for label in metric.labels), *bucket)
            assert key not in samples
            samples[key] = sample.value
    return samples


def promtool(*arguments: str, text: str | None = None) -> None:
    """Run promtool, which must find nothing to say against it."""
    if not shutil.which("promtool"):
        leave_out("promtool (Debian's package prometheus)")
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def look(store: rc.Store) -> dict[tuple[str, ...], float]:
    return parse(rc.metrics_text(store.database.metrics, store, {}))


# -- the format --------------------------------------------------------------------------------

def test_metrics_are_read_by_the_official_parser_and_by_promtool(world):
    world.nodes(3)
    world.agent(2).set(outcome="failed", message="no")
    new_release(world.store)
    world.executor().drain()
    with serving(world.store) as client:
        client("GET", "/api/v1/releases/1")
        answer = client("GET", "/metrics")
    assert answer.headers["Content-Type"] == CONTENT_TYPE
    seen = {re.sub("_(bucket|sum|count)$", "", key[0]) for key in parse(answer.text)}
    elsewhere = {"releasectl_release_nodes", "releasectl_release_last_event_timestamp_seconds",  # nothing is active
                 "releasectl_certificate_expiry_timestamp_seconds",                             # no settings here
                 "releasectl_token_expiry_timestamp_seconds"}
    assert seen == set(METRICS) - elsewhere
    promtool("check", "metrics", text=answer.text)


def test_metrics_hold_no_id_and_no_name_of_a_node(world):
    world.nodes(3)
    world.agent(2).set(outcome="failed", message="edge-2 said no")
    new_release(world.store)
    world.executor().drain()
    with serving(world.store) as client:
        for path in ("/api/v1/releases/1", "/api/v1/nodes/3", "/no/such/place", "/api/v1/releases/77"):
            client("GET", path)
        client("BREW", "/api/v1/nodes")
        text = client("GET", "/metrics").text
    assert not re.search(r"edge-|127\.0\.1\.|apply_config|/no/such|/1\"|/77|BREW", text)
    assert {label for m in rc.METRICS for label in m.labels} == {
        "version", "python", "target", "status", "drift", "outcome", "error_kind", "operation", "route", "method",
        "certificate", "token"}


def test_what_stands_in_a_label_cannot_break_the_format(store):
    store.nodes.add("edge-1", "127.0.1.1")
    new_release(store)
    odd = 'a"b\\c\nreleasectl_frozen 7'
    sql(store, "UPDATE release_tasks SET target = ?", odd)
    assert look(store)["releasectl_releases", odd, "pending"] == 1
    assert look(store)["releasectl_frozen",] == 0


# -- what the database tells ---------------------------------------------------------------------

def test_releases_are_counted_by_target_and_status_and_active_ones_by_their_nodes(store):
    for number in range(1, 5):
        store.nodes.add(f"edge-{number}", f"127.0.1.{number}")
    store.nodes.update(4, {"status": "offline"})
    for target in ("cdn", "cdn", "dns", "web"):
        new_release(store, target=target)
    sql(store, "UPDATE release_tasks SET status = 'failed' WHERE id = 1")
    sql(store, "UPDATE release_tasks SET status = 'running' WHERE id = 2")
    sql(store, "UPDATE release_task_nodes SET status = 'success' WHERE release_task_id = 2 AND node_id = 1")
    sql(store, "UPDATE release_task_nodes SET status = 'running' WHERE release_task_id = 2 AND node_id = 2")
    store.releases.set_freeze(True, "test", "holidays")
    seen = look(store)
    assert {key[1:]: value for key, value in seen.items() if key[0] == "releasectl_releases" and value} == {
        ("cdn", "failed"): 1, ("cdn", "running"): 1, ("dns", "pending"): 1, ("web", "pending"): 1}
    assert len([key for key in seen if key[0] == "releasectl_releases"]) == 3 * len(rc.RELEASE_STATUSES)
    assert {key[1:]: value for key, value in seen.items() if key[0] == "releasectl_release_nodes"} == {
        ("cdn", "pending"): 1, ("cdn", "running"): 1, ("cdn", "success"): 1, ("cdn", "failed"): 0,
        ("cdn", "skipped"): 0}
    assert (seen["releasectl_nodes", "online"], seen["releasectl_nodes", "offline"]) == (3, 1)
    assert seen["releasectl_frozen",] == 1


def test_the_last_event_of_an_active_release_tells_how_long_it_has_not_moved(store):
    store.nodes.add("edge-1", "127.0.1.1")
    new_release(store)
    assert not [key for key in look(store) if key[0] == "releasectl_release_last_event_timestamp_seconds"]
    store.claims.claim(1, "owner", 30)
    at = look(store)["releasectl_release_last_event_timestamp_seconds", "cdn", "running"]
    assert abs(at - time.time()) < 60
    sql(store, "UPDATE release_events SET at = 'yesterday'")
    assert not [key for key in look(store) if key[0] == "releasectl_release_last_event_timestamp_seconds"]


def test_the_oldest_50_targets_have_figures_of_their_own_and_the_rest_is_summed_up(store):
    store.nodes.add("edge-1", "127.0.1.1")
    for number in range(1, 61):
        new_release(store, target=f"t{number:02d}")
    new_release(store, target="t55")
    sql(store, "UPDATE release_tasks SET status = 'running' WHERE target IN ('t59', 't60')")
    seen = look(store)
    assert {key[1] for key in seen if key[0] == "releasectl_releases"} == {
        *(f"t{number:02d}" for number in range(1, 51)), "other"}
    assert seen["releasectl_releases", "other", "pending"] == 9
    assert seen["releasectl_releases", "other", "running"] == 2
    assert seen["releasectl_release_nodes", "other", "pending"] == 2


def test_no_figure_reads_the_nodes_or_events_of_releases_that_are_over(sqlite_url, open_store, monkeypatch):
    store, plans = open_store(sqlite_url), []
    execute = rc.Transaction.execute

    def explained(tx: rc.Transaction, statement: str, *params: object) -> int:
        if statement.strip().startswith("SELECT"):
            plans.extend(row[3] for row in tx._cursor.execute("EXPLAIN QUERY PLAN " + statement, params).fetchall())
        return execute(tx, statement, *params)

    monkeypatch.setattr(rc.Transaction, "execute", explained)
    store.releases.counts()
    steps = [plan for plan in plans if re.search(r"(SCAN|SEARCH)( TABLE)? (release_task_nodes AS )?(n|e)\b", plan)
             or re.search(r"release_(task_nodes|events)", plan)]
    assert len(steps) == 2
    assert all("SEARCH" in step and "release_task_id=?" in step and "INDEX" in step for step in steps), steps


def test_a_database_that_is_away_leaves_what_only_the_process_knows(client, database_url):
    take_away(database_url)
    answer = client("GET", "/metrics")
    assert (answer.status, answer.headers["Content-Type"]) == (200, CONTENT_TYPE)
    seen = parse(answer.text)
    assert seen["releasectl_database_up",] == 0
    assert seen["releasectl_database_errors_total",] == 1
    assert not [key for key in seen if key[0] in ("releasectl_releases", "releasectl_nodes", "releasectl_frozen")]


# -- what the process counts -----------------------------------------------------------------------

def test_ticks_are_counted_by_what_they_found_and_the_last_good_one_is_dated(world):
    world.nodes(1)
    world.executor().tick()
    new_release(world.store)
    executor = world.executor(CONTROL_CERT="/nowhere")
    with pytest.raises(rc.ConfigError):
        executor.tick()
    assert look(world.store)["releasectl_last_tick_timestamp_seconds",] == 0
    executor = world.executor()
    claim = world.store.claims.claim(1, "somebody else", 30)
    executor.tick()
    world.store.claims.drop(claim)
    executor.tick()
    seen = look(world.store)
    assert {key[1]: value for key, value in seen.items() if key[0] == "releasectl_ticks_total"} == {
        "idle": 1, "busy": 1, "worked": 1, "error": 1}
    assert abs(seen["releasectl_last_tick_timestamp_seconds",] - time.time()) < 60


def test_requests_to_agents_are_counted_by_outcome_and_their_time_is_measured(world):
    world.nodes(3)
    world.agent(2).set(outcome="failed", message="no")
    world.agent(3).set(mode="refuse")
    new_release(world.store)
    world.executor(AGENT_RETRIES=1).drain()
    seen = look(world.store)
    requests = {key[1:]: value for key, value in seen.items() if key[0] == "releasectl_agent_requests_total" and value}
    assert requests["dispatch", "success"] == 2
    assert requests["dispatch", "unreachable"] >= 1  # a release that fails sends nothing again
    assert requests["query", "agent_failed"] == 1
    assert requests["query", "success"] >= 1
    name = "releasectl_agent_request_duration_seconds"
    for operation in ("dispatch", "query"):
        buckets = [value for key, value in seen.items() if key[:2] == (f"{name}_bucket", operation)]
        assert buckets == sorted(buckets)
        assert seen[f"{name}_bucket", operation, "+Inf"] == seen[f"{name}_count", operation] == sum(
            value for key, value in requests.items() if key[0] == operation)
        assert 0 < seen[f"{name}_sum", operation] < 60


def test_a_request_that_took_as_long_as_a_bucket_ends_is_in_that_bucket(monkeypatch):
    metrics = rc.Metrics()
    monkeypatch.setattr(rc.time, "monotonic", lambda: 100.0)
    for took_s in (0.25, 0.375, 61.0):
        metrics.count_request("query", "success", 100.0 - took_s)
    seen = parse(metrics.text({}))
    name = "releasectl_agent_request_duration_seconds_bucket"
    assert [seen[name, "query", end] for end in ("0.1", "0.25", "0.5", "60.0", "+Inf")] == [0, 1, 2, 2, 3]


def test_the_durations_of_nodes_and_releases_are_measured_by_how_they_ended(world):
    world.nodes(3, task_ms=700)
    world.agent(2).set(outcome="failed", message="no")
    new_release(world.store, strategy={"maxFailed": 1, "soakSec": 1})
    world.executor().drain()
    new_release(world.store)
    world.store.releases.act("cancel", 2, "anna")  # it never started
    seen = look(world.store)
    nodes, releases = "releasectl_node_duration_seconds", "releasectl_release_duration_seconds"
    counts = {key: value for key, value in seen.items() if key[0] in (f"{nodes}_count", f"{releases}_count")}
    assert counts == {(f"{nodes}_count", "success"): 2, (f"{nodes}_count", "failed"): 1,
                      (f"{releases}_count", "partial"): 1}
    assert (seen[f"{nodes}_bucket", "success", "0.5"], seen[f"{nodes}_bucket", "success", "3600.0"]) == (0, 2)
    assert 2 * 0.7 <= seen[f"{nodes}_sum", "success"] < 60
    assert 1 + 2 * 0.7 <= seen[f"{releases}_sum", "partial"] < 60
    assert seen[f"{releases}_bucket", "partial", "1.0"] == 0


def test_failed_nodes_are_counted_by_error_kind_whoever_ended_them(world):
    world.nodes(2)
    world.agent(1).set(outcome="failed", message="no")
    new_release(world.store)
    world.executor().drain()
    new_release(world.store)
    world.store.claims.claim(2, "owner", 30)
    sql(world.store, "UPDATE release_task_nodes SET status = 'running', started_at = created_at "
                       "WHERE release_task_id = 2 AND node_id = 1")
    world.store.releases.act(rc.CANCEL_BY_FORCE, 2, "test")
    kinds = {key[1]: value for key, value in look(world.store).items() if key[0] == "releasectl_node_failures_total"}
    assert kinds == {**dict.fromkeys(rc.ERROR_KINDS, 0), "agent_failed": 1, "abandoned": 1}


def test_a_takeover_is_counted_and_a_release_that_was_let_go_is_none(store):
    store.nodes.add("edge-1", "127.0.1.1")
    new_release(store)
    store.claims.drop(store.claims.claim(1, "first", 30))
    store.claims.claim(1, "second", 30)
    assert look(store)["releasectl_takeovers_total",] == 0
    sql(store, "UPDATE release_tasks SET claim_expires_at = '2026-01-01T00:00:00.000Z'")
    claim = store.claims.claim(1, "third", 30)
    assert look(store)["releasectl_takeovers_total",] == 1
    assert (claim.fence, claim.version) == (store.releases.get(1).claim_fence, 1)


def test_what_was_rolled_back_is_not_counted(store):
    store.nodes.add("edge-1", "127.0.1.1")
    new_release(store)
    store.claims.claim(1, "first", 30)
    sql(store, "UPDATE release_tasks SET claim_expires_at = '2026-01-01T00:00:00.000Z'")
    with nothing_committed(store), pytest.raises(rc.DatabaseError):
        store.claims.claim(1, "second", 30)
    assert look(store)["releasectl_takeovers_total",] == 0


def test_requests_to_the_api_are_counted_by_route_method_and_status(client):
    client.store.nodes.add("edge-1", "127.0.1.1")
    for method, path in (("GET", "/api/v1/nodes/1"), ("GET", "/api/v1/nodes/7"), ("GET", "/api/v1/nodes/8"),
                         ("HEAD", "/healthz"), ("GET", "/nowhere"), ("BREW", "/healthz")):
        client(method, path)
    client.raw(b"nonsense\r\n\r\n")

    def counted() -> dict[tuple[str, ...], float]:
        seen = parse(client("GET", "/metrics").text)
        return {key[1:]: value for key, value in seen.items()
                if key[0] == "releasectl_api_requests_total" and key[1] != "/metrics"}

    wanted = {("/api/v1/nodes/{id}", "GET", "200"): 1, ("/api/v1/nodes/{id}", "GET", "404"): 2,
              ("/healthz", "HEAD", "200"): 1, ("other", "GET", "404"): 1, ("other", "other", "405"): 1,
              ("other", "GET", "400"): 1}
    eventually(lambda: counted() == wanted, message=lambda: f"counted {counted()}")


def test_the_figures_of_the_process_are_its_own(client):
    seen = parse(client("GET", "/metrics").text)
    assert 0 <= time.time() - seen["process_start_time_seconds",] < 60
    assert 0 < seen["process_cpu_seconds_total",] <= time.process_time()
    assert 5e6 < seen["process_resident_memory_bytes",] < 5e9
    assert 3 <= seen["process_open_fds",] < 1000
    assert 2 <= seen["process_threads",] < 100


def test_many_threads_count_together_without_losing_one():
    metrics = rc.Metrics()
    threads = [threading.Thread(target=lambda: [metrics.count("releasectl_takeovers_total") for _ in range(5000)])
               for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert parse(metrics.text({}))["releasectl_takeovers_total",] == 40000


# -- certificates ----------------------------------------------------------------------------------

def end_of(path: Path) -> float:
    shown = subprocess.run(["openssl", "x509", "-noout", "-enddate", "-in", str(path)], capture_output=True, text=True,
                           check=True).stdout
    return rc.ssl.cert_time_to_seconds(shown.strip().partition("=")[2])


def ends_in(path: Path) -> list[float]:
    return [until for _, until in rc.certificate_times(path.read_text())]


def test_the_end_of_each_certificate_is_told(certs, sqlite_url):
    agents = next((certs / "agents").glob("*.crt"))
    settings = settings_for(sqlite_url, certs, HTTP_CERT=agents, HTTP_KEY=agents.with_suffix(".key"))
    figures = {key[1]: value for key, value in rc.certificate_figures(settings).items()}
    assert figures == {"CONTROL_CERT": end_of(certs / "control.crt"), "CONTROL_CA": end_of(certs / "ca.crt"),
                       "HTTP_CERT": end_of(Path(settings.http_cert))}


def test_an_expired_certificate_and_one_past_2049_are_told_all_the_same(certs, tmp_path, sqlite_url):
    expired = make_certs(tmp_path / "expired", "127.0.1.1", DAYS="-1")
    late = make_certs(tmp_path / "late", "127.0.1.1", DAYS="20000")
    assert ends_in(expired / "control.crt") == [end_of(expired / "control.crt")]
    assert end_of(expired / "control.crt") < time.time()
    assert ends_in(late / "control.crt") == [end_of(late / "control.crt")]
    assert end_of(late / "control.crt") > 2524608000  # 2050: another kind of time in the certificate
    both = tmp_path / "both.crt"
    both.write_text((late / "control.crt").read_text() + "a comment\n" + (expired / "control.crt").read_text())
    figures = rc.certificate_figures(settings_for(sqlite_url, certs, CONTROL_CA=both))
    assert figures["releasectl_certificate_expiry_timestamp_seconds", "CONTROL_CA"] == end_of(expired / "control.crt")


def test_a_certificate_that_cannot_be_read_leaves_the_others(certs, tmp_path, sqlite_url):
    (tmp_path / "broken.crt").write_text("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")
    settings = settings_for(sqlite_url, certs, CONTROL_CA=tmp_path / "broken.crt", HTTP_CERT="/nowhere",
                            HTTP_KEY="/nowhere")
    assert [key[1] for key in rc.certificate_figures(settings)] == ["CONTROL_CERT"]


# -- run-once --metrics-file -------------------------------------------------------------------------

def test_run_once_writes_the_same_for_the_textfile_collector(fleet_cli):
    path = fleet_cli.folder / "out" / "releasectl.prom"
    path.parent.mkdir()
    path.write_text("old")
    before = path.stat().st_ino
    new_release(fleet_cli.world.store)
    fleet_cli.prefix = ("/bin/sh", "-c", 'umask 077; exec "$0" "$@"')
    fleet_cli.ok("run-once", "--drain", "--metrics-file", path)
    text = path.read_text()
    seen = parse(text)
    assert seen["releasectl_releases", "cdn", "success"] == 1
    assert seen["releasectl_agent_requests_total", "dispatch", "success"] == 3
    assert seen["releasectl_ticks_total", "worked"] >= 1
    assert seen["releasectl_certificate_expiry_timestamp_seconds", "CONTROL_CERT"] > time.time()
    # node_exporter has its own of these, and refuses to serve anything when a file has them too
    assert "process_" not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert path.stat().st_ino != before
    assert os.listdir(path.parent) == ["releasectl.prom"]
    promtool("check", "metrics", text=text)


def test_a_metrics_file_that_cannot_be_written_is_told_and_the_work_is_done(fleet_cli):
    new_release(fleet_cli.world.store)
    result = fleet_cli("run-once", "--drain", "--metrics-file", "/nowhere/x.prom")
    assert (result.code, result.err.splitlines()[-1]) == (
        2, "releasectl: --metrics-file /nowhere/x.prom can't be written: no such file or directory")
    assert fleet_cli.world.store.releases.get(1).status == "success"


def test_a_tick_that_fails_writes_the_metrics_file_too(fleet_cli):
    path = fleet_cli.folder / "releasectl.prom"
    fleet_cli.settings["DATABASE_URL"] = "sqlite:////nowhere/x.db"
    result = fleet_cli("run-once", "--metrics-file", path)
    assert (result.code, "the folder /nowhere does not exist" in result.err) == (69, True)
    seen = parse(path.read_text())
    assert (seen["releasectl_database_up",], seen["releasectl_database_errors_total",] >= 1) == (0, True)


def test_a_disabled_executor_dates_no_tick(fleet_cli):
    path = fleet_cli.folder / "releasectl.prom"
    fleet_cli.settings["RELEASE_EXECUTOR_ENABLED"] = "0"
    fleet_cli.ok("run-once", "--metrics-file", path)
    assert ("releasectl_last_tick_timestamp_seconds",) not in parse(path.read_text())


def test_serve_gives_the_certificates_and_the_ticks_of_its_own_process(fleet_cli):
    port = free_port()
    fleet_cli.settings["HTTP_ADDR"] = f"127.0.0.1:{port}"
    new_release(fleet_cli.world.store)
    serve = fleet_cli.start("serve")
    try:
        eventually(lambda: fleet_cli.world.store.releases.get(1).status == "success")
        def seen() -> dict[tuple[str, ...], float]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                return parse(answer.read().decode())
        eventually(lambda: seen()["releasectl_last_tick_timestamp_seconds",] > 0)
        found = seen()
        assert found["releasectl_certificate_expiry_timestamp_seconds", "CONTROL_CA"] > time.time()
        assert found["releasectl_agent_requests_total", "dispatch", "success"] == 3
        assert found["releasectl_ticks_total", "worked"] >= 1
    finally:
        serve.terminate()
        Cli.end(serve)


# -- what is made of them ----------------------------------------------------------------------------

RULES = ROOT / "docs" / "alerts.yml"
DASHBOARD = ROOT / "docs" / "grafana-dashboard.json"


def used(text: str) -> set[str]:
    """Return the metrics that expressions name."""
    return {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"\b(?:releasectl|process)_[a-z_]+", text)}


def test_the_documentation_has_every_metric_with_its_labels():
    text = (ROOT / "docs" / "OPERATIONS.md").read_text(encoding="utf-8")
    section = text.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in re.findall(
        r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", section, re.MULTILINE)}
    assert rows == {m.name: (m.kind, m.labels) for m in rc.METRICS}


def test_alerts_and_dashboard_ask_only_for_metrics_that_there_are():
    expressions = re.findall(r"^ +expr: (.+)$", RULES.read_text(encoding="utf-8"), re.MULTILINE)
    assert expressions
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    targets = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert used(" ".join(expressions)) <= set(METRICS)
    assert used(" ".join(targets)) <= set(METRICS)
    # what only tells of other figures: nobody looks at it alone
    assert set(METRICS) - used(" ".join(targets)) <= {"process_start_time_seconds", "process_threads"}
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_promtool_takes_the_alert_rules():
    promtool("check", "rules", str(RULES))


DAY = 86400
ALERTS = [
    ("ReleasectlExecutorNotTicking", [("releasectl_last_tick_timestamp_seconds", "0+0x60")], "20m"),
    ("ReleasectlGone", [("releasectl_takeovers_total", "0+0x60")], "20m"),
    ("ReleasectlReleaseFailed", [('releasectl_releases{target="cdn",status="failed"}', "3x10 4x50")], "14m"),
    ("ReleasectlReleaseFailed", [('releasectl_releases{target="cdn",status="partial"}', "3x10 4x50")], "14m"),
    ("ReleasectlReleaseStuck",
     [('releasectl_release_last_event_timestamp_seconds{target="cdn",status="running"}', "0x90")], "80m"),
    ("ReleasectlDatabaseErrors", [("releasectl_database_up", "0x30")], "10m"),
    ("ReleasectlDatabaseErrors", [("releasectl_database_errors_total", "0+1x30")], "20m"),
    ("ReleasectlDatabaseWentBack", [("releasectl_database_went_back_total", "0x5 1x30")], "10m"),
    ("ReleasectlFrozen", [("releasectl_frozen", "1x400")], "5h"),
    ("ReleasectlFrozen", [('releasectl_target_frozen{target="cdn"}', "1x400"), ("releasectl_frozen", "0x400")], "5h"),
    ("ReleasectlNotificationsStuck",
     [('releasectl_notifications_oldest_age_seconds{instance="a"}', "1000+60x30")], "20m"),
    ("ReleasectlNodesDrift", [('releasectl_nodes_drift{instance="a"}', "1x90")], "80m"),
    ("ReleasectlCertificateExpiring",
     [('releasectl_certificate_expiry_timestamp_seconds{certificate="CONTROL_CERT"}', f"{10 * DAY}x200")], "2h"),
    ("ReleasectlCertificateExpiresNow",
     [('releasectl_certificate_expiry_timestamp_seconds{certificate="HTTP_CERT"}', f"{2 * DAY}x60")], "30m"),
    ("ReleasectlTokenExpiring",
     [('releasectl_token_expiry_timestamp_seconds{token="deploy"}', f"{5 * DAY}x200")], "2h"),
    ("ReleasectlCrlExpiring",
     [('releasectl_certificate_expiry_timestamp_seconds{certificate="CONTROL_CA_CRL"}', f"{DAY // 2}x60")], "30m"),
]
WELL = [('releasectl_nodes_drift{instance="a",drift="behind"}', "2x20 0x20 2x50 0x300"),
        ('releasectl_nodes_drift{instance="a",drift="none"}', "5x400"),
        ("releasectl_last_tick_timestamp_seconds", "0+60x400"), ("releasectl_frozen", "0x400"),
        ("releasectl_database_up", "1x400"), ("releasectl_database_errors_total", "0x400"),
        ("releasectl_database_went_back_total", "0x400"),
        ('releasectl_notifications_oldest_age_seconds{instance="a"}', "0x10 60+60x10 0x380"),
        ('releasectl_releases{target="cdn",status="failed"}', "9x20 3x380"),  # pruned: no failure
        ('releasectl_release_last_event_timestamp_seconds{target="cdn",status="running"}', "0+60x400"),
        ('releasectl_release_last_event_timestamp_seconds{target="dns",status="paused"}', "0x400"),
        ('releasectl_certificate_expiry_timestamp_seconds{certificate="CONTROL_CERT"}', f"{90 * DAY}x400"),
        ('releasectl_token_expiry_timestamp_seconds{token="deploy"}', f"{30 * DAY}x400"),
        ('releasectl_certificate_expiry_timestamp_seconds{certificate="CONTROL_CA_CRL"}', f"{2 * DAY}x400")]


def fires(series: list[tuple[str, str]], alert: str, at: str, tmp_path: Path, wanted: bool) -> None:
    """Let promtool find out whether an alert fires: what it says is the test's verdict."""
    rules = tmp_path / "rules.yml"
    # of each alert only its expression and its patience: labels and words are not what is tested
    rules.write_text(re.sub(r"^( +)(labels|annotations):\n(?:\1 +.+\n)+", "", RULES.read_text(encoding="utf-8"),
                            flags=re.MULTILINE))
    seen = [{"series": name, "values": values} for name, values in series]
    labels = dict(re.findall(r'(\w+)="([^"]+)"', series[0][0])) if wanted else {}
    case = tmp_path / "case.yml"
    case.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [{
        "interval": "1m", "input_series": seen,
        "alert_rule_test": [{"eval_time": at, "alertname": alert,
                             "exp_alerts": [{"exp_labels": labels, "exp_annotations": {}}] if wanted else []}]}]}))
    promtool("test", "rules", str(case))


@pytest.mark.parametrize(("alert", "series", "at"), ALERTS, ids=[f"{n}-{a[0]}" for n, a in enumerate(ALERTS)])
def test_each_alert_fires_when_it_should(alert, series, at, tmp_path):
    fires(series, alert, at, tmp_path, wanted=True)


@pytest.mark.parametrize("alert", sorted({alert for alert, _, _ in ALERTS}))
def test_no_alert_fires_while_all_is_well(alert, tmp_path):
    for at in ("16m", "25m", "6h"):
        fires(WELL, alert, at, tmp_path, wanted=False)


def test_every_alert_is_tried_here():
    assert set(re.findall(r"alert: (\w+)", RULES.read_text(encoding="utf-8"))) == {alert for alert, _, _ in ALERTS}


@pytest.mark.parametrize("frozen", ["releasectl_frozen", 'releasectl_target_frozen{target="cdn"}'])
def test_a_frozen_release_is_not_called_stuck(frozen, tmp_path):
    fires([('releasectl_release_last_event_timestamp_seconds{target="cdn",status="running"}', "0x90"),
           (frozen, "1x90")], "ReleasectlReleaseStuck", "80m", tmp_path, wanted=False)
