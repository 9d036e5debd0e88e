"""The phase "random": a few processes on one database, releases without end, and all that can go wrong."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from fake_agent import Agent
from lab import Inbox

import releasectl as rc

from .agent_checks import check_agents, check_created, check_intents
from .agents import RecordedAgents
from .claim_trail import begin_trail, check_trail
from .databases import PostgresServer, retry
from .failovers import Failovers
from .figures import Finding
from .injections import WHENS, Injection
from .laboratory import Laboratory
from .operators import Operator
from .receivers import SETTINGS, begin_telling, check_told, deliver
from .scenarios import EXECUTOR_POINTS
from .tables import Tables, check_now, check_tables, read_tables
from .take_overs import TakeOvers
from .trials import check_log
from .workers import CLEAN_EXITS, CLEAN_STOP_S, Worker, settings_for

CLAIM_TTL_S = 2.0
END_LIMIT_S = 180.0


class Amounts(NamedTuple):
    """How much is to be done, within so many seconds."""

    kills: int
    suspends: int
    restarts: int
    failovers: int
    seconds: float
    nodes: int


class Chaos:
    """The whole phase; run() runs it once."""

    RUNNING = 4
    SUSPENDED = 3
    KILL_EVERY_S = 0.35
    SUSPEND_EVERY_S = 1.2
    CUT_EVERY_S = 0.5

    def __init__(self, lab: Laboratory, amounts: Amounts):
        self._lab, self._amounts, self._figures, self._random = lab, amounts, lab.figures, lab.random
        self._server = lab.databases if isinstance(lab.databases, PostgresServer) else None
        self._url = lab.databases.new()
        if self._server and amounts.failovers:
            self._server.add_standby()
            self._url = self._server.url_of_primary(self._url)
        self._agents = RecordedAgents(
            lab.certs, ["execute" if number % 4 == 3 else "tasks" for number in range(amounts.nodes)], 100)
        self._database = rc.Database(self._url)
        self._inbox = Inbox()
        self._failovers = Failovers(self._server, self._url, self._agents, self._figures, amounts.failovers) if (
            self._server and amounts.failovers) else None
        self._operator = Operator(self._url, self._agents, self._figures, self._random.randrange(2**32))
        self._take_overs = TakeOvers(self._database, self._figures)
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._stop_watch = threading.Event()
        self._workers: list[Worker] = []
        self._suspended: list[Worker] = []
        self._due: dict[str, float] = {}  # when something of a kind happens next
        self._calm_since = 0.0  # nobody is killed before a failover; 0: no failover is near

    def run(self) -> None:
        self._database.migrate()
        begin_trail(self._database)
        store = rc.Store(self._database)
        self._agents.add_nodes(store)
        self._agents.add_twins(store)
        begin_telling(self._url)
        self._operator.start()
        self._watcher.start()
        ends_at = time.monotonic() + self._amounts.seconds
        try:
            while time.monotonic() < ends_at and not self._is_enough():
                self._remove_ended()
                self._refill()
                self._strike()
                time.sleep(0.02)
            self._settle()
            self._check()
        finally:
            self._operator.stop()
            self._stop_watching()
            for worker in [*self._workers, *self._suspended]:
                worker.kill()
            self._agents.stop()
            self._inbox.stop()
            if self._failovers:
                self._failovers.close()
            self._database.close()

    def _is_enough(self) -> bool:
        done, wanted = self._figures.counts, self._amounts
        return (done["kills"] >= wanted.kills and done["suspensions"] >= wanted.suspends
                and (not self._failovers or done["failovers"] >= wanted.failovers))

    # -- what may be wrong at no moment ------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop_watch.wait(0.025):
            try:
                self._take_overs.update()
                self._figures.add(check_intents(self._database, self._agents), "meanwhile")
                self._figures.add(check_now(self._database), "meanwhile")
            except rc.DatabaseError:
                self._take_overs.drop_all()
        self._take_overs.close()

    def _stop_watching(self) -> None:
        self._stop_watch.set()
        self._watcher.join(30)

    # -- workers -------------------------------------------------------------------------------

    def _refill(self) -> None:
        while len(self._workers) < self.RUNNING:
            dice, injections = self._random.random(), ""
            command = ["serve"] if dice < 0.7 else ["run-once"] if dice < 0.8 else ["run-once", "--drain"]
            if self._random.random() < 0.15:
                whens = [when for when in WHENS if not when.startswith("stop-")]
                injections = str(Injection(self._random.choice(EXECUTOR_POINTS), self._random.choice(whens),
                                           self._random.randint(1, 12)))
            interval_s = round(self._random.uniform(0.1, 0.3), 2)
            self._workers.append(self._start(command, injections, RELEASE_EXECUTOR_INTERVAL_SEC=interval_s))
            self._figures.count("processes started")

    def _start(self, command: list[str], injections: str = "", **settings: object) -> Worker:
        return self._lab.workers.start(command, settings_for(
            self._url, self._lab.certs, CLAIM_TTL_S, NOTIFY_URL=self._inbox.url, **SETTINGS, **settings), injections)

    def _remove_ended(self) -> None:
        for worker in [one for one in self._workers if one.exit_code() is not None]:
            self._workers.remove(worker)
            self._note_end(worker)

    def _note_end(self, worker: Worker) -> None:
        self._lab.workers.drop(worker)
        code = worker.exit_code()
        for injection in worker.fired():
            self._figures.count_fired(injection)
            if code == -signal.SIGKILL:
                worker.is_killed_by_us = True
                self._take_overs.add_orphans(worker.pid, "kill", time.monotonic())
        errors = list(check_log(worker))
        self._figures.count("tracebacks in logs", len(errors))
        if not worker.is_killed_by_us:
            self._figures.exits[str(code)] += 1
            if code not in CLEAN_EXITS:
                errors.append(Finding("process", f"{worker.name} ended with {code}: {worker.end_of_log()}"))
        self._figures.add(errors, str(worker.log))
        if not errors and code in (*CLEAN_EXITS, -signal.SIGKILL):
            worker.log.unlink()

    # -- strikes -------------------------------------------------------------------------------

    def _strike(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        for worker in [one for one in self._suspended if one.suspended_until < now]:
            self._wake(worker)
        done, wanted = self._figures.counts, self._amounts
        if done["kills"] < wanted.kills and not self._calm_since and self._is_due("kill", self.KILL_EVERY_S):
            self._kill()
        if (done["suspensions"] < wanted.suspends and len(self._suspended) < self.SUSPENDED
                and self._is_due("suspend", self.SUSPEND_EVERY_S)):
            self._suspend()
        if not self._calm_since and self._is_due("agents", 0.15):
            disturb_agent(self._lab, self._agents, self._random.choice(self._agents.all))
        if self._is_due("receiver", 2.0):
            self._inbox.status = self._random.choice((200, 200, 500))
        if self._server:
            self._strike_server(self._server)
        if self._failovers:
            self._prepare_failover(self._failovers)

    def _strike_server(self, server: PostgresServer) -> None:
        if self._is_due("cut", self.CUT_EVERY_S):
            self._figures.count("connections cut", int(server.cut(self._url)))
        if server.is_ours and self._comes_now("server restarts", self._amounts.restarts):
            self._take_overs.drop_all()
            server.restart()
            self._take_overs.drop_all()
            self._figures.count("server restarts")

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._due.setdefault(what, now + every_s):
            return False
        self._due[what] = now + self._random.uniform(0.3, 1.7) * every_s
        return True

    def _comes_now(self, what: str, wanted: int) -> bool:
        """Spread what comes a few times over the kills."""
        done, kills = self._figures.counts[what], self._figures.counts["kills"]
        return done < wanted and kills * (wanted + 1) >= self._amounts.kills * (done + 1)

    def _choose(self, owner_share: float) -> Worker | None:
        """Return a worker: in so many cases one that holds a claim, and None where none does."""
        # at its start a process is hit now and then: more often, a machine under load would see nothing but starts
        ready = [one for one in self._workers if one.has_begun() or self._random.random() < 0.02]
        if self._random.random() < owner_share:
            try:
                owners = self._take_overs.owners()
            except rc.DatabaseError:
                return None
            ready = [one for one in ready if one.pid in owners]
        ready = [one for one in ready if one.exit_code() is None]
        return self._random.choice(ready) if ready else None

    def _kill(self) -> None:
        is_suspended = bool(self._suspended) and self._random.random() < 0.05
        worker = self._suspended.pop() if is_suspended else self._choose(0.6)
        if worker is None:
            return
        worker.is_killed_by_us = True
        since = time.monotonic()
        worker.kill()
        self._take_overs.add_orphans(worker.pid, "kill", since)
        self._figures.count("kills")
        if is_suspended:
            self._note_end(worker)

    def _suspend(self) -> None:
        worker = self._choose(0.9)
        if worker is None:
            self._due["suspend"] = 0.0  # as soon as there is one
            return
        worker.send(signal.SIGSTOP)
        since = time.monotonic()
        worker.suspended_until = since + self._random.uniform(1.2, 2.5) * CLAIM_TTL_S
        self._take_overs.add_orphans(worker.pid, "suspension", since)
        self._workers.remove(worker)
        self._suspended.append(worker)
        self._figures.count("suspensions")

    def _wake(self, worker: Worker) -> None:
        self._take_overs.drop_orphans_of(worker.pid)
        worker.send(signal.SIGCONT)
        self._suspended.remove(worker)
        self._workers.append(worker)

    # -- failovers: first the standby lags, then it is calm for a while, then the primary dies ------

    def _prepare_failover(self, failovers: Failovers) -> None:
        if not failovers.is_lagging:
            if self._comes_now("failovers", self._amounts.failovers):
                failovers.begin()
                if self._random.random() < 0.4:  # a short lag: claims that are lost, and given again, count alike
                    self._begin_calm()
            return
        with contextlib.suppress(rc.DatabaseError):
            if self._calm_since:
                calm_s = time.monotonic() - self._calm_since
                if calm_s > CLAIM_TTL_S and (failovers.is_moment() or calm_s > 4 * CLAIM_TTL_S) and (
                        failovers.is_ripe(is_short=True)):
                    self._fail_over(failovers)
            elif self._is_due("failover", 0.3) and failovers.is_ripe(is_short=False):
                self._begin_calm()

    def _begin_calm(self) -> None:
        """Kill nobody for a while, so that releases have owners that live, and let agents work longer."""
        self._calm_since = time.monotonic()
        if self._random.random() < 0.7:
            for agent in self._agents.all:
                agent.set(outcome="success", task_ms=self._random.randint(1000, 1500), mode="normal")

    def _fail_over(self, failovers: Failovers) -> None:
        """Fail over; an owner may be suspended meanwhile, and the operator's process be a new one afterwards."""
        self._calm_since = 0.0
        if self._random.random() < 0.6:
            self._suspend()
        meanwhile = self._operator.restart if self._random.random() < 0.5 else lambda: None
        self._take_overs.drop_all()
        failovers.fail_over(meanwhile)
        self._take_overs.drop_all()
        # who saw it happen is left alive for a while
        self._due["kill"] = time.monotonic() + self._random.uniform(0.0, 3 * CLAIM_TTL_S)

    # -- the end -------------------------------------------------------------------------------

    def _settle(self) -> None:
        """End all faults, stop the workers cleanly, and let one drain what is left."""
        self._operator.stop()
        for worker in list(self._suspended):
            self._wake(worker)
        self._agents.fleet.set(mode="normal", outcome="success", delay_ms=0)
        self._inbox.status = 200
        retry(self._operator.resume_all)
        self._wait_for_take_overs()
        self._remove_ended()  # also who was killed last
        self._stop_watching()
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            if worker.wait(CLEAN_STOP_S) not in CLEAN_EXITS and not worker.fired():
                self._figures.add([Finding("process", f"{worker.name} did not stop cleanly: "
                                                      f"{worker.exit_code()}, {worker.end_of_log()}")], "the end")
            worker.kill()
            self._note_end(worker)
        self._workers = []
        self._drain()

    def _wait_for_take_overs(self) -> None:
        """Give orphaned claims the time to find an owner, so that all take-overs are measured."""
        give_up_at = time.monotonic() + 5 * CLAIM_TTL_S
        while self._take_overs.are_awaited and time.monotonic() < give_up_at:
            self._remove_ended()
            time.sleep(0.05)

    def _drain(self) -> None:
        give_up_at = time.monotonic() + END_LIMIT_S
        while self._operator.open_releases() and time.monotonic() < give_up_at:
            retry(self._operator.resume_all)
            self._run("run-once", "--drain")
        deliver(self._database, lambda: self._run("run-once"), give_up_at)

    def _run(self, *command: str) -> None:
        worker = self._start(list(command))
        worker.wait(END_LIMIT_S)
        self._note_end(worker)

    def _check(self) -> None:
        tables = retry(lambda: read_tables(self._database))
        self._figures.count("releases", len(tables.releases))
        self._figures.count("releases that were success", sum(r.status == "success" for r in tables.releases))
        self._figures.count("releases that went back by themselves",
                            sum(r.reason.startswith("automatic rollback") for r in tables.releases))
        self._figures.count("releases that asked their agents first",
                            sum("preflight" in json.loads(r.strategy) for r in tables.releases))
        self._figures.count("releases that a preflight ended",
                            sum(r.error_msg.startswith("preflight: ") for r in tables.releases))
        self._figures.count("tasks run", sum(len(agent.runs) for agent in self._agents.all))
        self._figures.count("dispatches read by agents", sum(len(self._agents.sent(a)) for a in self._agents.all))
        if self._figures.add(self._findings(tables), "random phase"):
            folder = self._lab.evidence_folder("random")
            self._lab.databases.dump(self._url, folder)
            (folder / "agents.json").write_text(json.dumps(self._agents.fleet.snapshot(), indent=1))

    def _findings(self, tables: Tables) -> Iterator[Finding]:
        yield from check_tables(tables)
        yield from check_agents(tables, self._agents)
        yield from check_trail(self._database)
        yield from check_told(tables, self._inbox, self._figures, bool(self._failovers))
        yield from check_created(tables, self._agents, self._operator.created)
        if not any(release.status == "success" for release in tables.releases):
            yield Finding("process", f"no release came to a success; refused at last: "
                                     f"{self._operator.refusal or 'nothing'}")


def disturb_agent(lab: Laboratory, agents: RecordedAgents, agent: Agent) -> None:
    """Restart an agent, let it lose an answer or fail, or let it behave again, at random."""
    dice = lab.random.random()
    if dice < 0.1:
        agents.restart(agent)
        lab.figures.count("agents restarted")
    elif dice < 0.5:
        mode = lab.random.choice(("cut", "cutEarly", "drop"))
        only = lab.random.choice(("dispatch", "dispatch", "query", ""))
        if agent.protocol == "tasks" or lab.random.random() < 0.2:  # a cut costs an execute node 5 s
            agent.set(mode=mode, times=lab.random.randint(1, 2), only=only)
            lab.figures.count("answers to be lost")
    elif dice < 0.53:
        agent.set(outcome="failed")
    elif dice < 0.56:  # it gives tasks ids of its own for a while
        agent.set(rename=not agent.behaviour.rename)
    else:
        delay_ms = lab.random.choice((0, 0, 0, 20, 100))
        agent.set(outcome="success", task_ms=_task_ms(agent, lab.random), delay_ms=delay_ms)


def _task_ms(agent: Agent, dice: random.Random) -> int:
    """Return a short time for a task mostly; now and then one that a new owner finds still running."""
    if dice.random() > 0.15:
        return dice.randint(0, 300)
    return dice.randint(1000, 1500) if agent.protocol == "execute" else dice.randint(2000, 4000)
