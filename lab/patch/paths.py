"""Path patching: one sender's effect on one receiver alone, everything else as it was. Edits of three worlds in one pass.

A third world, "shadow", carries what the receiver would have been given:

    tokens  1 in every layer the shadow takes the stream of the world patched   2 its sender rows take keys and values
            from the source world   3 the receiver rows of the world patched take the attention output that follows
    heads   1 in the shadow the sender's head is the source world's   2 every attention output after it is frozen to what
            it was (MLPs follow; Wang et al., arXiv 2211.00593, section 3.1)   3 the receiver takes its query, key or
            value, or the final stream, from the shadow

Nothing but hook points is used, so any attention kernel and any policy will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lab.errors import UsageError
from lab.patch.edits import Edit, take

SHADOW = "shadow"
Via = Literal["kv", "k", "v"]


def token_path(
    way: str, sender: str, receiver: str, *, layers: Sequence[int], via: Via = "kv", head: Any = None
) -> list[Edit]:
    """Receiver tokens read the source world's keys and values of the sender tokens, in some layers (0-based).

    way   "clean -> corrupted"; head: query heads of the receiver (None: all); sender, receiver: segments
    """
    source, into = _ends(way)
    sites = {"kv": ("rot_k", "v"), "k": ("rot_k",), "v": ("v",)}
    if via not in sites:
        raise UsageError(f"via={via!r}; use kv, k or v")
    return [
        take(f"{into} -> {SHADOW}", site="resid_pre", layers=layers),
        *(take(f"{source} -> {SHADOW}", site=s, layers=layers, role=sender) for s in sites[via]),
        take(f"{SHADOW} -> {into}", site="z", layers=layers, role=receiver, head=head),
    ]


def head_path(
    way: str, sender: tuple[int, int], receiver: tuple[int, str, int] | None, *, n_layers: int, role: str = "*",
    freeze_mlps: bool = False,
) -> list[Edit]:  # fmt: skip
    """From one head's output to another head's query, key or value, or to the logits.

    sender    (layer, head), 0-based; receiver: (layer, "q" | "k" | "v", head) of a later layer (k and v by kv head), or
              None: the final stream
    role      the sender's rows; freeze_mlps: MLPs between are frozen as well
    Raises UsageError unless the receiver lies after the sender.
    """
    source, into = _ends(way)
    layer, head = sender
    stop = n_layers if receiver is None else receiver[0]
    if not layer < stop <= n_layers or (receiver is not None and receiver[1] not in ("q", "k", "v")):
        raise UsageError(
            f"a path leads from {sender} to (layer, 'q' | 'k' | 'v', head) of a later layer below {n_layers}, got {receiver}"
        )
    edits = [take(f"{source} -> {SHADOW}", site="z", layers=layer, head=head, role=role)]
    if layer + 1 < stop:
        edits.append(take(f"{into} -> {SHADOW}", site="z", layers=range(layer + 1, stop)))
    if freeze_mlps:
        edits.append(take(f"{into} -> {SHADOW}", site="mlp_out", layers=range(layer, stop)))
    if receiver is None:
        return [*edits, take(f"{SHADOW} -> {into}", site="resid_post", layers=n_layers - 1)]
    return [*edits, take(f"{SHADOW} -> {into}", site=receiver[1], layers=receiver[0], head=receiver[2])]


def _ends(way: str) -> tuple[str, str]:
    probe = take(way)
    assert probe.source is not None
    return probe.source, probe.into
