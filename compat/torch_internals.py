"""Write `docs/torch-internals.md`: each private name of torch that Shardkeep uses, and why.

    python -m compat.torch_internals     # writes the page, or lists names that nothing explains

A name is private if a part of it starts with an underscore. The uses are found in the source, so
that the page can't become stale: imports, attributes of imported names, names in strings, and
private members of torch's classes that Shardkeep's classes override or call.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

from compat.torch_internals_table import OTHER_RELEASES, TABLE

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "shardkeep"
DCP = "torch.distributed.checkpoint"
PAGE = ROOT / "docs" / "torch-internals.md"

NAMES_IN_PICKLES = ("format/", "torch_state/builders.py", "dcp/bridge/metadata_file.py")
"""Modules whose strings are names in the pickles of checkpoints: part of the format, not of torch's
code. Their imports and attributes count as in other modules.
"""

_NAME = re.compile(r"torch(\.\w+)+")


class Use(NamedTuple):
    """A private name of torch, and a file below `src/shardkeep` that uses it."""

    name: str
    file: str


def uses() -> set[Use]:
    """Return all uses of torch's private names in the source of Shardkeep."""
    found: set[Use] = set()
    for path in sorted(SOURCE.rglob("*.py")):
        file = path.relative_to(SOURCE).as_posix()
        names = names_in(path.read_text(encoding="utf-8"), strings=not is_format(file))
        found.update(Use(name, file) for name in names)
    return found


def is_format(file: str) -> bool:
    return file.startswith(NAMES_IN_PICKLES)


def names_in(source: str, *, strings: bool = True) -> set[str]:
    """Return the private names of torch that a module uses.

    Args:
        source: the text of the module.
        strings: whether strings count.
    """
    tree = ast.parse(source)
    imported = {"dist": "torch.distributed", **_imports(tree)}
    modules = set(imported.values())
    if "torch_module(" in source:
        modules.update(name for name in sys.modules if name.startswith(f"{DCP}."))
    members = _private_members() if DCP in source else {}
    found: set[str] = set()
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found.update(_imported_names(node))
        elif isinstance(node, ast.Attribute):
            if id(node) not in inner:
                found.add(_dotted(node, imported))
            found.add(members.get(node.attr, ""))
        elif isinstance(node, ast.FunctionDef):
            found.add(members.get(node.name, ""))
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _NAME.fullmatch(node.value):
                found.add(node.value)
            found.update(members.get(word, "") for word in node.value.split())
            found.update(_in_modules(node.value, modules))
    return {name for name in found if _is_private(name)}


def _imports(tree: ast.AST) -> dict[str, str]:
    """Return local name -> full name for everything that a module imports from torch."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_torch(node.module or ""):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname and _is_torch(alias.name):
                    found[alias.asname] = alias.name
                elif _is_torch(alias.name):
                    found["torch"] = "torch"
    return found


def _is_torch(module: str) -> bool:
    return module == "torch" or module.startswith("torch.")


def _imported_names(node: ast.ImportFrom | ast.Import) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    else:
        yield from (alias.name for alias in node.names)


def _dotted(node: ast.expr, imported: Mapping[str, str]) -> str:
    """Return the full name of an attribute of something imported from torch, or ""."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in imported:
        return ""
    return ".".join([imported[node.id], *reversed(parts)])


def _in_modules(text: str, modules: Set[str]) -> Iterator[str]:
    """Yield a string such as "_StorageInfo" as a name of the module that defines it."""
    if not re.fullmatch(r"_[A-Za-z]\w*", text):
        return
    for module in modules:
        value = getattr(sys.modules.get(module), text, None)
        if getattr(value, "__module__", None) == module:
            yield f"{module}.{text}"


def _private_members() -> dict[str, str]:
    """Return private members of the torch classes that Shardkeep's classes extend, by name."""
    import torch.distributed.checkpoint as stock

    made = [
        stock.DefaultSavePlanner(),
        stock.DefaultLoadPlanner(),
        stock.FileSystemWriter("nowhere"),  # creates nothing before it writes
        stock.FileSystemReader("nowhere"),
        stock.HuggingFaceStorageReader("nowhere"),
        stock.QuantizedHuggingFaceStorageReader("nowhere"),
    ]
    found: dict[str, str] = {}
    for instance in made:
        kind = type(instance)
        members = [(base, name) for base in kind.__mro__ for name in vars(base)]
        for base, name in [*members, *((kind, name) for name in vars(instance))]:
            if _is_torch(base.__module__) and re.match(r"_[A-Za-z]", name):
                found.setdefault(name, f"{base.__module__}.{base.__qualname__}.{name}")
    del found["_abc_impl"]
    return found


def _is_private(name: str) -> bool:
    return _is_torch(name) and any(re.match(r"_[A-Za-z]", part) for part in name.split("."))


def problems(found: Set[Use]) -> list[str]:
    """Return the errors of the table: names that it lacks, and names that nothing uses."""
    names = {use.name for use in found}
    lacking = [f"{use.file} uses {use.name}: add it to TABLE" for use in sorted(found)
               if use.name not in TABLE]  # fmt: skip
    unused = [f"nothing uses {name}: remove it from TABLE" for name in TABLE if name not in names]
    return lacking + unused


def text(found: Set[Use]) -> str:
    """Return the page."""
    rows = []
    for name, (why, without) in sorted(TABLE.items()):
        files = ", ".join(f"`{use.file}`" for use in sorted(found) if use.name == name)
        rows.append(f"| `{name}` | {files} | {why} | {without} |")
    others = [f"| `{name}` | {why} |" for name, why in sorted(OTHER_RELEASES.items())]
    messages = [f"| {message} | `{kind}` |" for message, kind in _messages()]
    return "\n".join([INTRODUCTION, *rows, AFTERWARDS, *others, MESSAGES, *messages, ""])


def _messages() -> Iterator[tuple[str, str]]:
    """Yield each kept message of torch, with the class of its error."""
    from shardkeep.dcp.bridge import torch_messages as kept

    yield kept.missing_key("NAME"), "RuntimeError"
    yield kept.size_mismatch("NAME", "torch.Size([...])", "torch.Size([...])"), "ValueError"
    yield kept.CHECKPOINT_EXISTS, "RuntimeError"
    yield kept.CANNOT_DETECT, "RuntimeError"
    yield kept.not_a_tensor("NAME"), "RuntimeError"


INTRODUCTION = """\
# Private names of torch that Shardkeep uses

`python -m compat.torch_internals` (part of `make drop-in`) makes this page. It finds the uses in
the source, and a test fails if a use is not listed here. A name is private if a part of it starts
with an underscore. Torch may change or remove such a name in any release, so each is listed with
the reason for its use, and with what depends on it. If a name that a module imports when it is
loaded is removed, the module can't be imported either, until the import is changed.

Most are used by the drop-in (`dcp/`), whose classes have to behave like torch's own for users who
derive from them. `shardkeep.save` and `shardkeep.load` use only the names that are listed with
`torch_state/` and `coordination/`.

Names that only occur in the pickles of checkpoints, such as `torch._utils._rebuild_tensor_v2`, are
part of the format. They are not listed.

| Name | Used in | Why | Without it |
|---|---|---|---|"""

AFTERWARDS = """
## Names of other releases

Looked up by `getattr`, so that their absence does not raise an error.

| Name | Why |
|---|---|"""

MESSAGES = """
## Messages that are kept word for word

Programs match on these messages of torch, so errors of the drop-in contain them; more may follow.
They are defined in `dcp/bridge/torch_messages.py`.

| Message | Class |
|---|---|"""


def main() -> int:
    """Write the page; if the table has errors, print them and return 1."""
    import shardkeep.dcp  # noqa: F401 - loads torch's modules, which the scan looks into

    found = uses()
    wrong = problems(found)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    if not wrong:
        PAGE.write_text(text(found), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
