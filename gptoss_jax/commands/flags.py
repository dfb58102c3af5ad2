"""The flags that commands share, in one spelling."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gptoss_jax.errors import UsageError

BUILTIN_TOOLS = ("browser", "python")


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, as every other wrong input is."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(message)


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of these names, with commas between."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, found {name!r}")
        return names

    return parse


def sizes(text: str) -> list[int]:
    """The type of a flag that takes sizes with commas between."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes such as 1,8,32, found {text!r:.60}") from None


def _not_empty(text: str) -> str:
    """The type of a flag whose value says something: an empty one comes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path or a name, found ''")
    return text


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser for `python -m gptoss_jax.<command>`."""
    return Parser(prog=f"python -m gptoss_jax.{command}", description=description)


def add_model_flags(
    flags: argparse.ArgumentParser,
    model: str = "a checkpoint's directory, or a Hub name such as openai/gpt-oss-20b",
) -> None:
    """Which model, and how it runs; `model` says what the flag takes."""
    group = flags.add_argument_group("model")
    group.add_argument(
        "--model",
        type=_not_empty,
        metavar="PATH|NAME",
        help=f"{model} (default: the small model that ships with the project)",
    )
    group.add_argument(
        "--mesh",
        metavar="MESH",
        help="devices to run on: expert=4,tensor=2 (also data=), or a preset of configs/meshes (default: one device; "
        "with several processes, experts over all devices)",
    )
    group.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of all but the experts"
    )
    group.add_argument(
        "--kernels",
        metavar="reference|auto|NAME",
        help="what computes: plain JAX, the platform's kernels (default), or the backend of that name",
    )


def add_cluster_flags(flags: argparse.ArgumentParser) -> None:
    """Which processes run together."""
    group = flags.add_argument_group(
        "several processes",
        "The same command in each; process 0 reads and prints. On TPU pods, under Slurm, Open MPI and in "
        "indexed Jobs of Kubernetes none of these is needed.",
    )
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument(
        "--num-processes", type=int, metavar="N", help="how many there are; 1 for one alone, whatever is detected"
    )
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


def add_engine_flags(flags: argparse.ArgumentParser, max_num_seqs: bool = True) -> None:
    """How much runs at once, and what the cache may take."""
    group = flags.add_argument_group("engine")
    if max_num_seqs:
        add_max_num_seqs(group)
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="most tokens of a request, with its output (the model's context)",
    )
    group.add_argument(
        "--kv-cache-memory",
        type=int,
        metavar="BYTES",
        help="of each device (default: 0.85 of what weights leave free)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help="instead: the share of each device's memory that weights and cache take together",
    )
    group.add_argument("--kv-cache-dtype", choices=("bfloat16", "float32", "float8"), help="default: as --dtype")
    group.add_argument(
        "--long-prefill-token-threshold",
        type=int,
        metavar="N",
        help="most prompt tokens of one sequence in a step (default: 2048; on CPUs 512)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="most prompt tokens of all sequences in a step (default: as many)",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse what the cache holds of earlier prompts that begin alike (default: yes)",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        help="draft N tokens a step from the text so far, and verify them (default: 0)",
    )
    group.add_argument(
        "--warm-up",
        action="store_true",
        help="compile every step shape at the start, not when it is first needed",
    )


def add_max_num_seqs(flags: argparse._ActionsContainer) -> None:
    """How many sequences run together."""
    flags.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences that run together (default: 8)")


def add_sampling_flags(flags: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    group = flags.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="default: what the context holds")
    group.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest token")
    group.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens")
    group.add_argument(
        "--min-p", type=float, default=0.0, help="keep tokens this likely relative to the likeliest"
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="repeat the same tokens (default: a new seed each time)"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")


def add_structure_flags(flags: argparse.ArgumentParser) -> None:
    """The form of the answer."""
    group = flags.add_argument_group(
        "structured output (extra: structured)",
        "Of a chat's final answer, after any reasoning; of all of --raw text.",
    ).add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE|JSON", help="the answer is JSON that this schema describes")
    group.add_argument("--regex", metavar="REGEX", help="the answer matches this regular expression")
    group.add_argument("--grammar", type=Path, metavar="FILE", help="a Lark or GBNF grammar of the answer")


def add_conversation_flags(flags: argparse.ArgumentParser) -> None:
    """What the conversation's opening messages say."""
    group = flags.add_argument_group("conversation")
    group.add_argument("--instructions", metavar="TEXT", help="the developer message")
    group.add_argument("--tools", type=Path, metavar="FILE", help="a JSON list of OpenAI-style function tools")
    group.add_argument(
        "--builtin-tools",
        type=_names(BUILTIN_TOOLS),
        default=[],
        metavar=",".join(BUILTIN_TOOLS),
        help="tools that gpt-oss was trained on",
    )
    group.add_argument("--reasoning-effort", choices=("low", "medium", "high"), default="medium")
