"""Pools: sizes as a pure function, leases in order of need, lost workers replaced."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest

from conf.schema import Settings
from ray_jobs.pool import Pool, Stopped, pool_sizes
from ray_jobs.settings import Layer, resolve

SETTINGS = resolve([Layer("test", {"ckpt_dir": "weights"})]).settings


def with_pools(**values: int) -> Settings:
    return dataclasses.replace(SETTINGS, **values)  # type: ignore[arg-type]


class Worker:
    def __init__(self) -> None:
        self.killed = False

    def kill(self) -> None:
        self.killed = True


def test_nothing_left_needs_no_workers() -> None:
    assert set(dataclasses.astuple(pool_sizes(SETTINGS, 0))) == {0}


def test_no_more_workers_than_lessons() -> None:
    sizes = pool_sizes(with_pools(num_groups=8, num_decoders=4, num_conditioners=3), 2)
    assert (sizes.groups, sizes.decoders, sizes.conditioners, sizes.lessons) == (2, 2, 2, 2)


def test_lessons_on_the_road_are_bounded_by_the_decoders_slots() -> None:
    assert pool_sizes(with_pools(num_groups=8, num_decoders=1, decode_slots=3), 1000).lessons == 3


def test_lessons_on_the_road_do_not_grow_with_the_manifest() -> None:
    assert pool_sizes(SETTINGS, 100) == pool_sizes(SETTINGS, 10_000)


def test_the_longest_remaining_chain_goes_first() -> None:
    pool = Pool(Worker, 1)
    order: list[int] = []

    def borrow(priority: int) -> None:
        with pool.lease(priority):
            order.append(priority)

    with pool.lease(0):
        threads = [threading.Thread(target=borrow, args=(priority,)) for priority in (1, 3, 2)]
        for thread in threads:
            thread.start()
        while len(pool._waiting) < 3:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [3, 2, 1]


def test_a_lease_given_back_early_is_given_back_once() -> None:
    pool = Pool(Worker, 1)
    with pool.lease(0) as lease:
        lease.release()
        with pool.lease(0):
            pass
    assert len(pool._free) == 1


def test_a_lost_worker_is_replaced_in_all_of_its_slots() -> None:
    pool = Pool(Worker, 1, slots=2)
    with pool.lease(0) as one, pool.lease(0) as other:
        assert one.worker is other.worker
        one.replace()
        other.replace()
    assert one.worker.killed
    assert len(pool.workers) == 1
    assert len(pool._free) == 2
    assert one.worker not in pool._free


def test_a_worker_that_loads_is_not_lent_before_it_is_admitted() -> None:
    pool = Pool(Worker, 1, loads=True)
    lent = threading.Event()

    def borrow() -> None:
        with pool.lease(0):
            lent.set()

    thread = threading.Thread(target=borrow)
    thread.start()
    assert not lent.wait(0.05)
    pool.admit(pool.workers[0])
    assert lent.wait(5)
    thread.join()


def test_stopping_wakes_those_who_wait() -> None:
    pool = Pool(Worker, 1)
    raised = threading.Event()

    def borrow() -> None:
        try:
            with pool.lease(0):
                pass
        except Stopped:
            raised.set()

    with pool.lease(0):
        thread = threading.Thread(target=borrow)
        thread.start()
        pool.stop()
        assert raised.wait(5)
    thread.join()
    with pytest.raises(Stopped), pool.lease(0):
        pass
