"""The command: see `python -m tools.convert --help`."""

from gptoss_jax.commands.cli import run
from gptoss_jax.convert import main

if __name__ == "__main__":
    run(lambda: main(prog="python -m tools.convert"))
