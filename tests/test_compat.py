"""Only `elastic.compat` uses private names of torch and of Ray, or looks at which version of them there is."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

PACKAGE = Path(__file__).parents[1] / "elastic"
FRAMEWORKS = ("torch", "ray")
#: Parts of Ray that have no private names, and that Ray does not document either.
INTERNAL = re.compile(r"ray\.(air\.execution|autoscaler|cluster_utils|core|experimental|train\.v2|tune\.execution)\b")
#: Private names of others: of the standard library, where they are documented, and of s3fs, which has no other way to
#: read a range with a version (`checkpoint/downloads.py`).
OTHERS = {"_fields", "_make", "_replace", "_asdict", "_exit", "_current_frames", "_call_s3"}
_NAMED = re.compile(rf"({'|'.join(FRAMEWORKS)})(\.\w+)*\._\w")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def private_names() -> set[str]:
    """Private names that objects of torch have."""
    lstm, sgd = nn.LSTM(1, 1), torch.optim.SGD([torch.ones(1)], lr=0.1)
    objects = [torch.Tensor, torch.UntypedStorage, lstm, nn.BatchNorm1d(1), sgd, torch.ops.aten.add.Tensor]
    objects += [nn.parallel.DistributedDataParallel, dist.ProcessGroup, dist.Work, torch.optim.lr_scheduler.LRScheduler]
    return {name for one in objects for name in dir(one) if is_private(name)}


def own_names(trees: list[ast.Module]) -> set[str]:
    """Private names that the package itself defines."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if is_private(name)}


def is_own(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


class Look(ast.NodeVisitor):
    """Private names of torch and Ray that a module uses, and where: (line, what)."""

    def __init__(self, own: set[str], private: set[str]):
        self._own, self._private = own, private
        self._imported: set[str] = set()  # names of this module that stand for something of torch or Ray
        self.found: list[tuple[int, str]] = []

    def _import(self, node: ast.stmt, whole: str, name: str) -> None:
        if whole.partition(".")[0] in FRAMEWORKS:
            self._imported.add(name)
            if any(map(is_private, whole.split("."))) or INTERNAL.match(whole):
                self.found.append((node.lineno, whole))

    def visit_Import(self, node: ast.Import) -> None:
        for one in node.names:
            self._import(node, one.name, one.asname or one.name.partition(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for one in node.names:
            self._import(node, f"{node.module}.{one.name}", one.asname or one.name)

    def _is_imported(self, node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self._imported

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        known = node.attr in self._own and (is_own(node.value) or node.attr not in self._private)
        if is_private(node.attr) and node.attr not in OTHERS and (not known or self._is_imported(node.value)):
            self.found.append((node.lineno, ast.unparse(node)))
        if isinstance(node.value, ast.Attribute) and node.value.attr == "__version__" and self._is_imported(node.value):
            self.found.append((node.lineno, ast.unparse(node)))

    def visit_Compare(self, node: ast.Compare) -> None:
        self.generic_visit(node)
        for one in (node.left, *node.comparators):
            if isinstance(one, ast.Attribute) and one.attr == "__version__" and self._is_imported(one):
                self.found.append((node.lineno, ast.unparse(node)))

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in ("hasattr", "getattr", "setattr", "delattr"):
            return
        by = node.args[1] if len(node.args) > 1 else None
        asked = by.value if isinstance(by, ast.Constant) else ""
        may_lack = name == "hasattr" or (name == "getattr" and len(node.args) == 3)
        hidden = is_private(asked) and asked not in self._own | self._private | OTHERS
        if hidden or (asked and may_lack and self._is_imported(node.args[0])):
            self.found.append((node.lineno, ast.unparse(node)))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and (_NAMED.match(node.value) or node.value in self._private - self._own):
            self.found.append((node.lineno, repr(node.value)))


def look(tree: ast.Module, own: set[str]) -> list[tuple[int, str]]:
    found = Look(own, private_names())
    found.visit(tree)
    return found.found


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "from torch.utils._pytree import tree_map",
        "from torch.distributed import distributed_c10d as c10d\nc10d._world",
        "import torch.nn as nn\nnn.modules.batchnorm._NormBase",
        "def f(tensor): return tensor._version",
        "class C:\n    def __init__(self): self._version = 1\n    def f(self, t): return t._version",
        "def f(module): return module._parameters['weight']",
        "class C(Module):\n    def f(self): return self._compiled_call_impl",
        "def f(thing): return thing._of_another_library",
        "def f(one): return getattr(one, '_flat_weights')",
        "def f(one): return getattr(one, '_of_another_library', None)",
        "from ray.cluster_utils import Cluster",
        "import ray\nray._private.worker",
        "def f(): from ray.train.v2.api.config import RunConfig",
        "NAME = 'torch._dynamo.eval_frame'",
        "import torch\nif torch.__version__ >= '2.13': pass",
        "import torch\ntorch.__version__.startswith('2.')",
        "import torch.distributed as dist\nhasattr(dist, 'all_gather_single')",
        "import torch.distributed as dist\ngetattr(dist, 'all_gather_single', None)",
    ],
)
def test_each_way_to_use_a_private_name_is_seen(source: str) -> None:
    tree = ast.parse(source)
    assert len(look(tree, own_names([tree]))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nf'this is {torch.__version__}'",
        "class C:\n    def __init__(self): self._parameters = 1\n    def f(self): return self._parameters",
        "class C:\n    def __init__(self): self._mine = 1\ndef f(c): return c._mine",
        "import torch\ngetattr(torch, 'float32')",
        "def f(pair): return pair._replace(first=1)",
    ],
)
def test_what_is_public_or_our_own_is_not(source: str) -> None:
    tree = ast.parse(source)
    assert look(tree, own_names([tree])) == []


@functools.cache
def package() -> dict[str, ast.Module]:
    """The modules of the package, by file name, but for `elastic.compat`."""
    files = (file for file in sorted(PACKAGE.rglob("*.py")) if file.parent.name != "compat")
    return {str(file.relative_to(PACKAGE.parent)): ast.parse(file.read_text()) for file in files}


def test_no_module_uses_a_private_name_of_torch_or_ray() -> None:
    own = own_names(list(package().values()))
    found = [f"{file}:{line}: {what}" for file, tree in package().items() for line, what in look(tree, own)]
    assert not found, "private names belong in elastic/compat, each with a test of its own:\n" + "\n".join(found)


def bases(tree: ast.Module) -> Iterator[tuple[ast.ClassDef, str, str]]:
    """Classes that derive from one of torch, of Ray or of `elastic.compat`: (class, module of that one, its name)."""
    places = {
        one.asname or one.name: (node.module, one.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and re.match(r"(torch|ray|elastic\.compat)\b", node.module)
        for one in node.names
    }
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in places:
                yield node, *places[base.id]
            elif ast.unparse(base) == "nn.Module":
                yield node, "torch.nn", "Module"


def test_no_class_defines_a_private_name_of_the_class_that_it_derives_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a framework calls by a private name belongs in a base class in `elastic.compat`."""
    monkeypatch.setenv("RAY_CLIENT_MODE", "0")  # importing Ray Tune sets it
    seen, found = set(), []
    for file, tree in package().items():
        for node, module, name in bases(tree):
            base = getattr(importlib.import_module(module), name)
            defined = {one.name for one in node.body if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))}
            for one in (one for one in node.body if isinstance(one, (ast.Assign, ast.AnnAssign))):
                targets = one.targets if isinstance(one, ast.Assign) else [one.target]
                defined |= {target.id for target in targets if isinstance(target, ast.Name)}
            hidden = sorted(name for name in defined if is_private(name) and hasattr(base, name))
            found += [f"{file}:{node.lineno}: {node.name}.{name}" for name in hidden]
            seen.add(node.name)
    assert found == []
    assert {"FreeableGloo", "Recorder", "Gates"} <= seen, "the classes that we know of"


def taken(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What a module takes of torch and Ray, wherever it does: (line, whole name)."""
    places: dict[str, str] = {}
    for node in (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))):
        for one in node.names:
            name = one.name if isinstance(node, ast.Import) else f"{node.module}.{one.name}"
            if name.partition(".")[0] in FRAMEWORKS:
                places[one.asname or name.rpartition(".")[2]] = name
                yield node.lineno, name
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Attribute)):
        root, _, rest = ast.unparse(node).partition(".")
        if root in places and re.fullmatch(r"[\w.]+", rest):
            yield node.lineno, f"{places[root]}.{rest}"


def is_there(name: str) -> bool:
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:i]))
            for part in parts[i:]:
                found = getattr(found, part)
        except (ImportError, AttributeError):
            continue
        return True
    return False


def test_every_name_that_compat_takes_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are not, at once: importing `elastic.compat` would tell the first alone."""
    monkeypatch.setenv("RAY_CLIENT_MODE", "0")  # importing Ray Tune sets it
    files = {file.name: ast.parse(file.read_text()) for file in sorted((PACKAGE / "compat").glob("*.py"))}
    known = {(file, line, name) for file, tree in files.items() for line, name in taken(tree)}
    missing = [f"compat/{file}:{line}: {name}" for file, line, name in sorted(known) if not is_there(name)]
    assert not missing, "this torch or Ray lacks:\n" + "\n".join(missing)
    assert {"torch._foreach_norm", "ray._private.worker.global_worker.node"} <= {name for *_, name in known}
    assert not is_there("torch._foreach_of_another_version")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("torch", {"ray", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo"}),
        ("ray", {"torch", "ray.train", "ray.tune", "ray.autoscaler.v2.sdk"}),
    ],
)
def test_a_part_of_compat_imports_its_own_framework_alone(module: str, absent: set[str]) -> None:
    program = f"import sys, elastic.compat.{module}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert absent & set(ran.stdout.split()) == set()
