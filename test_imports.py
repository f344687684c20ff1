"""The directions of imports: tools/ -> rm, model, data, train -> parts/, and no circle.

Read from the syntax of the files, so lazy imports inside functions count, too. Tests are exempt.
"""

import ast
import graphlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What each of the four modules imports of the other three.
FOUR = {"train": {"rm", "data"}, "rm": {"model"}, "model": set(), "data": set()}
# check_vectors imports the module that its argument names; bench asks whether `trl` is installed,
# gpu_check which versions are.
MAY_USE_IMPORTLIB = {"tools.check_vectors", "tools.bench", "tools.gpu_check"}


def is_test(path: Path) -> bool:
    return path.name.startswith("test_") or path.name == "conftest.py"


def modules() -> dict[str, ast.Module]:
    """Parse every file of the three floors: its module name, like "parts.rows", and its tree."""
    trees = {}
    for path in [*HERE.glob("*.py"), *HERE.glob("parts/**/*.py"), *HERE.glob("tools/**/*.py")]:
        if not is_test(path):
            name = ".".join(path.relative_to(HERE).with_suffix("").parts)
            trees[name.removesuffix(".__init__")] = ast.parse(path.read_text(), str(path))
    return trees


MODULES = modules()


def imported(node: ast.AST, module: str) -> list[str]:
    """List the modules that an import statement in `module` names, ours with their full names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:  # relative: from the package that this file lies in
        package = module.split(".")[: -node.level]
        base = ".".join([*package, *filter(None, [base])])
    names = []
    for alias in node.names:
        full = f"{base}.{alias.name}"
        names.append(full if full in MODULES else base)
    return names


def imports() -> list[tuple[str, str, str]]:
    """List every import: the module, the module that it imports, and "file:line"."""
    found = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            for name in sorted(set(imported(node, module))):
                place = f"{module.replace('.', '/')}.py:{node.lineno}"
                found.append((module, name, place))
    return found


def floor(module: str) -> str:
    """Name the floor of a module: "parts", "four" or "tools"; "" for what is not ours."""
    top = module.split(".")[0]
    if top in FOUR:
        return "four"
    if top in ("parts", "tools"):
        return top
    return ""


def test_imports_are_seen():
    """All files are read, and every kind of import statement is understood."""
    top = {name for name in MODULES if "." not in name} - {"parts", "tools"}
    assert top == set(FOUR)
    assert {floor(name) for name in MODULES} >= {"parts", "four"}  # tools/ may be deleted
    tree = ast.parse(
        "import parts.rows, json\n"
        "def f():\n"
        "    from parts import packed\n"
        "    from parts.packed import pack\n"
        "    from . import packed\n"
        "    from .packed import pack\n"
    )
    found = [imported(node, "parts.flags") for node in ast.walk(tree)]
    packed = [["parts.packed"]] * 4
    assert [names for names in found if names] == [["parts.rows", "json"], *packed]


def test_imports_go_down():
    order = ["parts", "four", "tools"]
    up = []
    for module, name, place in imports():
        if floor(name) and order.index(floor(name)) > order.index(floor(module)):
            up.append(f"{place} imports {name}")
    assert not up, "imports that go up:\n" + "\n".join(up)


def test_the_four_modules_import_each_other_in_one_direction():
    others = []
    for module, name, place in imports():
        if module in FOUR and name in FOUR and name not in FOUR[module]:
            allowed = ", ".join(sorted(FOUR[module])) or "none of the four"
            others.append(f"{place} imports {name}; {module} may import {allowed}")
    assert not others, "\n".join(others)


def test_parts_have_no_circle():
    graph = {}
    for module, name, _ in imports():
        if floor(module) == floor(name) == "parts":
            graph.setdefault(module, set()).add(name)
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError("a circle: " + " imports ".join(reversed(error.args[1]))) from None


def test_nothing_is_imported_by_name():
    """importlib and __import__ hide an import from these tests."""
    hidden = []
    for module, name, place in imports():
        if name.split(".")[0] == "importlib" and module not in MAY_USE_IMPORTLIB:
            hidden.append(f"{place} imports {name}")
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "__import__":
                hidden.append(f"{module.replace('.', '/')}.py:{node.lineno} calls __import__")
    assert not hidden, "\n".join(hidden)


def catches_import_errors(handler: ast.ExceptHandler) -> bool:
    """Tell whether an except clause names ImportError or ModuleNotFoundError, or names nothing."""
    if handler.type is None:
        return True
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
    return bool(names & {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})


def test_no_import_of_ours_is_optional():
    """Such an except would take an error inside the module for its absence."""
    optional = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Try):
                continue
            if not any(catches_import_errors(handler) for handler in node.handlers):
                continue
            for statement in node.body:
                for inner in ast.walk(statement):
                    for name in sorted(set(imported(inner, module))):
                        if floor(name):
                            place = f"{module.replace('.', '/')}.py:{inner.lineno}"
                            optional.append(f"{place} imports {name}")
    assert not optional, "except around imports of ours:\n" + "\n".join(optional)
