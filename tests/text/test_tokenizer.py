import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from gptoss_jax.errors import CheckpointError, UsageError
from gptoss_jax.text.pieces import PieceSplitter
from gptoss_jax.text.tokenizer import StreamDecoder, Tokenizer
from gptoss_jax.text.tokenizer_json import O200K_PATTERN
from tools.goldens.o200k import install

MARKS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}
SAMPLES = [
    "Hello, world! It's 12345 o'clock; don't SHOUT, HTTPServer.",
    "漢字かな交じり文 한국어 مرحبا 👩‍👩‍👧‍👦 Спасибо! ﬁ naïve",
    "  indented\n\n\t tabs \r\n and   spaces   ",
    "<|end|><|start|>system<|message|>",
    "a\u0301b '\u017f 'S x'LL \U0003fa9e\u0378",
]
# Characters of every class that the pattern distinguishes, and some newer than an engine's Unicode version.
kinds = st.sampled_from(
    "aAzZ'sLl 1٣²ǅʰあ漢\u0301\u0903\n\r\t/!?_\u3000\u2028€\u017f\u212aé\U0003fa9e\U000326e0\U00011b00\u1c89\ue000"
)
odd_texts = st.one_of(st.text(max_size=40), st.text(kinds, max_size=40))


def byte_characters() -> list[str]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(value) if value in plain else chr(next(others)) for value in range(256)]


def tokenizer_json(ranks: dict[bytes, int], marks: dict[str, int]) -> dict[str, Any]:
    """A tokenizer.json as Hugging Face converts tiktoken ranks: every split of every token, by rank."""
    characters = byte_characters()
    written = {token: "".join(characters[value] for value in token) for token in ranks}
    merges: list[Any] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [
            (token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks
        ]
        for left, right in sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            merges.append([written[left], written[right]])
    return {
        "added_tokens": [{"id": i, "content": text, "special": True} for text, i in marks.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "model": {"type": "BPE", "vocab": {written[t]: rank for t, rank in ranks.items()}, "merges": merges},
    }


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    install(tmp_path_factory.mktemp("o200k"))
    return tiktoken.get_encoding("o200k_harmony")


@pytest.fixture(scope="session")
def from_json(reference: tiktoken.Encoding, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("checkpoint")
    content = tokenizer_json(reference._mergeable_ranks, MARKS)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="session")
def small_json(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tokenizers import Regex, models, pre_tokenizers, trainers

    model = HFTokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(O200K_PATTERN), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    model.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([*SAMPLES, Path(__file__).read_text()], trainer)
    return json.loads(model.to_str())


def load(content: Any, directory: Path) -> Tokenizer:
    (directory / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return Tokenizer.from_dir(directory)


@pytest.mark.slow
def test_a_checkpoints_tokenizer_is_o200k_harmony(from_json: Tokenizer, reference: tiktoken.Encoding) -> None:
    assert from_json.special_tokens == reference._special_tokens
    assert from_json.vocab_size == 201_088
    assert from_json._ranks == reference._mergeable_ranks
    assert from_json._ids is None
    by_name = Tokenizer.from_name("o200k_harmony")
    assert by_name.special_tokens == from_json.special_tokens
    for text in SAMPLES:
        assert from_json.encode(text) == by_name.encode(text) == reference.encode_ordinary(text)


@given(text=odd_texts)
@settings(max_examples=200)
def test_encodes_as_tiktoken(text: str, from_json: Tokenizer, reference: tiktoken.Encoding) -> None:
    assert from_json.encode(text) == reference.encode_ordinary(text)
    assert from_json.decode(from_json.encode(text)) == text


@given(parts=st.lists(st.tuples(odd_texts, st.integers(1, 700)), min_size=1, max_size=3))
@example(parts=[("a", 5000), ("'\u017f\u3000", 1), ("!", 3000)])
@example(parts=[(" ", 2500), ("\U0003fa9e", 1200), ("\n \t", 900), ("5", 1)])
@settings(max_examples=100)
def test_long_runs_encode_as_tiktoken(
    parts: list[tuple[str, int]], from_json: Tokenizer, reference: tiktoken.Encoding
) -> None:
    text = "x" * 2001 + "".join(part * count for part, count in parts)
    assert from_json._encode_long(text) == reference.encode_ordinary(text)
    assert from_json.encode(text) == reference.encode_ordinary(text)


@given(text=odd_texts)
@settings(max_examples=200)
def test_split_keeps_everything(text: str) -> None:
    pieces = PieceSplitter(O200K_PATTERN).pieces(text)
    assert pieces is not None
    assert "".join(pieces) == text


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "aA", "A", "漢", "\u0301", " \t", "1", "' ", "ab cd\u3000"])
def test_half_a_megabyte_takes_seconds(unit: str, from_json: Tokenizer) -> None:
    text = unit * (500_000 // len(unit.encode())) + "x"
    started = time.perf_counter()
    tokens = from_json.encode(text)
    assert time.perf_counter() - started < 10
    assert from_json.decode(tokens) == text


def test_text_never_becomes_a_special_token(from_json: Tokenizer) -> None:
    for text, token in MARKS.items():
        assert not set(from_json.encode(f"a{text}b")) & set(from_json.special_tokens.values())
        assert from_json.encode_special(text) == token
    with pytest.raises(UsageError, match=r"no special token <\|nothing\|>"):
        from_json.encode_special("<|nothing|>")


def test_decoding(from_json: Tokenizer) -> None:
    assert from_json.decode([200006, 13225, 999_999, -1]) == "<|start|>Hello\ufffd\ufffd"
    assert from_json.token_bytes(13225) == b"Hello"
    with pytest.raises(UsageError, match="below 201088"):
        from_json.token_bytes(201_088)
    assert from_json.encode("\ud800x") == from_json.encode("\ufffdx")


@given(text=odd_texts, cut=st.integers(0, 9))
def test_stream_decoder(text: str, cut: int, from_json: Tokenizer) -> None:
    tokens = [from_json._ranks[bytes([value])] for value in text.encode()]
    tokens = tokens[: len(tokens) - cut]
    decoder = StreamDecoder(from_json)
    streamed = "".join(decoder.push([token]) for token in tokens)
    assert "\ufffd" not in streamed or "\ufffd" in text
    assert streamed + decoder.finish() == from_json.decode(tokens)


def test_threads_share_a_tokenizer(from_json: Tokenizer, reference: tiktoken.Encoding) -> None:
    texts = [text * 5 + "y" * (3000 * (i % 2)) for i, text in enumerate(SAMPLES * 4)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(from_json.encode, texts)) == [reference.encode_ordinary(text) for text in texts]


@pytest.mark.parametrize("variant", ["as trained", "merges as strings", "ids shuffled", "a token out of reach"])
def test_a_trained_tokenizer_encodes_as_tokenizers(variant: str, small_json: dict, tmp_path: Path) -> None:
    content = json.loads(json.dumps(small_json))
    vocab: dict[str, int] = content["model"]["vocab"]
    if variant == "merges as strings":
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    elif variant == "ids shuffled":
        ids = list(range(2, len(vocab)))
        random.Random(0).shuffle(ids)
        content["model"]["vocab"] = {t: i if i < 2 else ids[i - 2] for t, i in vocab.items()}
    elif variant == "a token out of reach":
        vocab["Hello,"] = len(vocab)
        vocab["zq"] = len(vocab)
    ours, theirs = load(content, tmp_path), HFTokenizer.from_str(json.dumps(content))

    @given(text=odd_texts)
    @settings(max_examples=100)
    @example(text="Hello, zq zqzq the thee athe")
    def compare(text: str) -> None:
        # The two use different versions of Unicode, and `tokenizers` finds added tokens in text.
        if text.isascii() and "<|" not in text:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text

    compare()
    for text in [*SAMPLES[:3], Path(__file__).read_text().replace("<|", "< |")]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.special_tokens == {"<|start|>": 0, "<|end|>": 1}


def test_text_that_the_pattern_does_not_match(small_json: dict, tmp_path: Path) -> None:
    content = json.loads(json.dumps(small_json))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\d"
    ours, theirs = load(content, tmp_path), HFTokenizer.from_str(json.dumps(content))
    check = ["abc, 12!? é", "!!!", "a" * 3000 + "!" * 3000 + "1"]
    for text in check:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    content["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    ours, theirs = load(content, tmp_path), HFTokenizer.from_str(json.dumps(content))
    for text in check:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def changed(path: str, value: Any) -> Any:
    def change(content: dict) -> dict:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        target: Any = content
        for key in parents:
            target = target[key]
        if value is None and isinstance(target, dict):
            target.pop(last, None)
        else:
            target[last] = value
        return content

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (changed("model", None), "model"),
        (changed("model/type", "WordPiece"), "model.type"),
        (changed("model/vocab", None), "model.vocab"),
        (changed("model/vocab/a", None), "model.vocab"),
        (changed("model/vocab/a", 0), "model.vocab"),
        (changed("model/vocab/a", "x"), "model.vocab"),
        (changed("model/vocab/日", 9999), "model.vocab"),
        (changed("model/vocab/a b", 9999), "model.vocab"),
        (changed("model/vocab/a\u00ad", 9999), "model.vocab"),
        (changed("model/merges", None), "model.merges"),
        (changed("model/merges", {}), "model.merges"),
        (changed("model/merges/0", "abc"), "model.merges[0]"),
        (changed("model/merges/0", ["a", 1]), "model.merges[0]"),
        (changed("model/merges/0", ["zz", "qq"]), "model.merges[0]"),
        (changed("model/byte_fallback", True), "model.byte_fallback"),
        (changed("model/dropout", 0.1), "model.dropout"),
        (changed("normalizer", {"type": "NFC"}), "normalizer"),
        (changed("pre_tokenizer", None), "pre_tokenizer"),
        (changed("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer"),
        (changed("pre_tokenizer/pretokenizers", []), "pre_tokenizer"),
        (changed("pre_tokenizer/pretokenizers/0/behavior", "Contiguous"), "pretokenizers[0].behavior"),
        (changed("pre_tokenizer/pretokenizers/0/behavior", "Removed"), "pretokenizers[0].invert"),
        (changed("pre_tokenizer/pretokenizers/0/pattern", {"String": " "}), "pretokenizers[0].pattern.Regex"),
        (changed("pre_tokenizer/pretokenizers/0/pattern/Regex", "("), "pre_tokenizer"),
        *(
            (
                changed("pre_tokenizer/pretokenizers/0/pattern/Regex", pattern),
                "Regex: expected a regular",
            )
            for pattern in ("", "a*", "(?=.)", r"\b", "x{0}", r"\p{L}+|[^\p{N}a]?", "a(?:b|)(?<=a)|(?i:c)*+")
        ),
        (changed("pre_tokenizer/pretokenizers/1/add_prefix_space", True), "pretokenizers[1].add_prefix_space"),
        (changed("added_tokens", None), "added_tokens"),
        (changed("added_tokens/1/id", 0), "added_tokens[1]"),
        (changed("added_tokens/0/id", 7), "added_tokens"),
        (lambda content: [], "the file"),
        (lambda content: "{", "JSON"),
    ],
)
def test_a_bad_tokenizer_json_names_file_and_field(
    change: Any, field: str, small_json: dict, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        load(change(json.loads(json.dumps(small_json))), tmp_path)
    message = str(error.value)
    assert field in message
    assert "tokenizer.json" in message
    assert "\n" not in message


def test_a_missing_file_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_dir(tmp_path)
    with pytest.raises(UsageError, match="found 'nothing'"):
        Tokenizer.from_name("nothing")

    def offline(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UsageError, match=r"^tokenizer: o200k_harmony is neither .* ConnectionError$"):
        Tokenizer.from_name("o200k_harmony")
