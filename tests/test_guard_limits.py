"""Limits as a part of the configuration, and what a refusal may say."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from serve_app.errors import InvalidRequest
from serve_app.guard.body import CHAT, check_body
from serve_app.guard.limits import Limits
from tests.test_guard_body import LIMITS, chat


def test_limits_can_be_a_part_of_the_configuration() -> None:
    adapter = TypeAdapter(Limits)
    limits = adapter.validate_python({"n": 2, "chat_template_kwargs": ["enable_thinking"]})
    assert limits == Limits(n=2, chat_template_kwargs=frozenset({"enable_thinking"}))
    with pytest.raises(ValidationError, match="max_n"):
        adapter.validate_python({"max_n": 2})


def test_no_text_of_a_request_is_repeated() -> None:
    secret = "my password is swordfish"
    for extra in ({"messages": secret}, {"temperature": secret}, {"stop": [secret] * 9}):
        with pytest.raises(InvalidRequest) as caught:
            check_body(chat(**extra), CHAT, LIMITS)
        assert "swordfish" not in str(caught.value)
