"""Errors that users cause: one line, and the field that is wrong as an attribute."""

import pickle

import pytest

from gptoss_jax import SamplingParams, UsageError
from gptoss_jax.errors import expect, named
from gptoss_jax.text.harmony import to_messages


def test_the_text_is_place_field_and_message() -> None:
    assert str(UsageError("expected 1, found 2")) == "expected 1, found 2"
    error = UsageError("expected 1, found 2", "top_k", "--batch: in.jsonl: line 3")
    assert str(error) == "--batch: in.jsonl: line 3: top_k: expected 1, found 2"
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.field, again.where) == (error.message, error.field, error.where)
    assert str(again) == str(error)


def test_the_field_is_kept_where_the_place_is_added() -> None:
    with pytest.raises(UsageError) as caught, named("file"), named("line 1"):
        expect(False, "seed", "an integer", "x")
    assert str(caught.value) == "file: line 1: seed: expected an integer, found 'x'"
    assert caught.value.field == "seed"
    with pytest.raises(UsageError, match=r"^line 1: nested too deeply$"), named("line 1"):
        raise RecursionError


def test_errors_in_a_request_name_the_field() -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(top_p=2)
    assert caught.value.field == "top_p"
    with pytest.raises(UsageError) as caught:
        to_messages([{"role": "user", "content": "hi"}, {"role": "user", "content": [{"type": "image"}]}])
    assert caught.value.field == "messages[1].content[0].type"
