"""An implementation in another process and any language, spoken to in the protocol of `spec/PROTOCOL.md`.

Needs POSIX, whose pipes can be waited for; elsewhere, make a file of answers.
"""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import subprocess
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any

from adamp_conformance.adapter import Arrays, Capabilities, Parameter, State
from adamp_conformance.protocol import (
    VERSION,
    Message,
    ProtocolError,
    create_message,
    read_capabilities,
    read_reply,
    read_state_of,
    state_message,
    step_message,
    write_line,
)

LONGEST_REPLY = 2**20  # bytes; with a problem, 8 times its `create` more
SECONDS_TO_EXIT = 2.0
KEPT_OF_STDERR = 2000  # bytes


class ProcessAdapter:
    """An `Adapter` that speaks to a child process; when it is gone, its process serves the next one of that command.

    Every method raises `protocol.Refused` where the implementation refuses, and `protocol.ProtocolError` where the
    process does not start, dies, is silent for `timeout`, or says what does not fit the schema or the problem. After
    the latter the process group is killed, and the next `create` starts another.

    Args:
      command: of the process, split as a shell does; no shell is started.
      timeout: seconds for one reply.

    Raises:
      ValueError: the command is empty, or a quotation in it is not closed.
    """

    def __init__(self, command: str, timeout: float = 60.0) -> None:
        self.command = tuple(shlex.split(command))
        if not self.command:
            raise ValueError(f"the command {command!r} of the adapter is empty; give a program and its arguments")
        self.timeout = timeout
        self.child: _Child | None = None
        self.problem: tuple[str, Mapping[str, Parameter]] | None = None
        self.longest = LONGEST_REPLY

    def capabilities(self) -> Capabilities:
        return self._started().capabilities

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        message = create_message(algorithm, hyper, parameters)
        self._ask("create", message, "done")
        self.problem = algorithm, dict(parameters)
        self.longest = LONGEST_REPLY + 8 * len(write_line("create", message))

    def load(self, state: State) -> None:
        self._ask("load", {"command": "load", "state": state_message(state)}, "done")

    def step(self, gradients: Arrays) -> None:
        self._ask("step", step_message(gradients), "done")

    def dump(self) -> State:
        return self._ask("dump", {"command": "dump"}, "dumped", self._read_state)

    def _read_state(self, reply: Message) -> State:
        if self.problem is None:
            raise ProtocolError("it has a state although nothing was created")
        return read_state_of(reply["state"], *self.problem)

    def _started(self) -> _Child:
        if self.child is None:
            idle = _idle[self.command]
            self.child = child = idle.pop() if idle else _Child(self.command)
            self._release = weakref.finalize(self, idle.append, child)
            if not child.greeted:
                hello = {"command": "hello", "protocol": VERSION}
                child.capabilities = self._ask("hello", hello, "capabilities", read_capabilities)
                child.greeted = True
        return self.child

    def _ask(
        self, kind: str, message: Message, reply: str, read: Callable[[Message], Any] = lambda reply: reply
    ) -> Any:
        line = write_line(kind, message)
        child = self._started()
        try:
            return read(read_reply(reply, child.exchange(line, self.timeout, self.longest)))
        except ProtocolError as error:
            self._release.detach()
            self.child = self.problem = None
            raise ProtocolError(f"`{shlex.join(self.command)}`, asked to {kind}: {error}{child.end()}") from error


class _Child:
    """A process, what it is capable of, and what came from it."""

    capabilities: Capabilities
    greeted = False

    def __init__(self, command: tuple[str, ...]) -> None:
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except OSError as error:
            raise ProtocolError(f"`{shlex.join(command)}` cannot be started: {error}") from error
        self.stdin, self.stdout, self.stderr = _descriptors(self.process)
        for descriptor in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(descriptor, False)
        self.said = b""  # the last of stderr
        self._stop = weakref.finalize(self, _stop, self.process)

    def exchange(self, line: bytes, timeout: float, longest: int) -> bytes:
        """Sends a line and returns the one that answers it. Reads stderr meanwhile, lest it fill up.

        Raises:
          ProtocolError: there is no such line.
        """
        deadline = time.monotonic() + timeout
        if unasked := self._read(self.stdout):
            raise ProtocolError(f"it wrote {unasked[:120]!r} to stdout without being asked")
        request, reply, complete = memoryview(line), bytearray(), False
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdin, selectors.EVENT_WRITE)
            selector.register(self.stdout, selectors.EVENT_READ)
            selector.register(self.stderr, selectors.EVENT_READ)
            while not complete:
                ready = {key.fd for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
                if self.stdin in ready:
                    with suppress(BrokenPipeError):  # then it has stopped reading, and may yet say why
                        request = request[os.write(self.stdin, request) :]
                        ready.remove(self.stdin)
                    if not request or self.stdin in ready:
                        selector.unregister(self.stdin)
                if self.stderr in ready and self._hear() == b"":
                    selector.unregister(self.stderr)
                if self.stdout in ready:
                    chunk = self._read(self.stdout) or b""
                    reply += chunk
                    complete = b"\n" in chunk
                    if len(reply) > longest:
                        raise ProtocolError(f"its reply is longer than {longest} bytes, more than the problem needs")
                if not complete and time.monotonic() > deadline:
                    raise ProtocolError(f"no reply within {timeout:g} s")
        if not reply.endswith(b"\n") or reply.count(b"\n") > 1:
            raise ProtocolError(f"it wrote {bytes(reply[:120])!r} to stdout, where a reply and nothing else belongs")
        if request:
            raise ProtocolError("it replied before it had read the request")
        return bytes(reply)

    def _read(self, descriptor: int) -> bytes | None:
        """What has come on stdout, None if nothing has."""
        try:
            chunk = os.read(descriptor, 2**16)
        except BlockingIOError:
            return None
        if not chunk and descriptor == self.stdout:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_TO_EXIT)  # for its exit status
            raise ProtocolError("it closed stdout")
        return chunk

    def _hear(self) -> bytes | None:
        chunk = self._read(self.stderr)
        self.said = (self.said + (chunk or b""))[-KEPT_OF_STDERR:]
        return chunk

    def end(self) -> str:
        """Kills the process and its children; tells how it ended and what it said last."""
        code = self.process.poll()
        _kill(self.process)
        for _ in range(64):  # a pipe's worth, though something might still write
            if not self._hear():
                break
        self._stop.detach()
        _close(self.process)
        how = "it was killed" if code is None else f"it had exited with status {code}"
        if code is not None and code < 0:
            how = f"it had died of {signal.Signals(-code).name}"
        said = self.said.decode(errors="replace").strip()
        return f"; {how}" + (f"; the end of its stderr: {said}" if said else "")


# Processes of adapters that are gone, by their commands. They are stopped when Python ends.
_idle: defaultdict[tuple[str, ...], list[_Child]] = defaultdict(list)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):  # it may have ended, or not be listening
        os.write(_descriptors(process)[0], write_line("stop", {"command": "stop"}))
    _close(process)
    try:
        process.wait(SECONDS_TO_EXIT)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # nobody is left in the group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _pipes(process: subprocess.Popen[bytes]) -> list[IO[bytes]]:
    return [pipe for pipe in (process.stdin, process.stdout, process.stderr) if pipe is not None]


def _descriptors(process: subprocess.Popen[bytes]) -> list[int]:
    return [pipe.fileno() for pipe in _pipes(process)]


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in _pipes(process):
        pipe.close()
