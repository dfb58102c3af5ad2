"""The o200k vocabulary from the `bpe-openai` package (a development dependency), without network access."""

import gzip
import hashlib
import os
from importlib import resources
from pathlib import Path

_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def install(directory: Path) -> None:
    """Writes the vocabulary to `directory`, and makes tiktoken and openai-harmony of this process use it.

    Raises ValueError if the package's file is not the published one.
    """
    packed = resources.files("bpe_openai") / "data" / "o200k_base.tiktoken.gz"
    vocabulary = gzip.decompress(packed.read_bytes())
    if hashlib.sha256(vocabulary).hexdigest() != _SHA256:
        raise ValueError(f"{packed}: not the published o200k_base.tiktoken")
    (directory / "o200k_base.tiktoken").write_bytes(vocabulary)
    # tiktoken's cache names a file by the SHA-1 of its URL.
    address = b"https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
    (directory / hashlib.sha1(address).hexdigest()).write_bytes(vocabulary)
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(directory)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(directory)
