"""The adapter protocol, version 1: messages of one line of JSON each, for implementations in any language.

`spec/PROTOCOL.md` is the normative text, `message.schema.json` closes every message. Here messages are
written, read and checked; `adapters/process.py` holds the conversation, `serve.py` the other end of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jsonschema
import numpy as np

from adamp_conformance.adapter import DTYPES, MOMENTS, Arrays, Capabilities, Parameter, State
from adamp_conformance.bits import float_from_hex, float_to_hex, from_hex, to_hex
from adamp_conformance.spec_files import spec_file
from adamp_spec import Branch, Layout

if TYPE_CHECKING:
    from adamp_conformance.vectors import Corpus, Group

VERSION = 1
COMMANDS = ("hello", "create", "load", "step", "dump", "stop")

Message = dict[str, Any]

# The dtypes of tensors in messages. Beside the ones that can be computed in, two that are to be refused.
WORDS = DTYPES | {name: np.dtype(name) for name in ("int32", "complex64")}


class Refused(ValueError):
    """The implementation refused its input, in the words that it gave."""


class ProtocolError(RuntimeError):
    """No answer, or none that counts. It is neither a pass nor a refusal, so it is not a ValueError or a TypeError."""


# Lines


def write_line(kind: str, message: Message) -> bytes:
    """The line of a message.

    Args:
      kind: a definition of `message.schema.json`, such as `create`.
      message: what `json.dumps` takes.

    Raises:
      ProtocolError: the message does not fit the schema.
    """
    _check(kind, message)
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def read_request(line: bytes) -> Message:
    """The message of a line that begins an exchange; its `command` is the kind.

    Raises:
      ProtocolError: the line is not JSON, repeats a key, has no known command or does not fit its definition.
    """
    message = _parse(line)
    command = message.get("command")
    if command not in COMMANDS:
        raise ProtocolError(f"{_short(repr(command))} is not a command; they are {', '.join(COMMANDS)}")
    _check(command, message)
    return message


def read_line(kind: str, line: bytes) -> Message:
    """The message of a line.

    Raises:
      ProtocolError: the line is not JSON, repeats a key, or does not fit the definition `kind` of the schema.
    """
    message = _parse(line)
    _check(kind, message)
    return message


def read_reply(kind: str, line: bytes) -> Message:
    """The message of a line that may also be a refusal or an error.

    Raises:
      Refused: the implementation refused.
      ProtocolError: it reported an error, or its line is not a reply of this kind.
    """
    message = _parse(line)
    for other in ("refused", "error"):
        if other in message:
            _check(other, message)
            raise Refused(message[other]) if other == "refused" else ProtocolError(f"it failed: {message[other]}")
    if kind == "capabilities" and message.get("protocol", VERSION) != VERSION:
        raise ProtocolError(f"it speaks protocol {_short(message['protocol'])}, this is protocol {VERSION}")
    _check(kind, message)
    return message


def _parse(line: bytes) -> Message:
    try:
        message = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of a number, of a key, of the depth
        raise ProtocolError(
            f"{_short(line)} is not a line of JSON ({error}); stdout is for replies alone, a log goes to stderr"
        ) from error
    if not isinstance(message, dict):
        raise ProtocolError(f"{_short(line)} is not a JSON object")
    return message


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads(spec_file("schema/message.schema.json").read_text())
    return jsonschema.Draft202012Validator({"$defs": schema["$defs"], "$ref": f"#/$defs/{kind}"})


def _check(kind: str, message: Message) -> None:
    error = jsonschema.exceptions.best_match(_validator(kind).iter_errors(message))
    if error is not None:
        raise ProtocolError(f"not a message `{kind}`: at {_short(error.json_path)}: {_short(error.message)}")


def _short(value: Any) -> str:
    """For messages: a line may be many megabytes long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-60:]}"


# Answers that were made elsewhere


def read_answers(path: Path, corpus: Corpus) -> tuple[Capabilities, dict[str, list[State]]]:
    """The capabilities of an implementation, and its states on groups of the corpus.

    Args:
      path: of a file whose first line is a reply to `hello`; each further line holds a group's name and the
        states after each of its steps, in order. Parameters have the names of their vectors.
      corpus: the vectors that were run.

    Returns:
      The capabilities, and for each group that was run the state after each step.

    Raises:
      ProtocolError: a line is truncated or malformed, a group is unknown or stands twice, a step is missing, or a
        vector that the capabilities cover. The message gives the line.
      OSError: the file cannot be read.
    """
    groups = {group.id: group for group in corpus.groups}
    capabilities: Capabilities | None = None
    answers: dict[str, list[State]] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if capabilities is None:
                    capabilities = read_capabilities(read_reply("capabilities", line))
                    continue
                message = read_line("answers", line)
                name = message["group"]
                if name not in groups:
                    raise ProtocolError(f"the corpus has no group {_short(name)!r}")
                if name in answers:
                    raise ProtocolError(f"group {name} stands twice")
                answers[name] = _read_states(message["states"], groups[name], capabilities)
            except (Refused, ProtocolError) as error:
                raise ProtocolError(f"{path}, line {number}: {error}") from error
    if capabilities is None:
        raise ProtocolError(f"{path} is empty; its first line must be the reply to `hello`")
    return capabilities, answers


def _read_states(messages: list[Message], group: Group, capabilities: Capabilities) -> list[State]:
    if len(messages) != group.steps:
        raise ProtocolError(f"{len(messages)} states of {group.id}, whose steps are {group.steps}")
    parameters = group.parameters(group.dtype, capabilities.weights)
    if capabilities.layouts == "first":
        parameters = {name: parameter for name, parameter in parameters.items() if parameter.layout == Layout()}
    return [read_state_of(message, group.algorithm, parameters) for message in messages]


# Values


def tensor_message(x: np.ndarray) -> Message:
    """An array of any shape and of a dtype in `WORDS`.

    Raises:
      ProtocolError: the dtype is another.
    """
    x = np.asarray(x)  # arithmetic on arrays of rank 0 gives scalars, which know no byte order
    dtype = next((name for name, dtype in WORDS.items() if dtype == x.dtype), None)
    if dtype is None:
        raise ProtocolError(f"an array of {x.dtype} cannot be sent; use one of {', '.join(WORDS)}")
    return {"dtype": dtype, "shape": list(x.shape), "data": to_hex(x if dtype in DTYPES else _as_floats(x))}


def read_tensor(message: Message) -> np.ndarray:
    """The inverse of `tensor_message`.

    Raises:
      ProtocolError: the shape needs another number of digits.
    """
    dtype, shape = message["dtype"], tuple(int(size) for size in message["shape"])
    try:
        if dtype in DTYPES:
            return from_hex(message["data"], DTYPES[dtype], shape)
        floats = (int(np.prod(shape, dtype=int)) * WORDS[dtype].itemsize // 4,)
        return from_hex(message["data"], np.dtype(np.float32), floats).view(WORDS[dtype]).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise ProtocolError(f"a tensor whose data do not fit its shape: {_short(str(error))}") from error


def _as_floats(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.float32)


def hyper_message(hyper: Mapping[str, Any]) -> Message:
    """Name -> flag, or bit pattern of a binary64 number.

    Raises:
      ProtocolError: a value is neither.
    """
    for name, value in hyper.items():
        if not isinstance(value, Real):
            raise ProtocolError(f"{name}={value!r} cannot be sent; it must be a real number or a flag")
    return {name: value if isinstance(value, bool) else float_to_hex(value) for name, value in hyper.items()}


def read_hyper(message: Message) -> dict[str, Any]:
    """The inverse of `hyper_message`."""
    return {name: value if isinstance(value, bool) else float_from_hex(value) for name, value in message.items()}


def capabilities_message(capabilities: Capabilities) -> Message:
    """The reply to `hello`."""
    fields = {name: list(x) if isinstance(x, tuple) else x for name, x in vars(capabilities).items()}
    return {"protocol": VERSION} | fields | {"fixed": hyper_message(capabilities.fixed)}


def read_capabilities(message: Message) -> Capabilities:
    """The inverse of `capabilities_message`."""
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in message.items() if name != "protocol"}
    return Capabilities(**fields | {"fixed": read_hyper(message["fixed"])})


def create_message(algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> Message:
    """The arguments of `Adapter.create`."""
    return {
        "command": "create",
        "algorithm": algorithm,
        "hyper": hyper_message(hyper),
        "parameters": {
            name: {"p": tensor_message(value), "layout": None if layout is None else layout.to_dict()}
            for name, (value, layout) in parameters.items()
        },
    }


def read_parameters(message: Message) -> dict[str, Parameter]:
    """The parameters of `create_message`.

    Raises:
      ProtocolError: a tensor is none.
      ValueError: a layout is none.
    """
    return {
        name: Parameter(read_tensor(entry["p"]), None if entry["layout"] is None else Layout(**entry["layout"]))
        for name, entry in message["parameters"].items()
    }


def step_message(gradients: Arrays) -> Message:
    """The argument of `Adapter.step`."""
    return {"command": "step", "gradients": {name: tensor_message(gradient) for name, gradient in gradients.items()}}


def read_gradients(message: Message) -> dict[str, np.ndarray]:
    """The gradients of `step_message`.

    Raises:
      ProtocolError: a tensor is none.
    """
    return {name: read_tensor(tensor) for name, tensor in message["gradients"].items()}


def state_message(state: State) -> Message:
    """A state, as `load` carries it there and `dump` back."""
    parameters: Message = {
        name: {key: tensor_message(x) for key, x in state.tensors(name).items()} for name in state.parameters
    }
    for name, branch in (state.branches or {}).items():
        parameters[name]["branch"] = [Branch(x).name.lower() for x in np.ravel(branch)]
    return {"step": state.step, "parameters": parameters}


def read_state(message: Message) -> State:
    """The inverse of `state_message`, but that the branches of a parameter are in one dimension.

    Raises:
      ProtocolError: a tensor is none, or a moment or a branch is given for some of the parameters only.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, entry in message["parameters"].items():
        for key, value in entry.items():
            found.setdefault(key, {})[name] = (
                np.array([Branch[x.upper()] for x in value], int) if key == "branch" else read_tensor(value)
            )
    for key, arrays in found.items():
        if missing := [name for name in message["parameters"] if name not in arrays]:
            raise ProtocolError(f"`{key}` of {_short(missing[0])!r} is missing")
    moments: dict[str, dict[str, np.ndarray]] = {moment: found[moment] for moment in ("m", "v") if moment in found}
    return State(int(message["step"]), found.get("p", {}), moments, found.get("branch"))


def read_state_of(message: Message, algorithm: str, parameters: Mapping[str, Parameter]) -> State:
    """A state of one problem.

    Args:
      message: as `state_message` makes it.
      algorithm, parameters: what the problem was created with.

    Raises:
      ProtocolError: a parameter, a moment, a dtype, a shape or a number of branches is not the problem's.
    """
    state = read_state(message)
    for name in sorted({*state.parameters, *parameters}):
        if name not in state.parameters:
            raise ProtocolError(f"parameter {_short(name)!r} is missing")
        if name not in parameters:
            raise ProtocolError(f"parameter {_short(name)!r} is not one of the problem")
    if parameters and tuple(state.moments) != MOMENTS[algorithm]:
        raise ProtocolError(f"the moments of {algorithm} are {MOMENTS[algorithm]}, got {tuple(state.moments)}")
    for name, (value, _) in parameters.items():
        for key, x in state.tensors(name).items():
            if x.dtype != value.dtype or x.shape != value.shape:
                expected, got = (f"{array.dtype}{list(array.shape)}" for array in (value, x))
                raise ProtocolError(f"{key} of {_short(name)!r} is {_short(got)}, must be {expected}")
    if state.branches is None:
        return state
    return replace(
        state, branches={name: _branches(name, state.branches[name], *parameters[name]) for name in parameters}
    )


def _branches(name: str, branches: np.ndarray, value: np.ndarray, layout: Layout | None) -> np.ndarray:
    try:
        return branches.reshape((layout or Layout()).rows(value.shape).slices)
    except ValueError as error:  # it counts slices wrongly, or has accepted a layout that there cannot be
        raise ProtocolError(f"{len(branches)} branches do not fit {_short(name)!r}: {error}") from error
