"""Controls: a row of buttons and choices with progress, a line of state and a line of error. Knows not what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from traitlets import Bool, Dict, Float, List, Unicode

from lab.view.canvas import Canvas, script


class Controls(Canvas):
    """buttons: (name, words) each; choices: (name, words, options) each; progress below 0: none is shown.

    A press calls `on_action(name, arguments)`: a choice's argument is `value`, a button's `path` where there is one.
    """

    _esm = script("controls.js")
    buttons = List().tag(sync=True)
    choices = List().tag(sync=True)
    chosen = Dict().tag(sync=True)
    main = Unicode("").tag(sync=True)
    with_path = Bool(False).tag(sync=True)
    path = Unicode("").tag(sync=True)
    disabled = List(Unicode()).tag(sync=True)
    progress = Float(-1.0).tag(sync=True)
    state = Unicode("").tag(sync=True)
    error = Unicode("").tag(sync=True)
    details = Unicode("").tag(sync=True)

    def __init__(
        self, title: str, buttons: Sequence[tuple[str, str]], on_action: Callable[[str, dict[str, Any]], None],
        **traits: Any,
    ) -> None:  # fmt: skip
        super().__init__(title=title, buttons=[list(b) for b in buttons], **traits)
        self._on_action = on_action
        self.on_msg(self._heard)

    def _heard(self, _widget: Any, message: Any, _buffers: Any) -> None:
        if isinstance(message, Mapping) and isinstance(message.get("do"), str):
            arguments: dict[str, Any] = {str(k): v for k, v in message.items()}
            self._on_action(str(arguments.pop("do")), arguments)
