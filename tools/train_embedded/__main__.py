"""Command line: python -m tools.train_embedded train|evaluate."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).parents[2] / "gptoss_jax" / "embedded"


def main() -> None:
    """Train the embedded model, or evaluate a trained one."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_embedded", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser(
        "train",
        formatter_class=helps,
        help="generate the conversations, and train the tokenizer and the weights",
        description="Generates conversations, trains a tokenizer and a model on them, and evaluates the model. This "
        "takes minutes on one GPU and many hours on a CPU, where a short run is enough to see the loss decrease.",
    )
    train.add_argument("--output", type=Path, required=True, help="output directory, replaced if it exists")
    train.add_argument(
        "--steps", type=int, default=4500, help="training steps, over which the learning rate decays to 0"
    )
    train.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="time limit, to which the learning-rate schedule is shortened",
    )
    train.add_argument("--rows", type=int, default=96, help="sequences per batch")
    train.add_argument("--length", type=int, default=640, help="tokens per sequence")
    train.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    train.add_argument("--warmup", type=int, default=300, help="warm-up steps")
    train.add_argument("--layers", type=int, default=6, help="layers of the model")
    train.add_argument("--seed", type=int, default=0, help="seed of the data and the weights")
    train.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that generate batches"
    )
    train.add_argument("--problems", type=int, default=500, help="held-out sums to evaluate on (0: none)")
    evaluate = commands.add_parser(
        "evaluate", formatter_class=helps, help="evaluate a trained model on held-out problems"
    )
    evaluate.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint directory")
    evaluate.add_argument("--problems", type=int, default=500, help="held-out sums; half as many tool calls")
    evaluate.add_argument("--dtype", default="bfloat16", help="dtype of everything except the packed experts")
    arguments = vars(parser.parse_args())
    if arguments.pop("command") == "train":
        _train(arguments.pop("problems"), arguments)
    else:
        _evaluate(arguments["model"], arguments["problems"], arguments["dtype"])


def _train(problems: int, settings: dict[str, Any]) -> None:
    # Imported here so that --help is fast, and so that the processes that generate batches do not import jax.
    from tools.train_embedded.train import Settings, train

    train(Settings(**settings))
    if problems:
        _evaluate(settings["output"], problems, "bfloat16")


def _evaluate(path: Path, problems: int, dtype: str) -> None:
    from tools.train_embedded.evaluate import evaluate

    evaluate(path, problems, dtype)


if __name__ == "__main__":
    main()
