"""At most seven of our frames between a step's `run` and the arithmetic, for every step and every family.

A dispatch mode sees every operation on a torch tensor, forward and backward, in every thread, and looks at the stack at
that moment. It counts from the step's `run` to the function that computes, alone and in `fit`. A comprehension or a
lambda is a line of the function around it. The step `read` computes nothing, and `speed` measures in a process of its
own, so what that process runs is called here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from compress_samples import Lab
from language_samples import write_encoder
from torch.utils._python_dispatch import TorchDispatchMode
from toys import deep

import gulliver
from gulliver.audit.measure import measure
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact
from gulliver.pipeline import fitting as fits
from gulliver.pipeline.call import call
from gulliver.pipeline.steps import STEPS

SOURCE = Path(gulliver.__file__).parent
MAX_HOPS = 7
SILENT = {"read", "speed"}
"""Steps that compute nothing in this process."""
STARTS = {f"{row.function.partition(':')[0].replace('.', '/').removeprefix('gulliver/')}.py:run" for row in STEPS}
STARTS |= {"audit/measure.py:measure", "tasks/base.py:load"}


class Hops(TorchDispatchMode):
    """Counts operations by the step that is running, and remembers each step's deepest stack of our frames.

    `above` are our frames above the thread that it is in.
    """

    def __init__(self, root: Path = SOURCE, starts: set[str] = STARTS, above: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.root, self.starts, self.above = f"{root}/", starts, above
        self.operations: Counter[str] = Counter()
        self.deepest: dict[str, tuple[str, ...]] = {}
        self.known: dict[CodeType, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = self.names(sys._getframe(1))
        start = max((index for index, name in enumerate(names) if name in self.starts), default=None)
        if start is not None:
            step, chain = names[start], names[start + 1 :]
            self.operations[step] += 1
            if len(chain) > len(self.deepest.get(step, ())):
                self.deepest[step] = chain
        return func(*args, **(kwargs or {}))

    def names(self, frame: FrameType | None) -> tuple[str, ...]:
        """Our functions on the stack, outermost first, as "file:function"."""
        found: list[str] = []
        while frame is not None:
            code = frame.f_code
            if code not in self.known:
                ours = code.co_filename.startswith(self.root) and not code.co_name.startswith("<")
                self.known[code] = f"{code.co_filename.removeprefix(self.root)}:{code.co_name}" if ours else ""
            if self.known[code]:
                found.append(self.known[code])
            frame = frame.f_back
        return (*self.above, *reversed(found))

    def submitting(self) -> Callable[..., Future[Any]]:
        """`ThreadPoolExecutor.submit` for work that is seen as if it ran where it was submitted."""
        submit = ThreadPoolExecutor.submit

        def seen(pool: ThreadPoolExecutor, function: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
            above = self.names(sys._getframe(1))

            def job() -> Any:
                inside = Hops(Path(self.root), self.starts, above)
                inside.operations, inside.deepest, inside.known = self.operations, self.deepest, self.known
                with inside:
                    return function(*args, **options)

            return submit(pool, job)

        return seen


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hops]:
    """Counts while the test runs, with two threads, so that what runs side by side does."""
    mode, threads = Hops(), torch.get_num_threads()
    monkeypatch.setattr(ThreadPoolExecutor, "submit", mode.submitting())
    torch.set_num_threads(2)
    try:
        with mode:
            yield mode
    finally:
        torch.set_num_threads(threads)


def judge(hops: Hops, *steps: str) -> None:
    """Every one of the steps was seen to compute, and none is too deep."""
    places = {
        row.name: f"{row.function.partition(':')[0].replace('.', '/').removeprefix('gulliver/')}.py:run"
        for row in STEPS
    }
    for step in set(steps) - SILENT:
        assert hops.operations[places[step]] > 0, f"{step} computed nothing that was seen; seen: {hops.operations}"
    deep = [
        f"{start}, {len(chain)} frames:\n  " + "\n  ".join(chain)
        for start, chain in hops.deepest.items()
        if len(chain) > MAX_HOPS
    ]
    assert not deep, "\n".join(deep)


# ---- the count itself ------------------------------------------------------------------------------------------------
TOYS = {"root": Path(deep.__file__).parent, "starts": {"deep.py:run"}}


@pytest.mark.parametrize(("calls", "more"), [(deep.down, 1), (deep.side_by_side, 2)])
def test_every_frame_and_every_thread_is_counted(
    calls: Callable[[int], Any], more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = Hops(**TOYS)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", mode.submitting())
    with mode:
        deep.run(calls, MAX_HOPS)
    assert mode.operations["deep.py:run"] >= 2
    assert len(mode.deepest["deep.py:run"]) == MAX_HOPS + more


def test_what_is_outside_a_step_is_not_counted() -> None:
    with Hops(**TOYS) as mode:
        deep.down(3)
    assert not mode.operations


# ---- every family ----------------------------------------------------------------------------------------------------
SMALL: dict[str, dict[str, Any]] = {
    "train": {"steps": 2, "batch_size": 4, "warmup_steps": 1},
    "sample": {"count": 2, "batch_size": 2, "tokens": 24},
    "calibrate": {"examples": 4, "gradient_examples": 4},
    "plan": {"probe_rows": 2, "gptq": False},
    "distill": {"steps": 1, "batch_size": 2},
    "quality": {"share": 0.1},
    "export": {"format": "safetensors"},
}


def compressed(lab: Lab, *, samples: bool = False, gptq: bool = False, seed: int) -> set[str]:
    """A model's way through every step that compresses and measures it; returns the names of the steps."""
    done: set[str] = set()
    options = {"quantize": {}, **SMALL, "plan": {**SMALL["plan"], "size_bytes": 60_000, "gptq": gptq}}

    def step(name: str, **inputs: Artifact) -> Artifact:
        done.add(name)
        return call(name, options[name], inputs, store=lab.store, seed=seed, progress=Progress(quiet=True))

    own = {"samples": step("sample", model=lab.model)} if samples else {}
    calibration = step("calibrate", model=lab.model, dataset=lab.dataset, **own)
    plan = step("plan", model=lab.model, calibration=calibration)
    small = step("quantize", model=lab.model, calibration=calibration, plan=plan)
    step("distill", model=small, parent=lab.model, dataset=lab.dataset, **own)
    step("quality", model=small, dataset=lab.dataset, parent=lab.model)
    step("export", model=small)
    return done


def test_language(language: Lab, hops: Hops) -> None:
    judge(hops, *compressed(language, samples=True, seed=71))


def test_vision(digits: Lab, hops: Hops) -> None:
    call("train", SMALL["train"], {"dataset": digits.dataset}, store=digits.store, progress=Progress(quiet=True))
    judge(hops, "train", *compressed(digits, seed=72))


def test_encoder(language: Lab, hops: Hops, tmp_path: Path) -> None:
    source = {"source": str(write_encoder(tmp_path / "encoder"))}
    model = call("pull", source, {}, store=language.store, progress=Progress(quiet=True))
    judge(hops, "pull", *compressed(Lab(language.store, model, language.dataset), gptq=True, seed=73))


TECHNIQUES: dict[str, Any] = {
    "learning_rate": "auto",
    "optimizer": "muon",
    "average": "ema",
    "evaluate_every": 1,
    "keep": "best",
    "accumulate": 2,
    "recompute": True,
    "precision": "stochastic",
    "label_smoothing": 0.1,
}


@pytest.mark.parametrize(
    "more", [{}, {**TECHNIQUES, "dropout": 0.1, "stochastic_depth": 0.1, "family": {"tokens": 16}}]
)
def test_training_a_language_model(language: Lab, hops: Hops, more: dict[str, Any]) -> None:
    config = SMALL["train"] | more
    call("train", config, {"dataset": language.dataset}, store=language.store, progress=Progress(quiet=True))
    judge(hops, "train")


def test_training_a_classifier_with_every_technique(digits: Lab, hops: Hops) -> None:
    config = SMALL["train"] | TECHNIQUES
    call("train", config, {"dataset": digits.dataset}, store=digits.store, progress=Progress(quiet=True))
    judge(hops, "train")


@pytest.mark.parametrize("lab", ["language", "digits"])
def test_measuring_speed(lab: str, hops: Hops, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the backend that torch runs; the native one computes in C++."""
    monkeypatch.setattr(sys.modules[measure.__module__], "native_reason", lambda: "this test sees what torch computes")
    monkeypatch.setattr("gulliver.tasks.vision.task.WORKLOAD_IMAGES", 8)
    model = request.getfixturevalue(lab).model
    measure(str(model.path), model.task, repeats=1)
    assert hops.operations["audit/measure.py:measure"] > 0
    judge(hops)


def test_fit(language: Lab, hops: Hops, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: SMALL.get(name) for name in fits.EFFORTS["high"]} | {"sample": None, "quality": {}}
    monkeypatch.setattr(fits, "EFFORTS", {**fits.EFFORTS, "high": small})
    gulliver.fit(
        language.model,
        size=56_000,
        data=language.dataset,
        effort="high",
        seed=74,
        store=language.store,
        progress=Progress(quiet=True),
    )
    judge(hops, "calibrate", "plan", "quantize", "distill", "quality")


def test_the_start_of_every_step_is_there() -> None:
    for place in STARTS:
        file, _, function = place.partition(":")
        assert f"def {function}(" in (SOURCE / file).read_text(encoding="utf-8"), place
