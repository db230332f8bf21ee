"""View: what every linked picture offers: a widget for the notebook, a static twin, and three exports. Torch-free.

A view is made from Results (never from a model) and follows one `Selection`. To add one: a file with a class that
says `result()`, `spec()` and `_make_widget()`; a view whose picture is no FigureSpec overrides `figure()` and
`_save_picture()` in place of `spec()`.

    view.widget()            the live widget, made at the first call; a view that ends a cell shows it
    view.figure()            the same picture without a kernel
    view.export("x.pdf")     .png .svg .pdf .html the figure; .csv .parquet the data; .yaml the config
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from ipywidgets import DOMWidget

from lab.errors import ConfigError, UsageError
from lab.result import Result, write_bytes
from lab.view.draw import save
from lab.view.matplotlib_out import SUFFIXES
from lab.view.plotly_out import to_plotly
from lab.view.selection import Selection
from lab.view.specs import FigureSpec
from lab.yamlfile import as_yaml, parse_yaml

PICTURES = (*SUFFIXES, ".html")
DATA = (".csv", ".parquet")
CONFIGS = (".yaml", ".yml")
HERE = Path(__file__).parent  # the .js and .css files of the widgets


class View(ABC):
    """One picture of one or several Results.

    selection   what is chosen; views that share it are linked
    """

    def __init__(self, selection: Selection | None = None) -> None:
        self.selection = selection if selection is not None else Selection()

    # ---- what a view says of itself -------------------------------------------------------------------------------

    @abstractmethod
    def result(self) -> Result:
        """The numbers behind the picture, as it stands now."""

    @abstractmethod
    def _make_widget(self) -> DOMWidget:
        """The live widget, linked to `selection`; called once."""

    def spec(self) -> FigureSpec:
        """The static picture, as it stands now."""
        raise UsageError(f"{type(self).__name__} has no FigureSpec; use figure() or export()")

    def settings(self) -> dict[str, Any]:
        """What the reader has set beside the selection (limits, threshold, ...), as plain data."""
        return {}

    def _set(self, settings: Mapping[str, Any]) -> None:
        """Take settings back. Raises ConfigError for what there is not."""
        if settings:
            raise ConfigError(f"{type(self).__name__} has no settings {', '.join(map(str, settings))}")

    # ---- what every view offers -----------------------------------------------------------------------------------

    @cached_property
    def _widget(self) -> DOMWidget:
        return self._make_widget()

    def widget(self) -> DOMWidget:
        """The live widget; always the same one."""
        return self._widget

    def figure(self) -> Any:
        """A figure without a kernel: plotly, as `lab.view.draw.show` makes it."""
        return to_plotly(self.spec())

    def data(self) -> pd.DataFrame:
        """One row for every value: its coordinates, `value`, and `low` and `high` where there is an interval."""
        return pd.DataFrame(self.result().tidy())

    def config(self) -> str:
        """YAML: the view's class, its selection and settings, and the recipe of its numbers. See `restore`."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        said = {"view": kind, "selection": self.selection.to_dict(), "settings": self.settings()}
        return as_yaml({**said, "recipe": self.result().recipe})

    def restore(self, config: str) -> None:
        """Set selection and settings as `config()` noted them. Raises ConfigError for another view's config."""
        data, name = parse_yaml(config, "config"), type(self).__qualname__
        if not isinstance(data, dict) or not str(data.get("view", "")).endswith(f".{name}"):
            raise ConfigError(f"this config is not one of {name}; it must say view: ....{name}")
        settings = data.get("settings") or {}
        if not isinstance(settings, dict):
            raise ConfigError(f"settings: must be a mapping, got {type(settings).__name__}")
        chosen = Selection.from_dict(data.get("selection") or {})
        self._set(settings)
        self.selection.clear()
        self.selection.set(**chosen.to_dict())

    def export(self, path: str | Path) -> Path:
        """Write figure (.png .svg .pdf .html), data (.csv .parquet) or config (.yaml), chosen by the suffix."""
        path = Path(path)
        suffix = path.suffix.lower()
        writers: dict[tuple[str, ...], Callable[[Path], Path]] = {
            PICTURES: self._save_picture, DATA: self._save_data, CONFIGS: self._save_config,
        }  # fmt: skip
        for suffixes, write in writers.items():
            if suffix in suffixes:
                return write(path)
        known = ", ".join((*PICTURES, *DATA, *CONFIGS))
        raise UsageError(f"cannot tell the format of {path}; end its name in {known}")

    def _save_picture(self, path: Path) -> Path:
        return save(self.spec(), path)

    def _save_data(self, path: Path) -> Path:
        if path.suffix.lower() == ".csv":
            return write_bytes(path, self.data().to_csv(index=False, lineterminator="\n").encode())
        return write_bytes(path, self.data().to_parquet(index=False))

    def _save_config(self, path: Path) -> Path:
        return write_bytes(path, self.config().encode())

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.widget()._repr_mimebundle_(**kwargs)


def asset(name: str) -> str:
    """The text of a .js or .css file beside the views."""
    return (HERE / name).read_text(encoding="utf-8")
