"""python -m gptoss_jax.convert: converts a checkpoint to another layout; the same as `python -m tools.convert`."""

from __future__ import annotations

import argparse

from gptoss_jax.commands.flags import Parser, file_path
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import UsageError

DESCRIPTION = """\
Convert a checkpoint. The layout of SOURCE is detected: Hugging Face's, OpenAI's original one, or Orbax. Every
tensor keeps its bytes and dtype, MXFP4 included. TARGET appears only when it is complete."""

EXAMPLES = """\
examples:
  {prog} openai/gpt-oss-20b ckpt/20b-orbax --to orbax --verify
  {prog} gpt-oss-20b/original ckpt/20b-hf --to hf --max-shard-size 5GB
  {prog} ckpt/20b-orbax ckpt/20b-hf --verify-only"""


def flags(prog: str) -> argparse.ArgumentParser:
    """The command's flags; `prog` is the name shown in the help text."""
    parser = Parser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint's directory, or a Hub name")
    parser.add_argument("target", metavar="TARGET", type=file_path, help="a new or empty directory")
    parser.add_argument("--to", choices=("hf", "orbax"), help="the layout of TARGET")
    check = parser.add_mutually_exclusive_group()
    check.add_argument(
        "--verify", action="store_true", help="read TARGET back and compare every byte, before it appears"
    )
    check.add_argument(
        "--verify-only", action="store_true", help="compare an existing TARGET with SOURCE, and write nothing"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="maximum size of a file with --to hf (default: 5GB)"
    )
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a progress bar (default: if standard error is a terminal)",
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = "python -m gptoss_jax.convert") -> None:
    """Convert or compare checkpoints, as given by the flags. Raises GptOssError."""
    options = flags(prog).parse_args(arguments)
    if options.verify_only == bool(options.to):
        raise UsageError("expected either --to hf, --to orbax, or --verify-only", "--to")
    if options.max_shard_size is not None and options.to != "hf":
        raise UsageError("only for --to hf", "--max-shard-size")
    # Imported here so that --help does not wait for jax.
    from gptoss_jax.checkpoints.conversion import compare, convert, parse_size
    from gptoss_jax.checkpoints.hub import resolve
    from gptoss_jax.checkpoints.reader import open_checkpoint

    try:
        max_shard_bytes = parse_size(options.max_shard_size or "5GB")
    except ValueError:
        raise UsageError(
            f"expected a size such as 500MB or 5GB, found {options.max_shard_size!r}", "--max-shard-size"
        ) from None
    source = resolve(options.source)
    if options.verify_only:
        with open_checkpoint(source) as checkpoint:
            size = compare(checkpoint, options.target, progress=options.progress)
        print(f"{options.target}: the same {size:,} bytes as {source}")
        return
    size = convert(
        source,
        options.target,
        options.to,
        verify=options.verify,
        max_shard_bytes=max_shard_bytes,
        progress=options.progress,
    )
    print(f"{options.target}: {size:,} bytes written" + (" and verified" if options.verify else ""))


if __name__ == "__main__":
    run_command(main)
