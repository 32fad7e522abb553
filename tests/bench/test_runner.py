"""What both comparisons run with: a process for each thing measured, rows kept as they come."""

import operator
import os

import pytest

from bench import runner


def test_what_is_measured_alone_is_in_a_process_of_its_own():
    first, second = (runner.alone(os.getpid) for _ in range(2))
    assert len({os.getpid(), first.result(), second.result()}) == 3


def test_a_process_that_fails_takes_no_other_with_it():
    killed, wrong, right = (
        runner.alone(os._exit, 1),
        runner.alone(operator.truediv, 1, 0),
        runner.alone(operator.add, 1, 2),
    )
    assert right.result() == 3
    assert isinstance(wrong.exception(), ZeroDivisionError)
    with pytest.raises(Exception, match="terminated abruptly"):
        killed.result()
