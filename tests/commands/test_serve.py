"""`python -m gptoss_jax.serve` answers over HTTP and ends cleanly."""

from __future__ import annotations

import signal
import subprocess
import sys

import openai
import pytest


@pytest.mark.slow
def test_the_included_model_answers_and_sigterm_ends_it() -> None:
    command = [sys.executable, "-m", "gptoss_jax.serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            url = server.stdout.readline().split()[-1]
            with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
                answer = client.chat.completions.create(
                    model="gptoss-jax",
                    messages=[{"role": "user", "content": "What is 17 + 25?"}],
                    temperature=0,
                )
            assert "42" in (answer.choices[0].message.content or "")
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
