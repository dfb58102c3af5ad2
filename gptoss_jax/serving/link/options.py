"""What the front is started with."""

from __future__ import annotations

import msgspec


class FrontOptions(msgspec.Struct):
    """The front's options.

    Args:
      link, listener: the file descriptors of its sockets.
      model: the checkpoint's directory.
      names: the names of the model.
      url: where it is served.
      shutdown_timeout: seconds that running requests may take to finish.
    """

    link: int
    listener: int
    model: str
    names: list[str]
    url: str
    shutdown_timeout: float = 30.0
