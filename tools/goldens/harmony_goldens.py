"""python -m tools.goldens.harmony_goldens DIR: regenerates the results of openai-harmony in DIR's *.jsonl files.

A case of render.jsonl has the inputs `harmony_json`, `next_role` and `auto_drop_analysis`, and the results `tokens` and
`text`, or `error`. A case of parse.jsonl has the inputs `tokens`, `role` and `strict`, and the results `text`,
`messages` and `stream` (the state after each token), or `error` instead of the messages, and also `stream_error` if a
token raised it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import openai_harmony as oracle

from tools.goldens.o200k import install


def load_oracle() -> oracle.HarmonyEncoding:
    """openai-harmony's encoding, with the vocabulary that `install` wrote."""
    return oracle.load_harmony_encoding(oracle.HarmonyEncodingName.HARMONY_GPT_OSS)


def render_case(case: dict[str, Any], encoding: oracle.HarmonyEncoding) -> dict[str, Any]:
    """The case with openai-harmony's rendering."""
    made = {key: value for key, value in case.items() if key not in ("tokens", "text", "error")}
    try:
        # The inner function takes the JSON unchanged; the library's Python classes would add defaults.
        tokens = encoding._inner.render_conversation_for_completion(
            conversation_json=json.dumps(case["harmony_json"]),
            next_turn_role=case["next_role"],
            config={"auto_drop_analysis": case["auto_drop_analysis"]},
        )
    except oracle.HarmonyError as error:
        return made | {"error": f"HarmonyError: {error}"}
    return made | {"tokens": tokens, "text": encoding.decode_utf8(tokens)}


def parse_case(case: dict[str, Any], encoding: oracle.HarmonyEncoding) -> dict[str, Any]:
    """The case with the messages and the stream states that openai-harmony parses from its tokens."""
    made = {key: case[key] for key in ("id", "tags", "role", "strict", "tokens", "text")}
    role = None if case["role"] is None else oracle.Role(case["role"])
    parser = oracle.StreamableParser(encoding, role, strict=case["strict"])
    stream: list[dict[str, Any]] = []
    try:
        for token in case["tokens"]:
            parser.process(token)
            stream.append(_state(parser))
    except oracle.HarmonyError as error:
        return made | {
            "error": f"HarmonyError: {error}",
            "stream": stream,
            "stream_error": f"HarmonyError: {error}",
        }
    try:
        parser.process_eos()
    except oracle.HarmonyError as error:
        return made | {"error": f"HarmonyError: {error}", "stream": stream}
    return made | {"messages": [message_fields(message) for message in parser.messages], "stream": stream}


def _state(parser: oracle.StreamableParser) -> dict[str, Any]:
    role = parser.current_role
    return {
        "delta": parser.last_content_delta,
        "channel": parser.current_channel,
        "recipient": parser.current_recipient,
        "role": None if role is None else role.value,
    }


def message_fields(message: oracle.Message) -> dict[str, Any]:
    """The fields of a message of openai-harmony as they are stored in a case."""
    return {
        "role": message.author.role.value,
        "name": message.author.name,
        "channel": message.channel,
        "recipient": message.recipient,
        "content_type": message.content_type,
        "text": "".join(part.text for part in message.content),
    }


def main() -> None:
    """Rewrites render.jsonl and parse.jsonl in the directory given on the command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("directory", type=Path)
    directory = arguments.parse_args().directory
    with tempfile.TemporaryDirectory() as vocabulary:
        install(Path(vocabulary))
        encoding = load_oracle()
    for name, make in (("render", render_case), ("parse", parse_case)):
        file = directory / f"{name}.jsonl"
        cases = [make(json.loads(line), encoding) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(case) + "\n" for case in cases))


if __name__ == "__main__":
    main()
