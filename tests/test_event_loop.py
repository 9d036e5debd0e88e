"""EventLoop: many coroutines wait in one thread, none delays another, every wait ends at its deadline."""
from __future__ import annotations

import queue
import socket
import threading
import time

import pytest
from lab import eventually

import releasectl as rc


@pytest.fixture
def loop():
    """An event loop that runs, closed at the end."""
    made = rc.EventLoop()
    made.start()
    yield made
    made.close()


@pytest.fixture
def new_pair():
    """A function that returns a non-blocking socket and its peer."""
    sockets = []

    def make() -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair()
        sockets.extend(pair)
        pair[0].setblocking(False)
        return pair

    yield make
    for sock in sockets:
        sock.close()


async def told(outcomes: queue.SimpleQueue, sock: socket.socket, limit_s: float) -> None:
    """Read once, and put what came: bytes or the error."""
    try:
        outcomes.put(await rc.TimedSocket(sock, time.monotonic() + limit_s, 1 << 20).recv(100))
    except OSError as error:
        outcomes.put(error)


def test_a_silent_peer_delays_no_other_and_all_are_waited_for_in_one_thread(loop, new_pair):
    pairs, outcomes, before = [new_pair() for _ in range(200)], queue.SimpleQueue(), threading.active_count()
    for near, _ in pairs:
        loop.submit(told(outcomes, near, 30))
    for number, (_, far) in reversed(list(enumerate(pairs))):
        if number:  # the first one says nothing
            far.sendall(b"%d" % number)
    assert {int(outcomes.get(timeout=60)) for _ in range(199)} == set(range(1, 200))
    assert threading.active_count() == before
    assert outcomes.empty()


@pytest.mark.parametrize("is_in_a_loop", [False, True])
def test_a_wait_ends_at_its_deadline(loop, new_pair, is_in_a_loop):
    outcomes, started = queue.SimpleQueue(), time.monotonic()
    coroutine = told(outcomes, new_pair()[0], 0.3)
    if is_in_a_loop:
        loop.submit(coroutine)
    else:
        rc.run_coroutine(coroutine)
    assert isinstance(outcomes.get(timeout=60), socket.timeout)
    assert time.monotonic() - started >= 0.3


def test_what_blocks_continues_in_a_thread_of_its_own_and_delays_no_other(loop, new_pair):
    (near, far), outcomes, released = new_pair(), queue.SimpleQueue(), threading.Event()

    async def blocking() -> None:
        await rc.BLOCKS
        outcomes.put(released.wait(60))
        await told(outcomes, near, 10)  # and from there on it waits in that thread
    loop.submit(blocking())
    quick, peer = new_pair()
    loop.submit(told(outcomes, quick, 10))
    peer.sendall(b"quick")
    assert outcomes.get(timeout=60) == b"quick"
    released.set()
    assert outcomes.get(timeout=60) is True
    far.sendall(b"slow")
    assert outcomes.get(timeout=60) == b"slow"


def test_one_that_fails_within_releasectl_is_logged_and_ends_no_other(loop, new_pair, caplog):
    async def broken() -> None:
        raise KeyError("oops")
    (near, far), outcomes = new_pair(), queue.SimpleQueue()
    loop.submit(told(outcomes, near, 10))
    loop.submit(broken())
    eventually(lambda: "a request to an agent failed within releasectl" in caplog.text)
    far.sendall(b"still here")
    assert outcomes.get(timeout=60) == b"still here"


def test_one_thread_that_stands_still_while_somebody_waits_is_hung(loop, new_pair):
    released, outcomes = threading.Event(), queue.SimpleQueue()

    async def stuck() -> None:
        outcomes.put("stuck")
        released.wait(60)
    loop.submit(told(outcomes, new_pair()[0], 20))
    loop.submit(stuck())
    assert outcomes.get(timeout=60) == "stuck"
    eventually(lambda: loop.is_hung(time.monotonic() - 0.2))
    released.set()
    eventually(lambda: not loop.is_hung(time.monotonic() - 0.2))


def test_nobody_who_waits_is_no_hang(loop):
    outcomes = queue.SimpleQueue()

    async def short() -> None:
        outcomes.put("done")
    loop.submit(short())
    assert outcomes.get(timeout=60) == "done"
    eventually(lambda: not loop._new)
    assert not loop.is_hung(time.monotonic() + 100)


def test_a_quiet_time_is_no_hang(loop, new_pair):
    (near, far), outcomes = new_pair(), queue.SimpleQueue()
    loop.submit(told(outcomes, near, 10))
    far.sendall(b"once")
    assert outcomes.get(timeout=60) == b"once"
    eventually(lambda: not loop._waiting)
    loop._cycled_at -= 1000  # it was idle
    loop.submit(told(outcomes, near, 10))
    assert not loop.is_hung(time.monotonic() - 500)


def test_an_answer_that_came_in_time_counts_also_when_we_are_late(loop, new_pair):
    (near, far), outcomes = new_pair(), queue.SimpleQueue()

    async def busy() -> None:
        far.sendall(b"in time")
        threading.Event().wait(0.6)  # the thread itself is kept
    loop.submit(told(outcomes, near, 0.3))
    loop.submit(busy())
    assert outcomes.get(timeout=60) == b"in time"


class NoMoreThreads(threading.Thread):
    def start(self) -> None:
        raise RuntimeError("can't start new thread")


def test_where_no_thread_can_be_started_to_block_in_the_coroutine_gets_the_error(loop, monkeypatch):
    outcomes = queue.SimpleQueue()

    async def blocking() -> None:
        try:
            await rc.BLOCKS
        except RuntimeError as error:
            outcomes.put(str(error))

    async def first() -> None:
        monkeypatch.setattr(threading, "Thread", NoMoreThreads)
        outcomes.put("first")
    loop.submit(first())
    assert outcomes.get(timeout=60) == "first"
    loop.submit(blocking())
    assert outcomes.get(timeout=60) == "can't start new thread"


def test_where_its_own_thread_can_not_be_started_it_says_so_each_time(new_pair, monkeypatch):
    loop, outcomes = rc.EventLoop(), queue.SimpleQueue()
    near, far = new_pair()
    loop.submit(told(outcomes, near, 10))  # waits for the thread
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", NoMoreThreads)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                loop.start()
    loop.start()
    far.sendall(b"better now")
    assert outcomes.get(timeout=60) == b"better now"
    loop.close()


def test_what_is_under_way_or_comes_later_is_dropped_by_close(loop, new_pair):
    (near, far), outcomes = new_pair(), queue.SimpleQueue()
    loop.submit(told(outcomes, near, 30))
    eventually(lambda: loop._waiting)
    loop.close()
    loop.submit(told(outcomes, near, 30))
    eventually(lambda: loop._wakers is None)
    far.sendall(b"too late")
    assert outcomes.empty()


def test_what_was_put_back_unread_is_read_first(new_pair):
    near, far = new_pair()
    timed = rc.TimedSocket(near, time.monotonic() + 5, 1 << 20)
    far.sendall(b"later")
    timed.unread = b"xyz"
    assert [rc.run_coroutine(timed.recv(2)) for _ in range(3)] == [b"xy", b"z", b"la"]


def test_more_than_may_be_read_is_refused(new_pair):
    near, far = new_pair()
    timed = rc.TimedSocket(near, time.monotonic() + 5, 3)
    far.sendall(b"four")
    with pytest.raises(rc.TooBig):
        rc.run_coroutine(timed.recv(100))


def test_sending_to_a_peer_that_does_not_read_ends_at_the_deadline(new_pair):
    near, _ = new_pair()
    with pytest.raises(socket.timeout):
        rc.run_coroutine(rc.TimedSocket(near, time.monotonic() + 0.3, 0).sendall(b"x" * (8 << 20)))


async def nibbling(outcomes: queue.SimpleQueue, sock: socket.socket, count: int, limit_s: float) -> None:
    """Read bytes one by one, and put the end or the error."""
    timed = rc.TimedSocket(sock, time.monotonic() + limit_s, 1 << 20)
    try:
        for _ in range(count):
            await timed.recv(1)
        outcomes.put("all read")
    except OSError as error:
        outcomes.put(error)


def test_a_peer_that_always_has_a_byte_more_lets_others_run(new_pair):
    (near, far), (quick, peer), outcomes = new_pair(), new_pair(), queue.SimpleQueue()
    far.sendall(b"x" * 50_000)
    peer.sendall(b"quick")
    loop = rc.EventLoop()
    loop.submit(nibbling(outcomes, near, 50_000, 30))
    loop.submit(told(outcomes, quick, 30))
    loop.start()
    try:
        assert [outcomes.get(timeout=60), outcomes.get(timeout=60)] == [b"quick", "all read"]
    finally:
        loop.close()


def test_a_peer_that_always_has_a_byte_more_has_no_longer_than_others(new_pair):
    (near, far), outcomes = new_pair(), queue.SimpleQueue()
    far.sendall(b"x" * 50_000)
    rc.run_coroutine(nibbling(outcomes, near, 50_000, 0))
    assert isinstance(outcomes.get(), socket.timeout)


def test_a_meter_counts_the_work_on_an_answer_and_neither_waits_nor_what_came_before(loop, new_pair):
    (near, far), outcomes = new_pair(), queue.SimpleQueue()

    def work(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    async def answered() -> str:
        work(0.2)
        await rc.READING
        await rc.TimedSocket(near, time.monotonic() + 20, 100).recv(1)
        work(0.05)
        await rc.BLOCKS
        time.sleep(0.3)
        work(0.05)
        return "read"

    async def metered() -> None:
        meter = rc.Meter(answered())
        outcomes.put((await meter, meter.cost_s))
    loop.submit(metered())
    work(0.3)  # it waits meanwhile
    far.sendall(b"x")
    said, cost_s = outcomes.get(timeout=60)
    assert said == "read"
    assert 0.1 <= cost_s < 0.2


def test_what_is_metered_ends_with_its_meter_and_gets_the_errors_of_its_waits(loop, new_pair):
    outcomes, ended = queue.SimpleQueue(), threading.Event()

    async def waiting(limit_s: float) -> None:
        try:
            await told(outcomes, new_pair()[0], limit_s)
            await rc.TimedSocket(new_pair()[0], time.monotonic() + 30, 100).recv(1)
        finally:
            ended.set()

    async def metered() -> None:
        await rc.Meter(waiting(0.1))
    loop.submit(metered())
    assert isinstance(outcomes.get(timeout=60), socket.timeout)
    assert not ended.is_set()
    loop.close()
    assert ended.wait(60)
