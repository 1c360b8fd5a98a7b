"""What is written: files, cards, texts for the hub."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base import model as stock_model
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

from families import make_sentence_transformer
from sbert_fast import FastEncoder

# What is written


def _files(model: SentenceTransformer, path: Path, **arguments: Any) -> dict[str, bytes]:
    model.save(str(path), **arguments)
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


SOURCES: dict[str, Callable[[Any], Any]] = {
    "path": lambda path: FastEncoder(path),
    "model": lambda path: FastEncoder(SentenceTransformer(path)),
    "copy": lambda path: copy.deepcopy(FastEncoder(path)),
    "unpickled": lambda path: pickle.loads(pickle.dumps(FastEncoder(path))),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("name", [None, "me/x"])
def test_saved_files_are_those_of_sentence_transformers(
    saved: str, tmp_path: Path, make: Callable[[str], Any], name: str | None
) -> None:
    theirs = _files(SentenceTransformer(saved), tmp_path / "theirs", model_name=name)
    encoder = make(saved)
    assert _files(encoder, tmp_path / "ours", model_name=name) == theirs
    assert (b'SentenceTransformer("me/x")' in theirs["README.md"]) is (name is not None)
    assert encoder.model_card_data.model is encoder


@pytest.mark.parametrize("prompts", [None, {"query": "q: ", "document": "d: "}])
def test_a_new_card_is_that_of_sentence_transformers(
    tmp_path: Path, prompts: dict[str, str] | None
) -> None:
    theirs = _files(make_sentence_transformer(prompts=prompts), tmp_path / "theirs")
    encoder = FastEncoder(make_sentence_transformer(prompts=prompts))
    ours = _files(encoder, tmp_path / "ours")
    assert ours == theirs
    assert b"FastEncoder" not in ours["README.md"]
    again = _files(FastEncoder(str(tmp_path / "ours")), tmp_path / "again", model_name="me/x")
    assert b'SentenceTransformer("me/x")' in again["README.md"]


def test_the_guide_of_a_loss_is_named_as_by_sentence_transformers(tmp_path: Path) -> None:
    def card(model: SentenceTransformer, path: Path) -> bytes:
        data = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
        loss = GISTEmbedLoss(model, guide=copy.deepcopy(model))
        told = model.model_card_data.extract_dataset_metadata(data, [], loss, "train")
        model.model_card_data.train_datasets = told
        model.model_card_data.add_tags("generated_from_trainer")
        return _files(model, path)["README.md"]

    theirs = card(make_sentence_transformer(), tmp_path / "theirs")
    assert b'"guide": "SentenceTransformer(' in theirs
    assert card(FastEncoder(make_sentence_transformer()), tmp_path / "ours") == theirs


def test_a_class_of_the_callers_keeps_its_name(tmp_path: Path) -> None:
    class Mine(FastEncoder):
        pass

    card = _files(Mine(make_sentence_transformer()), tmp_path)["README.md"]
    assert b"Mine(" in card and b"FastEncoder" not in card


@pytest.mark.parametrize("arguments", [{}, {"create_pr": True}, {"revision": "dev"}], ids=str)
def test_hub_texts_are_those_of_sentence_transformers(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    def pushed(model: SentenceTransformer) -> list[Any]:
        calls: list[Any] = []

        class Hub:
            def __init__(self, **_: Any) -> None:
                pass

            def __getattr__(self, name: str) -> Callable[..., Any]:
                def call(**given: Any) -> Any:
                    folder = given.pop("folder_path", None)
                    card = folder and Path(folder, "README.md").read_text()
                    calls.append((name, given, card))
                    return type("Url", (), {"repo_id": "me/x", "commit_url": "u", "pr_url": "p"})

                return call

        monkeypatch.setattr(stock_model, "HfApi", Hub)
        monkeypatch.setattr(stock_model, "load_file_path", lambda *_, **__: None)
        return [model.push_to_hub("me/x", **arguments), *calls]

    theirs = pushed(make_sentence_transformer())
    assert pushed(FastEncoder(make_sentence_transformer())) == theirs
    assert "SentenceTransformer" in str(theirs)
