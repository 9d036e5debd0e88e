"""A world in one thread: the real drivers, claims and store under a fake clock, with faults by a seed.

What is real: Executor._look and _renew, Driver.step, Store with all its SQL over SQLite in
memory, observe, decide and recover. What is simulated: time, the network, the agents, and the
processes, which crash, are suspended and lose the database, each at the moments that the seed
gives. Transactions are atomic here, as both engines promise; what happens between, before and
after them is what this explores.

After every commit and every event the invariants of sections 1 and 3 of the contract are
checked; a violation raises Violation with the seed and the schedule that led to it. There are
three worlds, each with all that the one before has:

    plain     releases of two targets on the same nodes, and every fault of a process
    steering  random strategies; people use every verb and the freeze, and in some of the schedules
              releases wait for a second person
    shared    releases that share some nodes and come later, also by hand; databases that go
              back, clocks that are set, two nodes at one address, pauses longer than deadlines

Run one seed alone:

    python tests/simulation.py SEED [plain|steering|shared]
"""
from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import heapq
import itertools
import random
import re
import sqlite3
import sys
import typing
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contract  # noqa: E402

import releasectl as rc  # noqa: E402

TTL_S, INTERVAL_S, CONNECT_S, REQUEST_S, DEADLINE_S = 4.0, 1.0, 1.0, 6.0, 300.0
# In the shared world people pause for longer than this.
SHORT_DEADLINE_S = 20.0
# After this the faults stop, and everything must come to its end before the second.
FAULTS_UNTIL_S, END_S = 60.0, 1000.0
EPOCH_S = 1_790_000_000.0
# So many things at one moment are no schedule any more.
STANDSTILL = 5000
# After so many of the steps of the world `why` is asked about each open release.
WHY_SHARE = 0.03
# How much later than it happened a process may notice a pause, a resume or a freeze.
NOTICE_S = 3 * INTERVAL_S
# A soak, with all that is not its own, is over so long after its time.
LATE_SOAK_S = 120.0
NOTHING_DONE, DONE_AT_ONCE = "nothing done", "done at once"
CUT = rc.Outcome(rc.DISPATCH, rc.LOST, "", rc.UNREACHABLE, "cut", hold_s=rc.CUT_BUSY_S)
WORLDS = PLAIN, STEERING, SHARED = "plain", "steering", "shared"


class Violation(BaseException):
    """A promise was broken. No edge of releasectl's catches it."""


class Crash(BaseException):
    """The process that runs now dies here."""


class SimClock(rc.Clock):
    """The clocks of the one host: the wall, which people set, and the time since its boot, which nobody sets."""

    def __init__(self, world: Simulation):
        self._world = world

    def wall(self) -> float:
        return self._world.wall

    def elapsed(self) -> float:
        return self._world.up_s + self._world.now

    def boot(self) -> str:
        return "the-only-boot"


class SimEngine(rc.SqliteEngine):
    """SQLite whose clock is the world's."""

    now_sql = "SELECT world_now()"

    def __init__(self, world: Simulation | None):
        super().__init__("sqlite:///:memory:")
        self._world = world
        self.opened: list[sqlite3.Connection] = []

    def identity(self) -> object:
        return None

    def connect(self, create: bool):
        """Connect as the product does, but for files; all statements stay prepared, as one process is many here."""
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, cached_statements=1000)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.create_function("world_now", 0, lambda: rc.utc_text(self._world.wall))
        self.opened.append(connection)
        return connection


class SimDatabase(rc.Database):
    """One database in memory, whose transactions are slow, fail, or are the last deed of a process."""

    def __init__(self, world: Simulation):
        super().__init__("sqlite:///:memory:")
        self.engine = SimEngine(world)
        self._world = world
        self.is_out = False

    def close(self) -> None:
        """Close every connection, also one that a violation left open."""
        super().close()
        for connection in self.engine.opened:
            connection.close()

    def look_in(self, statement: str, *params: object) -> list[tuple]:
        """Return the rows of a query from outside of the world."""
        with rc.Database.transaction(self) as tx:
            return tx.rows(statement, *params)

    def write_by_hand(self, *statements: tuple) -> None:
        """Do what a person types into sqlite3, in one transaction."""
        if self.is_out:
            raise rc.DatabaseError("simulated: out of reach")
        with rc.Database.transaction(self, write=True) as tx:
            for statement, *params in statements:
                tx.execute(statement, *params)
        self._world.check()

    def saved(self) -> sqlite3.Connection:
        """Return a copy of all that is in it."""
        copied = sqlite3.connect(":memory:", check_same_thread=False)
        connection, _ = self._take(False)
        connection.backup(copied)
        self._give_back(connection)
        self.engine.opened.append(copied)
        return copied

    def put_back(self, saved: sqlite3.Connection) -> None:
        """Put a copy in the place of all that is in it."""
        connection, _ = self._take(False)
        saved.backup(connection)
        self._give_back(connection)

    @contextlib.contextmanager
    def transaction(self, write: bool = False, create: bool = False, **more: float):
        self._world.stall()
        fate = self._world.database_fate(write)
        if self.is_out or fate == "refused":
            raise rc.DatabaseError("simulated: out of reach")
        with super().transaction(write, create, **more) as tx:
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


@dataclasses.dataclass(eq=False)
class Send:
    """A dispatch, from the moment that its intent was committed."""
    number: int
    owner: SimExecutor
    release_id: int
    node_id: int
    address: str
    version: int
    mark: str
    has_left: bool = False
    # What its process heard of it, and what it heard and lived to write anything after that.
    heard: str = ""
    known: str = ""
    # Which restore took its intent out of the database, 0 for none.
    lost_in: int = 0


@dataclasses.dataclass(eq=False)
class Run:
    """What an agent really did: only this makes a success true."""
    send: Send
    task_id: str
    began: float
    ends: float
    is_good: bool
    lifetime: int
    killed: float | None = None

    def is_live(self, now: float) -> bool:
        return self.killed is None and now < self.ends

    def ended_well(self, now: float) -> bool:
        return self.is_good and self.killed is None and self.ends <= now

    def seconds_since(self, since: float, now: float) -> float:
        """Return how long it was at work between two moments."""
        ends = self.ends if self.killed is None else self.killed
        return max(0.0, min(ends, now) - max(self.began, since))


class SimAgent:
    """An agent of either dialect, as section 1 of the contract has it: ids in memory, the version on its disk."""

    def __init__(self, world: Simulation, address: str, protocol: str):
        self.world, self.address, self.protocol = world, address, protocol
        # Whether it gives tasks ids of its own.
        self.renames = False
        # Until when it answers 503, and until when it refuses connections.
        self.is_bad_until = self.is_down_until = 0.0
        self.lifetime = 0
        self.names: dict[str, str] = {}
        # What it knows of, by its own ids; None: a version that it had already.
        self.tasks: dict[str, Run | None] = {}
        self.runs: list[Run] = []

    def restart(self) -> None:
        """Forget all ids, and break off what it is at."""
        self.lifetime += 1
        self.names.clear()
        self.tasks.clear()
        for run in self.live():
            run.killed = self.world.now

    def live(self) -> list[Run]:
        return [run for run in self.runs if run.is_live(self.world.now)]

    @property
    def applied(self) -> int:
        """The version that it has."""
        return max((run.send.version for run in self.runs if run.ended_well(self.world.now)), default=0)

    def ran(self, mark: str) -> bool:
        """Return whether it ever applied the payload with this mark."""
        return any(run.send.mark == mark and run.ended_well(self.world.now) for run in self.runs)

    def take(self, send: Send, task_id: str, duration_s: float, is_good: bool) -> str:
        """Take a dispatch of the dialect `tasks`; return the id to ask for."""
        name = self.names.setdefault(task_id, f"agent-{next(self.world.numbers)}" if self.renames else task_id)
        if name not in self.tasks:
            is_old = send.version <= self.applied
            self.tasks[name] = None if is_old else self.start(send, task_id, duration_s, is_good)
        return name

    def start(self, send: Send, task_id: str, duration_s: float, is_good: bool) -> Run:
        """Run a task; an execute agent does not notice that it runs already."""
        run = Run(send, task_id, self.world.now, self.world.now + duration_s, is_good, self.lifetime)
        for other in self.live():
            self.world.check_together(self, other, send)
        for other in self.runs:
            if other.send.mark == send.mark and other.lifetime == self.lifetime and not other.send.lost_in:
                self.world.fail(f"{self.address} ran {send.mark} twice in one lifetime, as {other.task_id} and "
                                f"{task_id}")
        self.runs.append(run)
        self.world.check_labels_at_work(send)
        self.world.figures["runs"] += 1
        return run

    def execute(self, send: Send, task_id: str, duration_s: float, is_good: bool) -> Run | None:
        """Take a request of the dialect `execute`; return the run that answers it, None for an old version."""
        known = self.tasks.get(task_id)
        if known is not None and not known.is_live(self.world.now):
            return known
        if known is None and send.version <= self.applied:
            return None
        run = self.tasks[task_id] = self.start(send, task_id, duration_s, is_good)
        return run


@dataclasses.dataclass
class Ledger:
    """What the world remembers of a database, saved and put back with it."""
    seen_events: int = 0
    statuses: dict[object, str] = dataclasses.field(default_factory=dict)
    holders: dict[int, tuple[str, int]] = dataclasses.field(default_factory=dict)
    # When the last node of a batch was at rest, and the batches after which somebody resumed.
    rested: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    resumed: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    # How long a pause or a freeze held a release, and since when one does.
    held_s: dict[int, float] = dataclasses.field(default_factory=dict)
    held_since: dict[int, float] = dataclasses.field(default_factory=dict)
    # When that is over by itself.
    held_until: dict[int, float] = dataclasses.field(default_factory=dict)
    # When a node's first dispatch was written down, and how long its release had been held by then.
    begun: dict[tuple[int, int], tuple[float, float]] = dataclasses.field(default_factory=dict)
    # From which version on releases are numbered, and when somebody said so.
    first_version: int = 0
    first_set: int = 0
    # The highest version of a process that saw the database go back, and wrote to it since.
    told: int = 0

    def note_held(self, release_id: int, left_s: float, now: float) -> None:
        """Take down for how long a pause or a freeze holds a release from now on, 0 for none."""
        if self.held_until.get(release_id, now) < now:  # it was over in between
            self._end_hold(release_id, self.held_until[release_id])
        if left_s > 0:
            self.held_since.setdefault(release_id, now)
            self.held_until[release_id] = now + left_s
        else:
            self._end_hold(release_id, now)

    def _end_hold(self, release_id: int, at: float) -> None:
        if release_id in self.held_since:
            self.held_s[release_id] = self.held_s.get(release_id, 0.0) + max(0.0, at - self.held_since[release_id])
            del self.held_since[release_id], self.held_until[release_id]

    def held_so_far(self, release_id: int, now: float) -> float:
        until = min(now, self.held_until.get(release_id, now))
        return self.held_s.get(release_id, 0.0) + max(0.0, until - self.held_since.get(release_id, until))


class Snapshot(typing.NamedTuple):
    """A copy of the database, and where the world stood."""
    number: int
    saved: sqlite3.Connection
    ledger: Ledger


class SimContext(rc.DriverContext):
    """What the drivers of a process share, and the process itself."""
    executor: SimExecutor


class SimDriver(rc.Driver):
    """The driver without its thread: the world turns it."""

    _context: SimContext
    turns = 0
    is_turning = False

    def start(self) -> None:
        self._context.executor.world.turn(self._context.executor, self)

    def join(self, timeout_s: float | None = None) -> None:
        pass


class SimClaims(rc.Claims):
    """The claims of one process, which the world asks what it saw."""

    owner: SimExecutor

    def scan(self, owner):
        found = super().scan(owner)
        self.owner.seen_event = self.owner.world.ledger.seen_events
        return found

    def commit(self, claim, release, decision, now, actor, counts=False) -> None:
        world = self.owner.world
        world.decided_at = now.elapsed - world.up_s
        try:
            super().commit(claim, release, decision, now, actor, counts)
            self.owner.seen_event = world.ledger.seen_events
            world.note_known(self.owner, claim.release_id)
        except (Crash, rc.DatabaseError):
            # it may be written, and nothing left: who finds it must think that something may have
            world.orphans.update((rc.parse_json(release.payload)["mark"], send.node.main_ip)
                                 for send in decision.sends if send.op == rc.DISPATCH)
            raise
        finally:
            world.decided_at = None

    def drop(self, claim) -> None:
        super().drop(claim)
        self.owner.world.note_known(self.owner, claim.release_id)

    def note_executor(self, *words) -> None:
        """Write it without a fault, but where the database is away: so what the row must say is known."""
        world = self.owner.world
        before, world.running = world.running, None
        try:
            super().note_executor(*words)
            self.owner.noted_at = world.now
        finally:
            world.running = before


class SimExecutor(rc.Executor):
    """A process: alive, suspended until some time, or dead."""

    def __init__(self, world: Simulation, settings: rc.Settings, number: int):
        store = rc.Store(world.database, SimClock(world))
        store.claims = SimClaims(store.state, store.queue, store.releases)
        super().__init__(settings, store, world.agents_stub, rc.Metrics())
        store.claims.owner = self
        self.world = world
        self.host = "host-a"
        self.owner = f"{self.host}:{number}:{number:08x}"
        self.context = SimContext(*self.context._replace(owner=self.owner))
        self.context.executor = self
        self.is_tick = world.faults and world.random.random() < 0.3
        self._kind = rc.SERVE
        self.is_dead = False
        self.suspended_until = 0.0
        # When its row in executors was written last.
        self.noted_at = -1000.0
        # The highest version that it made, claimed or sent, the newest event at its last look or
        # commit, and the restores that it can notice by that.
        self.seen_version = 0
        self.seen_event = 0
        self.can_notice: set[int] = set()

    def _start_threads(self) -> None:
        """Start none: the world renews and talks."""

    def submit(self, work: Callable[[], None]) -> None:
        self.world.request(self, work.func.__self__, *work.args)  # type: ignore[attr-defined]


def name_of(number: int) -> str:
    """Return the name of a node: every other one has spaces in it."""
    return f"Frankfurt edge {number}" if number % 2 else f"edge-{number}"


class Simulation:
    """One schedule, made of one seed."""

    at_once = False
    deadline_s = DEADLINE_S
    # So many times as long a run takes in an agent of `tasks`.
    slowness = 4

    def __init__(self, seed: int, owners: int = 0, faults: bool = True, world: str = PLAIN):
        self.seed, self.steering = seed, world != PLAIN
        self.random, self.why_random = random.Random(seed), random.Random(seed)
        # What labels and hung agents are made of: they leave the schedules of all else as they were.
        self.label_random = random.Random(f"labels {seed}")
        self.freeze_random = random.Random(f"freezes {seed}")
        # The same for preflights and what agents answer them.
        self.preflight_random = random.Random(f"preflight {seed}")
        # Nodes whose agents answered a process that asked for a release.
        self.answered: dict[tuple[int, str], set[int]] = {}
        # Until when an agent leaves the questions for a release without an answer.
        self.silent_until: dict[tuple[int, str], float] = {}
        # The same for what goes back by itself, or is in a hurry.
        self.back_random = random.Random(f"back {seed}")
        # The same for approvals, which a fifth of the schedules have; in some of these every release needs one.
        self.approval_random = random.Random(f"approvals {seed}")
        self.has_approvals = self.steering and self.approval_random.random() < 0.2
        # The marks of releases that need one, and of those that somebody let go.
        self.needs_approval: set[str] = set()
        self.approved: set[str] = set()
        # The labels of each release's nodes when it was made, by its mark.
        self.labels: dict[str, dict[int, dict[str, str]]] = {}
        self.now = 0.0
        # Since the boot of the host until the schedule began, and how far people set its clock.
        self.up_s, self.set_s = self.random.uniform(0, 1e5), 0.0
        self.numbers = itertools.count(1)
        self.events: list[tuple[float, int, SimExecutor | None, Callable[[], None]]] = []
        self.schedule: list[str] = []
        self.faults = faults
        self.running: SimExecutor | None = None
        self.ledger = Ledger()
        # The moment of the decision that is being committed.
        self.decided_at: float | None = None
        # How many probes of a payload on a node passed in a row, by who probes, and when as many did
        # as its strategy wants.
        self.streaks: dict[tuple[str, str, SimExecutor], int] = {}
        self.verified: dict[tuple[str, str], list[float]] = {}
        self.sends: list[Send] = []
        # Payloads and addresses of dispatches that were written down, perhaps, and never left.
        self.orphans: set[tuple[str, str]] = set()
        self.restores = 0
        self.clock_set_at = -1.0
        # Until then leases may overlap: the clock was set, or the claims are those of an older database.
        self.leases_clash_until = 0.0
        self.at_one_moment = 0
        self.looks_at_the_end_at = FAULTS_UNTIL_S
        self.figures = dict.fromkeys((
            "runs", "crashes", "stops", "suspensions", "take-overs", "lost answers", "restarts", "database faults",
            "commits", "verbs", "levels unknown", "full labels", "hung", "preflights", "silent", "whys",
            "whys that stop", "rolled back", "not rolled back", "superseded", "rollbacks now", "during a freeze",
            "overtaken", "approved", "approved late", "automatic", "target freezes", "freezes that end",
            "cancelled late"), 0)
        self.agents_stub = type("Agents", (), {"prepare": lambda _: None, "close": lambda _: None})()
        self.database = SimDatabase(self)
        self.database.approvals = self.has_approvals and self.approval_random.random() < 0.5
        self.is_set_up = False
        self.database.put_back(_migrated())
        self.database.migrate()
        self.settings = rc.Settings.load({
            "RELEASE_EXECUTOR_INTERVAL_SEC": str(INTERVAL_S), "CLAIM_TTL_SEC": str(TTL_S), "MTLS_ENABLED": "0",
            "AGENT_CONNECT_TIMEOUT_SEC": str(CONNECT_S), "AGENT_REQUEST_TIMEOUT_SEC": str(REQUEST_S),
            "AGENT_RETRIES": self.random.choice(["2", "100"]), "NODE_DEADLINE_SEC": str(self.deadline_s),
            "AGENT_CONCURRENCY": self.random.choice(["1", "2", "16"])})
        self.store = rc.Store(self.database, SimClock(self))
        self.agents: dict[str, SimAgent] = {}
        self.is_set_up = True
        self.owners: list[SimExecutor] = []
        self._people()
        if self.has_approvals:
            self.at(self.approval_random.uniform(0, 10), self._approve)
        self.owners += [SimExecutor(self, self.settings, n) for n in range(owners or self.random.randint(1, 3))]
        for owner in self.owners:
            self._boot(owner)
        if faults:
            self.at(self.random.uniform(0, 5), self._fault)

    @property
    def wall(self) -> float:
        """What the clock on the wall of the host shows, which is the database's too."""
        return EPOCH_S + self.now + self.set_s

    # -- the world ---------------------------------------------------------------------------

    def _people(self) -> None:
        """Add nodes and releases, and the verbs that somebody will use."""
        for number in range(1, self.random.randint(2, 5)):
            protocol = self.random.choice(["tasks", "tasks", "execute"])
            agent = SimAgent(self, f"10.0.0.{number}", protocol)
            self.agents[agent.address] = agent
            self.store.nodes.add(name_of(number), agent.address, agent_protocol=protocol, labels=self._labels())
        for target in self.random.choices(["cdn", "dns"], k=self.random.randint(1, 3)):
            request = rc.ReleaseRequest(target, payload=self._payload(), strategy=self._strategy())
            self.store.releases.create(self._asking(request), "test")
        if self.steering:
            self.at(self.random.uniform(0, 5), self._steer)
            self._hurry_now_and_then()
        elif self.faults and self.random.random() < 0.4:
            verb = self.random.choice(["pause", "cancel"])
            self.at(self.random.uniform(0, 20), lambda: self._act(verb))

    def _asking(self, request: rc.ReleaseRequest) -> rc.ReleaseRequest:
        """Return a request that asks for an approval, now and then, and note whether the release needs one."""
        asks = self.has_approvals and self.approval_random.random() < 0.6
        if asks or self.database.approvals:
            self.needs_approval.add(str(request.payload["mark"]))
        return request._replace(approval=rc.WANTED) if asks else request

    def _approve(self) -> None:
        """Let releases go that wait for it, one now and then; once the faults are over all of them."""
        is_late = self.now > FAULTS_UNTIL_S
        self.at(5.0 if is_late else self.approval_random.expovariate(1 / 6), self._approve)
        for release_id, author, text, *approval in self.database.look_in(
                "SELECT id, author, payload, approval, status, started_at FROM release_tasks"):
            waits = approval[0] == rc.WANTED and approval[1] in (rc.PENDING, rc.PAUSED) and approval[2] is None
            is_chosen = is_late or self.approval_random.random() < 0.4
            if is_chosen and author and not self.database.is_out:
                with contextlib.suppress(rc.AppError):
                    self.store.approvals.approve(release_id, author)
                    self.fail(f"section 7: release {release_id} was approved by its author")
            if is_chosen:
                is_emergency = self.approval_random.random() < 0.2
                with contextlib.suppress(rc.AppError):
                    self.store.approvals.approve(release_id, author if is_emergency else "anna", "why", is_emergency)
                    self.approved.add(str(rc.parse_json(text)["mark"]))
                    self.figures["approved"] += 1
                    self.figures["approved late"] += release_id < max(self.versions)
                    self.note(f"approve release {release_id}")
                    if not waits:
                        self.fail(f"section 7: release {release_id} was approved as {approval}")

    def _payload(self) -> dict[str, object]:
        """Return a payload that no other release has."""
        return {"websites": [], "mark": f"mark-{next(self.numbers)}"}

    def _strategy(self) -> dict[str, object]:
        """Return what a release may be asked to be, each key now and then."""
        if not self.steering:
            return {}
        choices: dict[str, list[typing.Any]] = {
            "batches": [[1, 1], ["50%"], [2], ["1%", "1%", "1%"]], "maxFailed": [1, "50%", "100%"],
            "maxFailedTotal": [0, 1, "50%"], "maxParallel": [1, 2], "soakSec": [0.5, 8], "pauseAfter": ["each", [1]],
            "onExceed": ["pause", "fail"], "retries": [0, 5],
            "startAt": [rc.utc_text(self.wall + self.random.uniform(0, 20))],
            "verify": [{"url": "http://{main_ip}/", "successes": self.random.choice([1, 3])}]}
        strategy = {key: self.random.choice(values) for key, values in choices.items() if self.random.random() < 0.4}
        if self.label_random.random() < 0.4:
            strategy["maxParallelPer"] = self.label_random.choice([{"rack": 1}, {"rack": 2}, {"rack": 1, "region": 2}])
        if self.preflight_random.random() < 0.3:
            is_strict = self.preflight_random.random() < 0.5
            strategy.update({"preflight": True, **({"retries": 1, "maxFailedTotal": 0} if is_strict else {})})
        if self.back_random.random() < 0.5:
            strategy["onExceed"] = rc.ROLLBACK
        return strategy

    def _hurry_now_and_then(self) -> None:
        # after the faults too, as few releases have a success behind them before
        for _ in range(self.back_random.randint(2, 8)):
            self.at(self.back_random.uniform(1, 1.5 * FAULTS_UNTIL_S), self._hurry)
        # something to go back to, and what is likely to fail
        self.at(0.1, lambda: self._create_plain({"maxFailed": "100%"}))
        for _ in range(2):
            self.at(self.back_random.uniform(5, FAULTS_UNTIL_S), lambda: self._create_plain(
                {"onExceed": rc.ROLLBACK, "batches": ["100%"], "retries": 0}))

    def _create_plain(self, strategy: dict[str, typing.Any]) -> None:
        with contextlib.suppress(rc.AppError):
            self.store.releases.create(rc.ReleaseRequest(payload=self._payload(), strategy=strategy), "test")

    def _hurry(self) -> None:
        """Make a release that supersedes others, or roll one back at once, in a freeze too."""
        target = self.back_random.choice(["cdn", "dns"])
        is_new, strategy = self.back_random.random() < 0.4, self._strategy()
        wish = rc.Again("in a hurry", True, supersede=self.back_random.random() < 0.7,
                        during_freeze=self.back_random.random() < 0.5, is_emergency=self.back_random.random() < 0.5)
        try:
            if not is_new and self.back_random.random() < 0.3:
                self.store.releases.set_freeze(True, "anna", "holidays")
            made = self.store.releases.create(rc.ReleaseRequest(
                target, payload=self._payload(), strategy=strategy, supersede=True), "anna") if is_new \
                else self._roll_back_the_newest(wish)
        except rc.AppError as error:
            self.note(f"not in a hurry: {error}")
            return
        if made is None:
            return
        self.figures["superseded"] += len(made.superseded)
        self.figures["rollbacks now"] += not is_new
        self.figures["during a freeze"] += not is_new and wish.during_freeze and bool(self.store.releases.freezes().on)
        others = self.database.look_in("""
            SELECT id
            FROM release_tasks
            WHERE target = ? AND id <> ? AND started_at IS NULL AND status IN ('pending', 'paused')""",
                                       made.release.target, made.release.id)
        if others and (is_new or wish.supersede):
            self.fail(f"section 7: {made.release} superseded {made.superseded}, and there still are {others}")

    def _roll_back_the_newest(self, wish: rc.Again) -> rc.Made | None:
        """Roll back the newest release that can be, None where there is none."""
        for (release_id,) in self.database.look_in(
                "SELECT id FROM release_tasks WHERE status IN ('success', 'partial', 'failed') ORDER BY id DESC"):
            try:
                return self.store.releases.rollback(release_id, "anna", wish)
            except rc.NotAgain as error:
                self.note(f"not rolled back by hand: {error}")
        return None

    def _labels(self) -> str:
        """Return the labels of a node; each is in a rack."""
        return rc.to_json({"rack": self.label_random.choice("ab"), "region": self.label_random.choice(["eu", "us"])})

    def _change_labels(self) -> None:
        """Move a node to another rack: what is planned does not change by that."""
        node_id = self.label_random.choice(self.database.look_in("SELECT id FROM nodes ORDER BY id"))[0]
        with contextlib.suppress(rc.DatabaseError):
            self.database.write_by_hand(("UPDATE nodes SET labels = ? WHERE id = ?", self._labels(), node_id))

    def _steer(self) -> None:
        """Use a verb or the freeze; once the faults are over only what lets everything end."""
        is_late = self.now > FAULTS_UNTIL_S
        self.at(5.0 if is_late else self.random.expovariate(1 / 3), self._steer)
        verb = self.random.choice(["pause", "resume", "resume", "resume", "cancel", rc.CANCEL_BY_FORCE, "freeze"])
        if not is_late and verb in ("cancel", rc.CANCEL_BY_FORCE) and self.random.random() < 0.7:
            return
        with contextlib.suppress(rc.AppError):
            if verb == "freeze" and not is_late:
                self._set_freeze(self.random.random() < 0.4)
            for freeze in self.store.releases.freezes().on if is_late else ():
                self.store.releases.set_freeze(False, "anna", target=freeze.target)
            releases = list(self.versions)
            for release_id in releases if is_late else releases and [self.random.choice(releases)]:
                self._use("resume" if is_late else verb, release_id)

    def _interfere(self) -> None:
        """Freeze or pause while somebody is between two transactions."""
        running = [row[0] for row in self.database.look_in("SELECT id FROM release_tasks WHERE status = 'running'")]
        with contextlib.suppress(rc.AppError):
            if running and self.random.random() < 0.5:
                self._use("pause", self.random.choice(running))
            else:
                self._set_freeze(True)

    def _set_freeze(self, is_on: bool) -> None:
        """Freeze everything or a target, for some time or until somebody lifts it; or lift that."""
        target = self.freeze_random.choice(["", "", "cdn", "dns"])
        until = rc.utc_text(self.wall + self.freeze_random.uniform(0.5, 15)) if is_on and (
            self.freeze_random.random() < 0.4) else None
        self.store.releases.set_freeze(is_on, "anna", "holidays", target, until)
        self.figures["target freezes"] += is_on and bool(target)
        self.figures["freezes that end"] += bool(until)
        self.note(f"freeze {'on' if is_on else 'off'} {target} {until or ''}")

    def _frozen_s(self, rows_of: Callable[[str], list]) -> Callable[[str, int], float]:
        """Return for how long a release of each target is frozen still, unless it passes a freeze.

        By another way than releasectl's.
        """
        left = [(target, rc.epoch_of(until) - rc.epoch_of(rc.utc_text(self.wall)) if until else float("inf"))
                for target, until in rows_of("SELECT '', until FROM release_freeze WHERE frozen = 1 "
                                             "UNION ALL SELECT target, until FROM target_freezes")]
        return lambda wanted, passes: 0.0 if passes else max(
            (left_s for target, left_s in left if target in ("", wanted)), default=0.0)

    def _use(self, verb: str, release_id: int) -> None:
        if verb == "freeze":
            return
        before = self.store.releases.get(release_id)
        accepts_at_once = "preflight" in before.strategy and self.preflight_random.random() < 0.3
        for accepts in (accepts_at_once, not accepts_at_once):
            more: typing.Any = {"accept_failures": accepts} if verb == "resume" else {}
            with contextlib.suppress(rc.AppError):
                more = {"accept_failures": accepts} if verb == "resume" else {}
                self.store.releases.act(verb, release_id, "anna", **more)
                self.note(f"{verb} release {release_id}")
                self.figures["verbs"] += 1
                self.ledger.resumed.add((release_id, before.passed_batch))
                return

    def _act(self, verb: str) -> None:
        release_id = self.random.choice(list(self.versions))
        try:
            self.store.releases.act(verb, release_id, "anna")
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
            self.store.releases.act("resume", release_id, "anna")
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
        """Run the schedule to its end; raise Violation."""
        while self.events:
            self._next()
            if self.now > self.looks_at_the_end_at:
                if self._is_over():
                    break
                self.looks_at_the_end_at = self.now + INTERVAL_S
            if self.now > END_S:
                self.fail(f"releases that never ended: {self._open()}")
        self._check_end()
        self.database.close()
        return self

    def _next(self) -> None:
        """Let the next thing happen."""
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
        if self.running is None and not self.database.is_out and self.why_random.random() < WHY_SHARE:
            self._check_why()

    def stall(self) -> None:
        """Suspend who runs now between two transactions, and let the others go on meanwhile."""
        owner = self.running
        if owner is None or not self.faults or self.now > FAULTS_UNTIL_S or self.random.random() > 0.01:
            return
        self.figures["suspensions"] += 1
        until = owner.suspended_until = self.now + self.random.uniform(0, 3 * TTL_S)
        self.note("is suspended between two transactions")
        if self.steering and self.random.random() < 0.3:
            self.at(self.random.uniform(0, until - self.now), self._interfere)
        decided_at, self.decided_at = self.decided_at, None
        while self.events and self.events[0][0] < until:
            self._next()
        self.now, self.running, self.decided_at = max(self.now, until), owner, decided_at
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
        return not self._open()

    def _open(self) -> list[tuple]:
        return self.database.look_in("""
            SELECT id, status, status_reason, claim_owner, claim_expires_at
            FROM release_tasks
            WHERE status IN ('pending', 'running', 'paused', 'cancelling')""")

    # -- processes ---------------------------------------------------------------------------

    def _boot(self, owner: SimExecutor) -> None:
        self.at(self.random.uniform(0, 1), lambda: self._look(owner), owner)
        self.at(TTL_S / 3, lambda: self._renew(owner), owner)

    def _look(self, owner: SimExecutor) -> None:
        self.at(INTERVAL_S, lambda: self._look(owner), owner)
        with contextlib.suppress(rc.AppError, rc.StateMoved):
            owner._scan([], owner.is_tick)

    def _renew(self, owner: SimExecutor) -> None:
        self.at(TTL_S / 3, lambda: self._renew(owner), owner)
        for driver in owner._active_drivers():
            owner._renew(driver.lease)

    def turn(self, owner: SimExecutor, driver: typing.Any) -> None:
        """Let a driver take its turn, now and whenever its wait is over or an outcome came."""
        if owner._drivers.get(driver.lease.claim.release_id) is not driver:
            return
        if driver.is_turning:  # it is suspended in the middle of a turn
            self.at(0.1, lambda: self.turn(owner, driver), owner)
            return
        driver.turns += 1
        number = driver.turns
        driver.collect(0.0)
        driver.is_turning = True
        try:
            wait_s = driver.step()
        finally:
            driver.is_turning = False
        if wait_s is None:
            driver.lease.is_lost = True
            owner.ended(driver)  # type: ignore[arg-type]
            return
        self.at(wait_s, lambda: self.turn(owner, driver) if driver.turns == number else None, owner)

    def _crash(self, owner: SimExecutor) -> None:
        if owner.is_dead:
            return
        self.note(f"{owner.owner} dies")
        self.figures["crashes"] += 1
        owner.is_dead = True
        self._start_another()

    def _start_another(self) -> None:
        again = SimExecutor(self, self.settings, len(self.owners))
        self.owners.append(again)
        self.at(self.random.uniform(0, 3), lambda: self._boot(again))

    def _stop(self, owner: SimExecutor) -> None:
        """Ask a process for a clean end, as a deploy does; another one begins."""
        self.figures["stops"] += 1
        owner.stopping.set()
        for driver in owner._active_drivers():
            self.at(0.0, functools.partial(self.turn, owner, driver), owner)
        self.at(rc.STOP_GRACE_S, lambda: self._end(owner))

    def _end(self, owner: SimExecutor) -> None:
        if not owner.is_dead:
            owner.is_dead = True
            self._start_another()

    # -- the network -------------------------------------------------------------------------

    def request(self, owner: SimExecutor, driver: SimDriver, op: str, node: rc.ReleaseNode, task: rc.AgentTask,
                written_at: rc.Moment) -> None:
        """Do what a request does: leave, arrive, and bring an outcome, each at its own time."""
        def answer(outcome: rc.Outcome) -> None:
            send.heard = _heard(outcome)
            driver.results.put((node.node_id, outcome._replace(op=op)))
            self.turn(owner, driver)

        send = Send(next(self.numbers), owner, driver.lease.claim.release_id, node.node_id, node.main_ip,
                    task.version, str(rc.parse_json(task.payload).get("mark", "")))

        if op == rc.PING:
            self._ask(owner, driver, node, answer)
            return

        def leave() -> None:
            if op == rc.DISPATCH and not driver.may_dispatch(written_at):
                answer(rc.Outcome(op, rc.NOT_SENT))
                return
            if op == rc.DISPATCH:
                self._check_dispatch(send, task)
            self._travel(send, op, task, answer)
        if op == rc.DISPATCH:
            self.sends.append(send)
        if self.at_once:  # a mutant's
            self._travel(send, op, task, answer)
        else:
            self.at(self.random.choice([0.0, 0.0, 0.01, CONNECT_S * 0.9]), leave, owner)

    def _ask(self, owner: SimExecutor, driver: SimDriver, node: rc.ReleaseNode, answer) -> None:
        """Ask an agent whether it answers, which is all that it does then."""
        chance, agent = self.preflight_random, self.agents[node.main_ip]
        until = self.silent_until.setdefault((driver.lease.claim.release_id, agent.address),
                                             self.now + chance.choice([0.0, 20.0]))
        is_bad = self.faults and self.now < FAULTS_UNTIL_S and (self.now < until or chance.random() < 0.1)
        is_silent = is_bad or self.now < max(agent.is_down_until, agent.is_bad_until)

        def hear() -> None:
            if not is_silent:
                self.answered.setdefault((driver.lease.claim.release_id, owner.owner), set()).add(node.node_id)
            answer(rc.Outcome(rc.PING, rc.UNSENT, "", rc.UNREACHABLE, "refused") if is_silent else
                   rc.Outcome(rc.PING, rc.SUCCESS))
        self.at(chance.choice([0.0, 0.01, CONNECT_S * 0.9]), hear, owner)

    def note_known(self, owner: SimExecutor, release_id: int) -> None:
        """Take down that a process wrote to a release: what it had heard by then is known from now on."""
        if self.restores and self.restores in owner.can_notice:
            self.ledger.told = max(self.ledger.told, owner.seen_version)
        for send in self.sends:
            if send.owner is owner and send.release_id == release_id:
                send.known = send.heard

    def _check_dispatch(self, send: Send, task: rc.AgentTask) -> None:
        """Check what leaves for an agent: whose it is, its id, its payload and its version."""
        owner, agent = send.owner, self.agents[send.address]
        owner.seen_version = max(owner.seen_version, send.version)
        send.has_left = True
        name = f"{owner.owner} sent v{send.version} to {send.address}"
        if not task.id.startswith(f"apply_config_{send.address}_{send.version}"):
            self.fail(f"section 1: {name} as {task.id}")
        if agent.protocol == "execute" and not isinstance(rc.parse_json(task.payload).get("websites"), list):
            self.fail(f"section 1: {name} with {task.payload}, which empties it")
        if send.mark in self.needs_approval - self.approved:
            self.fail(f"section 7: {name}, which nobody has approved")
        if send.lost_in:
            return  # the database went back meanwhile, and can't have told
        # of what the database has lost it knows where somebody said which version that was
        is_told = send.number > self.ledger.first_set > 0
        known = max(s.version for s in self.sends if s.address == send.address and s.has_left and (
            not s.lost_in or (is_told and s.version < self.ledger.first_version)))
        if send.version < known:
            self.fail(f"section 1: {name}, which was sent v{known} before")
        if self.now < self.leases_clash_until:
            return
        rows = self.database.look_in("SELECT claim_owner, claim_expires_at, status FROM release_tasks WHERE id = ?",
                                     send.release_id)
        *holder, status = rows[0] if rows else ("nobody", "", "gone")
        # what was written down before a cancel by force may still leave: its outcome is unknown
        if status != "cancelled" and (holder[0] != owner.owner or holder[1] <= rc.utc_text(self.wall)):
            self.fail(f"rule 9: {name}, and {holder} held it")

    def check_together(self, agent: SimAgent, live: Run, send: Send) -> None:
        """Check that what an agent is at allows what begins now: no address has two tasks at once."""
        first, second = sorted((live.send, send), key=lambda s: s.number)
        is_lost = first.lost_in != second.lost_in and first.lost_in > 0
        if agent.protocol == "execute":
            # who can see that the database went back leaves such an agent alone for a while
            if is_lost and first.lost_in not in second.owner.can_notice:
                return
        elif is_lost or second.lost_in or not self._is_running(live.send):
            return  # of which nobody can know, or nobody waits for any more
        self.fail(f"rule 2: {agent.address} has {live.send.mark} (v{live.send.version}) of {live.send.owner.owner} and "
                  f"{send.mark} (v{send.version}) of {send.owner.owner} under way at once")

    def check_labels_at_work(self, send: Send) -> None:
        """Check section 7 where an agent begins: of no label more agents are at work than may be.

        Those don't count whose row is at rest: nobody waits for them any more.
        """
        labels, strategy = self.labels.get(send.mark, {}), self._strategy_of(send.release_id)
        at_work = {run.send.node_id for agent in self.agents.values() for run in agent.live()
                   if run.send.mark == send.mark and not run.send.lost_in and self._is_running(run.send)}
        for key, most in strategy.max_parallel_per.items():
            for value in {of.get(key) for of in labels.values()} - {None}:
                busy = sorted(id_ for id_ in at_work if labels[id_].get(key) == value)
                if len(busy) > most and not send.lost_in:
                    self.fail(f"section 7: {key}={value} has nodes {busy} at work for release {send.release_id}")
                self.figures["full labels"] += len(busy) == most

    def _is_running(self, send: Send) -> bool:
        rows = self.database.look_in("SELECT status FROM release_task_nodes WHERE release_task_id = ? AND node_id = ?",
                                     send.release_id, send.node_id)
        return rows == [("running",)]

    @property
    def versions(self) -> dict[int, int]:
        return dict(self.database.look_in("SELECT id, version FROM release_tasks"))

    def _strategy_of(self, release_id: int) -> rc.Strategy:
        rows = self.database.look_in("SELECT strategy FROM release_tasks WHERE id = ?", release_id)
        return rc.parse_strategy(rc.parse_json(rows[0][0])) if rows else rc.NO_STRATEGY

    def _probe(self, send: Send) -> bool:
        """Return whether what a node serves passes a probe, and keep count."""
        passes = self._passes(send)
        key = (send.mark, send.address, send.owner)
        self.streaks[key] = self.streaks.get(key, 0) + 1 if passes else 0
        verify = self._strategy_of(send.release_id).verify
        if verify and self.streaks[key] and self.streaks[key] % verify.successes == 0:
            self.verified.setdefault((send.mark, send.address), []).append(self.now)
        return passes

    def _passes(self, send: Send) -> bool:
        return self.random.random() > 0.1

    def _travel(self, send: Send, op: str, task: rc.AgentTask, answer) -> None:
        """Take a request there, or not, and its answer back, or not."""
        agent, owner = self.agents[send.address], send.owner
        if op == rc.PROBE:
            passes = self._probe(send)
            said = rc.Outcome(op, rc.SUCCESS if passes else rc.UNCLEAR, "", "" if passes else rc.VERIFY,
                              "" if passes else "HTTP 500")
            self.at(0.01, lambda: answer(said), owner)
            return
        is_bad = self.faults and self.now < FAULTS_UNTIL_S
        fate = self.random.random() if is_bad else 1.0
        if fate < 0.08 or self.now < agent.is_down_until:
            self.at(0.01, lambda: answer(rc.Outcome(op, rc.UNSENT, "", rc.UNREACHABLE, "refused")), owner)
            return
        is_lost = fate < 0.25
        if is_lost:
            self.figures["lost answers"] += 1
        sent_at = self.now

        def deliver(value) -> None:
            if is_lost and self.random.random() < 0.5:
                wait_s = max(0.0, sent_at + REQUEST_S - self.now)
                value = rc.Outcome(op, rc.LOST, "", rc.TIMEOUT, "no answer", hold_s=REQUEST_S)
                self.at(wait_s, lambda: answer(value), owner)
                return
            if is_lost:
                value = CUT
            self.at(0.01, lambda: answer(value), owner)

        def arrive() -> None:
            if fate < 0.12:
                deliver(None)  # cut before the agent saw it
            elif self.now < agent.is_bad_until or 0.25 <= fate < 0.28:
                deliver(rc.Outcome(op, rc.UNCLEAR, "", rc.HTTP, "HTTP 503", is_refusal=True))
            else:
                self._serve(agent, op, send, task, deliver)
        self.at(self.random.choice([0.0, 0.01, 0.3]), arrive)

    def _serve(self, agent: SimAgent, op: str, send: Send, task: rc.AgentTask, deliver) -> None:
        # the longest run that arrives late still ends before a hold of CONNECT_S + REQUEST_S does
        duration_s = self.random.choice([0.0, 0.1, 1.0, 3.0, 5.5])
        is_good = self.random.random() > 0.03
        if agent.protocol == "execute":
            self._execute(agent, send, task, duration_s, is_good, deliver)
        elif op == rc.DISPATCH:
            is_hung = self.deadline_s < DEADLINE_S and self.label_random.random() < 0.05
            name = agent.take(send, task.id, 2 * self.deadline_s if is_hung else duration_s * self.slowness, is_good)
            self.figures["hung"] += is_hung
            run = agent.tasks[name]
            is_done = run is None or (run.is_good and not run.is_live(self.now))
            deliver(rc.Outcome(op, rc.ACCEPTED, name, applied=send.version if is_done else 0))
        elif task.id not in agent.tasks:
            deliver(rc.Outcome(op, rc.UNKNOWN, task.id))
        else:
            run = agent.tasks[task.id]
            if run is not None and run.is_live(self.now):
                deliver(rc.Outcome(op, rc.WORKING, task.id))
            else:
                deliver(self._word(run, task.id))

    def _execute(self, agent: SimAgent, send: Send, task: rc.AgentTask, duration_s: float, is_good: bool,
                 deliver) -> None:
        run = agent.execute(send, task.id, duration_s, is_good)
        if run is None:
            deliver(self._already(send.version, agent.applied, task.id))
            return
        self.at(max(0.0, run.ends - self.now), lambda: deliver(
            self._word(run, task.id) if run.killed is None else CUT))

    @staticmethod
    def _already(version: int, applied: int, task_id: str) -> rc.Outcome:
        """Return what the client makes of "already applied"."""
        if applied > version:
            return rc.Outcome(rc.DISPATCH, rc.FAILED, "", rc.REJECTED, f"the agent is already at version {applied}")
        return rc.Outcome(rc.DISPATCH, rc.SUCCESS, task_id, applied=applied,
                          message=f"Version {version} already applied (current: {applied})")

    @staticmethod
    def _word(run: Run | None, task_id: str) -> rc.Outcome:
        """Return what an agent says of a task that is at its end; it takes what it has already for a success."""
        if run is None or run.is_good:
            return rc.Outcome(rc.DISPATCH, rc.SUCCESS, task_id)
        return rc.Outcome(rc.DISPATCH, rc.FAILED, "", rc.AGENT_FAILED, "boom")

    # -- faults ------------------------------------------------------------------------------

    kinds: tuple[str, ...] = ("crash", "stop", "suspend", "suspend long", "restart", "database")

    def _fault(self) -> None:
        """Do one thing to somebody, and plan the next."""
        if self.now > FAULTS_UNTIL_S:
            return
        self.at(self.random.expovariate(1 / 4), self._fault)
        owner = self.random.choice([o for o in self.owners if not o.is_dead])
        kind = self.random.choice(self.kinds)
        self.note(f"{kind} {owner.owner}")
        self._break(kind, owner)

    def _break(self, kind: str, owner: SimExecutor) -> None:
        if kind == "crash":
            self._crash(owner)
        elif kind == "stop":
            self._stop(owner)
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
        """Return what happens to the transaction that begins now."""
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
        """Check sections 1, 3 and 7 of the contract on what was just committed."""
        if not self.is_set_up:
            return
        self.figures["commits"] += 1
        with rc.Database.transaction(self.database) as tx:
            for row in tx.rows("""
                    SELECT r.id, r.status, r.total_nodes, r.success_nodes, r.failed_nodes,
                           SUM(n.status = 'success'), SUM(n.status = 'failed'), SUM(n.status = 'skipped'), COUNT(*)
                    FROM release_tasks r JOIN release_task_nodes n ON n.release_task_id = r.id
                    WHERE r.status <> 'pending' GROUP BY r.id"""):  # what was written by hand is counted at its claim
                number, status, total, success, failed, successes, failures, skipped, count = row
                if (success, failed) != (successes, failures) or (total != count and status != rc.PAUSED):
                    self.fail(f"rule 7: release {number} counts {row}")
                if status in rc.TERMINAL and success + failed + skipped != total:
                    self.fail(f"rule 7: release {number} is {status} with nodes not at rest")
            active = tx.rows("SELECT target, COUNT(*) FROM release_tasks WHERE status IN ('running', 'cancelling') "
                             "AND started_at IS NOT NULL GROUP BY target HAVING COUNT(*) > 1")
            if active:
                self.fail(f"rule 2: two releases of one target are active: {active}")
            holders = {id_: (owner, fence) for id_, owner, fence in tx.rows(
                "SELECT id, claim_owner, claim_fence FROM release_tasks")}
            frozen_s = self._frozen_s(tx.rows)
            for release_id, status, target, passes in tx.rows(
                    "SELECT id, status, target, during_freeze FROM release_tasks"):
                self.ledger.note_held(release_id, float("inf") if status in (rc.PAUSED, rc.PENDING) else frozen_s(
                    target, passes) if status == rc.RUNNING else 0.0, self.now)
            events = tx.rows("SELECT id, release_task_id, node_id, from_status, to_status, actor, event "
                             "FROM release_events WHERE id > ? ORDER BY id", self.ledger.seen_events)
        if self.steering:
            begun = {(e[1], e[2]) for e in events if e[2] is not None and e[4] == "running"}
            self._check_strategies(begun)
        for number, *event in events:
            self.ledger.seen_events = number
            self._check_event(*event, holders)  # type: ignore[call-arg]
        self.ledger.holders = holders

    def _check_event(self, release_id: int, node_id: int | None, before: str, after: str, actor: str, event: str,
                     holders: dict[int, tuple[str, int]]) -> None:
        """Check one change of a status: that it is legal, by whom, and that what it says is so."""
        subject = (release_id, node_id)
        self.schedule.append(f"{self.now:8.3f} {actor:<8} release {release_id} node {node_id}: {before} -> {after} "
                             f"({event})")
        known = self.ledger.statuses.get(subject, "" if node_id is None else "pending")
        if node_id is None and (event == "renumbered" or not before):
            self._check_number(release_id)
            self.figures["overtaken"] += event == "renumbered"
        if before == after == known:
            return  # the freeze, which changes no status
        if before != known or not contract.may_follow(node_id, before, after):
            self.fail(f"section 3: {subject} went from {before} to {after}, and was {known}")
        self.ledger.statuses[subject] = after
        # not the rollback that it creates with an end, nor one that it finds too late before it would claim it
        if actor.startswith("owner") and before and not self._was_too_late(release_id):
            held_by = (self.ledger.holders.get(release_id, ("", 0))[0], holders[release_id][0])
            if actor not in held_by:
                self.fail(f"rule 9: {actor} wrote on release {release_id}, which is {held_by}'s")
        if node_id is None:
            if (before, after) == ("pending", "running"):
                self._check_turn(release_id)
            elif after in contract.TERMINAL:
                self._check_rollback(release_id, after)
                self.figures["cancelled late"] += self._was_too_late(release_id)
        elif after == "running":
            since = self.now if self.decided_at is None else self.decided_at
            self.ledger.begun[release_id, node_id] = (since, self.ledger.held_so_far(release_id, self.now))
        elif after == "success":
            self._check_success(release_id, node_id)
        elif (before, after) == ("running", "failed"):
            self._check_deadline(release_id, node_id)

    def _was_too_late(self, release_id: int) -> bool:
        """Tell whether a rollback ended before it began, as its target has a newer success."""
        return bool(self.database.look_in("SELECT 1 FROM release_tasks WHERE id = ? AND status = 'cancelled' "
                                          "AND started_at IS NULL AND status_reason LIKE '%comes too late%'",
                                          release_id))

    def _check_number(self, release_id: int) -> None:
        """Check that who gave a release its version saw no higher one (rule 1)."""
        version = self.versions[release_id]
        if version < self.ledger.first_version:
            self.fail(f"rule 1: release {release_id} is v{version}, and versions begin at {self.ledger.first_version}")
        if version <= self.ledger.told:
            self.fail(f"rule 1: release {release_id} is v{version}, and who saw the database go back saw "
                      f"v{self.ledger.told}")
        if self.running is None:
            return
        if version <= self.running.seen_version:
            self.fail(f"rule 1: release {release_id} is v{version}, and {self.running.owner} saw "
                      f"v{self.running.seen_version}")
        self.running.seen_version = version

    def _check_rollback(self, release_id: int, status: str) -> None:
        """Check that a release has its rollback at its end where its strategy wants that, and else none (rule 10)."""
        (text, reason, error, version, of_release), = self.database.look_in("""
            SELECT strategy, status_reason, error_msg, version, rollback_of
            FROM release_tasks
            WHERE id = ?""", release_id)
        found = self.database.look_in("SELECT id, goes_first, status, version, rollback_of FROM release_tasks "
                                      "WHERE rollback_of = ? AND reason LIKE 'automatic%'", release_id)
        is_wanted = status == "failed" and error.startswith("node ") and of_release is None and rc.parse_json(
            text).get("onExceed") == "rollback"
        (sent,), = self.database.look_in(
            "SELECT SUM(attempts) FROM release_task_nodes WHERE release_task_id = ?", release_id)
        is_wanted, is_refused = is_wanted and sent > 0, status == "failed" and "; not rolled back, as " in reason
        self.figures["rolled back"] += len(found)
        self.figures["not rolled back"] += is_refused
        if len(found) + is_refused != is_wanted:
            self.fail(f"rule 10: release {release_id} ended {status} ({reason}), and has the rollbacks {found}")
        for number, goes_first, its_status, its_version, _ in found:
            if (goes_first, its_status) != (1, "pending") or its_version <= version or (
                    f"release {number} rolls it back" not in reason):
                self.fail(f"rule 10: release {release_id} (v{version}, {reason}) has the rollback {found}")

    def _check_turn(self, release_id: int) -> None:
        """Check that a release that starts waits for no other (rule 2)."""
        if self.running is not None:
            self.running.seen_version = max(self.running.seen_version, self.versions[release_id])
        (target, version, strategy, goes_first, passes, *approval), = self.database.look_in("""
            SELECT target, version, strategy, goes_first, during_freeze, approval, author, approved_by, reason
            FROM release_tasks
            WHERE id = ?""", release_id)
        self._check_approval(release_id, *approval)
        now, frozen_s = rc.utc_text(self.wall), self._frozen_s(self.database.look_in)
        if frozen_s(target, passes) > 0:
            self.fail(f"section 7: release {release_id} started while {target} is frozen")
        if self._start_at(strategy) > now:
            self.fail(f"section 7: release {release_id} started before {self._start_at(strategy)}")
        for other in self.database.look_in("""
                SELECT DISTINCT r.id, r.version, r.status, r.started_at, r.strategy, r.target, r.goes_first,
                       r.during_freeze, r.approval
                FROM release_tasks r
                WHERE r.status IN ('pending', 'running', 'paused', 'cancelling') AND r.id <> ?
                  AND (r.target = ? OR EXISTS (
                       SELECT 1 FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id
                       WHERE n.release_task_id = r.id AND h.main_ip IN (
                             SELECT g.main_ip FROM release_task_nodes m JOIN nodes g ON g.id = m.node_id
                             WHERE m.release_task_id = ?)))""", release_id, target, release_id):
            (_, other_version, status, started_at, other_strategy, other_target, other_goes_first, other_passes,
             approval) = other
            # one that has a startAt, needs an approval, or is frozen, takes a later version when it starts
            waits = self._start_at(other_strategy) or approval == rc.WANTED or frozen_s(other_target, other_passes)
            is_before = (not other_goes_first, other_version) < (not goes_first, version) and not waits
            if is_before or (status != rc.PENDING and started_at):
                self.fail(f"rule 2: release {release_id} ({target}, v{version}) started before {other}")

    def _check_approval(self, release_id: int, approval: str, author: str, by: str, reason: str) -> None:
        """Check that a release that starts has an approval where it needs one, and of whom it must be."""
        is_alone = approval == "given" and by == author
        is_made_up = approval == "automatic" and not reason.startswith("automatic rollback")
        if approval == "wanted" or is_alone or is_made_up or (not approval and self.database.approvals):
            self.fail(f"section 7: release {release_id} ({reason}) of {author} started, which nobody has approved: "
                      f"{approval or 'not asked for'} {by}")
        self.figures["automatic"] += approval == "automatic"

    @staticmethod
    def _start_at(strategy: str) -> str:
        return str(rc.parse_json(strategy).get("startAt", ""))

    def _check_success(self, release_id: int, node_id: int) -> None:
        """Check that a node that is called a success ran just this payload, and to a good end."""
        (payload, version, address), = self.database.look_in("""
            SELECT r.payload, r.version, h.main_ip
            FROM release_task_nodes n
            JOIN release_tasks r ON r.id = n.release_task_id
            JOIN nodes h ON h.id = n.node_id
            WHERE n.release_task_id = ? AND n.node_id = ?""", release_id, node_id)
        mark, agent = rc.parse_json(payload)["mark"], self.agents[address]
        if agent.ran(mark):
            return
        sends = [s for s in self.sends if s.address == address and s.has_left]
        lost = {s.version for s in sends if s.lost_in}
        *earlier, last = [s for s in self.sends if s.address == address and s.mark == mark]
        was_tried = (mark, address) in self.orphans or any(s.known != NOTHING_DONE for s in earlier)
        # A database that went back: the version of a release that it has lost can't be told from what
        # an earlier try has done. An agent of `tasks` says the same of a higher one, and only at once.
        if agent.protocol == "tasks":
            is_unknowable = max(lost, default=0) >= version and (was_tried or last.known != DONE_AT_ONCE)
        else:
            is_unknowable = version in lost and was_tried
        if is_unknowable:
            self.figures["unknowable"] = self.figures.get("unknowable", 0) + 1
            return
        self.fail(f"section 8: release {release_id} (v{version}) calls {address} a success, which never ran {mark}")

    def _check_deadline(self, release_id: int, node_id: int) -> None:
        """Check that a node that ran out of time had that time."""
        (kind, address, payload, strategy), = self.database.look_in("""
            SELECT n.error_kind, h.main_ip, r.payload, r.strategy
            FROM release_task_nodes n
            JOIN release_tasks r ON r.id = n.release_task_id
            JOIN nodes h ON h.id = n.node_id
            WHERE n.release_task_id = ? AND n.node_id = ?""", release_id, node_id)
        if kind != rc.DEADLINE:
            return
        self.figures["deadlines"] = self.figures.get("deadlines", 0) + 1
        deadline_s = rc.parse_json(strategy).get("nodeDeadlineSec", self.deadline_s)
        since, held_before_s = self.ledger.begun[release_id, node_id]
        mark = rc.parse_json(payload)["mark"]
        runs = [run for run in self.agents[address].runs if run.send.mark == mark]
        if any(run.killed is None and run.ends <= self.now for run in runs):
            return  # it was asked for its end, or verified, which goes on in a pause
        held_s = self.ledger.held_so_far(release_id, self.now) - held_before_s
        at_work_s = sum(run.seconds_since(since, self.now) for run in runs)
        if held_s > 0 and self.clock_set_at >= since:
            return  # a new owner knows of pauses by the times of their events
        if self.running is not None and self.now - self.running.suspended_until < NOTICE_S:
            return  # it has just woken up, and knows what was so before
        if self.now - since - held_s + at_work_s < deadline_s - NOTICE_S:
            self.fail(f"section 7: release {release_id}, node {node_id}: deadline {self.now - since:.1f} s after its "
                      f"dispatch, held for {held_s:.1f} s, its agent at work for {at_work_s:.1f} s")

    def _check_strategies(self, begun: set[tuple[int, int]]) -> None:
        """Check section 7 of the contract: begun are the nodes whose first dispatch was just committed."""
        with rc.Database.transaction(self.database) as tx:
            frozen_s = self._frozen_s(tx.rows)
            releases = tx.rows("SELECT id, status, strategy, passed_batch, payload, target, during_freeze, "
                               "preflight_accepted, error_msg FROM release_tasks")
            rows = tx.rows("SELECT n.release_task_id, n.node_id, n.batch, n.status, n.accepted, h.main_ip, n.attempts, "
                           "n.error_kind "
                           "FROM release_task_nodes n JOIN nodes h ON h.id = n.node_id")
            labels = dict(tx.rows("SELECT id, labels FROM nodes"))
        for release_id, status, text, passed, payload, target, passes, goes_on, error_msg in releases:
            strategy, content = rc.parse_json(text), rc.parse_json(payload)
            mark, is_broken = content["mark"], "websites" not in content
            nodes = [row[1:] for row in rows if row[0] == release_id]
            if mark not in self.labels:
                self.labels[mark] = {node[0]: rc.parse_json(labels[node[0]]) for node in nodes}
            mine = [(node_id, batch) for node_id, batch, *_ in nodes if (release_id, node_id) in begun]
            self._note_rest(release_id, nodes)
            if "verify" in strategy:
                unseen = [node for node in nodes if node[2] == "success" and (mark, node[4]) not in self.verified]
                if unseen:
                    self.fail(f"section 7: release {release_id} calls nodes a success that no probes passed: {unseen}")
            exceeded = self._is_exceeded(strategy, nodes)
            if "preflight" in strategy and not goes_on:
                self._check_preflight(release_id, mark, strategy, nodes, mine)
            if status == "failed" and error_msg.startswith("preflight: "):
                self._check_nothing_sent(release_id, mark, nodes)
                continue
            is_partial = any(node[2] == "failed" for node in nodes)
            may_fail = is_broken or not nodes or (exceeded and strategy.get("onExceed") != "pause")
            if status == "failed" and not may_fail:
                self.fail(f"section 7: release {release_id} failed within its limits: {strategy} {nodes}")
            if status in ("partial", "success") and (exceeded or is_partial != (status == "partial")):
                self.fail(f"section 7: release {release_id} is {status}: {strategy} {nodes}")
            if not mine:
                continue
            name = f"section 7: release {release_id} dispatched {mine}"
            if frozen_s(target, passes) > 0 or status != "running" or exceeded:
                self.fail(f"{name} while {status}, frozen for {frozen_s(target, passes)} s, exceeded {exceeded}")
            parallel = sum(node[2] == "running" for node in nodes)
            if parallel > strategy.get("maxParallel", 0) > 0:
                self.fail(f"{name}: {parallel} in flight")
            for key, most in strategy.get("maxParallelPer", {}).items():
                found = collections.Counter(
                    self.labels[mark][node[0]].get(key) for node in nodes if node[2] == "running")
                if max((count for value, count in found.items() if value), default=0) > most:
                    self.fail(f"{name}: in flight are {found}")
            batch = min(batch for _, batch in mine)
            self._check_between(release_id, strategy, batch, {n[1] for n in nodes if n[1] < batch}, passed, name)
            if "verify" in strategy and "soakSec" in strategy and batch > 1:
                over = self.ledger.rested[release_id, batch - 1] + strategy["soakSec"]
                for node in nodes:
                    if node[1] == batch - 1 and node[2] == "success" and max(
                            self.verified[mark, node[4]]) < over - 0.002:
                        self.fail(f"{name}, and {node} was not looked at again after its soak")

    def _check_preflight(self, release_id: int, mark: str, strategy: dict, nodes: list[tuple],
                         mine: list[tuple[int, int]]) -> None:
        """Check that enough agents had answered whoever writes the first dispatches of a release."""
        begun = {node[0] for node in nodes if node[5]}
        if not mine or begun != {node_id for node_id, _ in mine} or self.running is None:
            return
        self.figures["preflights"] += 1
        answered = self.answered.get((release_id, self.running.owner), set())
        silent = [node[0] for node in nodes if node[0] not in answered and node[2] != "failed" and not node[3]]
        if len(silent) > self._most_silent(strategy, len(nodes)):
            self.fail(f"section 7: release {release_id} began though {silent} did not answer: {strategy} {nodes}")

    def _check_nothing_sent(self, release_id: int, mark: str, nodes: list[tuple]) -> None:
        """Check that a release that its preflight has ended reached no agent."""
        name = f"section 7: release {release_id} ended by its preflight"
        if any(send.has_left and not send.lost_in for send in self.sends if send.mark == mark):
            self.fail(f"{name}, and something was sent: {nodes}")
        if any(node[2] not in ("failed", "skipped") or node[5] for node in nodes):
            self.fail(f"{name}: {nodes}")
        self.figures["silent"] += self.ledger.statuses.get((release_id, None)) != "failed"

    @staticmethod
    def _most_silent(strategy: dict, whole: int) -> int:
        limit = strategy.get("maxFailedTotal", strategy.get("maxFailed", 0))
        return limit if isinstance(limit, int) else int(limit.rstrip("%")) * whole // 100

    def _note_rest(self, release_id: int, nodes: list[tuple]) -> None:
        """Take down which batches are at rest, by the moment of the decision that is being committed."""
        for number in {node[1] for node in nodes}:
            if all(node[2] in rc.AT_REST for node in nodes if node[1] == number):
                self.ledger.rested.setdefault((release_id, number),
                                              self.now if self.decided_at is None else self.decided_at)

    def _check_between(self, release_id: int, strategy: dict, batch: int, before_it: set[int], passed: int,
                       name: str) -> None:
        """Check what lies between the batch before and this one."""
        if batch == 1 or not before_it:
            return
        before = (release_id, max(before_it))
        # what is stored has milliseconds
        over = self.ledger.rested.get(before, float("inf")) + strategy.get("soakSec", 0)
        if self.now < over - 0.002:
            self.fail(f"{name} before the soak of batch {batch - 1} was over, at {over:.3f}")
        if self.now > max(over, FAULTS_UNTIL_S) + LATE_SOAK_S + self.deadline_s:
            self.fail(f"{name} long after the soak of batch {batch - 1} was over, at {over:.3f}")
        gates = strategy.get("pauseAfter", [])
        if (gates == "each" or batch - 1 in gates) and before not in self.ledger.resumed:
            self.fail(f"{name}, and nobody resumed after batch {batch - 1}")
        if passed < batch - 1:
            self.fail(f"{name} with batch {passed} the last one that is over")

    @staticmethod
    def _is_exceeded(strategy: dict, nodes: list[tuple]) -> bool:
        """Count failures against the limits, by another way than releasectl's."""
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
        if self.now < self.leases_clash_until:
            return
        holders: dict[int, str] = {}
        for owner in self.owners:
            if owner.is_dead:
                continue
            for driver in owner._active_drivers():
                # what is stored has milliseconds
                if driver.lease.is_valid(owner.clock.elapsed() + 0.001):
                    release_id = driver.lease.claim.release_id
                    if release_id in holders:
                        self.fail(f"{holders[release_id]} and {owner.owner} both hold release {release_id}")
                    holders[release_id] = owner.owner

    def _check_why(self) -> None:
        """What `why` says of each open release is what the world knows."""
        now, period_s = self.wall, rc.NOTE_EVERY_S + INTERVAL_S + rc.NOTE_LATE_S
        with rc.Database.transaction(self.database) as tx:
            frozen_s = self._frozen_s(tx.rows)
            free, _ = self.store.queue.runnable(tx)
            rows = tx.rows("""
                SELECT r.id, r.status, r.claim_owner, r.claim_expires_at, SUM(n.status = 'running'),
                       SUM(n.status = 'pending'), r.target, r.during_freeze, r.approval, r.started_at
                FROM release_tasks r JOIN release_task_nodes n ON n.release_task_id = r.id
                WHERE r.status IN ('pending', 'running', 'paused', 'cancelling') GROUP BY r.id""")
        noted = {owner.owner for owner in self.owners if self.now - owner.noted_at < period_s - 0.01}
        unnoted = {owner.owner for owner in self.owners if owner.noted_at < 0}
        for release_id, status, holder, expires, running, pending, target, passes, approval, started in rows:
            why = self.store.claims.why(release_id, self.deadline_s)
            said = {step.name: step for step in why.steps}
            stops = {step.name for step in why.steps if step.state == rc.STOPS}
            is_claimed = bool(expires) and now < rc.epoch_of(expires) <= now + rc.MAX_CLAIM_TTL_S
            is_frozen = frozen_s(target, passes) == float("inf") and (status == rc.PENDING or pending)
            wanted = {name for name, holds in (
                ("freeze", is_frozen), ("pause", status == rc.PAUSED),
                ("approval", approval == rc.WANTED and not started)) if holds}
            if not self.restores and self.clock_set_at < 0:  # else its row may be gone, or of another time
                # whose first row is not written yet is known by its claim alone
                is_at_work = is_claimed and (holder in noted or holder in unnoted)
                wanted |= {"executor"} if not noted and not is_at_work else set()
            elif "executor" in stops:
                wanted.add("executor")
            if stops - {"order"} != wanted:
                self.fail(f"release {release_id} is stopped by {sorted(stops)} and not {sorted(wanted)}: {why.line}")
            for step in why.steps:
                if not contract.has_its_time(step.text, step.until):
                    self.fail(f"release {release_id}: {step.name} says {step.text!r}, and until {step.until}")
            if any(not step.mend for step in why.steps if step.state == rc.STOPS):
                self.fail(f"release {release_id} is stopped and nothing would mend it: {why.line}")
            waits = {step.name for step in why.steps if step.state == rc.WAITS}
            if status == rc.PENDING and (release_id in free) == bool((stops | waits) & {
                    "order", "start", "freeze", "approval"}):
                self.fail(f"release {release_id} may {'' if release_id in free else 'not '}start: {why.line}")
            in_flight = re.search(r"(\d+) in flight", said["nodes"].text if "nodes" in said else "")
            if (int(in_flight[1]) if in_flight else 0) != running:
                self.fail(f"release {release_id} has {running} nodes in flight: {said.get('nodes')}")
            self.figures["whys"] += 1
            self.figures["whys that stop"] += bool(stops)

    def _check_end(self) -> None:
        rows = self.database.look_in("""
            SELECT r.payload, h.main_ip, n.status, n.error_kind, r.claim_fence
            FROM release_task_nodes n JOIN release_tasks r ON r.id = n.release_task_id
            JOIN nodes h ON h.id = n.node_id""")
        for payload, address, status, kind, fence in rows:
            mark, agent = rc.parse_json(payload)["mark"], self.agents[address]
            self.figures["take-overs"] = max(self.figures["take-overs"], fence - 1)
            ran = any(run.send.mark == mark and not run.send.lost_in for run in agent.runs)
            if status == "skipped" and ran and self._is_alone(mark, address):
                self.fail(f"{address} is skipped for {mark}, and ran it")
            if kind == "deadline" and not self.steering:
                self.fail(f"{address} was forgotten until its deadline")
        self._check_levels()
        twice = self.database.look_in("SELECT rollback_of, COUNT(*) FROM release_tasks WHERE reason LIKE 'automatic%' "
                                      "GROUP BY rollback_of HAVING COUNT(*) > 1")
        if twice:
            self.fail(f"rule 10: releases went back by themselves more than once: {twice}")
        surpassed = [] if self.is_shared else self.database.look_in(
            "SELECT release_task_id, node_id, error_msg FROM release_task_nodes "
            "WHERE error_msg LIKE 'node has version %'")
        if surpassed:
            self.fail(f"rule 2: releases that others overtook kept their versions: {surpassed}")

    is_shared = False

    def _check_levels(self) -> None:
        """What is said of each node's payload is what its agent has, or it is said that nobody knows."""
        with rc.Database.transaction(self.database) as tx:
            nodes = rc.all_nodes(tx)
            found = rc.levels(tx, nodes)
            marks = {id_: rc.parse_json(payload)["mark"] for id_, payload in tx.rows(
                "SELECT id, payload FROM release_tasks")}
        for node in nodes:
            has, runs = found[node.id].has, self.agents[node.main_ip].runs
            really = max((run for run in runs if run.ended_well(self.now)), key=lambda run: run.send.version,
                         default=None)
            told, really_has = has and marks[has.release_id], really and really.send.mark
            self.figures["levels unknown"] += found[node.id].is_unknown
            if not found[node.id].is_unknown and told != really_has and not self.restores:
                self.fail(f"{node.name} is said to have {told}, and has {really_has}")

    def _is_alone(self, mark: str, address: str) -> bool:
        """Return whether no other row of the release is for the same address."""
        return True


class SharedSimulation(Simulation):
    """The world in which releases share nodes, databases go back, and clocks are set."""

    deadline_s = SHORT_DEADLINE_S
    is_shared = True
    slowness = 2
    kinds = (*Simulation.kinds, "restart", "clock", "clock", "restore", "bad agent", "long hold",
             "long hold")

    def _people(self) -> None:
        """Add nodes, one of them entered twice now and then, and releases for some of them, now and later."""
        self.figures.update(dict.fromkeys((
            "restores", "new databases", "clocks set", "long holds", "refused twins", "by hand", "unknowable",
            "deadlines", "later", "renamed"), 0))
        self.fickle: set[tuple[str, str]] = set()
        self.snapshots: list[Snapshot] = []
        self.twin = ""
        for number in range(1, self.random.randint(3, 5)):
            self._add_agent(name_of(number), f"10.0.0.{number}")
        if self.random.random() < 0.4:
            self._enter_twice()
        self.snapshots.append(self._snapshot())
        for _ in range(self.random.randint(1, 3)):
            self._create()
        for _ in range(self.random.randint(0, 4)):
            self.at(self.random.uniform(1, FAULTS_UNTIL_S), self._create_later)
        if self.random.random() < (0.6 if self.twin else 0.2):
            self.at(self.random.uniform(1, FAULTS_UNTIL_S), self._create_by_hand)
        self.at(self.random.uniform(0, 5), self._steer)
        self._hurry_now_and_then()
        for _ in range(3):
            self.at(self.label_random.uniform(0, FAULTS_UNTIL_S), self._change_labels)
        if self.faults:
            self.at(self.random.uniform(0, 5), self._save)
            self.at(FAULTS_UNTIL_S, self._calm_down)

    def _add_agent(self, name: str, address: str) -> None:
        agent = SimAgent(self, address, self.random.choice(["tasks", "execute"]))
        agent.renames = agent.protocol == "tasks" and self.random.random() < 0.3
        self.figures["renamed"] += agent.renames
        self.agents[address] = agent
        self.store.nodes.add(name, address, agent_protocol=agent.protocol, labels=self._labels())

    def _enter_twice(self) -> None:
        """Enter a host once more, as a person does with SQL; enabled now, or later."""
        self.twin = self.random.choice(list(self.agents))
        enabled = int(self.random.random() < 0.3)
        self.database.write_by_hand((
            "INSERT INTO nodes (name, main_ip, agent_protocol, enabled) VALUES ('twin', ?, ?, ?)",
            self.twin, self.agents[self.twin].protocol, enabled))
        if not enabled:
            self.at(self.random.uniform(0, FAULTS_UNTIL_S), self._enable_twin)

    def _enable_twin(self) -> None:
        with contextlib.suppress(rc.DatabaseError):
            self.database.write_by_hand(("UPDATE nodes SET enabled = 1 WHERE name = 'twin'",))

    def _strategy(self) -> dict[str, object]:
        strategy = super()._strategy()
        if "verify" in strategy and self.random.random() < 0.5:
            strategy.update(verify={"url": "http://{main_ip}/", "successes": 2}, soakSec=8, retries=100)
        return strategy

    def _passes(self, send: Send) -> bool:
        """Pass mostly; some nodes only every other time, once their agent has been believed."""
        key = (send.mark, send.address)
        if key not in self.verified:
            return super()._passes(send)
        if len(self.verified[key]) == 1 and self.random.random() < 0.3:
            self.fickle.add(key)
        return not self.streaks.get((*key, send.owner)) if key in self.fickle else super()._passes(send)

    # -- releases ----------------------------------------------------------------------------

    def _create_later(self) -> None:
        """Create a release through a process that runs, as its API does, or through one of its own."""
        owners = [o for o in self.owners if not o.is_dead and o.suspended_until <= self.now]
        self.figures["later"] += 1
        if owners and self.random.random() < 0.7:
            owner = self.random.choice(owners)
            self._do(owner, lambda: self._create(owner.store))
        else:
            self._create()

    def _create(self, store: rc.Store | None = None) -> None:
        """Create a release for some nodes or all; a refusal is an answer too."""
        ids = [row[0] for row in self.database.look_in("SELECT id FROM nodes WHERE enabled = 1 ORDER BY id")]
        chosen = self.random.sample(ids, self.random.randint(1, len(ids))) if self.random.random() < 0.7 else None
        request = rc.ReleaseRequest(self.random.choice(["cdn", "dns"]), payload=self._payload(),
                                    strategy=self._strategy(), node_ids=chosen)
        is_twice = self.is_twice(chosen or ids)
        try:
            (store or rc.Store(self.database, SimClock(self))).releases.create(self._asking(request), "test")
        except rc.AppError as error:
            self.note(f"no release: {error}")
            self.figures["refused twins"] += is_twice and error.code == 3003
        else:
            if is_twice:
                self.fail(f"section 2: a release was made for two nodes at {self.twin}")

    def is_twice(self, node_ids: list[int]) -> bool:
        """Return whether two of these enabled nodes have one address."""
        rows = self.database.look_in("SELECT id FROM nodes WHERE main_ip = ?", self.twin)
        return len({row[0] for row in rows} & set(node_ids)) > 1

    def _create_by_hand(self) -> None:
        """Write a release as people do: some columns, any nodes, a version that was left out, a bare payload."""
        versions = set(self.versions.values())
        gaps = [v for v in range(1, max(versions, default=0)) if v not in versions]
        version = self.random.choice([*gaps, max(versions, default=0) + self.random.choice([1, 3])])
        ids = [row[0] for row in self.database.look_in("SELECT id FROM nodes ORDER BY id")]
        payload = self._payload()
        if self.database.approvals:
            self.needs_approval.add(str(payload["mark"]))
        if self.random.random() < 0.1:
            del payload["websites"]
        release_id = max(self.versions, default=0) + 1
        try:
            self.database.write_by_hand(
                ("INSERT INTO release_tasks (id, target, version, payload) VALUES (?, ?, ?, ?)",
                 release_id, self.random.choice(["cdn", "dns"]), version, rc.to_json(payload)),
                *[("INSERT INTO release_task_nodes (release_task_id, node_id, batch) VALUES (?, ?, ?)",
                   release_id, node_id, self.random.randint(1, 2)) for node_id in ids if self.random.random() < 0.8])
        except rc.DatabaseError:
            return
        self.note(f"release {release_id} (v{version}) is written by hand")
        self.ledger.statuses[release_id, None] = "pending"
        self.figures["by hand"] += 1
        if self.random.random() < 0.5 and self.now < FAULTS_UNTIL_S:
            self.at(self.random.uniform(1, 20), self._create_by_hand)

    def _is_alone(self, mark: str, address: str) -> bool:
        return address != self.twin

    # -- what goes back, and what is set -------------------------------------------------------

    def _break(self, kind: str, owner: SimExecutor) -> None:
        if kind == "clock":
            self._set_clock()
        elif kind == "restore":
            self._restore()
        elif kind == "bad agent":
            self._trouble_an_agent()
        elif kind == "long hold":
            self._hold_long()
        else:
            super()._break(kind, owner)

    def _execute(self, agent: SimAgent, *rest) -> None:
        """Let the database go back now and then just when an agent is at work that can't be asked."""
        super()._execute(agent, *rest)
        if self.faults and agent.live() and self.random.random() < 0.3:
            self.at(self.random.uniform(0, 1), self._restore)

    def _set_clock(self) -> None:
        """Set the wall's clock, by a minute or by hours: to what no setting explains."""
        by_s = self.random.choice([self.random.uniform(1, 60), 7200.0, 14400.0]) * self.random.choice([-1, 1])
        self._set_wall(self.set_s + by_s)

    def _set_wall(self, set_s: float) -> None:
        self.note(f"the clock is set by {set_s - self.set_s:.1f} s")
        self.set_s, self.clock_set_at = set_s, self.now
        self.ahead_s = max(self.ahead_s, set_s)
        self.figures["clocks set"] += 1
        self.leases_clash_until = self.now + TTL_S + CONNECT_S

    ahead_s = 0.0

    def _calm_down(self) -> None:
        """Set the clock to what nothing in the database lies ahead of, or leave it."""
        if self.random.random() < 0.5:
            self._set_wall(self.ahead_s)
        self.hands_off_until = min(self.hands_off_until, self.now + 10)

    def _cancel_what_never_comes(self) -> None:
        """End what is to start in a time that is not to come, as the clock was set back."""
        for release_id, status, strategy in self.database.look_in("SELECT id, status, strategy FROM release_tasks"):
            if status in (rc.PENDING, rc.PAUSED) and self._start_at(strategy) > rc.utc_text(self.wall + 60):
                with contextlib.suppress(rc.AppError):
                    self.store.releases.act("cancel", release_id, "anna")

    def _hold_long(self) -> None:
        """Pause a release or freeze all for longer than a node may take; somebody restarts an agent meanwhile."""
        self.figures["long holds"] += 1
        self._interfere()
        self.hands_off_until = self.now + SHORT_DEADLINE_S * self.random.uniform(1, 1.5)
        if self.random.random() < 0.5:
            self.at(self.random.uniform(0, 5), self.random.choice(list(self.agents.values())).restart)

    hands_off_until = 0.0

    def _steer(self) -> None:
        if self.now < self.hands_off_until:
            self.at(min(5.0, self.hands_off_until - self.now), self._steer)
            return
        super()._steer()
        if self.now > FAULTS_UNTIL_S:
            self._cancel_what_never_comes()

    def _save(self) -> None:
        """Take a backup, and plan the next."""
        if self.now < FAULTS_UNTIL_S:
            self.at(self.random.expovariate(1 / 6), self._save)
            self.snapshots.append(self._snapshot())

    def _snapshot(self) -> Snapshot:
        return Snapshot(next(self.numbers), self.database.saved(), copy.deepcopy(self.ledger))

    def _restore(self) -> None:
        """Put an earlier database in the place of this one, or a new one with the same nodes; twice at most."""
        if self.restores == 2 or self.now > FAULTS_UNTIL_S:
            return
        self.restores += 1
        is_new = self.random.random() < 0.2
        place = 0 if is_new else self.random.randrange(len(self.snapshots))
        del self.snapshots[place + 1:]
        snapshot = self.snapshots[place]
        self.figures["new databases" if is_new else "restores"] += 1
        self.database.put_back(snapshot.saved)
        self.ledger = copy.deepcopy(snapshot.ledger)
        self.leases_clash_until = self.now + TTL_S + CONNECT_S
        for owner in self.owners:
            if not owner.is_dead and owner.seen_event > self.ledger.seen_events:
                owner.can_notice.add(self.restores)
        for send in self.sends:
            if send.number > snapshot.number and not send.lost_in:
                send.lost_in = self.restores
        self.note(f"the database is as it was before number {snapshot.number}, event {self.ledger.seen_events}")
        self._after_a_restore()

    def _after_a_restore(self) -> None:
        """Do what goes with such a day: an agent is down, a process is stopped, and people write rows by hand."""
        if self.random.random() < 0.4:
            self._set_first_version()
        if self.random.random() < 0.4:
            self.at(self.random.uniform(1, 5), self._create_by_hand)
        if self.random.random() < 0.5:
            self._trouble_an_agent()
            self.at(self.random.uniform(2, 8), lambda: self._break("stop", self.random.choice(
                [o for o in self.owners if not o.is_dead])))

    def _trouble_an_agent(self) -> None:
        agent = self.random.choice(list(self.agents.values()))
        setattr(agent, self.random.choice(["is_bad_until", "is_down_until"]), self.now + self.random.uniform(1, 10))

    def _set_first_version(self) -> None:
        """Do what the runbook says after a restore: new versions begin above all that agents have."""
        first = max((send.version for send in self.sends), default=0) + 1
        with contextlib.suppress(rc.DatabaseError):
            rc.Store(self.database, SimClock(self)).releases.set_first_version(first)
            self.ledger.first_version, self.ledger.first_set = first, next(self.numbers)


@functools.cache
def _migrated() -> sqlite3.Connection:
    """Return an empty database of this schema, made once: each schedule begins with a copy."""
    database = rc.Database("sqlite:///:memory:")
    database.engine = SimEngine(None)
    database.migrate()
    return database.engine.opened[0]


def _heard(outcome: rc.Outcome) -> str:
    """Return what the outcome of a dispatch says of what it did: nothing, done at once, or "" for neither."""
    if outcome.result in (rc.UNSENT, rc.NOT_SENT) or outcome.is_refusal:
        return NOTHING_DONE
    return DONE_AT_ONCE if outcome.applied else ""


def run_seed(seed: int, world: str = PLAIN, **options) -> Simulation:
    """Run one schedule; raise Violation, with the schedule, when a promise is broken."""
    real_driver, plan_rollback, numbers = rc.Driver, rc.plan_rollback, itertools.count(1)

    def plan_marked(tx, old, wish):
        """Plan a rollback with a mark of its own: by it what agents ran is told apart."""
        request, *rest = plan_rollback(tx, old, wish)
        mark = f"{request.payload['mark']} for {old.id}, {next(numbers)}"
        return (request._replace(payload={**request.payload, "mark": mark}), *rest)
    rc.Driver, rc.plan_rollback = SimDriver, plan_marked
    try:
        simulation = (SharedSimulation if world == SHARED else Simulation)(seed, world=world, **options)
        with contextlib.closing(simulation.database):
            return simulation.run()
    finally:
        rc.Driver, rc.plan_rollback = real_driver, plan_rollback


if __name__ == "__main__":
    rc.log.disabled = True
    done = run_seed(int(sys.argv[1]), *sys.argv[2:3])
    print("\n".join(done.schedule))
    print(done.figures)
