"""python -m gptoss_jax.chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from gptoss_jax.checkpoints.hub import expand_home
from gptoss_jax.commands import processes
from gptoss_jax.commands.files import read_tools
from gptoss_jax.commands.flags import (
    add_cluster_flags,
    add_conversation_flags,
    add_engine_flags,
    add_model_flags,
    add_sampling_flags,
    command_parser,
)
from gptoss_jax.commands.options import by_flag, conversation_options, sampling_params
from gptoss_jax.commands.printing import dimmed
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import UsageError, expect

if TYPE_CHECKING:
    from gptoss_jax.serving.client import LLM
    from gptoss_jax.text.transcripts import TextDelta
    from gptoss_jax.types import CompletionOutput, SamplingParams

HELP = """\
/reset                   start a new conversation
/effort low|medium|high  set the reasoning effort
/tools FILE|off          give the model function tools, whose results you type in
/analysis on|off         show or hide the reasoning
/exit                    leave (also Ctrl-D)"""


def flags() -> argparse.ArgumentParser:
    """The command's argument parser."""
    parser = command_parser("chat", "Chat with the model in the terminal; /help lists the commands.")
    add_conversation_flags(parser)
    add_sampling_flags(parser)
    add_model_flags(parser)
    add_engine_flags(parser)
    add_cluster_flags(parser)
    parser.add_argument("--hide-analysis", action="store_true", help="hide the reasoning")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = flags().parse_args(arguments)
    with by_flag(options):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    params = sampling_params(options)
    if follow := processes.join("chat", options):
        return follow()
    session = Session(conversation_options(options), options.instructions, not options.hide_analysis)
    session.start(processes.load_llm(options, max_num_seqs=1), params)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() history and editing)
    if sys.stdin.isatty():
        print("/help lists the commands.", file=sys.stderr)
    while session.turn():
        pass
    return 0


class Session:
    """A conversation: its messages, tools and settings."""

    def __init__(self, conversation: dict[str, Any], instructions: str | None, show_analysis: bool) -> None:
        self._conversation = conversation
        self._opening = [{"role": "developer", "content": instructions}] if instructions else []
        self._show_analysis = show_analysis
        self.messages: list[dict[str, Any]] = list(self._opening)

    def start(self, llm: LLM, params: SamplingParams) -> None:
        """Set the model and the sampling parameters."""
        self._llm, self._params = llm, params

    def turn(self) -> bool:
        """Read a line from the user and answer it; returns False when the user leaves."""
        try:
            line = _ask("> ")
            if line is None or line.strip() in ("/exit", "/quit"):
                return False
            if line.startswith("/"):
                self._command(*line.split(maxsplit=1))
            elif line.strip():
                self._say(line)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
        return True

    def _command(self, name: str, argument: str = "") -> None:
        argument = argument.strip()
        if name == "/help":
            print(HELP, file=sys.stderr)
        elif name == "/reset":
            self.messages = list(self._opening)
        elif name == "/effort":
            expect(argument in ("low", "medium", "high"), name, "low, medium or high", argument)
            self._conversation["reasoning_effort"] = argument
        elif name == "/tools":
            expect(argument != "", name, "a file or off", argument)
            self._conversation["tools"] = None if argument == "off" else read_tools(expand_home(argument), name)
        elif name == "/analysis":
            expect(argument in ("on", "off"), name, "on or off", argument)
            self._show_analysis = argument == "on"
        else:
            raise UsageError(f"unknown command {name!a:.60}; /help lists the commands")

    def _say(self, line: str) -> None:
        before = list(self.messages)
        self.messages.append({"role": "user", "content": line})
        try:
            while (completion := self._answer()).finish_reason == "tool_calls":
                assert completion.message is not None
                self.messages += [completion.message, *map(_tool_result, completion.message["tool_calls"])]
            assert completion.message is not None
            self.messages.append(completion.message)
        except (KeyboardInterrupt, UsageError) as reason:
            # An unfinished turn is removed from the conversation.
            self.messages = before
            if isinstance(reason, UsageError):
                raise
            print("\ninterrupted", file=sys.stderr)

    def _answer(self) -> CompletionOutput:
        request = self._llm.chat_request("turn", self.messages, self._params, **self._conversation)
        printer = _Printer(self._show_analysis)
        for progress in self._llm.stream([request]):
            for delta in progress.deltas:
                printer.show(delta)
        printer.finish()
        completion = progress.output.outputs[0]
        for problem in completion.malformed:
            print(f"malformed: {problem}", file=sys.stderr)
        if completion.finish_reason == "length":
            print("(truncated: --max-new-tokens)", file=sys.stderr)
        elif completion.finish_reason != "tool_calls" and not completion.text:
            print("(no answer)", file=sys.stderr)
        return completion


class _Printer:
    """Streams a turn's text: answers as they are, reasoning dimmed or hidden."""

    def __init__(self, show_analysis: bool) -> None:
        self._show_analysis = show_analysis
        self._thinking: bool | None = None

    def show(self, delta: TextDelta) -> None:
        """Print more text; tool calls are printed once they are complete."""
        thinking = delta.kind == "reasoning"
        if delta.kind in ("call", "nothing") or (thinking and not self._show_analysis):
            return
        if self._thinking not in (None, thinking):
            print()
        self._thinking = thinking
        print(dimmed(delta.text, sys.stdout) if thinking else delta.text, end="", flush=True)

    def finish(self) -> None:
        """End the last line."""
        if self._thinking is not None:
            print()


def _ask(question: str) -> str | None:
    try:
        line = input(question if sys.stdin.isatty() else "")
        line.encode()  # bytes that are not UTF-8 are read as surrogates
        return line
    except EOFError:
        return None
    except UnicodeError:
        raise UsageError("standard input: not UTF-8 text") from None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""


def _tool_result(call: dict[str, Any]) -> dict[str, Any]:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    print(f"{name}({arguments})")
    answer = _ask(f"result of {name}: ")
    return {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": answer if answer is not None else json.dumps(None),
    }


if __name__ == "__main__":
    run_command(main)
