"""A YAML file of flags, read as the words that stand in it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, reading


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML takes 1e-3 for text."""

    yaml_implicit_resolvers = yaml.SafeLoader.yaml_implicit_resolvers.copy()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1} has an alias")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = [key for key, count in keys.items() if count > 1]
            if twice:
                raise yaml.YAMLError(f"{twice[0]} stands there twice")
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_flags(path: str) -> dict[str, Any]:
    """Flag -> its word, list of words, mapping, or None where the file says null.

    Words are what the file says, letter by letter: ``no`` is a word, and 010 is not 8. Which type a
    flag has is known where flags are read. Raises UserError for a file that is no mapping, a flag
    that stands there twice, an alias, and lists in lists.
    """
    remedy = "write one 'flag: value' a line, in UTF-8"
    with reading("config", "a readable YAML file", path, remedy):
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            return {_word(key, path): _value(loader, node, path) for key, node in root.value}
    got = "nothing" if root is None else root.id
    raise UserError(f"config: expected a mapping of flags in {path}, got {got}; {remedy}")


def _value(loader: _Loader, node: yaml.Node, path: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_word(item, path) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _word(node: yaml.Node, path: str) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    raise UserError(
        f"config: expected a word at line {node.start_mark.line + 1} of {path}, got a {node.id}; "
        "write one 'flag: value' a line"
    )
