#!/usr/bin/env python3
"""llama.cpp as a peer of the runtime: builds it outside the repository, makes its files, and measures it.

    python benchmarks/peers_runtime_llama.py --peers PEERS --parent HF_DIR [--large HF_DIR] [--jobs 2]

Takes the llama.cpp tree that the sdist of llama-cpp-python carries, builds llama-bench, llama-server and llama-quantize
for this very CPU (Release, native), converts the parent to BF16 and quantizes it without an importance matrix: speed
does not depend on it. Everything lies in PEERS: llama-cpp-python-src/, llama-build/bin/, gguf/. What is there stays, so
the run may be stopped and started again. Needs cmake, ninja, a C++ compiler, and a Python with torch, transformers and
sentencepiece for the conversion (`--python`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from runtime_server import Server

TYPES = ("Q4_K_M", "Q4_0", "Q8_0")
LARGE_TYPES = ("Q4_0",)
CMAKE = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
TARGETS = ("llama-quantize", "llama-bench", "llama-server", "mtmd")


@dataclass(frozen=True)
class Llama:
    """llama.cpp and its files in a folder of peers."""

    peers: Path

    @property
    def bin(self) -> Path:
        return self.peers / "llama-build" / "bin"

    @property
    def source(self) -> Path:
        return self.peers / "llama-cpp-python-src" / "vendor" / "llama.cpp"

    def file(self, kind: str, name: str = "parent") -> Path:
        """The GGUF file of one type."""
        return self.peers / "gguf" / f"{name}-{kind}.gguf"

    def tokens_per_second(
        self, kind: str, *, prompt: int = 0, tokens: int = 0, depth: int = 0, threads: int = 2, name: str = "parent"
    ) -> float:
        """One run of llama-bench, which warms up by itself: prefill of `prompt`, or `tokens` after `depth` others.

        llama-bench feeds random tokens and samples none, so this is the time of its network alone.
        """
        sizes = {"-p": prompt, "-n": tokens, "-d": depth, "-t": threads, "-r": 1, "-o": "json"}
        words = [word for pair in sizes.items() for word in pair]
        done = subprocess.run(
            [str(word) for word in (self.bin / "llama-bench", "-m", self.file(kind, name), *words)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"llama-bench {kind}: exit {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(done.stdout)[0]["avg_ts"]

    def server_command(self, kind: str, port: int, *, slots: int, context: int, threads: int) -> list[object]:
        """llama-server with `slots` sequences of `context` tokens each."""
        sizes = {"-t": threads, "-np": slots, "-c": slots * context, "--port": port, "--host": "127.0.0.1"}
        words = [word for pair in sizes.items() for word in pair]
        return [self.bin / "llama-server", "-m", self.file(kind), *words]

    @property
    def version(self) -> dict[str, str]:
        """{"llama-cpp-python": …, "ggml": …} of the tree that was built."""
        found = {}
        for line in (self.source / "ggml" / "CMakeLists.txt").read_text(encoding="utf-8").splitlines():
            for part in ("MAJOR", "MINOR", "PATCH"):
                if line.startswith(f"set(GGML_VERSION_{part} "):
                    found[part] = line.split()[1].rstrip(")")
        package = self.source.parent.parent / "PKG-INFO"
        lines = package.read_text(encoding="utf-8").splitlines()
        sdist = next(line.split(": ", 1)[1] for line in lines if line.startswith("Version: "))
        return {"llama-cpp-python": sdist, "ggml": ".".join(found[part] for part in ("MAJOR", "MINOR", "PATCH"))}


# ---- making it ------------------------------------------------------------------------------------------------------
def build(llama: Llama, jobs: int) -> None:
    """The programs, from the sdist of llama-cpp-python."""
    if not llama.source.exists():
        _run(sys.executable, "-m", "pip", "download", "--no-binary", "llama-cpp-python", "--no-deps",
             "--dest", llama.peers, "llama-cpp-python")  # fmt: skip
        archive = max(llama.peers.glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(archive) as file:
            file.extractall(llama.peers, filter="data")
        (llama.peers / archive.name.removesuffix(".tar.gz")).rename(llama.source.parent.parent)
    folder = llama.bin.parent
    options = [f"-D{name}={value}" for name, value in CMAKE.items()]
    _run("cmake", "-G", "Ninja", "-S", llama.source, "-B", folder, *options)
    _run("nice", "ninja", "-C", folder, f"-j{jobs}", *TARGETS)


def make_files(llama: Llama, model: Path, name: str, kinds: tuple[str, ...], python: str) -> None:
    """GGUF files of a Hugging Face folder: BF16 by llama.cpp's converter, the others by its quantizer."""
    wide = llama.file("BF16", name)
    wide.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(llama.source / "gguf-py")}
    if not wide.exists():
        partial = wide.with_suffix(".partial")
        _run(python, llama.source / "convert_hf_to_gguf.py", model, "--outfile", partial, "--outtype", "bf16",
             env=environment)  # fmt: skip
        partial.rename(wide)
    for kind in kinds:
        path, partial = llama.file(kind, name), llama.file(kind, name).with_suffix(".partial")
        if not path.exists():
            _run(llama.bin / "llama-quantize", wide, partial, kind)
            partial.rename(path)


def _run(*command: object, env: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    code = subprocess.run(words, env=env).returncode
    if code:
        raise SystemExit(f"{' '.join(words)}: exit {code}")


def quick_look(llama: Llama, kind: str) -> str:
    """What the model of a type goes on with after "The capital of France is", by llama-server."""
    with Server(llama.server_command(kind, 0, slots=1, context=256, threads=1), health="/health") as server:
        prompt = {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
        return server.post("/v1/completions", prompt)["choices"][0]["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--parent", type=Path, required=True, help="the parent, a Hugging Face folder")
    parser.add_argument("--large", type=Path, help="a model beyond the last cache, a Hugging Face folder")
    parser.add_argument("--python", default=sys.executable, help="has torch, transformers and sentencepiece")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    args.peers.mkdir(parents=True, exist_ok=True)
    llama = Llama(args.peers.resolve())
    build(llama, args.jobs)
    make_files(llama, args.parent, "parent", TYPES, args.python)
    if args.large:
        make_files(llama, args.large, "large", LARGE_TYPES, args.python)
    print(json.dumps({"version": llama.version, "says": {kind: quick_look(llama, kind) for kind in TYPES}}, indent=1))


if __name__ == "__main__":
    main()
