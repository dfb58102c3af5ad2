"""Errors that users cause: one line, and the field that is wrong as an attribute."""

import pickle
import re
from typing import Any

import numpy as np
import pytest

from gptoss_jax import SamplingParams, StructuredOutputsParams, UsageError
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


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"structured_outputs": {1: 2, "a": 3}}, "structured_outputs.1: expected one of choice, "),
        ({"top_k": np.array([1, 2])}, "top_k: expected an integer"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias: expected at most 1024 token ids"),
    ],
)
def test_odd_values_are_no_other_exception(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(named)}"):
        SamplingParams(**fields)
    with pytest.raises(
        UsageError, match=r"^structured_outputs.choice: expected texts to choose from, found array"
    ):
        StructuredOutputsParams(choice=np.array(["a", "b"]))  # type: ignore[arg-type]


def test_errors_in_a_request_name_the_field() -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(top_p=2)
    assert caught.value.field == "top_p"
    with pytest.raises(UsageError) as caught:
        to_messages([{"role": "user", "content": "hi"}, {"role": "user", "content": [{"type": "image"}]}])
    assert caught.value.field == "messages[1].content[0].type"
