"""Linear algebra is limited to one thread while targets are coded, and let go afterwards."""

from __future__ import annotations

import threading

from threadpoolctl import threadpool_info

from rmmformat.blas import one_thread, with_one_thread


def n_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_one_thread_within_and_what_it_was_afterwards() -> None:
    before = n_threads()
    assert before
    with one_thread():
        assert n_threads() == {1}
        with one_thread():
            assert n_threads() == {1}
        assert n_threads() == {1}
    assert n_threads() == before
    assert with_one_thread(n_threads) == {1}


def test_blocks_that_overlap_in_several_threads_end_together() -> None:
    before = n_threads()
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with one_thread():
            inside.set()
            leave.wait(10)

    worker = threading.Thread(target=work)
    with one_thread():
        worker.start()
        assert inside.wait(10)
    assert n_threads() == {1}  # the other thread is still at it
    leave.set()
    worker.join()
    assert n_threads() == before
