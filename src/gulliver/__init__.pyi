"""The public names as editors see them. Made by `make docs` from the table of steps; change it there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact
from gulliver.core.repair import repair as repair
from gulliver.pipeline.api import audit as audit
from gulliver.pipeline.api import list_artifacts as list_artifacts
from gulliver.pipeline.api import show as show
from gulliver.pipeline.api import verify as verify
from gulliver.pipeline.api import verify_home as verify_home
from gulliver.pipeline.ask import ask as ask
from gulliver.pipeline.bench import bench as bench
from gulliver.pipeline.fit import fit as fit
from gulliver.pipeline.generate import generate as generate
from gulliver.pipeline.run import run_recipe as run

__version__: str
__all__ = ["ask", "audit", "bench", "calibrate", "distill", "export", "fit", "generate", "harness", "list_artifacts", "plan", "pull", "quality", "quantize", "read", "repair", "run", "sample", "show", "speed", "train", "verify", "verify_home"]

_Source = str | Path | Artifact
"""An artifact, its id, its folder, or what `pull` and `read` take."""

def pull(
    source: str,
    task: str | None = None,
    *,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """bring a model in: catalog:NAME, hf:ORG/NAME, a local folder or a GGUF file"""

def read(
    data: str,
    eval_data: str | None = None,
    task: str = 'language',
    tokens: int = 512,
    holdout: float = 0.1,
    text_column: str = 'text',
    windows: int = 24,
    context: int = 1024,
    questions: int = 100,
    texts: int = 256,
    *,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """make a dataset from files or the catalog, split into parts that never overlap"""

def sample(
    model: _Source,
    *,
    count: int = 96,
    held_out: int = 16,
    batch_size: int = 64,
    max_ram_bytes: int | str | None = None,
    tokens: int = 512,
    holdout: float = 0.1,
    text_column: str = 'text',
    windows: int = 24,
    context: int = 1024,
    questions: int = 100,
    texts: int = 256,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """let a model write data of its own, for calibration that favours no domain"""

def train(
    dataset: _Source,
    *,
    task: str | None = None,
    size: int = 1,
    steps: int = 300,
    batch_size: int = 64,
    optimizer: Literal['adamw', 'sgd', 'muon'] = 'adamw',
    learning_rate: float | Literal['auto'] = 0.001,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.01,
    layer_decay: float = 1.0,
    edge_rate: float = 1.0,
    vector_rate: float = 1.0,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    max_unit_ratio: float | None = None,
    schedule: Literal['cosine', 'wsd', 'one-cycle', 'plateau', 'constant'] = 'cosine',
    warmup_steps: int = 20,
    decay_steps: int | None = None,
    plateau_patience: int | None = None,
    plateau_shrink: float | None = None,
    label_smoothing: float = 0.0,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    average: Literal['none', 'ema', 'mean'] = 'none',
    ema_decay: float | None = None,
    average_from: int | None = None,
    evaluate_every: int = 0,
    evaluate_batches: int = 8,
    patience: int | None = None,
    keep: Literal['last', 'best'] = 'last',
    accumulate: int = 1,
    recompute: bool = False,
    precision: Literal['float32', 'autocast', 'stochastic', 'compensated'] = 'float32',
    checkpoint_every: int = 50,
    tokens: int = 512,
    holdout: float = 0.1,
    text_column: str = 'text',
    windows: int = 24,
    context: int = 1024,
    questions: int = 100,
    texts: int = 256,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """train a new network on a dataset"""

def calibrate(
    model: _Source,
    dataset: _Source,
    samples: _Source | None = None,
    *,
    examples: int = 64,
    batch_size: int = 4,
    moments: Literal['full', 'diagonal'] = 'full',
    sensitivity: Literal['auto', 'gradient', 'power'] = 'auto',
    gradient_examples: int = 16,
    max_ram_bytes: int | str | None = None,
    tokens: int = 512,
    holdout: float = 0.1,
    text_column: str = 'text',
    windows: int = 24,
    context: int = 1024,
    questions: int = 100,
    texts: int = 256,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """stream calibration data through a model, block by block, and keep each layer's statistics"""

def plan(
    model: _Source,
    calibration: _Source,
    *,
    size_bytes: int | str,
    kind: Literal['any', 'codebook', 'uniform'] = 'any',
    target: Literal['native', 'gguf', 'vllm', 'transformers'] = 'native',
    min_bits: int = 2,
    probe_rows: int = 32,
    gptq: bool = True,
    max_ram_bytes: int | str | None = None,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """choose one format per tensor: least predicted loss increase within the budget"""

def quantize(
    model: _Source,
    calibration: _Source,
    plan: _Source | None = None,
    *,
    bits: int = 4,
    group_size: int = 64,
    kind: Literal['codebook', 'uniform'] = 'codebook',
    method: Literal['gptq', 'rtn'] = 'gptq',
    sweeps: int = 2,
    max_ram_bytes: int | str | None = None,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """pack a model's weights into few bits, by the plan or in one format"""

def distill(
    model: _Source,
    parent: _Source,
    dataset: _Source,
    samples: _Source | None = None,
    *,
    steps: int = 100,
    batch_size: int = 2,
    learning_rate: float | None = None,
    scale_rate: float = 0.0005,
    vector_rate: float = 0.0003,
    warmup_steps: int = 5,
    max_grad_norm: float = 1.0,
    checkpoint_every: int = 25,
    max_ram_bytes: int | str | None = None,
    tokens: int = 512,
    holdout: float = 0.1,
    text_column: str = 'text',
    windows: int = 24,
    context: int = 1024,
    questions: int = 100,
    texts: int = 256,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """train a model, packed or dense, to answer like its parent"""

def quality(
    model: _Source,
    dataset: _Source,
    parent: _Source | None = None,
    *,
    share: float = 1.0,
    max_ram_bytes: int | str | None = None,
    tokens: int = 512,
    holdout: float = 0.1,
    text_column: str = 'text',
    windows: int = 24,
    context: int = 1024,
    questions: int = 100,
    texts: int = 256,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """measure a model on held-out data, paired against its parent"""

def harness(
    model: _Source,
    parent: _Source | None = None,
    *,
    tasks: tuple[str, ...],
    limit: int | None = None,
    include_path: str | None = None,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """score a language model on tasks of lm-eval, paired against its parent by item"""

def speed(
    model: _Source,
    *,
    repeats: int = 5,
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """measure a model's speed, memory and size on this machine"""

def export(
    model: _Source,
    *,
    format: Literal['safetensors', 'compressed-tensors', 'gguf', 'onnx'],
    widen: bool = False,
    type: Literal['exact', 'f32', 'bf16', 'f16', 'q8_0'] = 'exact',
    home: Path | str | None = None,
    database_url: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """write a model in another tool's format, exactly or not at all"""