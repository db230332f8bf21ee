"""Shared fixtures: tiny random models of every family, saved to disk once and loaded back; the bundled model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import families

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """name -> folder of a tiny random checkpoint of that family."""
    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            made[name] = str(root / name)
            families.build(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def plain(saved):
    """name -> an unwrapped transformers model loaded from disk."""

    def load(name: str, **kw):
        return AutoModelForImageTextToText.from_pretrained(saved(name), **kw).eval()

    return load


@pytest.fixture(scope="session")
def wrapped(saved):
    """name -> the lab's model loaded from the same folder; made once (tests must leave it clean)."""
    from lab.model.zoo import load

    made = {}

    def get(name: str):
        if name not in made:
            made[name] = load(saved(name), device="cpu", dtype="float32")
        return made[name]

    return get


@pytest.fixture(scope="session")
def wrapped_text():
    """name -> a tiny random model of that family with tokenizer and preprocessor, so that `prepare` works; made once."""
    from lab.model.zoo import wrap

    made = {}

    def get(name: str):
        if name not in made:
            hf = families.build(name).requires_grad_(False)
            made[name] = wrap(hf, families.tokenizer(name), preprocessor=families.preprocessor(name))
        return made[name]

    return get
