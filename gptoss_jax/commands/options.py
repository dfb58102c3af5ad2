"""Converts parsed flags to Python objects, and names flags in the errors that these raise."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.commands.files import read_text, read_tools
from gptoss_jax.commands.flags import flag_name
from gptoss_jax.errors import UsageError
from sharding.errors import ClusterError, ShardingError

if TYPE_CHECKING:
    from gptoss_jax.engine.options import EngineOptions
    from gptoss_jax.types import SamplingParams, StructuredOutputsParams


def sampling_params(options: argparse.Namespace, **more: Any) -> SamplingParams:
    """The sampling flags as SamplingParams. Raises UsageError, naming the field."""
    from gptoss_jax.types import SamplingParams

    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
    given = {name: getattr(options, name) for name in names}
    return SamplingParams(max_tokens=options.max_new_tokens, **given, **more)


def structured_outputs(options: argparse.Namespace) -> StructuredOutputsParams | None:
    """The structured-output flag as StructuredOutputsParams, checked. Raises UsageError, naming the flag."""
    from gptoss_jax.text.structured import check
    from gptoss_jax.types import StructuredOutputsParams

    if options.json_schema is not None:
        flag, text = "--json-schema", options.json_schema
        is_json = text.lstrip().startswith(("{", "["))
        constraint = StructuredOutputsParams(json=text if is_json else read_text(Path(text), flag))
    elif options.regex is not None:
        flag, constraint = "--regex", StructuredOutputsParams(regex=options.regex)
    elif options.grammar is not None:
        flag, constraint = "--grammar", StructuredOutputsParams(grammar=read_text(options.grammar, "--grammar"))
    else:
        return None
    try:
        check(constraint)
    except UsageError as error:
        raise UsageError(error.message, flag) from None
    return constraint


def conversation_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `LLM.chat` that the flags set; a JSON schema of the answer is also part of the prompt."""
    schema = structured_outputs(options) if getattr(options, "json_schema", None) else None
    return {
        "tools": read_tools(options.tools, "--tools") if options.tools else None,
        "builtin_tools": options.builtin_tools,
        "reasoning_effort": options.reasoning_effort,
        "response_format": schema and {"type": "json_schema", "schema": json.loads(str(schema.json))},
    }


def engine_options(options: argparse.Namespace, **more: Any) -> EngineOptions:
    """The engine flags as EngineOptions; `more` takes precedence. Raises UsageError, naming the field."""
    from gptoss_jax.engine.options import EngineOptions

    names = [field.name for field in dataclasses.fields(EngineOptions)]
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    return dataclasses.replace(EngineOptions(**given), **more)


@contextlib.contextmanager
def by_flag(options: argparse.Namespace) -> Iterator[None]:
    """Translate errors raised in the block: fields of the Python API become the flags that set them."""
    try:
        yield
    except UsageError as error:
        # With a single prompt the request's name adds nothing; a line of a file has fields and no flags.
        if error.where in (None, "request prompt"):
            raise UsageError(error.message, _flag_of(error.field, vars(options)) or error.field) from None
        raise
    except ClusterError:
        raise
    except ShardingError as error:
        given = vars(options)
        field, _, rest = str(error).partition(": ")
        if flag := _flag_of(field, given):
            raise UsageError(rest, flag) from None
        if given.get("mesh") is None:
            raise
        raise UsageError(f"{given['mesh']}: {error}", "--mesh") from None


def _flag_of(field: str | None, given: dict[str, Any]) -> str | None:
    """The flag that sets a field of the Python API, if there is one."""
    name = {"max_tokens": "max_new_tokens"}.get(str(field), field)
    if name == "prompt":
        name = "prompt_tokens" if given.get("prompt_tokens") is not None else None
    return flag_name(name) if name in given and name is not None else None
