"""Metrics of an accuracy matrix, on examples that were worked out by hand."""

import math

import numpy as np
import pytest

from nestlearn.continual.metrics import (
    area_under_curve,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_curve,
    summary,
)
from nestlearn.errors import UserError

R = [
    [0.8, 0.2, 0.1],
    [0.9, 0.6, 0.3],
    [0.5, 0.7, 0.9],
]


def near(value, expected):
    return value == pytest.approx(expected, abs=1e-12)


def test_by_hand():
    assert near(average_accuracy(R), (0.5 + 0.7 + 0.9) / 3)
    assert near(backward_transfer(R), ((0.5 - 0.8) + (0.7 - 0.6)) / 2)
    assert near(forgetting(R), ((0.9 - 0.5) + (0.6 - 0.7)) / 2)  # the best before the last task
    assert near(forward_transfer(R, [0.0, 0.1, 0.1]), ((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert learning_curve(R).tolist() == pytest.approx([0.8, 0.75, 0.7])
    assert near(area_under_curve(R), 0.75)
    assert summary(R)["average_accuracy"] == average_accuracy(R) and len(summary(R)) == 4


def test_a_learner_that_keeps_everything_and_one_that_keeps_only_the_last():
    kept, lost = np.tril(np.ones((4, 4))), np.eye(4)
    assert (average_accuracy(kept), forgetting(kept), backward_transfer(kept), area_under_curve(kept)) == (1, 0, 0, 1)
    assert (average_accuracy(lost), forgetting(lost), backward_transfer(lost)) == (0.25, 1, -1)
    assert near(area_under_curve(lost), (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_unmeasured_futures_cost_only_what_needs_them():
    r = np.where(np.tril(np.ones((3, 3))) > 0, R, np.nan)
    assert near(backward_transfer(r), -0.1) and near(forgetting(r), 0.15) and near(area_under_curve(r), 0.75)
    assert math.isnan(forward_transfer(r, [0, 0, 0]))


def test_only_the_last_row_is_an_upper_bound():
    r = np.full((3, 3), np.nan)
    r[-1] = R[-1]
    assert near(average_accuracy(r), 0.7)
    assert math.isnan(forgetting(r)) and math.isnan(backward_transfer(r)) and math.isnan(area_under_curve(r))


def test_one_task_has_nothing_to_forget():
    assert (
        average_accuracy([[0.5]]) == 0.5 and math.isnan(forgetting([[0.5]])) and math.isnan(backward_transfer([[0.5]]))
    )


@pytest.mark.parametrize(
    ("r", "message"),
    [([[0.1, 0.2]], "shape"), ([], "shape"), ([[1.5]], "within 0 and 1"), ([[-0.5]], "within 0 and 1")],
)
def test_what_is_no_accuracy_matrix_is_refused(r, message):
    with pytest.raises(UserError, match=message):
        average_accuracy(r)
    with pytest.raises(UserError, match="one accuracy for each"):
        forward_transfer(R, [0.0])
