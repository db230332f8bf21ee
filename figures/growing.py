"""Deeper models from a model's own layers, and the time of a sweep on any model and prompt. Needs torch."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lab.bench.sweep import compared
from lab.edges.closure import Cuts
from lab.edges.fast import ROWS
from lab.edges.pathrows import path_rows
from lab.edges.sweeping import layers_of
from lab.model.anatomy import language_model, text_config
from lab.model.zoo import wrap


def stacked(model: Any, times: int) -> Any:
    """The model with its decoder layers repeated `times` times, as a model of its own. Its answers mean nothing."""
    if times == 1:
        return model
    hf = copy.deepcopy(model.hf)
    lm: Any = language_model(hf)
    layers = list(lm.layers)
    grown = [
        layers[i] if i < len(layers) else copy.deepcopy(layers[i % len(layers)])
        for i in range(times * len(layers))
    ]
    for i, layer in enumerate(grown):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    lm.layers = torch.nn.ModuleList(grown)
    config = text_config(lm)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(grown)
    if kinds:
        config.layer_types = list(kinds) * times
    return wrap(hf, model.tokenizer, preprocessor=model.preprocessor)


def timed(model: Any, item: Any, n_frames: int, recipe: Any, windows: int) -> dict[str, Any]:
    """Seconds of a sweep both ways: every pathway cut in windows of a third of the layers at so many centres."""
    ready = model.prepare(item, n_frames)
    model.see(ready)  # the tower runs once for either
    n = model.cfg.n_layers
    centres = torch.linspace(0, n - 1, min(windows, n)).round().long().unique().tolist()
    cuts: list[Cuts] = []
    for pathway in recipe.pathways:
        cut = path_rows(ready.maps[0], pathway, ready.item)
        cuts += [dict.fromkeys(layers_of(c, max(1, n // 3), n), cut) for c in centres]
    return {"layers": n, **compared(model, ready, cuts, n_naive=min(recipe.timed, len(cuts)), n_rows=ROWS)}
