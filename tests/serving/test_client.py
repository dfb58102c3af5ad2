"""The Python API: a wrong argument raises a one-line error that names it."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss_jax import LLM, AsyncLLM, EngineError, SamplingParams
from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.errors import UsageError
from gptoss_jax.serving.worker import Inbox

FEW = SamplingParams(max_tokens=2, temperature=0)
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


@cache
def llm() -> LLM:
    return LLM(engine=EngineOptions(max_num_seqs=2), progress=False)


@pytest.mark.parametrize(
    ("method", "arguments", "named"),
    [
        ("generate", (5,), "^prompts: expected text, token ids .*, found 5$"),
        ("generate", ([None],), r"^prompts\[0\]: expected text or token ids, found None$"),
        ("generate", (["hi", 1.5],), r"^prompts\[1\]: .*, found 1.5$"),
        ("generate", ({"prompt": "hi"},), "^prompts: "),
        ("generate", ([["hi"]],), "^request 0: prompt: expected token ids, found 'hi'$"),
        ("generate", ("hi", {"temperature": 0}), "^sampling_params: expected SamplingParams"),
        ("generate", ("hi", [None]), "^sampling_params: "),
        ("generate", ("hi", [FEW, FEW]), "^sampling_params: expected one or 1, found 2$"),
        ("generate", (np.array(5),), r"^prompts: expected text, token ids .*, found array\(5\)$"),
        ("chat", ("hi",), "^messages: expected a list of messages, .*, found 'hi'$"),
        ("chat", (["hi"],), r"^messages\[0\]: expected a message, .*, found 'hi'$"),
        ("chat", (QUESTION[0],), "^messages: "),
        ("chat", ([*QUESTION, None],), r"^messages\[1\]: "),
        ("chat", (QUESTION, 5), "^sampling_params: "),
    ],
)
def test_wrong_arguments_are_named(method: str, arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        getattr(llm(), method)(*arguments)
    assert llm().engine.unfinished == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"path": 5}, "^path: expected .*, found 5$"),
        ({"engine": {"max_num_seqs": 2}}, "^engine: expected EngineOptions, found "),
        ({"dtype": 5}, "^dtype: "),
        ({"mesh": 5}, "^mesh: expected .*, found 5$"),
        ({"rules": {"heads": ()}}, "^rules: expected ShardingRules, found "),
        ({"kernels": "mosaic_tpu"}, "^kernels: mosaic_tpu is for TPUs, found the platform cpu$"),
        ({"engine": EngineOptions(kv_cache_memory=1000)}, "^kv_cache_memory: 1000 bytes"),
    ],
)
def test_invalid_llm_arguments_are_rejected(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        LLM(**arguments)


def test_options_of_a_chat() -> None:
    for name in ("foo", "next_role"):
        with pytest.raises(TypeError, match=rf"LLM.chat\(\) got an unexpected keyword argument '{name}'"):
            llm().chat(QUESTION, FEW, **{name: "user"})
    with pytest.raises(UsageError, match=r"^auto_drop_analysis: expected true or false, found 'x'$"):
        llm().chat(QUESTION, FEW, auto_drop_analysis="x")
    nothing = dict.fromkeys(("builtin_tools", "reasoning_effort", "current_date", "response_format", "tools"))
    [plain], [nulls] = llm().chat(QUESTION, FEW), llm().chat(QUESTION, FEW, **nothing)
    assert plain.prompt_token_ids == nulls.prompt_token_ids


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(EMBEDDED / name)
    with pytest.raises(UsageError) as caught:
        LLM(tmp_path, progress=False).chat(QUESTION)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: no such file")
    assert "--prompt-tokens" in str(caught.value)


def test_prompts_may_be_arrays() -> None:
    listed, arrays = llm().generate([[1, 2], [3]], FEW), llm().generate([np.array([1, 2]), np.array([3])], FEW)
    assert [output.outputs[0].token_ids for output in listed] == [output.outputs[0].token_ids for output in arrays]
    [alone] = llm().generate(np.array([1, 2]), FEW)
    assert alone.outputs[0].token_ids == listed[0].outputs[0].token_ids


def test_a_call_within_a_stream_has_its_own_tokens() -> None:
    """A `generate` and another stream inside a `stream`, and all get what they get alone."""
    prompts, params = ["1 + 2", "What is 3 + 4?"], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    alone = [output.outputs[0].token_ids for output in llm().generate(prompts, params)]
    outer = [llm().raw_request("0", prompts[0], params)]
    seen = []
    for progress in llm().stream(outer):
        [inner] = llm().generate(prompts[1], params)
        assert inner.outputs[0].token_ids == alone[1]
        for other in llm().stream([llm().raw_request("0", prompts[1], params)]):
            assert other.completion.token_ids == alone[1][: len(other.completion.token_ids)]
        seen = progress.completion.token_ids
    assert seen == alone[0]


def test_threads_share_a_model() -> None:
    prompts = [f"{i} + {i}" for i in range(8)]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    alone = [output.outputs[0].token_ids for output in llm().generate(prompts, params)]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda prompt: llm().generate(prompt, params)[0].outputs[0].token_ids, prompts)
        assert list(together) == alone


def test_closing_a_stream_drops_its_requests() -> None:
    stream = llm().stream([llm().raw_request(str(i), "1", SamplingParams(max_tokens=500)) for i in range(3)])
    next(stream)
    stream.close()
    load = llm().load()
    assert load.running == load.waiting == load.pages_used == 0


def test_an_interrupt_ends_the_call_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook."""
    get, calls = Inbox.get, []

    def interrupted(self: Inbox, timeout: float | None = None) -> list[Any]:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return get(self, timeout)

    monkeypatch.setattr(Inbox, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm().generate(["1 + 2"], SamplingParams(max_tokens=500, ignore_eos=True))
    [output] = llm().generate("1 + 2", FEW)
    assert len(output.outputs[0].token_ids) == 2
    assert llm().load().running == 0


def test_asyncio() -> None:
    """Several tasks share a model; one leaves its stream early, and another is cancelled."""
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    alone = [output.outputs[0].token_ids for output in llm().generate(["1 + 2", "3 + 4"], params)]
    answer = llm().chat(QUESTION, FEW)[0].outputs[0].token_ids

    async def main() -> None:
        model = AsyncLLM(engine=EngineOptions(max_num_seqs=2), progress=False)
        long = SamplingParams(max_tokens=500, ignore_eos=True)

        async def leave() -> None:
            async for progress in model.stream([model.raw_request("0", "5 + 5", long)]):
                if len(progress.completion.token_ids) == 3:
                    return

        async def streamed() -> list[int]:
            tokens: list[int] = []
            async for progress in model.stream([model.raw_request("0", "3 + 4", params)]):
                tokens = progress.completion.token_ids
            return tokens

        endless = asyncio.create_task(model.generate("7", long))
        chat = model.chat(QUESTION, FEW)
        first, tokens, said, _ = await asyncio.gather(model.generate("1 + 2", params), streamed(), chat, leave())
        assert first[0].outputs[0].token_ids == alone[0]
        assert tokens == alone[1]
        assert said[0].outputs[0].token_ids == answer
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        gc.collect()
        assert await asyncio.to_thread(model.worker.drain, 60)
        with pytest.raises(EngineError, match="takes no requests"):
            await model.generate("1", params)
        model.close()

    asyncio.run(main())


def test_a_model_that_is_collected_ends_its_thread() -> None:
    own = LLM(engine=EngineOptions(max_num_seqs=2), progress=False)
    own.generate("1", FEW)
    thread = own.worker._thread
    del own
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
