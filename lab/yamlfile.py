"""YAML for recipes and item lists: plain data in, plain data out. Torch-free.

A small, safe part of YAML 1.2: mappings, lists, texts, whole numbers, floats, true/false, null. What can bite is
refused: tags, anchors and aliases (a few lines of them unfold to gigabytes), a key given twice, several documents.
`no`, `12:30` and dates stay texts; `1e-3` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lab.errors import ConfigError

MAX_BYTES = 1_000_000
_CORE = {
    "null": (r"~|null|", ["~", "n", ""]),
    "bool": (r"true|false", list("tf")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)\.[0-9]*|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+0123456789."),
    ),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, no tags, no aliases, no double keys."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    yaml_constructors: dict[Any, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (& and *) are not allowed", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem=f"the tag {event.tag!r} is not allowed", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in out:
                what = (
                    f"the key {key!r} stands twice" if isinstance(key, Hashable) else "a key must be a text"
                )
                raise yaml.MarkedYAMLError(problem=what, problem_mark=key_node.start_mark)
            out[key] = self.construct_object(value_node, deep=True)
        return out

    def sequence(self, node: yaml.SequenceNode) -> list[Any]:
        return [self.construct_object(n, deep=True) for n in node.value]


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text that `_Loader` or a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in _CORE.items():
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", getattr(yaml.SafeLoader, f"construct_yaml_{_name}"))
_Loader.add_constructor("tag:yaml.org,2002:str", yaml.SafeLoader.construct_yaml_str)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.sequence)
_Dumper.add_representer(float, lambda d, x: d.represent_scalar("tag:yaml.org,2002:float", _float(x)))


def read_text(path: str | Path) -> str:
    """The text of a file. Raises ConfigError if it is missing, larger than `MAX_BYTES`, or not UTF-8."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # devices and pipes may never end
            raise ConfigError(f"cannot read {path}: it is not a file")
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path} has {size} bytes, more than the {MAX_BYTES} allowed")
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise ConfigError(f"cannot read {str(path)[:200]}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text (byte {e.start})") from None
    except ValueError:
        raise ConfigError(f"cannot read {str(path)!r}: not a path") from None


def parse_yaml(text: str, name: str) -> Any:
    """Plain data from one YAML document. Raises ConfigError, one line, with the line number."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{name} has {len(text)} characters, more than the {MAX_BYTES} allowed")
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader with fewer powers
    except yaml.MarkedYAMLError as e:
        line = f" line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{name}:{line} {e.problem or e.context or 'is not YAML'}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{name}: not readable as YAML: {' '.join(str(e).split())}") from None
    except RecursionError:
        raise ConfigError(f"{name}: lists or mappings are nested too deep") from None


def as_yaml(data: Any) -> str:
    """Plain data as YAML text that `parse_yaml` reads back unchanged; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _float(x: float) -> str:
    if x != x:
        return ".nan"
    return repr(x) if abs(x) != float("inf") else (".inf" if x > 0 else "-.inf")
