"""Lists what only tests use: functions that no production code names, parameters it never passes.

    python scripts/lint_callers.py

Production is the package, its programs (examples, benchmarks, scripts) and the code in the
documents. Names are matched as words, not resolved: a call of any `close` counts for every `close`,
so what is listed is surely unused, and what is not listed may be. Of classes that stand on another
package's (vLLM, torch, pydantic), methods are not looked at: their callers are there.

`ALLOWED` names what is meant for callers outside, with the reason; an entry that is not needed is
an error too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFINING = ("routing", "kernels", "vllm_lora_ext", "model_patches")
CALLING = (*DEFINING, "examples", "benchmarks", "scripts")
PACKAGE = "vllm_lora_ext"
# Pattern of what `findings` names → why it has its callers all the same.
ALLOWED = {
    "model_patches.*.apply": "the register names the module, `Patch.apply` calls it",
    "kernels.mix_mlp.block.BlockSite.write(*": "takes what `pack` takes",
    "vllm_lora_ext.adapters.*Template.*": "workers call them through the protocol `Template`",
    "model_patches.mixes.Front.*": "serving calls its host through a protocol of its own",
}

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Named = _Function | ast.ClassDef
_BY_NAME = ("getattr", "collective_rpc")  # call what a string names
_FENCE = re.compile(r"```python[^\n]*\n(.*?)```", re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Definition:
    """A function that could be called from outside of its module."""

    path: Path
    name: str
    class_name: str
    node: _Function

    def __str__(self) -> str:
        return ".".join((*self.path.with_suffix("").parts, *filter(None, [self.class_name]))) + (
            f".{self.name}"
        )

    @property
    def called(self) -> str:
        """The name that stands in a call."""
        return self.class_name if self.name == "__init__" else self.name


@dataclass
class Calls:
    """What all calls of one name pass, and whether the name stands anywhere without a call."""

    most: int = 0
    keywords: set[str] = field(default_factory=set)
    anything: bool = False  # *args, **kwargs, or handed on as a value
    seen: int = 0


class Uses(ast.NodeVisitor):
    """Every name of ours that one file mentions, by the name it was defined with."""

    def __init__(self, tree: ast.Module, document: bool = False) -> None:
        self.calls: dict[str, Calls] = defaultdict(Calls)
        self._document = document
        self.imports: set[str] = set()
        self._inside: list[str] = []
        # Local name → the name that was imported, or None for another package's module.
        self._known: dict[str, str | None] = {
            node.name: node.name for node in tree.body if isinstance(node, _Named)
        }
        for node in ast.walk(tree):
            self._learn(node)
        self.visit(tree)

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom) and node.module:
            self.imports.add(node.module)
            for alias in node.names:
                self.imports.add(f"{node.module}.{alias.name}")
                self._known[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                self.imports.add(alias.name)
                if not alias.name.startswith(PACKAGE):
                    self._known[alias.asname or alias.name.split(".")[0]] = None

    def visit_FunctionDef(self, node: _Function) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        # A function that only calls itself has no caller.
        self._inside.append(node.name)
        for child in (node.args, *node.body):
            self.visit(child)
        self._inside.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function, args = node.func, node.args
        if _last(function) == "partial" and args:
            function, args = args[0], args[1:]
        if _last(function) in _BY_NAME:
            for argument in args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    self._mention(argument.value)
        # `self.site.pack()` inside of `pack` hands on, `self.pack()` and `pack()` come back.
        hands_on = isinstance(function, ast.Attribute) and not isinstance(function.value, ast.Name)
        self._note(self._name(function), args, node.keywords, [] if hands_on else self._inside)
        if isinstance(function, ast.Attribute):
            self.visit(function.value)
        elif not isinstance(function, ast.Name):
            self.visit(function)
        for child in (*args, *(k.value for k in node.keywords)):
            self.visit(child)

    def visit_Name(self, node: ast.Name) -> None:
        self._mention(self._name(node))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._mention(self._name(node))
        self.visit(node.value)

    def _name(self, node: ast.expr) -> str | None:
        """What a name or an attribute stands for, if it may be ours."""
        if isinstance(node, ast.Name):  # in a document, a word in code is what it says
            return self._known.get(node.id, node.id if self._document else None)
        if isinstance(node, ast.Attribute):
            value = node.value
            outside = isinstance(value, ast.Name) and self._known.get(value.id, "") is None
            return None if outside else node.attr
        return None

    def _note(
        self, name: str | None, args: list[ast.expr], keywords: list[ast.keyword],
        inside: list[str],
    ) -> None:  # fmt: skip
        if name is None or name in inside:
            return
        calls = self.calls[name]
        calls.seen += 1
        calls.most = max(calls.most, len(args))
        calls.keywords |= {k.arg for k in keywords if k.arg}
        starred = any(isinstance(a, ast.Starred) for a in args)
        calls.anything |= starred or any(k.arg is None for k in keywords)

    def _mention(self, name: str | None) -> None:
        if name is not None and name not in self._inside:
            self.calls[name].seen += 1
            self.calls[name].anything |= not self._document


def findings(root: Path) -> list[str]:
    """One line for each function without a caller, and each parameter that no caller passes."""
    files = {
        _module(path, root): Uses(ast.parse(path.read_text())) for path in _files(root, CALLING)
    }
    documents = [Uses(tree, document=True) for tree in _documented(root)]
    reach = {name: _reach(name, files) for name in files}
    found = []
    for definition in _definitions(root):
        at = _module(root / definition.path, root)
        # A caller knows the module it calls into, if only by way of others.
        near = [uses for name, uses in files.items() if at in reach[name]] + documents
        calls = [u.calls[definition.called] for u in near if definition.called in u.calls]
        if not any(c.seen for c in calls):
            found.append(f"{definition}: nothing but tests calls it")
            continue
        if any(c.anything for c in calls):
            continue
        for place, name in _optional(definition):
            given = any(name in c.keywords or (place is not None and c.most > place) for c in calls)
            if not given:
                found.append(f"{definition}({name}): no production call passes it")
    return found


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] in DEFINING and parts[0] != PACKAGE:
        parts = (PACKAGE, *parts)
    return ".".join(parts).removesuffix(".__init__")


def _reach(name: str, files: dict[str, Uses]) -> set[str]:
    """The modules that one can get at from a module by imports, itself among them."""
    found, left = set(), [name]
    while left:
        module = left.pop()
        if module in found or module not in files:
            continue
        found.add(module)
        left += files[module].imports
    return found


def _definitions(root: Path) -> Iterator[Definition]:
    trees = {path.relative_to(root): _parse(path) for path in _files(root, DEFINING)}
    every = [node for tree in trees.values() for node in tree.body]
    classes = {node.name for node in every if isinstance(node, ast.ClassDef)}
    for where, tree in trees.items():
        for node in tree.body:
            if isinstance(node, _Function):
                yield from _public(Definition(where, node.name, "", node))
            elif isinstance(node, ast.ClassDef) and _ours(node, classes):
                for method in node.body:
                    if isinstance(method, _Function):
                        yield from _public(Definition(where, method.name, node.name, method))


def _ours(node: ast.ClassDef, classes: set[str]) -> bool:
    """Whether nobody but us calls the methods of this class."""
    return all(_last(base) in classes for base in node.bases)


def _public(definition: Definition) -> Iterator[Definition]:
    dunder = definition.name.startswith("__") and definition.name != "__init__"
    # What a decorator makes of a function (a command, a validator, a property) is its own caller.
    plain = all(_last(d) in ("contextmanager", "cache", "lru_cache", "classmethod", "staticmethod")
                for d in definition.node.decorator_list)  # fmt: skip
    if plain and not dunder:
        yield definition


def _optional(definition: Definition) -> Iterator[tuple[int | None, str]]:
    """(place among the positional arguments or None, name) of each parameter with a default."""
    args = definition.node.args
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    static = any(_last(d) == "staticmethod" for d in definition.node.decorator_list)
    own = 1 if definition.class_name and not static else 0
    for place in range(len(names) - len(args.defaults), len(names)):
        yield place - own, names[place]
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        if default is not None:
            yield None, arg.arg


def _files(root: Path, folders: Iterable[str]) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _documented(root: Path) -> Iterator[ast.Module]:
    """Python in the documents: blocks, and code inside a line."""
    for page in (*root.glob("*.md"), *(root / "docs").rglob("*.md"), *root.glob("*/README.md")):
        text = page.read_text()
        for code in (*_FENCE.findall(text), *_CODE.findall(text)):
            try:
                yield ast.parse(code)
            except SyntaxError:  # a command line, a path, a pattern
                continue


def _last(node: ast.expr) -> str | None:
    match node:
        case ast.Call(func=func):
            return _last(func)
        case ast.Subscript(value=value):
            return _last(value)
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return None


def judge(found: list[str], allowed: Mapping[str, str]) -> list[str]:
    """The findings that no pattern allows, and the patterns that allow nothing."""
    names = {line: line.split(":")[0] for line in found}
    wrong = [line for line, n in names.items() if not any(fnmatchcase(n, p) for p in allowed)]
    spare = [p for p in allowed if not any(fnmatchcase(n, p) for n in names.values())]
    return wrong + [f"{pattern}: allowed, and nothing needs it" for pattern in spare]


def main() -> int:
    wrong = judge(findings(ROOT), ALLOWED)
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
