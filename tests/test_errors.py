from __future__ import annotations

import pytest

from memopt.errors import BadInput, Interrupted, MemoptError, OverBudget, StoreError
from memopt.tiers import Category, Tier


@pytest.mark.parametrize(
    ("kind", "code"), [(MemoptError, 1), (BadInput, 2), (OverBudget, 1), (StoreError, 2), (Interrupted, 130)]
)
def test_exit_codes_are_those_the_command_line_promises(kind: type[MemoptError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, MemoptError)


def test_bad_input_is_a_value_error_for_library_users() -> None:
    assert issubclass(BadInput, ValueError)


def test_names_are_what_reports_and_flags_use() -> None:
    assert [str(tier) for tier in Tier] == ["gpu", "dram", "ssd"]
    assert f"{Category.KV_CACHE}" == "kv_cache"
    assert list(Category)[-1] is Category.OTHER
