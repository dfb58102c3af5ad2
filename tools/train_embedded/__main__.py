"""Command line: python -m tools.train_embedded."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path


def main() -> None:
    """Train the embedded model, then tell how well it does."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_embedded",
        description="Trains the small model of gptoss_jax/embedded from nothing: makes its conversations, its "
        "tokenizer and its weights, and evaluates them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write, replaced if it exists")
    parser.add_argument("--steps", type=int, default=6000, help="updates; the learning rate falls to 0 over them")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end earlier, learning rate included")
    parser.add_argument("--rows", type=int, default=96, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=640, help="tokens in a sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its highest")
    parser.add_argument("--warmup", type=int, default=300, help="steps until then")
    parser.add_argument("--layers", type=int, default=6, help="of the model")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the weights")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that make batches")
    parser.add_argument(
        "--problems", type=int, default=500, help="held-out sums to evaluate on at the end (0: none)"
    )
    arguments = vars(parser.parse_args())
    problems = arguments.pop("problems")

    # Imported here so that --help is quick, and so that the processes that make batches do without jax.
    from tools.train_embedded.evaluate import evaluate
    from tools.train_embedded.train import Settings, train

    settings = Settings(**arguments)
    train(settings)
    if problems:
        evaluate(settings.output, problems)


if __name__ == "__main__":
    main()
