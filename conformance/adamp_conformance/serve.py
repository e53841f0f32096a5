"""The other end of the protocol: serves an adapter that is written in Python, say from an environment of its own.

python -m adamp_conformance.serve package.module:Class
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pkgutil import resolve_name
from typing import BinaryIO

from adamp_conformance.adapter import Adapter
from adamp_conformance.protocol import (
    Message,
    capabilities_message,
    read_gradients,
    read_hyper,
    read_parameters,
    read_request,
    read_state,
    state_message,
    write_line,
)


def serve(adapter: Adapter, requests: Iterable[bytes], replies: BinaryIO) -> None:
    """Answers requests, a line each, until `stop` or the end of them.

    A ValueError or TypeError of the adapter is a refusal; what else is raised is an error.
    """
    for line in requests:
        try:
            request = read_request(line)
            if request["command"] == "stop":
                return
            reply = write_line(*answer(adapter, request))
        except (ValueError, TypeError) as error:
            reply = write_line("refused", {"refused": str(error) or type(error).__name__})
        except Exception as error:
            reply = write_line("error", {"error": f"{type(error).__name__}: {error}"})
        replies.write(reply)
        replies.flush()


def answer(adapter: Adapter, request: Message) -> tuple[str, Message]:
    """The kind of the reply, and the reply; raises what the adapter raises."""
    match request["command"]:
        case "hello":
            return "capabilities", capabilities_message(adapter.capabilities())
        case "create":
            adapter.create(request["algorithm"], read_hyper(request["hyper"]), read_parameters(request))
        case "load":
            adapter.load(read_state(request["state"]))
        case "step":
            adapter.step(read_gradients(request))
        case "dump":
            return "dumped", {"state": state_message(adapter.dump())}
    return "done", {"ok": True}


def main() -> None:
    """Serves the adapter that the command line names on stdin and stdout; what it prints goes to stderr."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m adamp_conformance.serve package.module:Class")
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)
        serve(resolve_name(sys.argv[1])(), sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
