"""Calls beside the training: their order, their bound and their errors."""

from __future__ import annotations

import threading

import pytest

from milp_ray.personalize.beside import Beside


def test_calls_are_made_in_order_in_another_thread_and_have_ended_with_the_block() -> None:
    seen: list[tuple[int, int]] = []
    with Beside(lambda value: seen.append((value, threading.get_ident()))) as call:
        for value in range(100):
            call(value)
    assert [value for value, _ in seen] == list(range(100))
    assert threading.get_ident() not in {thread for _, thread in seen}


def test_a_caller_waits_where_too_many_calls_do() -> None:
    go = threading.Event()
    begun: list[int] = []

    def slow(value: int) -> None:
        begun.append(value)
        assert go.wait(30)

    with Beside(slow, most_waiting=2) as call:
        call(0)
        call(1)
        third = threading.Thread(target=call, args=(2,))
        third.start()
        third.join(0.2)
        assert third.is_alive(), "two calls are unfinished: a third has to wait"
        go.set()
        third.join(30)
    assert begun == [0, 1, 2]


def test_an_error_of_a_call_ends_the_block_and_the_calls_before_it_are_made() -> None:
    seen: list[int] = []

    def fails_at_two(value: int) -> None:
        if value == 2:
            raise OSError("the disk is full")
        seen.append(value)

    def block() -> None:
        with Beside(fails_at_two) as call:
            for value in range(3):
                call(value)

    with pytest.raises(OSError, match="full"):
        block()
    assert seen == [0, 1]


def test_what_was_given_before_the_block_failed_is_done_and_its_own_failure_kept() -> None:
    seen: list[int] = []

    def block() -> None:
        with Beside(seen.append) as call:
            call(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert seen == [1]
