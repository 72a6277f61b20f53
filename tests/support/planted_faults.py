"""Faults that the tests of GPU sessions plant: functions that workers and stages call by name."""

import os
import signal
import time

from benchmarks.gpu import records
from benchmarks.rows import Environment, Row

HERE = Environment("cuda: a device", 1, {"torch": "2.13.0"}, "0123456789ab", "2026-01-01")


def answer(value):
    return value


def nap(seconds):
    time.sleep(seconds)
    return "awake"


def abort():
    os.abort()


def refuse():
    raise ValueError("no such thing\nsecond line")


def wrong_result():
    from benchmarks.workers.problems import Problem, check
    from fpe_kernels.backends import chunked

    real = chunked.apply

    def spoiled(maps, value, out, *rest):
        real(maps, value, out, *rest)
        out[0, 0, 0, 0] += 1e-3  # one element of the product

    chunked.apply = spoiled  # in a worker that does nothing after it
    return check(Problem((0, 0), 64, 64, 16, "float32"), "cpu", "torch")


def hang_on_the_device():
    time.sleep(1000)


def rows_then(context, end):
    """A stage that finishes a row and then ends as it is told."""
    records.say_row(
        Row.new(HERE, suite="kernels", case="a", provider="sdpa", dtype="float16", status="ok", samples_ms=(1.0,))
    )
    records.say("begin", what="the next case")
    end()


def terminated(context):
    rows_then(context, lambda: os.kill(os.getpid(), signal.SIGTERM))


def hung(context):
    rows_then(context, lambda: time.sleep(1000))


def out_of_memory(context):
    def end():
        records.say_row(
            Row.new(HERE, suite="kernels", case="b", provider="fpe-triton", dtype="float16", status="failed",
                    reason="OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB")
        )  # fmt: skip

    rows_then(context, end)
