"""Every causal architecture of the installed transformers, at toy size, through the whole chain: what fails, and why.

    python benchmarks/architectures.py [--only NAME …] [--wider] [--out FILE]

Each is built with random weights from its own config class, shrunk by a general recipe, and goes through pull,
generate, calibrate, quantize, quality and export (safetensors). The result is benchmarks/results/architectures.json:
for each architecture the step that failed and its error, the share of the packed bytes that stays at 16 bits, and
whether the network was streamed block by block or run whole. The table in docs/models.md is drawn from it. Main types
are tried at a second size too (`--wider`: that alone), with other numbers of columns and layers, biases, and a head of
their own.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures_recipe import WIDER_TYPES, build
from transformers.models.auto import modeling_auto as auto

from gulliver.core.errors import ArtifactError, ConfigError, first_line
from gulliver.core.progress import Progress
from gulliver.core.records import PlainTensors, StatisticsTable
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call
from gulliver.pipeline.resolve import resolve_data, resolve_model
from gulliver.tasks import get_task

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- table: architectures -->", "<!-- end table -->"
LIMIT_S = 40
"""Seconds of processor time for one architecture, so that a busy machine gives the same rows."""
LOSS_AT_8_BITS = 0.001
"""A divergence at 8 bits that rounding explains; a larger one has to be a tenth of that at 4 bits."""
LIMIT_WALL_S = 400
"""Seconds after which one that does not compute is ended."""
TEXT = "".join(f"The {number}th fox jumps over {number * 7} lazy dogs and goes home.\n" for number in range(600))


def streamed(folder: Path) -> bool:
    """Whether the network runs block by block. AssertionError when that gives other logits than all of it."""
    network = get_task("language").load(folder)
    batch = {"tokens": torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))}
    try:
        blocks = get_task("language").blocks(network, [batch])
    except ConfigError:
        return False
    with torch.no_grad():
        x: Any = batch
        for block in blocks:
            x = block.forward(x, 0)
        right = network(input_ids=batch["tokens"], use_cache=False).logits
    assert torch.allclose(x, right, rtol=1e-3, atol=1e-4 * float(right.abs().max())), "streamed logits are others"
    return True


def chain(kind: str, home: Path, data: Any, store: Store, wider: bool = False) -> dict[str, Any]:
    """What became of one architecture: the step that failed and why, or facts about what was made."""
    from gulliver.pipeline.generate import generate

    row: dict[str, Any] = {}
    losses: dict[int, float] = {}
    step, quiet = "build", Progress(quiet=True)
    try:
        build(kind, home / kind, wider)
        step = "pull"
        model = resolve_model(home / kind, store, progress=quiet)
        step = "stream"
        row["streamed"] = streamed(model.path)
        step = "generate"
        generate(model.path, "hello there", raw=True, max_tokens=4, temperature=0.0, home=store.home)
        step, given = "calibrate", {"store": store, "progress": quiet}
        options = {"examples": 4, "batch_size": 2, "gradient_examples": 2, "family": {"tokens": 64}}
        calibration = call(step, options, {"model": model, "dataset": data}, **given)
        table = StatisticsTable.of(calibration)
        row |= {"notes": list(table.notes), "packed": len(table.weights)}
        for bits in (8, 4):
            step, options = "quantize", {"group_size": 32, "kind": "uniform", "bits": bits}
            packed = call(step, options, {"model": model, "calibration": calibration}, **given)
            step, inputs = "quality", {"model": packed, "dataset": data, "parent": model}
            call(step, {"family": {"windows": 2, "context": 64}}, inputs, **given)
            found = [one.value for one in store.evidence(packed.id) if one.metric == "kl_divergence"]
            losses[bits] = found[-1]
        row["share_at_16_bits"] = round(PlainTensors.of(packed).share, 4)
        row["kl_divergence"] = round(losses[4], 4)
        assert losses[8] < max(LOSS_AT_8_BITS, losses[4] / 10), f"a loss of {losses[8]:.2g} at 8 bits is no rounding"
        step = "export"
        call(step, {"format": "safetensors"}, {"model": packed}, **given)
    except Exception as error:
        told = f"{type(error).__name__}: {first_line(error).replace(str(home), '…')}"
        if step == "pull" and isinstance(error, ArtifactError):
            return row | {"failed": step, "refused": True, "reason": told.split(", which no family")[0]}
        return row | {"failed": step, "reason": told}
    return row | {"failed": None}


def apart(kind: str, home: Path, data: Any, store: Store, wider: bool) -> dict[str, Any]:
    """The chain in a child process, so that one that crashes or hangs is a row, not the end."""
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
        row = chain(kind, home, data, store, wider)
        here.send(row | {"processor_s": round(time.process_time(), 1)})

    child = context.Process(target=work, daemon=True)
    child.start()
    here.close()
    try:
        return there.recv() if there.poll(LIMIT_WALL_S) else {"failed": "time", "reason": "it does not end"}
    except EOFError:
        child.join()
        if child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return {"failed": "time", "reason": f"not done after {LIMIT_S} s of processor time"}
        return {"failed": "process", "reason": f"the process ended with {child.exitcode}"}
    finally:
        child.kill()
        child.join()
        shutil.rmtree(home / kind, ignore_errors=True)


def encoders() -> set[str]:
    """Model types that transformers also has as a network of another kind: an encoder, or one with a decoder."""
    return {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}


def table(found: dict[str, Any]) -> list[str]:
    """The lines of Markdown that say what became of each model type."""
    lines = []
    for title, kinds in (("decoders", sorted(set(found) - encoders())), ("others", sorted(set(found) & encoders()))):
        rows = {kind: found[kind] for kind in kinds}
        passed = {kind: row for kind, row in rows.items() if row["failed"] is None}
        refused = sum(row.get("refused", False) for row in rows.values())
        told = f"; {refused} are refused by name, because they do not write text by themselves" if refused else ""
        lines += [f"{len(passed)} of the {len(rows)} {title} that were tried pass{told}.", ""] if rows else []
        plain = sorted((row["share_at_16_bits"], kind) for kind, row in passed.items())
        if plain:
            lines += [
                f"Share of the bytes at 16 bits: median {plain[len(plain) // 2][0]:.1%}; above a tenth: "
                + (", ".join(f"{kind} {share:.0%}" for share, kind in plain if share > 0.1) or "none") + ".", ""
            ]  # fmt: skip
        if len(passed) < len(rows):
            lines += ["| type | step | reason |", "| --- | --- | --- |"]
            lines += [
                f"| {kind} | {row['failed']} | {row['reason'].replace('|', '/')} |"
                for kind, row in rows.items()
                if row["failed"] is not None
            ]
            lines.append("")
    return lines[:-1]


def second_size(wide: dict[str, Any]) -> list[str]:
    """The lines of Markdown on the types that were tried with the wider recipe."""
    failed = [f"{kind} fails at {row['failed']}: {row['reason']}" for kind, row in wide.items() if row["failed"]]
    passed = ", ".join(sorted(kind for kind, row in wide.items() if row["failed"] is None))
    told = "With three layers, 96 columns, biases and a head of its own, these pass too"
    return ["", f"{told}: {passed}.{''.join(f' {one}.' for one in failed)}"] if wide else []


def draw(found: dict[str, Any], wide: dict[str, Any], page: Path = PAGE) -> None:
    """Put the table between its marks in the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END, 1)
    page.write_text(
        f"{before}{BEGIN}\n{chr(10).join(table(found) + second_size(wide))}\n{END}{after}", encoding="utf-8"
    )


def main() -> None:
    """Run the chain for all, or those named, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--wider", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    again = (asked.only or asked.wider) and asked.out.is_file()
    before = json.loads(asked.out.read_text()) if again else {}
    found, wide = before.get("architectures", {}), before.get("wider", {})
    types = () if asked.wider else asked.only or auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    wider_types = () if asked.only and not asked.wider else [kind for kind in asked.only or WIDER_TYPES]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "text.txt").write_text(TEXT)
        store = Store(home / "store")
        data = resolve_data(home / "text.txt", store)
        for kind, rows in [*((kind, found) for kind in types), *((kind, wide) for kind in wider_types)]:
            began = time.monotonic()
            rows[kind] = apart(kind, home, data, store, rows is wide)
            print(kind, json.dumps(rows[kind]), f"{time.monotonic() - began:.1f} s", flush=True)
            done = sum(row["failed"] is None for row in found.values())
            body = {"transformers": transformers.__version__, "passed": done, "of": len(found), "architectures": found}
            asked.out.write_text(json.dumps(body | {"wider": wide}, indent=1, sort_keys=True) + "\n")
    if asked.out == RESULTS:
        draw(found, wide)


if __name__ == "__main__":
    main()
