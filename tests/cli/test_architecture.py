"""The shape of the product: which way imports go, how much a training step loads, how long files and docstrings are.

All of it is read from the sources; nothing is imported.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = ("schemas", "embeddings", "pipeline", "jobs")
"""Each may import those before it, and itself."""
NOT_PRODUCT = ("benchmarks", "tests")
LONGEST_FILE = 450
TRAINER = "pipeline.train.trainer"
MODULES_OF_THE_TRAINER = 60

ROOMS = {
    "embeddings": (
        ("batch", "compiled", "features", "intervals", "machine", "prefetch", "sizes", "workload"),
        ("distributed",),
        ("layers",),
        ("tables",),
        ("search", "gradient_routing", "initialization"),
        ("model",),
        ("models", "loss"),
        ("planning",),
        ("sharding",),
    ),
    "pipeline": (
        ("files", "errors", "hashing", "paths", "progress", "reporting", "upload", "versions"),
        ("stream", "ingest"),
        ("runs", "synth", "inspect"),
        ("evaluate", "serve"),
        ("train", "export"),
        ("experiment", "online", "planning"),
    ),
}
"""Rooms of a package from the bottom to the top: one may import rooms of the rows above its own, and itself."""

STUBS = ("Of ", "The same", "See `", "As ")
"""Docstrings that begin so cannot be read without what stands beside them."""


@cache
def modules() -> dict[str, Path]:
    """Path of each module of the product by its dotted name; a package's is that of its ``__init__``."""
    found = {}
    for package in PRODUCT:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def is_package(module: str) -> bool:
    return modules()[module].name == "__init__.py"


def imported(module: str, tree: ast.AST) -> set[str]:
    """Modules that the import statements below ``tree`` name, down to the submodule in ``from package import it``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide where they lead"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else str(node.module) for name in names}
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """All that a module imports, within functions too."""
    return frozenset(imported(module, parsed(module)))


@cache
def imports_at_once(module: str) -> frozenset[str]:
    """Modules of the product that are loaded when ``module`` is, packages included, directly."""
    found: set[str] = set()
    for statement in parsed(module).body:
        only_types = isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        if not only_types and not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found |= imported(module, statement)
    found |= {name.rsplit(".", depth)[0] for name in found for depth in range(1, name.count(".") + 1)}
    return frozenset(found & modules().keys())


def loaded_with(module: str) -> set[str]:
    """``module`` and all of the product that is loaded with it."""
    loaded, open_ = set(), [module, *(module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1))]
    while open_:
        name = open_.pop()
        if name not in loaded:
            loaded.add(name)
            open_ += imports_at_once(name)
    return loaded


def level(module: str) -> tuple[str, int]:
    """The room of a module of `ROOMS`, and which row of it that is."""
    package, room, *_ = f"{module}.".split(".")
    for index, row in enumerate(ROOMS[package]):
        if room in row:
            return room, index
    raise AssertionError(f"{module}: {package} has a room that this test does not know; add {room} to ROOMS")


def test_packages_import_one_way_and_neither_benchmarks_nor_tests() -> None:
    wrong = []
    for module in modules():
        above = {*PRODUCT[PRODUCT.index(module.split(".")[0]) + 1 :], *NOT_PRODUCT}
        wrong += [f"{module} imports {name}" for name in imports(module) if name.split(".")[0] in above]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_one_way(package: str) -> None:
    wrong = []
    for module in modules():
        if not module.startswith(f"{package}."):
            continue
        room, row = level(module)
        for name in imports(module) & modules().keys():
            if name.startswith(f"{package}."):
                other, other_row = level(name)
                # Rooms of the first row are single files that may build on each other; circles have their own test.
                if other != room and other_row >= max(row, 1):
                    wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            raise AssertionError(" -> ".join([*path[path.index(module) :], module]))
        if module not in done:
            for name in sorted(imports(module) & modules().keys()):
                visit(name, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_no_file_is_long() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def test_a_trainer_loads_few_modules() -> None:
    loaded = loaded_with(TRAINER)
    counted = sorted(name for name in loaded if not is_package(name))
    print(f"{TRAINER} loads {len(counted)} modules, with packages {len(loaded)}")
    assert len(counted) <= MODULES_OF_THE_TRAINER, "\n".join(counted)


def stubs_of(module: str) -> list[str]:
    """Line and text of each docstring, attributes' included, that begins as `STUBS` do."""
    found = []
    for node in ast.walk(parsed(module)):
        # A string that is a statement of its own documents what is before or around it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = node.value.value.strip()
            if text.startswith(STUBS):
                path = modules()[module].relative_to(ROOT)
                found.append(f"{path}:{node.lineno}: {text.splitlines()[0]}")
    return found


@pytest.mark.parametrize("package", PRODUCT)
def test_docstrings_stand_alone(package: str) -> None:
    stubs = [stub for module in modules() if module.split(".")[0] == package for stub in stubs_of(module)]
    assert not stubs, f"{len(stubs)} docstrings begin as if something stood before them:\n" + "\n".join(stubs)
