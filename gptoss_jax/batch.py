"""Many requests from a file of JSON lines to another, resumable: what is already written is not run again."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax import cli
from gptoss_jax.engine.params import SamplingParams
from gptoss_jax.errors import UsageError

if TYPE_CHECKING:
    from gptoss_jax.llm import LLM, Request

_PROMPTS = ("prompt", "messages", "prompt_tokens")
_CONVERSATION = ("tools", "builtin_tools", "reasoning_effort", "model_identity", "current_date", "response_format")
_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
_RESULT = b'{"id": '
"""What each line of results begins with."""


def run_batch(options: argparse.Namespace, params: SamplingParams) -> int:
    """Run `--batch` into `--output`. Raises UsageError for a bad line before any request runs."""
    lines = _read_requests(options.batch)
    if options.output.exists() and options.output.samefile(options.batch):
        raise UsageError(f"--output: {options.output}: expected another file than --batch")
    with _open_output(options.output) as output:
        done = _finished_ids(options.output)
        todo = [line for line in lines if line["id"] not in done]
        if len(todo) < len(lines):
            print(
                f"{len(lines) - len(todo)} of {len(lines)} requests are in {options.output} already",
                file=sys.stderr,
            )
        if not todo:
            return 0
        llm = cli.load_llm(options)
        conversation = cli.conversation_options(options)
        requests = [_request(llm, line, params, options, conversation) for line in todo]
        _write_results(llm, requests, [line["id"] for line in todo], output)
    return 0


def _write_results(llm: LLM, requests: list[Request], ids: list[Any], output: Any) -> None:
    from tqdm import tqdm

    from gptoss_jax.generate import result

    names = {request.request_id: name for request, name in zip(requests, ids, strict=True)}
    # A request that can never run is reported by the first step, before there is a bar for it to tear.
    stream = llm.stream(requests)
    first = next(stream)
    with tqdm(total=len(requests), unit="request", file=sys.stderr) as bar:
        for progress in itertools.chain([first], stream):
            if progress.output.finished:
                line = {"id": names[progress.output.request_id], **result(progress.output)}
                output.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                output.flush()
                bar.update()


def _read_requests(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    seen: dict[str | int, int] = {}
    for number, text in enumerate(cli.read_text(path, "--batch").split("\n"), 1):
        if not text.strip():
            continue
        where = f"--batch: {path}: line {number}"
        line = cli.parse_json(text, where, dict)
        if sum(key in line for key in _PROMPTS) != 1:
            raise UsageError(f"{where}: expected one of {', '.join(_PROMPTS)}")
        unknown = sorted(line.keys() - {"id", "raw", *_PROMPTS, *_CONVERSATION, *_SAMPLING})
        if unknown:
            raise UsageError(f"{where}: {unknown[0]}: not a field of a request")
        line.setdefault("id", number)
        if not isinstance(line["id"], str | int) or isinstance(line["id"], bool):
            raise UsageError(f"{where}: id: expected a string or an integer, found {type(line['id']).__name__}")
        if re.search(r"[\ud800-\udfff]", str(line["id"])):
            raise UsageError(f"{where}: id: expected Unicode text, found {line['id']!r:.60}")
        if line["id"] in seen:
            raise UsageError(f"{where}: id: {line['id']!r} is used in line {seen[line['id']]} already")
        seen[line["id"]] = number
        lines.append(line | {"where": where})
    return lines


def _request(
    llm: LLM,
    line: dict[str, Any],
    params: SamplingParams,
    options: argparse.Namespace,
    conversation: dict[str, Any],
) -> Request:
    """A line's request: its own settings before the flags'."""
    where, request_id = line["where"], json.dumps(line["id"])
    try:
        params = dataclasses.replace(params, **{key: line[key] for key in _SAMPLING if key in line})
        if "prompt_tokens" in line:
            tokens = line["prompt_tokens"]
            if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                raise UsageError("prompt_tokens: expected a list of integers")
            return llm.raw_request(request_id, tokens, params)
        if "prompt" in line and not isinstance(line["prompt"], str):
            raise UsageError(f"prompt: expected a string, found {type(line['prompt']).__name__}")
        if "prompt" in line and line.get("raw", options.raw):
            return llm.raw_request(request_id, line["prompt"], params)
        if "raw" in line and "messages" in line:
            raise UsageError("raw: only with a prompt, not with messages")
        messages = line.get("messages", [{"role": "user", "content": line.get("prompt")}])
        if options.instructions:
            messages = [{"role": "developer", "content": options.instructions}, *messages]
        conversation = conversation | {key: line[key] for key in _CONVERSATION if key in line}
        return llm.chat_request(request_id, messages, params, **conversation)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _open_output(path: Path) -> Any:
    """The file of results, opened to append; a line that an interruption cut short is removed first."""
    try:
        file = open(path, "ab+")  # noqa: SIM115
        file.seek(0)
        *whole, cut = file.read().split(b"\n")
        if not _RESULT.startswith(cut[: len(_RESULT)]):
            raise UsageError(f"--output: {path}: line {len(whole) + 1}: expected a result of --batch")
        if cut:
            file.truncate(sum(len(line) + 1 for line in whole))
            file.seek(0, os.SEEK_END)
        return file
    except OSError as error:
        raise UsageError(f"--output: {path}: {error.strerror}") from None


def _finished_ids(path: Path) -> set[Any]:
    done = set()
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        known = isinstance(line, dict) and "finish_reason" in line and isinstance(line.get("id"), str | int)
        if not known:
            raise UsageError(f"--output: {path}: line {number}: expected a result of --batch")
        done.add(line["id"])
    return done
