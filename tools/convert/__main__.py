"""Command line of `python -m tools.convert`."""

from gptoss_jax.commands.running import run_command
from gptoss_jax.convert import main

if __name__ == "__main__":
    run_command(lambda: main(prog="python -m tools.convert"))
