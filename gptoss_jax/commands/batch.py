"""Runs a file of requests into a file of results, both JSON lines; an interrupted run can be resumed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gptoss_jax.commands import processes
from gptoss_jax.commands.files import check_writable, parse_json, read_text
from gptoss_jax.commands.options import conversation_options
from gptoss_jax.commands.printing import ESCAPED
from gptoss_jax.commands.results import result
from gptoss_jax.errors import UsageError, expect, named
from gptoss_jax.types import SamplingParams

if TYPE_CHECKING:
    from gptoss_jax.serving.client import LLM, Request

_PROMPTS = ("prompt", "messages", "prompt_tokens")
_CONVERSATION = (
    "tools",
    "builtin_tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning_effort",
    "model_identity",
    "current_date",
    "response_format",
)
_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
_RESULT = b'{"id": '
"""The beginning of each line of results."""


@dataclasses.dataclass
class _Line:
    """A line of `--batch`: its location for error messages, its fields and its sampling parameters."""

    where: str
    fields: dict[str, Any]
    params: SamplingParams

    @property
    def id(self) -> str | int:
        return self.fields["id"]


def run_batch(options: argparse.Namespace, params: SamplingParams) -> int:
    """Run the requests of `--batch` and append their results to `--output`.

    Raises UsageError for an invalid line, before the model is loaded or `--output` is created.
    """
    lines = _read_requests(options, params)
    check_writable(options.output, "--output")
    if options.output.exists() and options.output.samefile(options.batch):
        raise UsageError(f"{options.output}: expected a different file from --batch", "--output")
    done = _finished_ids(options.output)
    todo = [line for line in lines if line.id not in done]
    if len(todo) < len(lines):
        print(
            f"{len(lines) - len(todo)} of {len(lines)} requests are already in {options.output}", file=sys.stderr
        )
    if not todo:
        # Opening the file removes an incomplete last line.
        _open_output(options.output).close()
        return 0
    conversation = conversation_options(options)
    llm = processes.load_llm(options)
    requests = [_request(llm, line, options, conversation) for line in todo]
    _write_results(llm, requests, [line.id for line in todo], options.output)
    return 0


def _write_results(llm: LLM, requests: list[Request], ids: list[Any], path: Path) -> None:
    from tqdm import tqdm

    names = {request.request_id: name for request, name in zip(requests, ids, strict=True)}
    with _open_output(path) as output, tqdm(total=len(requests), unit="request", file=sys.stderr) as bar:
        for progress in llm.stream(requests):
            if progress.output.finished:
                line = {"id": names[progress.output.request_id], **result(progress.output)}
                _append(output, path, json.dumps(line, ensure_ascii=False).encode(errors=ESCAPED) + b"\n")
                bar.update()


def _read_requests(options: argparse.Namespace, params: SamplingParams) -> list[_Line]:
    """The lines of `--batch`, validated as far as possible without a model. Raises UsageError, naming the line."""
    lines: list[_Line] = []
    seen: dict[str | int, int] = {}
    for number, text in enumerate(read_text(options.batch, "--batch").split("\n"), 1):
        if not text.strip():
            continue
        where = f"--batch: {options.batch}: line {number}"
        given = {name: value for name, value in parse_json(text, where, dict).items() if value is not None}
        fields = {"id": number} | given
        with named(where):
            _check(fields, options.raw)
            if fields["id"] in seen:
                raise UsageError(f"{fields['id']!r} is already used in line {seen[fields['id']]}", "id")
            own = dataclasses.replace(params, **{key: fields[key] for key in _SAMPLING if key in fields})
        seen[fields["id"]] = number
        lines.append(_Line(where, fields, own))
    if not lines:
        raise UsageError(f"{options.batch}: expected one request per line, found none", "--batch")
    return lines


def _check(fields: dict[str, Any], raw: bool) -> None:
    """Validate the fields of a line; `raw` is the default of the field `raw`. Raises UsageError."""
    if sum(key in fields for key in _PROMPTS) != 1:
        raise UsageError(f"expected one of {', '.join(_PROMPTS)}")
    for name in sorted(fields.keys() - {"id", "raw", *_PROMPTS, *_CONVERSATION, *_SAMPLING}):
        raise UsageError("unknown field of a request", name)
    name, prompt, tokens = fields["id"], fields.get("prompt", "any"), fields.get("prompt_tokens", [0])
    expect(type(name) in (str, int), "id", "a string or an integer", name)
    expect(not re.search(r"[\ud800-\udfff]", str(name)), "id", "Unicode text", name)
    expect(isinstance(prompt, str) and bool(prompt.strip()), "prompt", "non-empty text", prompt)
    whole = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    expect(whole and bool(tokens), "prompt_tokens", "a non-empty list of integers", tokens)
    messages = fields.get("messages", [])
    expect(isinstance(messages, list), "messages", "a list", messages)
    expect(isinstance(fields.get("raw", raw), bool), "raw", "true or false", fields.get("raw"))
    if "raw" in fields and "messages" in fields:
        raise UsageError("only with a prompt, not with messages", "raw")
    if "prompt_tokens" in fields or ("prompt" in fields and fields.get("raw", raw)):
        for name in _CONVERSATION:
            if name in fields:
                raise UsageError("only with the chat format, not with raw text or tokens", name)


def _request(llm: LLM, line: _Line, options: argparse.Namespace, conversation: dict[str, Any]) -> Request:
    """A line's request; its fields take precedence over the flags. Raises UsageError if it can never run."""
    fields, request_id = line.fields, json.dumps(line.id)
    with named(line.where):
        if "prompt_tokens" in fields:
            request = llm.raw_request(request_id, fields["prompt_tokens"], line.params)
        elif "prompt" in fields and fields.get("raw", options.raw):
            request = llm.raw_request(request_id, fields["prompt"], line.params)
        else:
            messages = fields.get("messages", [{"role": "user", "content": fields.get("prompt")}])
            if options.instructions:
                messages = [{"role": "developer", "content": options.instructions}, *messages]
            own = conversation | {key: fields[key] for key in _CONVERSATION if key in fields}
            request = llm.chat_request(request_id, messages, line.params, **own)
        try:
            llm.check(request)
        except UsageError as error:
            if error.field != "prompt":
                raise
            raise UsageError(error.message, next(name for name in _PROMPTS if name in fields)) from None
        return request


def _open_output(path: Path) -> BinaryIO:
    """Open the file of results for appending, after removing an incomplete last line."""
    try:
        file = open(path, "ab+")  # noqa: SIM115
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        return file
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "--output") from None


def _append(output: BinaryIO, path: Path, line: bytes) -> None:
    try:
        output.write(line)
        output.flush()
    except OSError as error:
        # Closing drops the buffered data, which a later close would try to write again.
        with contextlib.suppress(OSError):
            output.close()
        raise UsageError(f"{path}: {error.strerror}", "--output") from None


def _finished_ids(path: Path) -> set[Any]:
    """The ids in a file of results, which need not exist; an incomplete last line is ignored."""
    done: set[Any] = set()
    if not path.exists():
        return done
    try:
        *lines, cut = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "--output") from None
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        known = isinstance(line, dict) and "finish_reason" in line and isinstance(line.get("id"), str | int)
        if not known:
            raise UsageError(f"{path}: line {number}: expected a result of --batch", "--output")
        done.add(line["id"])
    if not _RESULT.startswith(cut[: len(_RESULT)]):
        raise UsageError(f"{path}: line {len(lines) + 1}: expected a result of --batch", "--output")
    return done
