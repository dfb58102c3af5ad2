"""python -m gptoss_jax.generate: answers a prompt, or a file of requests."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from gptoss_jax.commands import processes
from gptoss_jax.commands.files import read_text
from gptoss_jax.commands.flags import (
    add_cluster_flags,
    add_conversation_flags,
    add_engine_flags,
    add_model_flags,
    add_sampling_flags,
    add_structure_flags,
    command_parser,
    file_path,
    flag_name,
    integers,
    utf8,
)
from gptoss_jax.commands.options import by_flag, conversation_options, sampling_params, structured_outputs
from gptoss_jax.commands.printing import dimmed
from gptoss_jax.commands.results import result
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import UsageError

if TYPE_CHECKING:
    from gptoss_jax.serving.client import LLM, Progress, Request


def flags() -> argparse.ArgumentParser:
    """The command's argument parser."""
    parser = command_parser("generate", "Generate an answer to a prompt and stream it to standard output.")
    parser.add_argument("prompt", type=utf8, nargs="?", help="prompt text (default: read from standard input)")
    parser.add_argument("--prompt-file", type=file_path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument(
        "--prompt-tokens",
        type=integers,
        metavar="1,2,3",
        help="continue these token ids; with --json, no tokenizer is needed",
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as plain text, without a chat format"
    )
    add_conversation_flags(parser)
    add_sampling_flags(parser)
    add_structure_flags(parser)
    add_model_flags(parser)
    add_engine_flags(parser)
    add_cluster_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--show-analysis", action="store_true", help="print the reasoning to standard error")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    output.add_argument(
        "--logprobs", type=int, metavar="N", help="report the N most likely tokens at each position (0 to 20)"
    )
    batch = parser.add_argument_group("batch")
    batch.add_argument(
        "--batch",
        type=file_path,
        metavar="IN.jsonl",
        help='input file with one request per line: {"id", "prompt"}, {"id", "messages", "tools", ...} or '
        '{"id", "prompt_tokens"}',
    )
    batch.add_argument(
        "--output",
        type=file_path,
        metavar="OUT.jsonl",
        help="output file with one result per line; requests that already have a result are skipped",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = flags().parse_args(arguments)
    _check(options)
    with by_flag(options):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    params = sampling_params(options, logprobs=options.logprobs)
    if follow := processes.join("generate", options):
        return follow()
    params = dataclasses.replace(params, structured_outputs=structured_outputs(options))
    if options.batch:
        from gptoss_jax.commands.batch import run_batch

        return run_batch(options, params)
    prompt = _prompt(options)
    conversation = conversation_options(options)
    started = time.perf_counter()
    llm = processes.load_llm(options, max_num_seqs=1)
    loaded = time.perf_counter() - started
    if options.raw or options.prompt_tokens:
        request = llm.raw_request("prompt", prompt, params)
    else:
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        if options.instructions:
            messages.insert(0, {"role": "developer", "content": options.instructions})
        request = llm.chat_request("prompt", messages, params, **conversation)
    return _answer(llm, request, options, loaded)


def _check(options: argparse.Namespace) -> None:
    given = [
        name for name in ("prompt", "prompt_file", "prompt_tokens", "batch") if getattr(options, name) is not None
    ]
    if len(given) > 1:
        names = [name if name == "prompt" else flag_name(name) for name in given]
        raise UsageError(f"expected one source of prompts, found {' and '.join(names)}")
    if options.logprobs is not None and not (options.json or options.batch):
        raise UsageError("only with --json or --batch", "--logprobs")
    if bool(options.batch) != bool(options.output):
        raise UsageError("--batch and --output: expected both or neither")
    if options.raw or options.prompt_tokens:
        for name in ("instructions", "tools", "builtin_tools"):
            if getattr(options, name):
                raise UsageError("only with the chat format, not with --raw or tokens", flag_name(name))


def _prompt(options: argparse.Namespace) -> str | list[int]:
    if options.prompt_tokens is not None:
        return list(options.prompt_tokens)
    text: str
    if options.prompt is not None:
        text, source = options.prompt, "prompt"
    elif options.prompt_file is not None:
        text, source = read_text(options.prompt_file, "--prompt-file"), f"--prompt-file: {options.prompt_file}"
    else:
        source = "standard input"
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UsageError("not UTF-8 text", where=source) from None
    if not text.strip():
        raise UsageError("the prompt is empty", where=source)
    return text


class _Printer:
    """Streams the answer to standard output, and the reasoning to standard error."""

    def __init__(self, show_analysis: bool) -> None:
        self._show_analysis = show_analysis
        self._thinking = False
        self._end = ""

    def show(self, progress: Progress) -> None:
        for delta in progress.deltas:
            if delta.kind in (None, "answer", "preamble"):
                self._close_analysis()
                print(delta.text, end="", flush=True)
                self._end = delta.text
            elif delta.kind == "reasoning" and self._show_analysis:
                print(dimmed(delta.text, sys.stderr), end="", file=sys.stderr, flush=True)
                self._thinking = True

    def _close_analysis(self) -> None:
        if self._thinking:
            print(file=sys.stderr)
            self._thinking = False

    def finish(self, message: dict[str, Any] | None) -> None:
        self._close_analysis()
        if self._end and not self._end.endswith("\n"):
            print()
        for call in (message or {}).get("tool_calls", []):
            print(f"{call['function']['name']}({call['function']['arguments']})")
        sys.stdout.flush()


def _answer(llm: LLM, request: Request, options: argparse.Namespace, load_seconds: float) -> int:
    printer = None if options.json else _Printer(options.show_analysis)
    started = time.perf_counter()
    first = last = started
    progress, interrupted = None, False
    try:
        for progress in llm.stream([request]):
            last = time.perf_counter()
            if len(progress.output.outputs[0].token_ids) == 1:
                first = last
            if printer:
                printer.show(progress)
    except KeyboardInterrupt:
        interrupted = True
    if progress is None:
        raise KeyboardInterrupt
    completion = progress.output.outputs[0]
    count = len(completion.token_ids)
    speed = (count - 1) / (last - first) if count > 1 else 0.0
    if printer:
        printer.finish(completion.message)
    elif not interrupted:
        timings = {
            "load_seconds": load_seconds,
            "time_to_first_token_seconds": first - started,
            "total_seconds": last - started,
            "tokens_per_second": speed,
        }
        print(json.dumps(result(progress.output) | {"timings": timings}, ensure_ascii=False))
    for problem in completion.malformed:
        print(f"malformed: {problem}", file=sys.stderr)
    ended = "interrupted" if interrupted else completion.finish_reason
    drafted = progress.output.drafted_tokens
    drafts = f", {progress.output.accepted_tokens} of {drafted} drafts accepted" if drafted else ""
    print(
        f"{count} tokens ({ended}), first after {first - started:.2f} s, {speed:.1f} tok/s{drafts}",
        file=sys.stderr,
    )
    return 130 if interrupted else 0


if __name__ == "__main__":
    run_command(main)
