"""Token maps for tensors that a transformers processor made: what every position of every world is.

Nothing was rendered by us here, so only what ids and shapes tell is known: padding, video tokens, the marks and texts
between them, the last position. All else is "text" until the caller names it with `roles=`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoGrid
from lab.errors import PromptError
from lab.model.families.base import Family
from lab.model.families.geometry import join
from lab.spans import KINDS, ROLES

Place = tuple[int, int]
RoleMap = Mapping[str, Place | Sequence[Place]]
RoleCall = Callable[[list[int]], Sequence[str | None]]
Roles = RoleMap | RoleCall | Sequence[RoleMap]

_FIXED = ("pad", "frame", "generated")  # known from the tensors themselves; nobody else may give or take them
_VIDEO_COLUMNS = ("frame", "row", "col", "seconds", "weight", "source")


def token_maps(
    family: Family,
    config: Any,
    inputs: dict[str, Tensor],
    *,
    tokenizer: Any = None,
    roles: Roles | None = None,
) -> tuple[TokenMap, ...]:
    """One TokenMap per world of `inputs["input_ids"]` [world, pos]; every position has exactly one role.

    tokenizer  gives the pieces' texts and the ids of a family's marks; optional
    roles      what the text is: a callable (ids of one world without padding -> a role or None per position), or a
               mapping role -> (start, stop) or several of them, counted from the first real token; one mapping for
               all worlds or one per world. Several "option" places are options 0, 1, ...

    Raises PromptError if the number of placeholders is not the number of video tokens, and for roles that are unknown,
    overlap or lie outside the prompt.
    """
    ids = inputs["input_ids"].cpu()
    real = inputs["attention_mask"].cpu().bool() if inputs.get("attention_mask") is not None else ids >= 0
    videos = family.videos_by_world(config, inputs)
    is_video = ids == family.placeholder(config)
    marks = _mark_ids(family, config, tokenizer)
    maps = []
    for world in range(len(ids)):
        plain = _plain(ids[world], real[world], is_video[world], videos[world], marks)
        given = _given(roles, world, len(ids), ids[world][real[world]])
        maps.append(_build(ids[world], plain, given, real[world], is_video[world], videos[world], tokenizer))
    return tuple(maps)


# ---- what the tensors tell ------------------------------------------------------------------------------------------


def _plain(
    ids: Tensor, real: Tensor, is_video: Tensor, videos: list[VideoGrid], marks: set[int]
) -> list[str]:
    """Role names of one world, as far as ids and shapes tell."""
    if not bool(real.any()):
        raise PromptError("a world of the batch has no real token: attention_mask is 0 everywhere")
    names = ["text"] * len(ids)
    places = is_video.nonzero().squeeze(1).tolist()
    if bool((is_video & ~real).any()):
        raise PromptError(
            f"{int((is_video & ~real).sum())} video placeholders are masked as padding by attention_mask"
        )
    at = 0
    for video in videos:
        mine = places[at : at + len(video)]
        at += len(video)
        for p in range(mine[0], mine[-1] + 1):
            names[p] = "separator"
        for p, frame in zip(mine, video.frame.tolist(), strict=True):
            names[p] = "frame" if frame >= 0 else "separator"
    for p, (id_, is_real) in enumerate(zip(ids.tolist(), real.tolist(), strict=True)):
        if id_ in marks and names[p] == "text":
            names[p] = "separator"
        if not is_real:
            names[p] = "pad"
    names[int(real.nonzero()[-1])] = "last"
    return names


def _mark_ids(family: Family, config: Any, tokenizer: Any) -> set[int]:
    """Ids of the marks round a video: from the config, and from the family's texts if there is a tokenizer."""
    names = ("vision_start_token_id", "vision_end_token_id")
    ids = {getattr(config, n) for n in names if getattr(config, n, None) is not None}
    if tokenizer is not None:
        unknown = getattr(tokenizer, "unk_token_id", None)
        found = {tokenizer.convert_tokens_to_ids(m) for m in family.marks}
        ids |= {i for i in found if i is not None and i != unknown}
    return {int(i) for i in ids}


# ---- what the caller tells ------------------------------------------------------------------------------------------


def _given(roles: Roles | None, world: int, worlds: int, ids: Tensor) -> list[tuple[str, int] | None]:
    """For every real position: (role, option or -1) or None."""
    if roles is None:
        return [None] * len(ids)
    if callable(roles):
        return _called(roles, ids)
    if isinstance(roles, Mapping):
        return _placed(roles, len(ids))
    if len(roles) != worlds:
        raise PromptError(
            f"roles= has {len(roles)} mappings for {worlds} worlds; give one for all, or one for each"
        )
    return _placed(roles[world], len(ids))


def _called(roles: RoleCall, ids: Tensor) -> list[tuple[str, int] | None]:
    names = list(roles(ids.tolist()))
    if len(names) != len(ids):
        raise PromptError(f"roles= gave {len(names)} roles for {len(ids)} positions (padding left out)")
    for name in names:
        if name is not None:
            _check_name(name, ("last", *_FIXED))
    # options are told apart by the text between them: each unbroken run is the next option
    option, out = -1, []
    for i, name in enumerate(names):
        option += name == "option" and (i == 0 or names[i - 1] != "option")
        out.append(None if name is None else (name, option if name == "option" else -1))
    return out


def _placed(roles: RoleMap, length: int) -> list[tuple[str, int] | None]:
    out: list[tuple[str, int] | None] = [None] * length
    for name, value in roles.items():
        _check_name(name)
        for option, (start, stop) in enumerate(_places(name, value, length)):
            for p in range(start, stop):
                taken = out[p]
                if taken is not None:
                    raise PromptError(f"roles {taken[0]!r} and {name!r} overlap at position {p}")
                out[p] = (name, option if name == "option" else -1)
    return out


def _places(name: str, value: Any, length: int) -> list[Place]:
    """The (start, stop) pairs of one role, checked."""
    try:
        one = len(value) == 2 and all(isinstance(v, int) for v in value)
        places = [(operator.index(a), operator.index(b)) for a, b in ([value] if one else value)]
    except (TypeError, ValueError):
        raise PromptError(
            f"role {name!r}: give (start, stop) or a list of such pairs, got {value!r}"
        ) from None
    for start, stop in places:
        if not 0 <= start < stop <= length:
            raise PromptError(
                f"role {name!r}: span ({start}, {stop}) does not lie in the {length} positions of the prompt"
            )
    return places


def _check_name(name: str, also: Sequence[str] = ()) -> None:
    known = [r for r in ROLES if r not in (*_FIXED, "last")] + list(also)
    if name not in known:
        raise PromptError(
            f"roles= names {name!r}, which is no role a caller can give; known: {', '.join(known)}"
        )


# ---- the map --------------------------------------------------------------------------------------------------------


def _build(
    ids: Tensor,
    names: list[str],
    given: list[tuple[str, int] | None],
    real: Tensor,
    is_video: Tensor,
    videos: list[VideoGrid],
    tokenizer: Any,
) -> TokenMap:
    option = torch.full((len(ids),), -1)
    for p, told in zip(real.nonzero().squeeze(1).tolist(), given, strict=True):
        if told is None or names[p] == "last" or told[0] == names[p]:
            continue
        if bool(is_video[p]) or told[0] in ("last", *_FIXED):
            raise PromptError(f"roles= calls position {p} {told[0]!r}, but the ids say it is {names[p]!r}")
        names[p], option[p] = told
    kind = torch.where(is_video, KINDS.index("video"), KINDS.index("text"))
    columns: dict[str, Any] = _video_columns(len(ids), is_video, join(videos))
    return TokenMap(
        ids=ids,
        pieces=_pieces(ids, is_video, tokenizer),
        role=torch.tensor([ROLES.index(n) for n in names]),
        kind=kind,
        option=option,
        order=torch.arange(len(ids)),
        **columns,
    )


def _video_columns(length: int, is_video: Tensor, grid: VideoGrid) -> dict[str, Tensor]:
    columns = {name: torch.full((length,), -1) for name in ("frame", "row", "col", "source")}
    columns |= {"seconds": torch.full((length,), torch.nan), "weight": torch.ones(length)}
    for name in _VIDEO_COLUMNS:
        columns[name][is_video] = getattr(grid, name).to(columns[name].dtype)
    return columns


def _pieces(ids: Tensor, is_video: Tensor, tokenizer: Any) -> tuple[str, ...]:
    if tokenizer is None:
        return ("",) * len(ids)
    pairs = zip(ids.tolist(), is_video.tolist(), strict=True)
    return tuple("" if video else str(tokenizer.decode([i])) for i, video in pairs)
