"""captum's perturbation methods over players: groups of video tokens that are there, or replaced by the baseline.

Everything happens at the decoder's door, so the vision tower runs for the question and for the baseline and never again.
A coalition that was run once is remembered: Shapley values of n players cost at most 2^n decoder runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lab.errors import UsageError
from lab.model.door import Door

EXACT = 10  # with more players, Shapley values are sampled


class Coalitions:
    """(shares [row, *shape]) -> output [row]: every player's tokens are `share` theirs and the rest the baseline's.

    forward      the decoder from its door, with one number a row: forward.at(door, world)
    door, base   the doors of question and baseline, one world each, DeepStack additions included
    players   bool [player, pos]; tokens of no player stay what they are
    runs      decoder rows computed so far
    """

    def __init__(
        self, forward: Any, door: Door, base: Door, players: Bool[Tensor, "player pos"], *, batch: int = 32
    ) -> None:
        if base.embeds.shape != door.embeds.shape:
            raise UsageError(
                f"the baseline is {tuple(base.embeds.shape)} at the door, the question {tuple(door.embeds.shape)}"
            )
        if not len(players) or not bool(players.any(1).all()):
            raise UsageError("every player needs at least one token")
        self.forward, self.door, self.base, self.players, self.batch = forward, door, base, players, batch
        self.runs = 0
        self._seen: dict[bytes, float] = {}

    @torch.no_grad()
    def __call__(self, shares: Float[Tensor, "row *shape"]) -> Float[Tensor, " row"]:
        flat = shares.detach().reshape(len(shares), -1).float().cpu()
        keys = [row.numpy().tobytes() for row in flat]
        new = list(dict.fromkeys(k for k in keys if k not in self._seen))
        for start in range(0, len(new), self.batch):
            some = new[start : start + self.batch]
            for key, value in zip(some, self._run(flat[[keys.index(k) for k in some]]), strict=True):
                self._seen[key] = float(value)
        return torch.tensor([self._seen[k] for k in keys], device=shares.device)

    def _run(self, shares: Tensor) -> Tensor:
        """Decoder runs of coalitions [row, player]."""
        self.runs += len(shares)
        keep = self._kept(shares).to(self.door.embeds)[..., None]
        x = self.door
        deep = tuple(a * keep + b * (1 - keep) for a, b in zip(x.deep, self.base.deep, strict=True))
        rows = len(shares)
        rope = x.rope if x.rope.ndim == 2 else x.rope.expand(-1, rows, -1)
        pad = None if x.pad is None else x.pad.expand(rows, -1)
        mixed = x.embeds * keep + self.base.embeds * (1 - keep)
        return self.forward.at(
            Door(mixed, rope, pad, deep), torch.zeros(rows, dtype=torch.long, device=mixed.device)
        )

    def _kept(self, shares: Tensor) -> Float[Tensor, "row pos"]:
        """How much of every position is the question's own."""
        free = ~self.players.any(0)
        return shares @ self.players.float() + free.float()


def shapley(game: Coalitions, *, n_samples: int, exact: int = EXACT) -> tuple[Float[Tensor, " player"], bool]:
    """Shapley values, and whether they are exact: from all coalitions of up to `exact` players, else captum's sampling."""
    n = len(game.players)
    if n <= exact:
        return _exact(game, n), True
    from captum.attr import ShapleyValueSampling

    found = ShapleyValueSampling(game).attribute(torch.ones(1, n), torch.zeros(1, n), n_samples=n_samples, perturbations_per_eval=game.batch)  # fmt: skip
    return found[0], False


def _exact(game: Coalitions, n: int) -> Tensor:
    """sum over coalitions S without i of |S|! (n - |S| - 1)! / n! (f(S + i) - f(S))."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)))
    worth = game(every).double()
    at = {tuple(row): i for i, row in enumerate(every.int().tolist())}
    values = torch.zeros(n, dtype=torch.float64)
    for row, i in at.items():
        size = sum(row)
        for p in (p for p in range(n) if not row[p]):
            joined = at[(*row[:p], 1, *row[p + 1 :])]
            values[p] += (
                math.factorial(size)
                * math.factorial(n - size - 1)
                / math.factorial(n)
                * (worth[joined] - worth[i])
            )
    return values.float()


def ablation(game: Coalitions) -> Float[Tensor, " player"]:
    """captum's FeatureAblation: what is lost without each player."""
    from captum.attr import FeatureAblation

    n = len(game.players)
    return FeatureAblation(game).attribute(
        torch.ones(1, n), torch.zeros(1, n), perturbations_per_eval=game.batch
    )[0]


def occlusion(
    game: Coalitions, present: Bool[Tensor, "frame row col"], window: Sequence[int], strides: Sequence[int]
) -> Float[Tensor, " player"]:
    """captum's Occlusion: a block of (frames, rows, columns) slides over the video's tokens, which are the players.

    present  where on the grid a token stands, in the players' order. Raises UsageError if they are not as many.
    """
    from captum.attr import Occlusion

    there = present.reshape(-1)
    if int(there.sum()) != len(game.players):
        raise UsageError(
            f"occlusion slides over a grid of tokens; {len(game.players)} players do not stand on "
            f"{int(there.sum())} places of {tuple(present.shape)}"
        )
    size = tuple(min(w, s) for w, s in zip(window, present.shape, strict=True))
    step = tuple(min(s, w) for s, w in zip(strides, size, strict=True))
    ones = torch.ones(1, *present.shape)

    def of_cells(cells: Float[Tensor, "row frame row col"]) -> Float[Tensor, " row"]:
        return game(cells.flatten(1)[:, there])

    found = Occlusion(of_cells).attribute(
        ones, size, step, torch.zeros_like(ones), perturbations_per_eval=game.batch
    )
    return found[0].reshape(-1)[there]


def infidelity(
    game: Coalitions, values: Float[Tensor, " player"], *, n_samples: int = 64, seed: int = 0
) -> dict[str, float]:
    """captum's infidelity (arXiv 1901.09392) with random halves of the players replaced by the baseline.

    mean squared difference between the attributions of what was replaced and what the output lost; `share`: relative
    to the mean square of what it lost (0: the attributions predict every coalition; 1: no better than nothing).
    """
    from captum import metrics

    measured: Any = metrics.infidelity  # its types know tuples only

    dice = torch.Generator().manual_seed(seed)

    @metrics.infidelity_perturb_func_decorator(multiply_by_inputs=True)
    def replaced(inputs: Tensor, baselines: Tensor | None = None) -> Tensor:
        return inputs * (torch.rand(inputs.shape, generator=dice) < 0.5)

    n = len(game.players)
    ones, zeros = torch.ones(1, n), torch.zeros(1, n)
    found = measured(game, replaced, ones, values[None].float().cpu(), zeros, n_perturb_samples=n_samples, max_examples_per_batch=game.batch)  # fmt: skip
    dice.manual_seed(seed)
    kept = (torch.rand((n_samples, n), generator=dice) < 0.5).float()
    lost = float((game(ones) - game(kept)).double().pow(2).mean())
    return {"infidelity": float(found.mean()), "share": float(found.mean()) / max(lost, 1e-12)}
