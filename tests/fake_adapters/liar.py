"""Serves the oracle, truthfully but for the one lie that its argument names."""

import io
import json
import os
import subprocess
import sys
import time

import numpy as np

from adamp_conformance.adapters.oracle import OracleAdapter
from adamp_conformance.serve import serve

LIES = {}
TENSOR = {"dtype": "float32", "shape": [1], "data": "00000000"}


def on(command):
    """Registers a lie about the replies to `command`: given the true reply, it writes, sleeps or dies."""
    return lambda lie: LIES.setdefault(lie.__name__.replace("_", "-"), (command, lie))


def say(reply):
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def about_state(change):
    """Registers a lie in the state, made of its true parameters."""

    def lie(reply):
        change(reply["state"], reply["state"]["parameters"])
        say(reply)

    LIES[change.__name__.replace("_", "-")] = ("dump", lie)


# Silence and death


@on("step")
def hangs(reply):
    child = subprocess.Popen(["sleep", "600"])
    print(f"started {child.pid}", file=sys.stderr, flush=True)
    time.sleep(600)


@on("hello")
def stops_reading(reply):
    say(reply)
    time.sleep(600)


@on("step")
def dribbles(reply):
    while True:
        sys.stdout.write("[")
        sys.stdout.flush()
        time.sleep(0.01)


@on("step")
def dies(reply):
    raise MemoryError("no room for 8 elements")


@on("dump")
def dies_mid_reply(reply):
    sys.stdout.write(json.dumps(reply)[:200])
    sys.stdout.flush()
    os._exit(0)


@on("step")
def is_killed(reply):
    os.abort()


@on("create")
def closes_stdout(reply):
    os.close(1)
    time.sleep(600)


@on("hello")
def exits_at_once(reply):
    sys.exit(7)


# What is not a message


@on("step")
def garbage(reply):
    sys.stdout.buffer.write(b"\xff\xfe{}\n")
    sys.stdout.flush()


@on("step")
def logs(reply):
    print("step 11, loss 0.3")
    say(reply)


@on("step")
def logs_after(reply):
    print(json.dumps(reply) + "\nstep 11, loss 0.3", flush=True)


@on("hello")
def logs_later(reply):
    say(reply)
    time.sleep(0.2)
    print("ready", flush=True)


@on("dump")
def endless_line(reply):
    while True:
        sys.stdout.write("0" * 2**16)


@on("step")
def deep(reply):
    print("[" * 100_000, flush=True)


@on("step")
def a_list(reply):
    say([reply])


@on("step")
def more_than_ok(reply):
    say(reply | {"margin": 0.1})


@on("step")
def not_quite_ok(reply):
    say({"ok": False})


@on("dump")
def ok_for_a_state(reply):
    say({"ok": True})


@on("dump")
def key_twice(reply):
    print(json.dumps(reply).replace('"state":', '"state": {"step": 11, "parameters": {}}, "state":'), flush=True)


@on("step")
def failure(reply):
    say({"error": "out of memory"})


@on("step")
def refusal(reply):
    say({"refused": "momentum = 2 must be in [0, 1)"})


@on("hello")
def next_protocol(reply):
    say(reply | {"protocol": 2})


@on("hello")
def unknown_dtype(reply):
    say(reply | {"dtypes": ["float8"]})


# States that are not of the problem


@about_state
def wrong_shape(state, parameters):
    parameters["channel"]["p"]["shape"].reverse()


@about_state
def wrong_dtype(state, parameters):
    tensor = parameters["channel"]["m"]
    tensor["dtype"], tensor["data"] = "float64", tensor["data"] * 2


@about_state
def other_half(state, parameters):
    for tensor in parameters["channel"].values():
        if isinstance(tensor, dict):
            tensor["dtype"], tensor["data"] = "bfloat16", tensor["data"][::2]


@about_state
def short_data(state, parameters):
    parameters["channel"]["v"]["data"] = parameters["channel"]["v"]["data"][:-1]


@about_state
def decimal_data(state, parameters):
    parameters["channel"]["p"]["data"] = "0.5 " * len(parameters["channel"]["p"]["data"])


@about_state
def missing_parameter(state, parameters):
    del parameters["channel"]


@about_state
def unknown_parameter(state, parameters):
    parameters["w"] = {"p": TENSOR, "m": TENSOR, "v": TENSOR} | (
        {"branch": ["none"]} if "branch" in parameters["channel"] else {}
    )


@about_state
def missing_moment(state, parameters):
    for tensors in parameters.values():
        del tensors["v"]


@about_state
def missing_moment_of_one(state, parameters):
    del parameters["channel"]["v"]


@about_state
def step_in_words(state, parameters):
    state["step"] = "eleven"


@about_state
def step_is_true(state, parameters):
    state["step"] = True


@about_state
def step_is_nan(state, parameters):
    state["step"] = float("nan")


@about_state
def unknown_branch(state, parameters):
    parameters["channel"]["branch"] = ["rows"]


@about_state
def branches_of_two(state, parameters):
    if "branch" in parameters["channel"]:
        parameters["channel"]["branch"] *= 2


@about_state
def branch_of_one(state, parameters):
    parameters["channel"].pop("branch", None)


# States that the judge has to fail


@about_state
def nan(state, parameters):
    if state["step"] > 10:
        data = parameters["layer"]["p"]["data"]
        parameters["layer"]["p"]["data"] = data[:8] + "7fc00000" + data[16:]


@about_state
def wrong_branch(state, parameters):
    if state["step"] > 10:
        parameters["layer"]["branch"] = ["channel"]


@about_state
def one_bit(state, parameters):
    if state["step"] > 10:
        data = parameters["none"]["p"]["data"]
        last = np.frombuffer(bytes.fromhex(data[-8:]), ">u4")[0] + 40
        parameters["none"]["p"]["data"] = data[:-8] + f"{last:08x}"


first_state = {}


@about_state
def same_state(state, parameters):
    parameters.update(json.loads(first_state.setdefault("", json.dumps(parameters))))


@about_state
def step_does_not_count(state, parameters):
    state["step"] = 10


# Truth, with a bad manner


@on("step")
def floods_stderr(reply):
    for _ in range(200):
        os.write(2, b"warning: " + b"x" * 2**16)
    say(reply)


@on("dump")
def stays(reply):
    say(reply)


def main(name):
    command, lie = LIES[name]
    adapter = OracleAdapter()
    for line in sys.stdin.buffer:
        asked = json.loads(line)["command"]
        if name == "stays" and asked == "stop":
            time.sleep(600)
        reply = io.BytesIO()
        serve(adapter, [line], reply)
        if asked == command:
            lie(json.loads(reply.getvalue()))
        else:
            sys.stdout.write(reply.getvalue().decode())
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
