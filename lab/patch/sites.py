"""Sites: where a value can be replaced, by short name; the hook points behind them and how their values lie."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from lab.errors import UsageError

STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")  # [pos, d_model]
HEADS = ("q", "rot_q", "z")  # [pos, head, d_head]
KV_HEADS = ("k", "rot_k", "v")  # [pos, kv_head, d_head]
MAPS = ("attn_scores", "pattern")  # [head, q, k]: rows are queries
EMBED = "embed"  # what stands at the decoder's door, [pos, d_model]; has no layer
SITES = (EMBED, *STREAM, *HEADS, *KV_HEADS, *MAPS)
STATE = (
    EMBED,
    "resid_pre",
    "resid_post",
)  # all there is of a position, with what DeepStack will still add to it


def check_site(site: str) -> str:
    """The site. Raises UsageError for an unknown one, naming the closest."""
    if site not in SITES:
        near = difflib.get_close_matches(str(site), SITES, n=3)
        raise UsageError(
            f"no site {site!r}; closest: {', '.join(near) or 'none'}; there are {', '.join(SITES)}"
        )
    return site


def hook_name(site: str, layer: int) -> str:
    """The hook point of a site in a layer (0-based)."""
    if site == EMBED:
        return "embed.hook_out"
    inner = "" if site in STREAM else "attn."
    return f"blocks.{layer}.{inner}hook_{site}"


def layers_with(model: Any, site: str, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers (0-based) asked for, or all that have the site.

    Raises UsageError for a layer that does not exist or has no such site (layers without softmax attention).
    """
    n = model.cfg.n_layers
    if site == EMBED:
        if layers not in (None, (0,)):
            raise UsageError(
                f"site 'embed' lies before all layers; leave layers out, got {tuple(layers or ())}"
            )
        return (0,)
    if layers is None:
        return tuple(i for i in range(n) if hook_name(site, i) in model.hook_dict)
    for layer in layers:
        if not 0 <= layer < n:
            raise UsageError(f"no layer {layer + 1} (blocks.{layer}): the model has layers 1..{n}")
        if hook_name(site, layer) not in model.hook_dict:
            raise UsageError(
                f"layer {layer + 1} (blocks.{layer}) has no site {site!r}: it has no softmax attention"
            )
    return tuple(layers)


def in_stream(site: str, layer: int, n_deep: int) -> int | None:
    """Which entry of a stored stream (entering every layer, then the end) is what passes at a site; None: none of them.

    n_deep  how many layers DeepStack adds to
    """
    match site:
        case "embed":
            return 0
        case "resid_pre":
            return layer
        case "resid_post":
            return None if layer < n_deep else layer + 1
        case _:
            return None


def n_heads(model: Any, site: str) -> int:
    """How many heads the site's values have; 0 for sites without heads."""
    if site in KV_HEADS:
        return int(model.cfg.n_key_value_heads)
    return int(model.cfg.n_heads) if site in (*HEADS, *MAPS) else 0
