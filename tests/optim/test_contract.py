"""Every optimizer of the family passes the contract of its kind."""

from __future__ import annotations

import pytest

from tests.contracts.optimizer import CHECKS
from tests.optim.family import FAMILY


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("member", FAMILY, ids=lambda member: member.name)
def test_contract(member, check):
    check(member)


def test_names_are_unique():
    assert len({member.name for member in FAMILY}) == len(FAMILY)
