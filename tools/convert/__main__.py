"""Command line of `python -m tools.convert`."""

from gptoss_jax.commands.cli import run
from gptoss_jax.convert import main

if __name__ == "__main__":
    run(lambda: main(prog="python -m tools.convert"))
