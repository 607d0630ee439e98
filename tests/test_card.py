"""The model card and evidence.json: made from the same evidence, honest, escaped, and no part of the content id."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from report_samples import artifact, fitted

from gulliver.core.store.artifact import open_artifact, verify
from gulliver.core.store.store import Store
from gulliver.report.card import card, code, plain, write_card
from gulliver.report.gather import gather

HOSTILE = "x\n---\nlicense: mit\n# <img src=x onerror=alert(1)> | `a` *b* [c](http://evil)"


def matter(text: str) -> dict[str, Any]:
    """The YAML front matter of a card."""
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def test_card_and_evidence_are_annotations(tmp_path: Path) -> None:
    store, model = fitted(tmp_path / "home")
    write_card(model, store)
    assert (model.path / "README.md").is_file() and (model.path / "evidence.json").is_file()
    verify(model)
    assert open_artifact(model.path).id == model.id
    before = (model.path / "README.md").read_bytes()
    write_card(model, store)
    assert (model.path / "README.md").read_bytes() == before


def test_card_says_verdict_evidence_formats_use_lineage_limits(tmp_path: Path) -> None:
    store, model = fitted(tmp_path / "home")
    text = card(gather(model, store))
    headings = re.findall("^## (.*)$", text, re.MULTILINE)
    assert headings == ["Gates", "Evidence", "Formats", "Use", "Lineage", "Limits"]
    assert text.index("**PASS**") < text.index("## Evidence") and "2.68 to 3.56" in text
    assert "| quality loss at most 5 % | PASS | 3.12 % | 2.68 to 3.56 % |" in text
    assert "Downloaded: 94.10 kB GGUF Q4\\_1; 269 kB in bfloat16." in text
    assert f"gulliver verify {model.id[:12]}" in text and "gulliver audit FOLDER" in text
    assert "Quality was measured on wikitext-2.test.txt, tinyshakespeare.txt only" in text
    assert "| `c3g128` | 1 | 18,874,368 |" in text and "quantize made model" in text


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    store, model = fitted(tmp_path / "catalog")
    found = matter(card(gather(model, store)))
    assert found == {
        "library_name": "gulliver",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["gulliver", "language", "quantized"],
    }
    store, model = fitted(tmp_path / "hub", source="hf:some/model")
    found = matter(card(gather(model, store)))
    assert found["base_model"] == "some/model" and found["base_model_relation"] == "quantized"
    assert "license" not in found
    assert "licence of the first model was not recorded" in card(gather(model, store))


def test_card_of_a_model_without_evidence_invents_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    model = artifact(store, "model", "train", {"model.safetensors": 100})
    write_card(model, store)
    text = (model.path / "README.md").read_text(encoding="utf-8")
    assert "NOT JUDGED" in text and "Nothing was measured." in text and "Quality was not measured." in text
    assert "## Formats" not in text and "No machine was recorded." in text
    assert "None" not in text
    assert matter(card(replace(gather(model, store), task="vision")))["pipeline_tag"] == "image-classification"
    assert "pipeline_tag" not in matter(card(replace(gather(model, store), task="of another version")))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    store, model = fitted(tmp_path / "home", source=f"hf:{HOSTILE}")
    data = gather(model, store)
    data = replace(data, data_names=dict.fromkeys(data.data_names, HOSTILE))
    text = card(replace(data, evidence=tuple(replace(row, machine=HOSTILE) for row in data.evidence)))
    found = matter(text)
    assert found["base_model"] == HOSTILE and "license" not in found
    outside = re.sub(r"(`+) .*? \1(?!`)", "", text.split("---\n", 2)[2])
    assert "<img" not in outside and not re.search(r"(?<!\\)\]\(http", outside)
    assert len(re.findall("^# ", text, re.MULTILINE)) == 1
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert columns == {8, 5}


def test_code_spans_hold_back_ticks() -> None:
    assert code("a") == "`a`" and code("a`b``c") == "``` a`b``c ```" and code("a\nb") == "`a b`"
    assert plain("a\n|<b>*_") == "a \\|&lt;b&gt;\\*\\_"


def test_evidence_json_holds_all_evidence(tmp_path: Path) -> None:
    store, model = fitted(tmp_path / "home")
    write_card(model, store)
    body = json.loads((model.path / "evidence.json").read_bytes())
    assert body["artifact_id"] == model.id and body["format"] == 1 and list(body) == sorted(body)
    assert body["evidence"] == [row.to_json() for row in store.evidence(model.id)]
