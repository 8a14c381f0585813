"""Work that its giver does not wait for."""

import threading
import time

import pytest

from lem.aside import Aside


def test_jobs_are_done_in_order_while_their_giver_goes_on():
    aside, done, begun = Aside(), [], threading.Event()
    aside.do(begun.wait)
    for number in range(50):
        aside.do(lambda number=number: done.append(number))
    assert done == []
    begun.set()
    aside.wait()
    assert done == list(range(50))


def test_a_failure_is_raised_where_the_next_job_is_given_and_no_other_is_done():
    aside, done = Aside(), []
    aside.do(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        aside.wait()
    with pytest.raises(ZeroDivisionError):
        aside.do(lambda: done.append(1))
    aside.close()
    assert done == []


def test_what_was_given_before_the_failure_was_known_is_not_done_either():
    aside, done, begun = Aside(), [], threading.Event()
    aside.do(begun.wait)
    aside.do(lambda: 1 / 0)
    aside.do(lambda: done.append(1))
    begun.set()
    aside.close()
    assert done == []


def test_closing_does_what_is_left_and_ends_the_thread():
    aside, done = Aside(), []
    before = threading.active_count()
    aside.do(lambda: time.sleep(0.05))
    aside.do(lambda: done.append(1))
    assert threading.active_count() == before + 1
    aside.close()
    assert done == [1]
    assert threading.active_count() == before
    Aside().close()
