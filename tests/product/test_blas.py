"""Linear algebra is limited to one thread while targets are coded, and let go afterwards."""

from __future__ import annotations

import threading
from pathlib import Path

from threadpoolctl import threadpool_info

from rmmformat.blas import one_thread, with_one_thread
from rmmformat.methods import choose_method
from rmmformat.pipeline import convert

from .conftest import make_tasks


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


def test_helpers_within_a_block_do_not_end_it() -> None:
    before = n_threads()
    seen: list[set[int]] = []
    with one_thread():
        helpers = [
            threading.Thread(target=lambda: seen.append(with_one_thread(n_threads)))
            for _ in range(4)
        ]
        for helper in helpers:
            helper.start()
        for helper in helpers:
            helper.join()
        assert n_threads() == {1}
    assert seen == [{1}] * 4
    assert n_threads() == before


def test_a_conversion_leaves_the_limit_as_it_was(tmp_path: Path) -> None:
    before = n_threads()
    convert(make_tasks(), tmp_path / "x.rmm", choose_method(max_error=0.1))
    assert n_threads() == before
