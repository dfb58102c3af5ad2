"""Flags that several commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gptoss_jax.errors import UsageError

BUILTIN_TOOLS = ("browser", "python")


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError, so that flag errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(message)


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """The argument type of a comma-separated list of these names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, found {name!r}")
        return names

    return parse


def integers(text: str) -> list[int]:
    """The argument type of a comma-separated list of integers."""
    # int() also reads 1_000 and the digits of other scripts.
    if not re.fullmatch(r"\s*-?\d{1,30}\s*(,\s*-?\d{1,30}\s*)*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected integers such as 1,8,32, found {text!a:.60}")
    return [int(part) for part in text.split(",")]


def utf8(text: str) -> str:
    """The argument type of any text; Python reads bytes that are not UTF-8 as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, found {text!a:.60}") from None
    return text


def _not_empty(text: str) -> str:
    """The argument type of a non-empty string; an empty one usually comes from an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path or a name, found ''")
    return text


def _not_empty_text(text: str) -> str:
    """The argument type of text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected text that is not empty, found ''")
    return utf8(text)


def file_path(text: str) -> Path:
    """The argument type of a file's path; Path("") is the current directory."""
    return Path(_not_empty(text))


def flag_name(name: str) -> str:
    """The flag that sets `options.<name>`."""
    return f"--{name.replace('_', '-')}"


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser for `python -m gptoss_jax.<command>`."""
    return Parser(prog=f"python -m gptoss_jax.{command}", description=description)


def add_model_flags(
    flags: argparse.ArgumentParser,
    model: str = "checkpoint directory, or Hugging Face Hub name such as openai/gpt-oss-20b",
) -> None:
    """Add the flags of the model and its devices; `model` describes the values of --model."""
    group = flags.add_argument_group("model")
    group.add_argument(
        "--model",
        type=_not_empty,
        metavar="PATH|NAME",
        help=f"{model} (default: the small model included in the package)",
    )
    group.add_argument(
        "--mesh",
        metavar="MESH",
        help="device mesh, as sizes of the axes data, expert and tensor (expert=4,tensor=2), or the name of a preset "
        "in configs/meshes (default: one device; with several processes, expert parallelism over all devices)",
    )
    group.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="data type of activations and of all weights except the experts (default: bfloat16)",
    )
    group.add_argument(
        "--kernels",
        metavar="reference|auto|NAME",
        help="kernel backend: auto for the platform's kernels, reference for plain JAX, or a backend's name "
        "(default: auto)",
    )


def add_cluster_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of a multi-process run."""
    group = flags.add_argument_group(
        "several processes",
        "Run the same command in every process; process 0 reads the input and prints the output. Their "
        "values are detected on TPU pods, under Slurm and Open MPI, and in indexed Kubernetes Jobs.",
    )
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="address on which process 0 listens")
    group.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="number of processes; 1 disables the detection of other processes",
    )
    group.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--cluster-secret-file",
        type=file_path,
        metavar="FILE",
        help="file with a secret that all processes share, readable only by its owner; required unless HOST is a "
        "loopback address (default: the secret in the environment variable GPTOSS_JAX_CLUSTER_SECRET)",
    )


def add_engine_flags(flags: argparse.ArgumentParser, max_num_seqs: bool = True) -> None:
    """Add the flags of the engine and its cache."""
    group = flags.add_argument_group("engine")
    if max_num_seqs:
        add_max_num_seqs(group)
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="maximum length of a request, prompt and output, in tokens (default: the model's context length)",
    )
    group.add_argument(
        "--kv-cache-memory",
        type=int,
        metavar="BYTES",
        help="size of the KV cache on each device in bytes (default: 0.85 of the memory that the weights leave free)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="FRACTION",
        help="fraction of each device's memory for weights and KV cache together, instead of --kv-cache-memory",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=("bfloat16", "float32", "float8"),
        help="data type of the KV cache (default: that of --dtype)",
    )
    group.add_argument(
        "--long-prefill-token-threshold",
        type=int,
        metavar="N",
        help="maximum number of prompt tokens of one sequence in a step (default: as many as a step has)",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="maximum number of tokens of a step, prompts and decodes of all sequences together (default: 2048; on "
        "CPUs 512)",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse the cached keys and values of earlier prompts with the same prefix (default: enabled)",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        help="draft N tokens per step by prompt lookup, and verify them (default: 0)",
    )
    group.add_argument(
        "--warm-up",
        action="store_true",
        help="compile all programs before the first request",
    )


def add_max_num_seqs(flags: argparse._ActionsContainer) -> None:
    """Add the flag of the batch size."""
    flags.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="maximum number of concurrent sequences (default: 8)"
    )


def add_sampling_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of sampling."""
    group = flags.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="maximum number of generated tokens (default: the rest of the context)",
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy sampling (default: 0)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens whose cumulative probability reaches this value (default: 1)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K most likely tokens; 0 for all tokens (default: 0)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="minimum probability of a token, relative to that of the most likely token (default: 0)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="random seed (default: a new seed for each request)")
    group.add_argument(
        "--stop",
        type=_not_empty_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="stop generation at this text; may be given several times",
    )


def add_structure_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of structured output."""
    group = flags.add_argument_group(
        "structured output (extra: structured)",
        "Constrain the final answer of a chat, after the reasoning, or all text generated with --raw.",
    ).add_mutually_exclusive_group()
    group.add_argument(
        "--json-schema", type=_not_empty, metavar="FILE|JSON", help="constrain the answer to JSON with this schema"
    )
    group.add_argument(
        "--regex", type=_not_empty_text, metavar="REGEX", help="constrain the answer to this regular expression"
    )
    group.add_argument(
        "--grammar", type=file_path, metavar="FILE", help="constrain the answer to this Lark or GBNF grammar"
    )


def add_conversation_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of a conversation's system and developer messages."""
    group = flags.add_argument_group("conversation")
    group.add_argument("--instructions", type=_not_empty_text, metavar="TEXT", help="developer message")
    group.add_argument(
        "--tools", type=file_path, metavar="FILE", help="JSON file with a list of OpenAI-style function tools"
    )
    group.add_argument(
        "--builtin-tools",
        type=_names(BUILTIN_TOOLS),
        default=[],
        metavar=",".join(BUILTIN_TOOLS),
        help="built-in tools of gpt-oss to enable, separated by commas",
    )
    group.add_argument(
        "--reasoning-effort",
        choices=("low", "medium", "high"),
        default="medium",
        help="reasoning effort (default: medium)",
    )
