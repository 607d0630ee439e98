"""A decoder's life: threads that call it at once, other models in the process, closing, the end of Python, forks, a
system that gives too little."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_decoders import write_decoder

from gulliver.core.errors import ConfigError, KernelError
from gulliver.runtime.decode import native_reason, open_decoder
from gulliver.runtime.decoder import Decoder, StepBatch

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

START = """
import os, resource, sys, threading, time
from pathlib import Path
import numpy as np
from gulliver.core.errors import ConfigError, KernelError
from gulliver.core.machine import usable_cores
from gulliver.runtime.decode import open_decoder
from gulliver.runtime.decoder import StepBatch
folder, one = Path(sys.argv[1]), np.zeros(1, np.int32)
batch = StepBatch(one, one, one, one[None], one)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("life") / "model", "llama")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("life") / "second", "qwen2")


def token(number: int) -> StepBatch:
    """One token as a sequence of its own, in block `number`."""
    one = lambda value: np.array([value], np.int32)  # noqa: E731
    return StepBatch(one(number), one(0), one(0), np.array([[number]], np.int32), one(0))


def run(script: str, model: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + script, str(model)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_threads_that_step_at_once_wait_for_each_other(model: Path) -> None:
    decoder = open_decoder(model, backend="native", threads=2, cache_tokens=256)
    right = [decoder.step(token(number)).argmax() for number in range(8)]
    wrong = []

    def steps(number: int) -> None:
        for _ in range(200):
            logits = decoder.step(token(number))
            if not np.isfinite(logits).all():
                wrong.append(number)

    threads = [threading.Thread(target=steps, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and [decoder.step(token(number)).argmax() for number in range(8)] == right


def test_a_closed_decoder_refuses_steps_and_may_be_closed_again(model: Path) -> None:
    decoder = open_decoder(model, backend="native", threads=2, cache_tokens=64)
    decoder.close()
    decoder.close()
    with pytest.raises(KernelError, match="closed"):
        decoder.step(token(0))


def test_python_may_end_while_a_thread_steps(model: Path) -> None:
    ended = run(
        "decoder = open_decoder(folder, backend='native', threads=2, cache_tokens=64)\n"
        "def loop():\n"
        "    try:\n"
        "        while True: decoder.step(batch)\n"
        "    except KernelError: time.sleep(60)\n"
        "threading.Thread(target=loop, daemon=True).start()\n"
        "time.sleep(0.2)",
        model,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# ---- two models of a process ----
def a_run(decoder: Decoder) -> NDArray[np.float32]:
    """Logits of every row of a prompt in one step, then of 24 tokens one by one, each drawn from the last."""
    rows = np.arange(9, dtype=np.int32)
    blocks = np.arange(4, dtype=np.int32)[None]
    found = [decoder.step(StepBatch(rows + 1, rows, rows * 0, blocks, rows)).copy()]
    for position in range(9, 33):
        drawn = found[-1][-1:].argmax(1).astype(np.int32)
        found.append(decoder.step(StepBatch(drawn, np.array([position], np.int32), rows[:1], blocks, rows[:1])).copy())
    return np.concatenate(found)


@pytest.mark.parametrize("threads", [(1, 1), (2, 2), (1, 2), (2, 5)])
def test_two_models_at_once_answer_as_alone(model: Path, second: Path, threads: tuple[int, int]) -> None:
    decoders = [
        open_decoder(folder, backend="native", threads=count, cache_tokens=64)
        for folder, count in zip((model, second), threads, strict=True)
    ]
    alone = [a_run(decoder) for decoder in decoders]
    assert not np.array_equal(*alone)
    with ThreadPoolExecutor(2) as beside:
        at_once = list(beside.map(lambda decoder: [a_run(decoder) for _ in range(8)], decoders))
    for right, runs in zip(alone, at_once, strict=True):
        assert all(np.array_equal(run, right) for run in runs)
    for decoder in decoders:
        decoder.close()


@pytest.mark.parametrize("threads", [2, 3])
def test_a_model_comes_and_goes_while_another_one_steps(model: Path, second: Path, threads: int) -> None:
    decoder = open_decoder(model, backend="native", threads=2, cache_tokens=64)
    right = a_run(decoder)
    ended = threading.Event()

    def steps() -> list[bool]:
        same = []
        while not ended.is_set() or not same:
            same.append(np.array_equal(a_run(decoder), right))
        return same

    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(steps)
        try:
            guests = []
            for _ in range(12):
                guest = open_decoder(second, backend="native", threads=threads, cache_tokens=64)
                guests.append(a_run(guest))
                guest.close()
        finally:
            ended.set()
        assert all(running.result())
    assert all(np.array_equal(guest, guests[0]) for guest in guests)
    decoder.close()


def test_neither_of_two_models_keeps_the_other_from_running(model: Path, second: Path) -> None:
    decoders = [open_decoder(folder, backend="native", threads=2, cache_tokens=64) for folder in (model, second)]
    counts, start = [0, 0], threading.Barrier(2)

    def steps(number: int) -> int:
        """How far the other one was when this one had made its steps."""
        start.wait()
        for _ in range(400):
            decoders[number].step(token(1))
            counts[number] += 1
        return counts[1 - number]

    with ThreadPoolExecutor(2) as beside:
        assert min(beside.map(steps, range(2))) > 40
    for decoder in decoders:
        decoder.close()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads in /proc")
def test_models_share_as_many_threads_as_the_cores_have_room_for(model: Path) -> None:
    ended = run(
        "many = usable_cores() + 1\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "def opened(threads, models):\n"
        "    before = count()\n"
        "    opening = {'backend': 'native', 'threads': threads, 'cache_tokens': 64}\n"
        "    found = [open_decoder(folder, **opening) for _ in range(models)]\n"
        "    for decoder in found: decoder.step(batch)\n"
        "    seen = count() - before\n"
        "    for decoder in found[1:]: decoder.close()\n"
        "    found[0].step(batch)\n"
        "    found[0].close()\n"
        "    assert count() == before, 'threads are left'\n"
        "    return seen\n"
        "assert opened(many, 1) == many\n"
        "assert opened(many, 3) == many\n"
        "assert opened(1, many + 1) == many - 1\n"  # one beside the other, as long as each has a core
        "assert opened(1, 1) == 1\n",
        model,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# ---- forks ----
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_opens_its_own_while_the_parent_steps(model: Path) -> None:
    ended = run(
        "decoders = [open_decoder(folder, backend='native', threads=2, cache_tokens=64) for _ in range(2)]\n"
        "right, ended = decoders[0].step(batch).copy(), threading.Event()\n"
        "def loop(decoder):\n"
        "    while not ended.is_set(): decoder.step(batch)\n"
        "beside = [threading.Thread(target=loop, args=(decoder,)) for decoder in decoders]\n"
        "for thread in beside: thread.start()\n"
        "for _ in range(20):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        own = [open_decoder(folder, backend='native', threads=2, cache_tokens=64) for _ in range(2)]\n"
        "        os._exit(7 if all((one.step(batch) == right).all() for one in own) else 8)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "ended.set()\n"
        "for thread in beside: thread.join()\n"
        "assert (decoders[0].step(batch) == right).all()",
        model,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_to_open_its_own(model: Path) -> None:
    ended = run(
        "decoder = open_decoder(folder, backend='native', threads=2, cache_tokens=64)\n"
        "decoder.step(batch)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    try: decoder.step(batch)\n"
        "    except KernelError as error: print(error, flush=True)\n"
        "    decoder.close()\n"  # threads that are not there must not be waited for
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "decoder.step(batch)",
        model,
    )
    assert ended.returncode == 0, ended.stderr
    assert "forked" in ended.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space")
def test_a_system_that_gives_fewer_threads_is_an_error(model: Path) -> None:
    ended = run(
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))\n"
        "try: open_decoder(folder, backend='native', threads=1000, cache_tokens=64)\n"
        "except ConfigError as error: print(error)",
        model,
    )
    assert ended.returncode == 0, ended.stderr
    assert "of 1000 threads" in ended.stdout


def test_numbers_out_of_range_are_named(model: Path) -> None:
    with pytest.raises(ConfigError, match="threads must be 1 to 1024"):
        open_decoder(model, backend="native", threads=5000)
    with pytest.raises(ConfigError, match="cache_tokens is 0"):
        open_decoder(model, backend="native", cache_tokens=0)
    with pytest.raises(ConfigError, match="cache_tokens"):
        open_decoder(model, backend="native", cache_tokens=2**40)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space")
def test_a_cache_that_the_system_does_not_give_is_an_error(model: Path) -> None:
    ended = run(
        "resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))\n"
        "try: open_decoder(folder, backend='native', threads=2, cache_tokens=2**27)\n"
        "except ConfigError as error: print(error)",
        model,
    )
    assert ended.returncode == 0, ended.stderr
    assert "fewer tokens" in ended.stdout
