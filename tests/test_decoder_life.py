"""A decoder's life: threads that call it at once, closing, the end of Python, forks, a system that gives too little."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_decoders import write_decoder

from gulliver.core.errors import ConfigError, KernelError
from gulliver.runtime.decode import StepBatch, native_reason, open_decoder

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

START = """
import os, resource, sys, threading, time
from pathlib import Path
import numpy as np
from gulliver.core.errors import ConfigError, KernelError
from gulliver.runtime.decode import Batch, open_decoder
folder, one = Path(sys.argv[1]), np.zeros(1, np.int32)
batch = Batch(one, one, one, one[None], one)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("life") / "model", "llama")


def token(number: int) -> StepBatch:
    """One token as a sequence of its own, in block `number`."""
    one = lambda value: np.array([value], np.int32)  # noqa: E731
    return StepBatch(one(number), one(0), one(0), np.array([[number]], np.int32), one(0))


def run(script: str, model: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + script, str(model)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_threads_that_step_at_once_wait_for_each_other(model: Path) -> None:
    decoder = open_decoder(model, path="native", threads=2, cache_tokens=256)
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
    decoder = open_decoder(model, path="native", threads=2, cache_tokens=64)
    decoder.close()
    decoder.close()
    with pytest.raises(KernelError, match="closed"):
        decoder.step(token(0))


def test_python_may_end_while_a_thread_steps(model: Path) -> None:
    ended = run(
        "decoder = open_decoder(folder, path='native', threads=2, cache_tokens=64)\n"
        "def loop():\n"
        "    try:\n"
        "        while True: decoder.step(batch)\n"
        "    except KernelError: time.sleep(60)\n"
        "threading.Thread(target=loop, daemon=True).start()\n"
        "time.sleep(0.2)",
        model,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_to_open_its_own(model: Path) -> None:
    ended = run(
        "decoder = open_decoder(folder, path='native', threads=2, cache_tokens=64)\n"
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
        "try: open_decoder(folder, path='native', threads=1000, cache_tokens=64)\n"
        "except ConfigError as error: print(error)",
        model,
    )
    assert ended.returncode == 0, ended.stderr
    assert "of 1000 threads" in ended.stdout


def test_numbers_out_of_range_are_named(model: Path) -> None:
    with pytest.raises(ConfigError, match="threads must be 1 to 1024"):
        open_decoder(model, path="native", threads=5000)
    with pytest.raises(ConfigError, match="cache_tokens is 0"):
        open_decoder(model, path="native", cache_tokens=0)
    with pytest.raises(ConfigError, match="cache_tokens"):
        open_decoder(model, path="native", cache_tokens=2**40)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space")
def test_a_cache_that_the_system_does_not_give_is_an_error(model: Path) -> None:
    ended = run(
        "resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))\n"
        "try: open_decoder(folder, path='native', threads=2, cache_tokens=2**27)\n"
        "except ConfigError as error: print(error)",
        model,
    )
    assert ended.returncode == 0, ended.stderr
    assert "fewer tokens" in ended.stdout
