"""Every architecture that is read from GGUF computes what the transformers network computes that the file is of."""

from __future__ import annotations

import pytest
import torch
from gguf_files import CASES, network, write_file

from gulliver.tasks import get_task
from gulliver.tasks.language.gguf.config import READ
from gulliver.tasks.language.gguf.read import convert_gguf


@pytest.mark.parametrize("name", CASES)
def test_a_file_computes_what_its_network_computes(tmp_path, name):
    model = network(CASES[name])
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(write_file(tmp_path / "model.gguf", model, CASES[name]), folder)
    found = get_task("language").load(folder)
    tokens = torch.randint(0, 258, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, got = (one(input_ids=tokens, use_cache=False).logits for one in (model, found))
    assert type(found) is type(model)
    assert wanted.std() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_every_architecture_has_a_case():
    import gguf

    assert {gguf.MODEL_ARCH_NAMES[case.arch] for case in CASES.values()} == set(READ) - {"mistral"}
