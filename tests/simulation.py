"""A world in one thread: the real drivers, claims and store under a fake clock, with faults by a seed.

What is real: Executor._look and _renew, Driver.step, Store with all its SQL over SQLite in
memory, observe, decide and adopt. What is simulated: time, the network, the agents, and the
processes, which crash, are suspended and lose the database, each at the moments that the seed
gives. Transactions are atomic here, as both engines promise; what happens between, before and
after them is what this explores.

After every commit and every event the invariants of section 3 of the contract are checked; a
violation raises Violation with the seed and the schedule that led to it. With steering the
releases have random strategies and people use every verb and the freeze; what those promise is
checked too. Run one seed alone:

    python tests/simulation.py SEED [steering]
"""
from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import sys
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import releasectl as rc  # noqa: E402

TTL_S, INTERVAL_S, CONNECT_S, REQUEST_S, DEADLINE_S = 6.0, 1.0, 1.0, 6.0, 300.0
# After this the faults stop, and everything must come to its end before the second.
FAULTS_UNTIL_S, END_S = 60.0, 2000.0
EPOCH_S = 1_790_000_000.0
# So many things at one moment are no schedule any more.
STANDSTILL = 5000

LEGAL_NODE = {("pending", "running"), ("running", "success"), ("running", "failed"), ("pending", "skipped"),
              ("success", "failed")}  # the last one: the look at the end of a soak
LEGAL_RELEASE = {
    ("", "pending"), ("pending", "running"), ("running", "success"), ("running", "partial"), ("running", "failed"),
    ("pending", "paused"), ("running", "paused"), ("paused", "pending"), ("paused", "running"),
    ("pending", "cancelling"), ("running", "cancelling"), ("paused", "cancelling"), ("cancelling", "cancelled")}


class Violation(BaseException):
    """A promise was broken. No edge of releasectl's catches it."""


class Crash(BaseException):
    """The process that runs now dies here."""


class SimClock(rc.Clock):
    """The wall is the database's for all; each process has its own zero of elapsed time."""

    def __init__(self, world: Simulation, offset: float):
        self._world, self._offset = world, offset

    def wall(self) -> float:
        return EPOCH_S + self._world.now

    def elapsed(self) -> float:
        return self._offset + self._world.now


class SimEngine(rc.SqliteEngine):
    """SQLite whose clock is the world's."""

    now_sql = "SELECT world_now()"

    def __init__(self, world: Simulation):
        super().__init__("sqlite:///:memory:")
        self._world = world

    def connect(self, create: bool):
        connection = super().connect(create)
        connection.create_function("world_now", 0, lambda: rc.utc_text(EPOCH_S + self._world.now))
        return connection


class SimDatabase(rc.Database):
    """One database in memory, whose transactions are slow, fail, or are the last deed of a process."""

    def __init__(self, world: Simulation):
        super().__init__("sqlite:///:memory:")
        self.engine = SimEngine(world)
        self._world = world
        self.is_out = False

    def look_in(self, statement: str, *params: object) -> list[tuple]:
        """Gives the rows of a query from outside of the world."""
        with rc.Database.transaction(self) as tx:
            return tx.rows(statement, *params)

    @contextlib.contextmanager
    def transaction(self, write: bool = False, create: bool = False):
        self._world.stall()
        fate = self._world.database_fate(write)
        if self.is_out or fate == "refused":
            raise rc.DatabaseError("simulated: out of reach")
        with super().transaction(write, create) as tx:
            yield tx
            if fate == "crash before":
                raise Crash
            if fate == "failed":
                raise rc.DatabaseError("simulated: not committed")
        if write:
            self._world.check()
        if fate == "crash after":
            raise Crash
        if fate == "lost":
            raise rc.DatabaseError("simulated: committed, and the answer was lost")


class SimAgent:
    """An agent of either dialect, with the memory that the contract gives it."""

    def __init__(self, world: Simulation, address: str, protocol: str):
        self.world, self.address, self.protocol = world, address, protocol
        self.lifetime = 0
        self.tasks: dict[str, tuple[float, bool]] = {}
        self.runs: dict[tuple[int, int], int] = {}
        self.busy: dict[int, int] = {}
        self.applied: set[int] = set()

    def restart(self) -> None:
        self.lifetime += 1
        self.tasks.clear()
        self.busy.clear()

    def start(self, task_id: str, version: int, duration_s: float, is_good: bool) -> None:
        """Runs a task; an execute agent does not notice that it runs already."""
        self.runs[self.lifetime, version] = self.runs.get((self.lifetime, version), 0) + 1
        self.world.figures["runs"] += 1
        if self.protocol == "tasks" and self.runs[self.lifetime, version] > 1:
            self.world.fail(f"{self.address} ran v{version} twice in one lifetime")
        if self.protocol == "execute" and self.busy:
            self.world.fail(f"{self.address} has v{version} and v{next(iter(self.busy.values()))} under way at once")
        lifetime, number = self.lifetime, next(self.world.numbers)
        self.busy[number] = version
        self.tasks[task_id] = (self.world.now + duration_s, is_good)

        def finish() -> None:
            if self.lifetime == lifetime:
                self.busy.pop(number)
                if is_good:
                    self.applied.add(version)
        self.world.at(duration_s, finish)


class SimDriver(rc.Driver):
    """The driver without its thread: the world turns it."""

    def start(self) -> None:
        self._executor.world.turn(self._executor, self)

    def join(self, timeout_s: float | None = None) -> None:
        pass


class SimExecutor(rc.Executor):
    """A process: alive, suspended until some time, or dead."""

    def __init__(self, world: Simulation, settings: rc.Settings, number: int):
        clock = SimClock(world, world.random.uniform(0, 1e5))
        super().__init__(settings, rc.Store(world.database, clock), world.agents_stub)
        self.world = world
        self.owner = f"owner-{number}"
        self.is_tick = world.faults and world.random.random() < 0.3
        self.is_dead = False
        self.suspended_until = 0.0

    def _start_threads(self) -> None:
        """Starts none: the world renews and talks."""

    def submit(self, work: Callable[[], None]) -> None:
        self.world.request(self, *work.args)  # type: ignore[attr-defined]


class Simulation:
    """One schedule, made of one seed."""

    at_once = False

    def __init__(self, seed: int, owners: int = 0, faults: bool = True, steering: bool = False):
        self.seed, self.steering = seed, steering
        self.random = random.Random(seed)
        self.now = 0.0
        self.numbers = itertools.count()
        self.events: list[tuple[float, int, SimExecutor | None, Callable[[], None]]] = []
        self.schedule: list[str] = []
        self.faults = faults
        self.running: SimExecutor | None = None
        self.seen_events = 0
        self.statuses: dict[object, str] = {}
        self.holders: dict[int, str] = {}
        # When the last node of a batch was at rest, and the batches after which somebody resumed.
        self.rested: dict[tuple[int, int], float] = {}
        self.resumed: set[tuple[int, int]] = set()
        # How many probes of a release on a node passed in a row, and when as many did as its strategy wants.
        self.streaks: dict[tuple[int, str], int] = {}
        self.verified: dict[tuple[int, str], list[float]] = {}
        self.at_one_moment = 0
        self.figures = dict.fromkeys(("runs", "crashes", "suspensions", "take-overs", "lost answers", "restarts",
                                      "database faults", "commits", "verbs"), 0)
        self.agents_stub = type("Agents", (), {"prepare": lambda _: None, "close": lambda _: None})()
        self.database = SimDatabase(self)
        self.is_set_up = False
        self.database.migrate()
        self.settings = rc.Settings.load({
            "RELEASE_EXECUTOR_INTERVAL_SEC": str(INTERVAL_S), "CLAIM_TTL_SEC": str(TTL_S), "MTLS_ENABLED": "0",
            "AGENT_CONNECT_TIMEOUT_SEC": str(CONNECT_S), "AGENT_REQUEST_TIMEOUT_SEC": str(REQUEST_S),
            "AGENT_RETRIES": self.random.choice(["2", "100"]), "NODE_DEADLINE_SEC": str(DEADLINE_S),
            "AGENT_CONCURRENCY": self.random.choice(["1", "2", "16"])})
        self.store = rc.Store(self.database, SimClock(self, 0.0))
        self.agents: dict[str, SimAgent] = {}
        self._people()
        self.is_set_up = True
        self.owners = [SimExecutor(self, self.settings, n) for n in range(owners or self.random.randint(1, 3))]
        for owner in self.owners:
            self._boot(owner)
        if faults:
            self.at(self.random.uniform(0, 5), self._fault)

    # -- the world ---------------------------------------------------------------------------

    def _people(self) -> None:
        """Adds nodes and releases, and the verbs that somebody will use."""
        for number in range(1, self.random.randint(2, 5)):
            protocol = self.random.choice(["tasks", "tasks", "execute"])
            agent = SimAgent(self, f"10.0.0.{number}", protocol)
            self.agents[agent.address] = agent
            self.store.add_node(f"edge-{number}", agent.address, agent_protocol=protocol)
        for target in self.random.choices(["cdn", "dns"], k=self.random.randint(1, 3)):
            self.store.create_release(rc.ReleaseRequest(target, strategy=self._strategy()), "test")
        if self.steering:
            self.at(self.random.uniform(0, 5), self._steer)
        elif self.faults and self.random.random() < 0.4:
            verb = self.random.choice(["pause", "cancel"])
            self.at(self.random.uniform(0, 20), lambda: self._act(verb))

    def _strategy(self) -> dict[str, object]:
        """Gives what a release may be asked to be, each key now and then."""
        if not self.steering:
            return {}
        choices = {
            "batches": [[1, 1], ["50%"], [2], ["1%", "1%", "1%"]], "maxFailed": [1, "50%", "100%"],
            "maxFailedTotal": [0, 1, "50%"], "maxParallel": [1, 2], "soakSec": [0.5, 8], "pauseAfter": ["each", [1]],
            "onExceed": ["pause", "fail"], "retries": [0, 5],
            "startAt": [rc.utc_text(EPOCH_S + self.random.uniform(0, 20))],
            "verify": [{"url": "http://{main_ip}/", "successes": self.random.choice([1, 3])}]}
        return {key: self.random.choice(values) for key, values in choices.items() if self.random.random() < 0.4}

    def _steer(self) -> None:
        """Uses a verb or the freeze; once the faults are over only what lets everything end."""
        is_late = self.now > FAULTS_UNTIL_S
        self.at(5.0 if is_late else self.random.expovariate(1 / 3), self._steer)
        verb = self.random.choice(["pause", "resume", "resume", "resume", "cancel", rc.CANCEL_BY_FORCE, "freeze"])
        if not is_late and verb in ("cancel", rc.CANCEL_BY_FORCE) and self.random.random() < 0.7:
            return
        with contextlib.suppress(rc.AppError):
            if is_late or verb == "freeze":
                self.store.set_freeze(not is_late and self.random.random() < 0.4, "anna", "holidays")
            for release_id in self.versions if is_late else [self.random.choice(list(self.versions))]:
                self._use("resume" if is_late else verb, release_id)

    def _use(self, verb: str, release_id: int) -> None:
        if verb == "freeze":
            return
        before = self.store.release(release_id)
        for accepts in (False, True):
            with contextlib.suppress(rc.AppError):
                self.store.act(verb, release_id, "anna", **({"accept_failures": accepts} if verb == "resume" else {}))
                self.note(f"{verb} release {release_id}")
                self.figures["verbs"] += 1
                self.resumed.add((release_id, before.passed_batch))
                return

    def _act(self, verb: str) -> None:
        release_id = self.random.choice(list(self.versions))
        try:
            self.store.act(verb, release_id, "anna")
        except rc.DatabaseError:
            self.at(1.0, lambda: self._act(verb))
        except rc.AppError:
            return
        else:
            self.note(f"{verb} release {release_id}")
        if verb == "pause":
            self.at(self.random.uniform(1, 15), lambda: self._resume(release_id))

    def _resume(self, release_id: int) -> None:
        try:
            self.store.act("resume", release_id, "anna")
        except rc.DatabaseError:
            self.at(1.0, lambda: self._resume(release_id))
        except rc.AppError:
            pass

    def at(self, delay_s: float, deed: Callable[[], None], owner: SimExecutor | None = None) -> None:
        heapq.heappush(self.events, (self.now + delay_s, next(self.numbers), owner, deed))

    def note(self, text: str) -> None:
        self.schedule.append(f"{self.now:8.3f} {self.running.owner if self.running else '-':<8} {text}")

    def fail(self, text: str) -> None:
        raise Violation(f"seed {self.seed}: {text}\n" + "\n".join(self.schedule[-60:]))

    def run(self) -> Simulation:
        """Runs the schedule to its end; raises Violation."""
        while self.events:
            self._next()
            if self.now > FAULTS_UNTIL_S and self._is_over():
                break
            if self.now > END_S:
                self.fail(f"releases that never ended: {self.database.look_in('SELECT * FROM release_tasks')}")
        self._check_end()
        self.database.close()
        return self

    def _next(self) -> None:
        """Lets the next thing happen."""
        at, number, owner, deed = heapq.heappop(self.events)
        self.at_one_moment = self.at_one_moment + 1 if at <= self.now else 0
        if self.at_one_moment > STANDSTILL:
            self.fail("time stands still: somebody turns without an end")
        self.now = max(self.now, at)
        if owner is not None and owner.is_dead:
            return
        if owner is not None and owner.suspended_until > self.now:
            heapq.heappush(self.events, (owner.suspended_until, number, owner, deed))
            return
        self._do(owner, deed)
        self._check_leases()

    def stall(self) -> None:
        """Suspends who runs now between two transactions, and lets the others go on meanwhile."""
        owner = self.running
        if owner is None or not self.faults or self.now > FAULTS_UNTIL_S or self.random.random() > 0.01:
            return
        self.figures["suspensions"] += 1
        until = owner.suspended_until = self.now + self.random.uniform(0, 3 * TTL_S)
        self.note("is suspended between two transactions")
        while self.events and self.events[0][0] < until:
            self._next()
        self.now, self.running = max(self.now, until), owner
        if owner.is_dead:
            raise Crash
        self.note("wakes up")

    def _do(self, owner: SimExecutor | None, deed: Callable[[], None]) -> None:
        before, self.running = self.running, owner
        try:
            deed()
        except Crash:
            assert owner is not None
            self._crash(owner)
        finally:
            self.running = before

    def _is_over(self) -> bool:
        return all(row[0] in rc.TERMINAL for row in self.database.look_in("SELECT status FROM release_tasks"))

    # -- processes ---------------------------------------------------------------------------

    def _boot(self, owner: SimExecutor) -> None:
        self.at(self.random.uniform(0, 1), lambda: self._look(owner), owner)
        self.at(TTL_S / 3, lambda: self._renew(owner), owner)

    def _look(self, owner: SimExecutor) -> None:
        self.at(INTERVAL_S, lambda: self._look(owner), owner)
        with contextlib.suppress(rc.AppError, rc.StateMoved):
            owner._look([], owner.is_tick)

    def _renew(self, owner: SimExecutor) -> None:
        self.at(TTL_S / 3, lambda: self._renew(owner), owner)
        for driver in owner._active_drivers():
            owner._renew(driver.lease)

    def turn(self, owner: SimExecutor, driver: SimDriver) -> None:
        """Lets a driver take its turn, now and whenever its wait is over or an outcome came."""
        if driver.lease.claim.release_id not in owner._drivers or owner._drivers[
                driver.lease.claim.release_id] is not driver:
            return
        driver.turns = getattr(driver, "turns", 0) + 1  # type: ignore[attr-defined]
        number = driver.turns  # type: ignore[attr-defined]
        driver.collect(0.0)
        wait_s = driver.step()
        if wait_s is None:
            driver.lease.is_lost = True
            owner.ended(driver)
            return
        self.at(wait_s, lambda: self.turn(owner, driver) if driver.turns == number else None,  # type: ignore[attr-defined]
                owner)

    def _crash(self, owner: SimExecutor) -> None:
        if owner.is_dead:
            return
        self.note(f"{owner.owner} dies")
        self.figures["crashes"] += 1
        owner.is_dead = True
        again = SimExecutor(self, self.settings, len(self.owners))
        self.owners.append(again)
        self.at(self.random.uniform(0, 3), lambda: self._boot(again))

    # -- the network -------------------------------------------------------------------------

    def request(self, owner: SimExecutor, op: str, node: rc.ReleaseNode, task: rc.AgentTask,
                written_at: rc.Moment) -> None:
        """Takes what a conversation would do: leave, arrive, and bring an outcome, each at its own time."""
        driver = next(d for d in owner._active_drivers() if d._nodes.get(node.node_id)
                      and task.version == self.store_version(d))

        def answer(value: rc.Answer | rc.AgentError | rc.Outcome) -> None:
            driver.results.put(value if isinstance(value, rc.Outcome) else rc.outcome_of(node.node_id, op, value))
            self.turn(owner, driver)

        def leave() -> None:
            if op == rc.DISPATCH and not driver.may_dispatch(written_at):
                answer(rc.AgentError(rc.UNREACHABLE, "too late", reached=False, is_held=True))
                return
            *holder, status = self.database.look_in("SELECT claim_owner, claim_expires_at, status FROM release_tasks "
                                                    "WHERE version = ?", task.version)[0]
            # what was written down before a cancel by force may still leave: its outcome is unknown
            if op == rc.DISPATCH and status != "cancelled" and (
                    holder[0] != owner.owner or holder[1] <= rc.utc_text(EPOCH_S + self.now)):
                self.fail(f"rule 9: {owner.owner} sent v{task.version} to {node.main_ip}, and {holder} held it")
            self._travel(owner, op, node, task, answer)
        if self.at_once:  # a mutant's
            self._travel(owner, op, node, task, answer)
        else:
            self.at(self.random.choice([0.0, 0.0, 0.01, CONNECT_S * 0.9]), leave, owner)

    def store_version(self, driver: SimDriver) -> int:
        return self.versions[driver.lease.claim.release_id]

    @property
    def versions(self) -> dict[int, int]:
        return dict(self.database.look_in("SELECT id, version FROM release_tasks"))

    def _note_probe(self, version: int, address: str, passes: bool) -> None:
        strategy = rc.parse_strategy(rc.parse_json(self.database.look_in(
            "SELECT strategy FROM release_tasks WHERE version = ?", version)[0][0]))
        key = (version, address)
        self.streaks[key] = self.streaks.get(key, 0) + 1 if passes else 0
        if self.streaks[key] and self.streaks[key] % strategy.verify.successes == 0:
            self.verified.setdefault(key, []).append(self.now)

    def _travel(self, owner, op, node, task, answer) -> None:
        agent = self.agents[node.main_ip]
        if op == rc.PROBE:
            passes = self.random.random() > 0.1
            self._note_probe(task.version, node.main_ip, passes)
            said = rc.Outcome(node.node_id, op, rc.SUCCESS if passes else rc.UNCLEAR, "", "" if passes else rc.VERIFY,
                              "" if passes else "HTTP 500")
            self.at(0.01, lambda: answer(said), owner)
            return
        is_bad = self.faults and self.now < FAULTS_UNTIL_S
        fate = self.random.random() if is_bad else 1.0
        if fate < 0.08:
            self.at(0.01, lambda: answer(rc.AgentError(rc.UNREACHABLE, "refused", reached=False)), owner)
            return
        is_lost = fate < 0.25
        if is_lost:
            self.figures["lost answers"] += 1
        sent_at = self.now

        def deliver(value) -> None:
            if is_lost and self.random.random() < 0.5:
                wait_s = max(0.0, sent_at + REQUEST_S - self.now)
                value = rc.AgentError(rc.TIMEOUT, "no answer", reached=True, hold_s=REQUEST_S)
                self.at(wait_s, lambda: answer(value), owner)
                return
            if is_lost:
                value = rc.AgentError(rc.UNREACHABLE, "cut", reached=True, hold_s=rc.CUT_HOLD_S)
            self.at(0.01, lambda: answer(value), owner)

        def arrive() -> None:
            if fate < 0.12:
                deliver(None)  # cut before the agent saw it
            else:
                self._serve(agent, op, node, task, deliver)
        self.at(self.random.choice([0.0, 0.01, 0.3]), arrive)

    def _serve(self, agent: SimAgent, op: str, node: rc.ReleaseNode, task: rc.AgentTask, deliver) -> None:
        # the longest run that arrives late still ends before a hold of CONNECT_S + REQUEST_S does
        duration_s = self.random.choice([0.0, 0.1, 1.0, 3.0, 5.5])
        is_good = self.random.random() > 0.03
        if agent.protocol == "execute":
            if task.version in agent.applied:
                deliver(rc.Answer(rc.SUCCESS, task.id))
                return
            agent.start(task.id, task.version, duration_s, is_good)
            said = rc.Answer(rc.SUCCESS, task.id) if is_good else rc.AgentError(
                rc.AGENT_FAILED, "boom", reached=True, final=True)
            lifetime, cut = agent.lifetime, rc.AgentError(rc.UNREACHABLE, "cut", reached=True, hold_s=rc.CUT_HOLD_S)
            self.at(duration_s, lambda: deliver(said if agent.lifetime == lifetime else cut))
            return
        if op == rc.DISPATCH:
            if task.id not in agent.tasks:
                agent.start(task.id, task.version, duration_s * 4, is_good)
            deliver(rc.Answer(rc.ACCEPTED, task.id))
        elif task.id not in agent.tasks:
            deliver(rc.Answer(rc.UNKNOWN, task.id))
        else:
            done_at, was_good = agent.tasks[task.id]
            if self.now < done_at:
                deliver(rc.Answer(rc.WORKING, task.id))
            elif was_good:
                agent.applied.add(task.version)  # a slow disk may have kept its finish waiting
                deliver(rc.Answer(rc.SUCCESS, task.id))
            else:
                deliver(rc.AgentError(rc.AGENT_FAILED, "boom", reached=True, final=True))

    # -- faults ------------------------------------------------------------------------------

    def _fault(self) -> None:
        """Does one thing to somebody, and plans the next."""
        if self.now > FAULTS_UNTIL_S:
            return
        self.at(self.random.expovariate(1 / 4), self._fault)
        owner = self.random.choice([o for o in self.owners if not o.is_dead])
        kind = self.random.choice(["crash", "suspend", "suspend long", "restart", "database"])
        self.note(f"{kind} {owner.owner}")
        if kind == "crash":
            self._crash(owner)
        elif kind.startswith("suspend"):
            self.figures["suspensions"] += 1
            owner.suspended_until = self.now + self.random.uniform(0, 2 if kind == "suspend" else 3 * TTL_S)
        elif kind == "restart":
            self.figures["restarts"] += 1
            self.random.choice(list(self.agents.values())).restart()
        else:
            self.figures["database faults"] += 1
            self.database.is_out = True
            self.at(self.random.uniform(0.1, 1.5 * TTL_S), self._heal)

    def _heal(self) -> None:
        self.database.is_out = False

    def database_fate(self, write: bool) -> str:
        """Gives what happens to the transaction that begins now."""
        if not self.is_set_up or self.running is None or not self.faults or self.now > FAULTS_UNTIL_S:
            return ""
        if write and self.random.random() < 0.05:
            self.now += self.random.uniform(0, TTL_S / 4)  # a slow disk
        fate = self.random.random()
        if fate > 0.05 or not write:
            return "refused" if fate < 0.005 else ""
        kind = self.random.choice(["crash before", "crash after", "failed", "lost"])
        self.figures["database faults"] += 1
        self.note(f"the next commit: {kind}")
        return kind

    # -- what must hold ----------------------------------------------------------------------

    def check(self) -> None:
        """Checks section 3 of the contract on what was just committed."""
        if not self.is_set_up:
            return
        self.figures["commits"] += 1
        with rc.Database.transaction(self.database) as tx:
            for row in tx.rows("""
                    SELECT r.id, r.status, r.total_nodes, r.success_nodes, r.failed_nodes,
                           SUM(n.status = 'success'), SUM(n.status = 'failed'), SUM(n.status = 'skipped'), COUNT(*)
                    FROM release_tasks r JOIN release_task_nodes n ON n.release_task_id = r.id GROUP BY r.id"""):
                number, status, total, success, failed, successes, failures, skipped, count = row
                if (total, success, failed) != (count, successes, failures):
                    self.fail(f"rule 7: release {number} counts {row}")
                if status in rc.TERMINAL and success + failed + skipped != total:
                    self.fail(f"rule 7: release {number} is {status} with nodes not at rest")
            active = tx.rows("SELECT target, COUNT(*) FROM release_tasks WHERE status IN ('running', 'cancelling') "
                             "AND started_at IS NOT NULL GROUP BY target HAVING COUNT(*) > 1")
            if active:
                self.fail(f"rule 2: two releases of one target are active: {active}")
            holders = dict(tx.rows("SELECT id, claim_owner FROM release_tasks"))
            events = tx.rows("SELECT id, release_task_id, node_id, from_status, to_status, actor FROM release_events "
                             "WHERE id > ? ORDER BY id", self.seen_events)
        if self.steering:
            begun = {(e[1], e[2]) for e in events if e[2] is not None and e[4] == "running"}
            self._check_strategies(begun)
        for number, release_id, node_id, before, after, actor in events:
            self.seen_events = number
            subject = (release_id, node_id)
            self.schedule.append(f"{self.now:8.3f} {actor:<8} release {release_id} node {node_id}: {before} -> {after}")
            legal = LEGAL_RELEASE if node_id is None else LEGAL_NODE
            known = self.statuses.get(subject, "" if node_id is None else "pending")
            if before == after == known:
                continue  # the freeze, which changes no status
            if (before, after) not in legal or before != known:
                self.fail(f"section 3: {subject} went from {before} to {after}, and was {known}")
            self.statuses[subject] = after
            if actor.startswith("owner") and actor not in (self.holders.get(release_id), holders[release_id]):
                self.fail(f"rule 9: {actor} wrote on release {release_id}, which is {holders[release_id]}'s")
        self.holders = holders

    def _check_strategies(self, begun: set[tuple[int, int]]) -> None:
        """Checks section 7 of the contract: begun are the nodes whose first dispatch was just committed."""
        with rc.Database.transaction(self.database) as tx:
            frozen = tx.value("SELECT frozen FROM release_freeze")
            releases = tx.rows("SELECT id, status, strategy, passed_batch, version FROM release_tasks")
            rows = tx.rows("SELECT n.release_task_id, n.node_id, n.batch, n.status, n.accepted, n.finished_at, "
                           "h.main_ip FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id")
        for release_id, status, text, passed, version in releases:
            strategy = rc.parse_json(text)
            nodes = [row[1:] for row in rows if row[0] == release_id]
            mine = [(node_id, batch) for node_id, batch, *_ in nodes if (release_id, node_id) in begun]
            self._note_rest(release_id, nodes)
            if "verify" in strategy:
                unseen = [node for node in nodes if node[2] == "success" and (version, node[5]) not in self.verified]
                if unseen:
                    self.fail(f"section 7: release {release_id} calls nodes a success that no probes passed: {unseen}")
            exceeded = self._is_exceeded(strategy, nodes)
            is_partial = any(node[2] == "failed" for node in nodes)
            if status == "failed" and not (exceeded and strategy.get("onExceed", "fail") == "fail"):
                self.fail(f"section 7: release {release_id} failed within its limits: {strategy} {nodes}")
            if status in ("partial", "success") and (exceeded or is_partial != (status == "partial")):
                self.fail(f"section 7: release {release_id} is {status}: {strategy} {nodes}")
            if not mine:
                continue
            name = f"section 7: release {release_id} dispatched {mine}"
            if frozen or status != "running" or exceeded:
                self.fail(f"{name} while {status}, frozen {frozen}, exceeded {exceeded}")
            if strategy.get("startAt", "") > rc.utc_text(EPOCH_S + self.now):
                self.fail(f"{name} before {strategy['startAt']}")
            parallel = sum(node[2] == "running" for node in nodes)
            if parallel > strategy.get("maxParallel", 0) > 0:
                self.fail(f"{name}: {parallel} in flight")
            batch = min(batch for _, batch in mine)
            self._check_between(release_id, strategy, batch, passed, name)
            if "verify" in strategy and "soakSec" in strategy and batch > 1:
                over = self.rested[release_id, batch - 1] + strategy["soakSec"]
                for node in nodes:
                    if node[1] == batch - 1 and node[2] == "success" and max(
                            self.verified[version, node[5]]) < over - 0.002:
                        self.fail(f"{name}, and {node} was not looked at again after its soak")

    def _note_rest(self, release_id: int, nodes: list[tuple]) -> None:
        for number in {node[1] for node in nodes}:
            members = [node for node in nodes if node[1] == number]
            if all(node[2] in rc.AT_REST for node in members):
                last = max(rc.epoch_of(node[4]) for node in members) - EPOCH_S
                self.rested.setdefault((release_id, number), last)

    def _check_between(self, release_id: int, strategy: dict, batch: int, passed: int, name: str) -> None:
        """Checks what lies between the batch before and this one."""
        if batch == 1:
            return
        before = (release_id, batch - 1)
        # what is stored has milliseconds
        if before not in self.rested or self.now < self.rested[before] + strategy.get("soakSec", 0) - 0.002:
            self.fail(f"{name} before the soak of batch {batch - 1} was over")
        gates = strategy.get("pauseAfter", [])
        if (gates == "each" or batch - 1 in gates) and before not in self.resumed:
            self.fail(f"{name}, and nobody resumed after batch {batch - 1}")
        if passed < batch - 1:
            self.fail(f"{name} with batch {passed} the last one that is over")

    @staticmethod
    def _is_exceeded(strategy: dict, nodes: list[tuple]) -> bool:
        """Counts failures against the limits, by another way than releasectl's."""
        def number(limit, whole):
            return limit if isinstance(limit, int) else int(limit.rstrip("%")) * whole // 100

        counted = [node for node in nodes if node[2] == "failed" and not node[3]]
        for batch in {node[1] for node in nodes}:
            size = len([node for node in nodes if node[1] == batch])
            if len([node for node in counted if node[1] == batch]) > number(strategy.get("maxFailed", 0), size):
                return True
        total = strategy.get("maxFailedTotal")
        return total is not None and len(counted) > number(total, len(nodes))

    def _check_leases(self) -> None:
        """At no time do two processes believe that they may act for one release."""
        holders: dict[int, str] = {}
        for owner in self.owners:
            if owner.is_dead:
                continue
            for driver in owner._active_drivers():
                if driver.lease.is_valid(owner.clock.elapsed()):
                    release_id = driver.lease.claim.release_id
                    if release_id in holders:
                        self.fail(f"{holders[release_id]} and {owner.owner} both hold release {release_id}")
                    holders[release_id] = owner.owner

    def _check_end(self) -> None:
        rows = self.database.look_in("""
            SELECT r.version, h.main_ip, n.status, n.error_kind, r.claim_fence
            FROM release_task_nodes n JOIN release_tasks r ON r.id = n.release_task_id
            JOIN nodes h ON h.id = n.node_id""")
        for version, address, status, kind, fence in rows:
            agent = self.agents[address]
            self.figures["take-overs"] = max(self.figures["take-overs"], fence - 1)
            if status == "success" and version not in agent.applied:
                self.fail(f"{address} is success for v{version}, and never applied it")
            if status == "skipped" and any(v == version for _, v in agent.runs):
                self.fail(f"{address} is skipped for v{version}, and ran it")
            if kind == "deadline":
                self.fail(f"{address} was forgotten until its deadline")


def run_seed(seed: int, **options) -> Simulation:
    """Runs one schedule; raises Violation, with the schedule, when a promise is broken."""
    real_driver = rc.Driver
    rc.Driver = SimDriver  # type: ignore[misc]
    try:
        return Simulation(seed, **options).run()
    finally:
        rc.Driver = real_driver  # type: ignore[misc]


if __name__ == "__main__":
    rc.log.disabled = True
    done = run_seed(int(sys.argv[1]), steering="steering" in sys.argv)
    print("\n".join(done.schedule))
    print(done.figures)
