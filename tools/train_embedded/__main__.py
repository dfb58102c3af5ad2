"""Command line: python -m tools.train_embedded train|evaluate."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).parents[2] / "gptoss_jax" / "embedded"


def main() -> None:
    """Train the embedded model, or tell how well a trained one does."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_embedded", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser(
        "train",
        formatter_class=helps,
        help="make the conversations, the tokenizer and the weights",
        description="Makes conversations, trains a tokenizer and a model on them, and evaluates it: minutes on "
        "one GPU. A CPU takes many hours for the same; a short run there shows the loss fall.",
    )
    train.add_argument("--output", type=Path, required=True, help="directory to write, replaced if it exists")
    train.add_argument("--steps", type=int, default=4500, help="updates; the learning rate falls to 0 over them")
    train.add_argument("--minutes", type=float, default=math.inf, help="end earlier, learning rate included")
    train.add_argument("--rows", type=int, default=96, help="sequences in a batch")
    train.add_argument("--length", type=int, default=640, help="tokens in a sequence")
    train.add_argument("--learning-rate", type=float, default=2e-3, help="at its highest")
    train.add_argument("--warmup", type=int, default=300, help="steps until then")
    train.add_argument("--layers", type=int, default=6, help="of the model")
    train.add_argument("--seed", type=int, default=0, help="of the data and the weights")
    train.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that make batches")
    train.add_argument("--problems", type=int, default=500, help="held-out sums to evaluate on (0: none)")
    evaluate = commands.add_parser(
        "evaluate", formatter_class=helps, help="ask a trained model what training held out"
    )
    evaluate.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint directory")
    evaluate.add_argument("--problems", type=int, default=500, help="held-out sums; half as many tool calls")
    evaluate.add_argument("--dtype", default="bfloat16", help="of everything but the packed experts")
    arguments = vars(parser.parse_args())
    if arguments.pop("command") == "train":
        _train(arguments.pop("problems"), arguments)
    else:
        _evaluate(arguments["model"], arguments["problems"], arguments["dtype"])


def _train(problems: int, settings: dict[str, Any]) -> None:
    # Imported here so that --help is quick, and so that the processes that make batches do without jax.
    from tools.train_embedded.train import Settings, train

    train(Settings(**settings))
    if problems:
        _evaluate(settings["output"], problems, "bfloat16")


def _evaluate(path: Path, problems: int, dtype: str) -> None:
    from tools.train_embedded.evaluate import evaluate

    evaluate(path, problems, dtype)


if __name__ == "__main__":
    main()
