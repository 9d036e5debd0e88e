"""The phases "points" and "faults": one small release and one injection in a database of its own, many at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lab import SITES, Inbox

import releasectl as rc

from .agent_checks import check_agents, check_intents
from .agents import RecordedAgents
from .claim_trail import begin_trail, check_trail
from .databases import retry
from .figures import Finding
from .injections import CALL, COUNTED, COUNTING, FAULTS, Injection
from .laboratory import Laboratory
from .receivers import KINDS, SETTINGS, check_told, deliver
from .scenarios import FAULT_SCENARIOS, LONG, LONG_POINTS, PAYLOAD_FILE, READING_POINTS, SCENARIOS, Scenario
from .tables import Tables, check_tables, read_open_releases, read_tables
from .workers import CLEAN_EXITS, CLEAN_STOP_S, TRACE, Worker, settings_for

CLAIM_TTL_S = 1.0
LIMIT_S = 60.0  # for a whole trial


class Trial:
    """One run of a scenario with an injection: start the worker, let others end its release, check."""

    def __init__(self, lab: Laboratory, scenario: Scenario, injection: Injection):
        self.lab, self.scenario, self.injection = lab, scenario, injection
        self.name = f"{injection} {' '.join(scenario.command)}"
        self.has_fired = False
        self.counted: dict[str, Any] = {}  # what the injection "count" reported
        self._began_at = time.monotonic()
        self._ends_at = self._began_at + LIMIT_S
        self._url = lab.databases.new()
        self._store = rc.Store(rc.Database(self._url, notify_on=frozenset(KINDS)))
        self._inbox = Inbox()
        self._agents = RecordedAgents(lab.certs, scenario.protocols, scenario.task_ms)
        self._settings = settings_for(self._url, lab.certs, CLAIM_TTL_S, AGENT_REQUEST_TIMEOUT_SEC=1,
                                      NOTIFY_URL=self._inbox.url, **SETTINGS, **dict(scenario.settings))
        self._workers: list[Worker] = []
        self._findings: list[Finding] = []

    def run(self) -> Trial:
        try:
            if self.scenario.before:
                self._prepare()
            self._play()
            deliver(self._store.database, self._tick, self._ends_at)
            tables = read_tables(self._store.database)
            self._findings += [*check_tables(tables), *check_agents(tables, self._agents),
                               *check_trail(self._store.database), *self._check_end(tables),
                               *check_told(tables, self._inbox, self.lab.figures)]
        except Exception as error:  # the edge of a trial: the others go on
            logging.exception("%s", self.name)
            self._findings.append(Finding("process", f"the trial itself failed: {error!r}"))
        finally:
            for worker in self._workers:
                worker.kill()
                self.lab.workers.drop(worker)
                self._findings += check_log(worker)
            self._agents.stop()
            self._inbox.stop()
            self._store.database.close()
        self._keep_or_clear()
        logging.info("%.1f s: %s", time.monotonic() - self._began_at, self.name)
        return self

    def _prepare(self) -> None:
        """Make what the scenario is to find; other processes may be at the database."""
        retry(self._store.database.migrate)
        retry(lambda: begin_trail(self._store.database))
        self._agents.add_nodes(self._store)
        if self.scenario.before != "nodes":
            retry(lambda: self._store.releases.create(rc.ReleaseRequest(reason="torture", payload=SITES), "torture"))
        self._agents.fleet.set(outcome=self.scenario.outcome)
        if self.scenario.before == "cancelled":
            self._store.releases.act("cancel", 1, "torture")

    def _play(self) -> None:
        worker = self._start(self.scenario.command, ",".join(filter(None, [self.scenario.first, str(self.injection)])))
        self._watch(worker)
        self.has_fired = self.injection in worker.fired()
        if self.has_fired:
            self.lab.figures.count_fired(self.injection)
        if not self.scenario.before:  # the migration was cut short: prepare now what other scenarios begin with
            time.sleep(CLAIM_TTL_S / 2)
            worker.send(signal.SIGCONT)
            self._prepare()
        self._findings += retry(lambda: list(check_intents(self._store.database, self._agents)))
        self._rescue(worker)
        self._wake(worker)
        self._rescue(worker)  # once it was awake it may have brought more to do
        for report in worker.reports(COUNTED):
            self.counted = json.loads(report)

    def _start(self, command: Sequence[str], injections: str = "") -> Worker:
        words = [self.lab.payload_file if word == PAYLOAD_FILE else word for word in command]
        worker = self.lab.workers.fork(words, self._settings, injections)
        self._workers.append(worker)
        return worker

    def _watch(self, worker: Worker) -> None:
        """Wait until the worker has ended, is suspended, or has done its work."""
        is_server = self.scenario.command[0] == "serve"
        while worker.exit_code() is None and time.monotonic() < self._ends_at:
            if self.injection.suspends and self.injection in worker.fired():
                return
            if is_server and self._is_over():
                worker.terminate()
                worker.wait(CLEAN_STOP_S)
                return
            time.sleep(0.02)

    def _rescue(self, worker: Worker) -> None:
        """Let fresh processes end the release, as the next ticks of cron would."""
        while not self._is_over() and time.monotonic() < self._ends_at:
            time.sleep(min(max(self._claimed_for_s(), 0.0), CLAIM_TTL_S))
            rescuer = self._start(("run-once", "--drain"))
            code = rescuer.wait(max(self._ends_at - time.monotonic(), 0.1))
            if code not in CLEAN_EXITS:
                self._findings.append(Finding("process", f"the rescuer ended with {code}: {rescuer.end_of_log()}"))
                return
            if code == rc.EXIT_UNAVAILABLE:
                worker.send(signal.SIGCONT)  # on SQLite a suspended writer keeps everyone out
            if code != rc.EXIT_DONE:
                time.sleep(0.1)

    def _tick(self) -> None:
        self._start(("run-once",)).wait(max(self._ends_at - time.monotonic(), 0.1))

    def _wake(self, worker: Worker) -> None:
        """Wake a worker that is suspended; it must end by itself, with the right code."""
        give_up_at = time.monotonic() + CLEAN_STOP_S
        while worker.exit_code() is None and time.monotonic() < give_up_at:
            worker.send(signal.SIGCONT)  # again, as it may report that it suspends itself just before it does
            worker.wait(0.5)
        code = worker.exit_code()
        is_right = code == -signal.SIGKILL if self.has_fired and self.injection.kills else code in CLEAN_EXITS
        if not is_right:
            self._findings.append(Finding("process", f"it ended with {code}: {worker.end_of_log()}"))

    def _is_over(self) -> bool:
        return not retry(lambda: read_open_releases(self._store.database))

    def _claimed_for_s(self) -> float:
        """Return for how long the latest claim stands if nobody renews it."""
        def latest() -> str:
            with self._store.database.transaction() as tx:
                return tx.value("SELECT MAX(claim_expires_at) FROM release_tasks") or ""
        expires = retry(latest)
        return rc.epoch_of(expires) - time.time() if expires else 0.0

    def _check_end(self, tables: Tables) -> Iterator[Finding]:
        """Yield what may not be when a release to agents that behave has ended."""
        command = self.scenario.command[0]
        allowed = {"success", "cancelled"} if command in ("cancel", "retry") else {self.scenario.outcome}
        for release in tables.releases:
            if release.status not in allowed:
                yield Finding("lost", f"release {release.id} ended as {release.status}: "
                                      f"{[node for node in tables.nodes if node.status == 'failed']}")
        if command in ("create", "retry"):
            took_place = not self.has_fired or self.injection.when != "before"
            expected = int(command == "retry") + int(took_place)
            if len(tables.releases) != expected:
                yield Finding("lost", f"{len(tables.releases)} releases, {expected} were created")
        elif self.scenario.before == "created" and command != "cancel" and self.scenario.outcome == "success":
            for agent in self._agents.all:
                if len(agent.runs) != 1:
                    yield Finding("twice" if agent.runs else "untrue", f"{agent.address} ran {agent.runs}")

    def _keep_or_clear(self) -> None:
        """Keep the evidence where something was wrong, else nothing."""
        if not self.lab.figures.add(self._findings, self.name):
            for worker in self._workers:
                worker.log.unlink(missing_ok=True)
            self.lab.databases.free(self._url)
            return
        folder = self.lab.evidence_folder(f"trials/{self.name.replace(' ', '_').replace(':', '-')}")
        self.lab.databases.dump(self._url, folder)
        for number, worker in enumerate(self._workers):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(worker.log, folder / f"{number}-{worker.log.name}")


def check_log(worker: Worker) -> Iterator[Finding]:
    """Yield the stack traces in a log, as one finding: whatever happens, one line must say it."""
    text = worker.log_text()
    count, at = text.count(TRACE), text.find(TRACE)
    if count:
        yield Finding("traces", f"{worker.name}: {count}, the first: {text[max(at - 300, 0):at + 3000]}")


# -- the two phases -----------------------------------------------------------------------------


Planned = tuple[Scenario, Injection]


def run_trials(lab: Laboratory, trials: Iterable[Planned], at_once: int, ends_at: float) -> None:
    """Run trials, some at a time; those that could not begin in time are left out."""
    def run(planned: Planned) -> None:
        if time.monotonic() > ends_at:
            lab.figures.count("trials left out for time")
            return
        lab.figures.count("trials")
        Trial(lab, *planned).run()

    pool = ThreadPoolExecutor(at_once)
    try:
        list(pool.map(run, trials))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # all are done, or we were told to stop


def count_undisturbed(lab: Laboratory, scenarios: Iterable[Scenario]) -> dict[Scenario, dict[str, Any]]:
    """Return what a worker reported in each scenario when nothing was done to it."""
    return {scenario: Trial(lab, scenario, COUNTING).run().counted for scenario in scenarios}


def run_points(lab: Laboratory, depth: int, whens: Sequence[str], at_once: int, ends_at: float) -> None:
    """Try every point and moment; a moment that did not come is tried once more, at the first hit."""
    trials = plan_points(lab, depth, whens)
    run_trials(lab, trials, at_once, ends_at)

    def missed() -> list[Planned]:
        first = {(scenario, injection._replace(hit=1)): None for scenario, injection in trials}
        return [(scenario, injection) for scenario, injection in first
                if not lab.figures.points.get(injection.point, Counter())[injection.when]]

    run_trials(lab, missed(), at_once, ends_at)
    lab.figures.count("points that were not reached", len(missed()))


def plan_points(lab: Laboratory, depth: int, whens: Sequence[str]) -> list[Planned]:
    """Return the trials of all points: every moment, up to the hit number `depth`; with 1, a random hit."""
    counted = count_undisturbed(lab, set(SCENARIOS.values()))
    trials = [(LONG, Injection(point, when, 1 if point != "claims.commit" else lab.random.randint(1, 2)))
              for point, when in itertools.product(LONG_POINTS, whens)]
    for (point, scenario), when in itertools.product(SCENARIOS.items(), whens):
        passed = counted[scenario].get("passed", {}).get(point, 0)
        if not passed:
            lab.figures.points[point] = Counter({"not passed by any scene": 0})
        elif not (point in READING_POINTS and when.startswith("stop-")):
            hits = range(1, min(passed, depth) + 1) if depth > 1 else [lab.random.randint(1, passed)]
            trials += [(scenario, Injection(point, when, hit)) for hit in hits]
    lab.random.shuffle(trials)
    return trials


def plan_faults(lab: Laboratory, every_kind: bool, at_most: int) -> list[Planned]:
    """Return the trials of calls of the database that fail: each call, with every kind of fault or a random one."""
    counted = count_undisturbed(lab, FAULT_SCENARIOS)
    trials = []
    for scenario in FAULT_SCENARIOS:
        calls, commits = counted[scenario].get("calls", 0), set(counted[scenario].get("commits", ()))
        for number in range(1, calls + 1):
            kinds = [kind for kind in FAULTS[lab.databases.name] if kind != "lost" or number in commits]
            trials += [(scenario, Injection(CALL, kind, number))
                       for kind in (kinds if every_kind else [lab.random.choice(kinds)])]
    lab.random.shuffle(trials)
    return trials[:at_most] if at_most else trials
