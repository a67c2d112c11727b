"""The shape of the code, held by its syntax trees: imports go down, files stay short, names stay private."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyro_blr"

TOP_LEVEL = {"pyproject.toml", "README.md", "pyro_blr", "examples", "tests", "docs"}

# Lower layers first. A module imports from layers before its own, and a package from itself.
LAYERS = [
    "shapes",
    "callers",
    "generators",
    "series",
    "interrupts",
    "requests",
    "families",
    "distributions",
    "memory",
    "vocabulary",
    "tape",
    "recorded",
    "expressions",
    "kinds",
    "likelihoods",
    "batches",
    "sequences",
    "estimators",
    "smoothness",
    "quadrature",
    "cubature",
    "rules",
    "stopping",
    "shortcuts",
    "scalars",
    "unrolling",
    "bindings",
    "lowering",
    "fusing",
    "graph",
    "sharing",
    "running",
    "sameness",
    "capture",
    "arbiter",
    "members",
    "options",
    "blocks",
    "likeness",
    "checks",
    "marginals",
    "quantiles",
    "initial",
    "starts",
    "storage",
    "probe",
    "plans",
    "probabilities",
    "forms",
    "interactions",
    "excuses",
    "reasons",
    "remedies",
    "conjugacy",
    "cuts",
    "elementwise",
    "affine",
    "predictors",
    "gathers",
    "pieces",
    "grams",
    "maps",
    "summaries",
    "arguments",
    "rows",
    "integrals",
    "patterns",
    "couplings",
    "groupings",
    "groups",
    "looms",
    "loops",
    "averages",
    "enumeration",
    "replays",
    "messages",
    "together",
    "concave",
    "program",
    "beliefs",
    "accuracy",
    "draws",
    "targets",
    "ascent",
    "leaps",
    "halts",
    "tails",
    "newton",
    "climbs",
    "portfolio",
    "steps",
    "settling",
    # What a method of Posterior or of the engine is made of stands below it, and is told what it needs.
    "diagnostics",
    "explain",
    "plots",
    "export",
    "report",
    "posterior",
    "plates",
    "masks",
    "guides",
    "parameters",
    "links",
    "parts",
    "summed",
    "readings",
    "laws",
    "statements",
    "projections",
    "curved",
    "conditionals",
    "coefficients",
    "autoguides",
    "gradients",
    "points",
    "remainder",
    "mixed",
    "symmetry",
    "renewal",
    "levels",
    "runs",
    "searches",
    "transactions",
    "attempts",
    "compilation",
    "own_fits",
    "inference",
    "nn",
    "distributed",
]

RECORDING = {"tape", "recorded", "expressions", "kinds"}

# Beyond the order: what a layer must not know although it stands lower.
FORBIDDEN = {
    "kinds": {"families"},
    "probe": {"estimators", "rules"},
    "remedies": {"estimators", "rules"},
    "likelihoods": {"families", *RECORDING},
    "estimators": {*RECORDING, "likelihoods"},
    "quadrature": {"families", *RECORDING, "likelihoods", "estimators"},
    "cubature": {"families", *RECORDING, "likelihoods", "estimators"},
    "rules": {*RECORDING, "likelihoods", "estimators"},
    "graph": {"families", "likelihoods", "estimators", "rules"},
    "conjugacy": {"estimators", "rules"},
    "averages": {"estimators", "rules"},
    "messages": {"rules"},
    "program": {"rules"},
    "guides": {"estimators", "rules", "messages", "program"},
    "posterior": {"estimators", "rules", "messages", "program"},
    "nn": {*RECORDING, "graph"},
}

# These know that there are families, and none by name.
ANY_FAMILY = {"estimators", "rules", "inference"}
FAMILY_NAMES = {"ExponentialFamily", "family_of", "pushforward_family", "register_family"}

# The third-party modules that the mathematics may import; above it, whatever the package depends on.
MATHEMATICS = {
    "families": {"torch", "pyro.distributions"},
    "distributions": {"torch", "pyro.distributions"},
    "vocabulary": {"torch"},
    "tape": {"torch"},
    "recorded": {"torch"},
    "expressions": {"torch"},
    "kinds": {"torch"},
    "likelihoods": {"torch", "pyro.distributions"},
    "estimators": {"torch", "numpy"},
    "quadrature": {"torch", "numpy"},
    "cubature": {"torch"},
    "rules": {"torch"},
}

# Members of a package that are made of another member; beginnings with an underscore serve all of them.
BUILT_ON: dict[str, set[str]] = {
    "families/transformed_normal.py": {"normal", "multivariate_normal", "diagonal_normal"},
}

OPTIONAL = {"arviz", "arviz_stats", "pandas", "xarray", "matplotlib", "tqdm", "triton", "IPython", "torchmetrics"}

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_LINES, MAX_FUNCTION_LINES = 300, 50
# Longer than that, and how long they may be: shorten the list, never lengthen it without a reason.
LONG_FILES = {
    "pyro_blr/arguments.py": 360,
    "pyro_blr/blocks.py": 330,
    "pyro_blr/conjugacy.py": 380,
    "pyro_blr/inference.py": 340,
    "pyro_blr/maps.py": 340,
}
LONG_FUNCTIONS: dict[str, int] = {}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str | None:
    """`families` for pyro_blr/families/gamma.py; None for the package's own __init__, which lists names."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if part == "__init__" else part


def imports(path: Path) -> Iterator[tuple[ast.stmt, str, str | None]]:
    """(statement, absolute module, imported name or None) of every import, also inside functions."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, module, alias.name


def internal_layers(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """The layers of this package that a file imports from."""
    for node, module, name in imports(path):
        parts = module.split(".")
        if parts[0] == "pyro_blr":
            yield node, parts[1] if len(parts) > 1 else str(name)


every_module = pytest.mark.parametrize("path", modules(), ids=name_of)


def test_top_level_holds_only_what_the_layout_names() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in found - TOP_LEVEL if not name.startswith(".")} == set()


@every_module
def test_every_module_has_a_layer_and_a_docstring(path: Path) -> None:
    layer = layer_of(path)
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, "name a file after what it holds"
    assert layer is None or layer in LAYERS, f"{layer} is no layer: give it a row in LAYERS, in its place"
    assert ast.get_docstring(tree_of(path)), "a file begins by saying what it is"


def test_the_page_on_how_it_works_names_every_layer() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    present = [path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    names = [name if name.endswith(".py") else f"{name}/" for name in present if not name.startswith("__")]
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


@every_module
def test_imports_go_down(path: Path) -> None:
    layer = layer_of(path)
    if layer is None:
        return
    for node, target in internal_layers(path):
        if target == layer:
            continue
        where = f"{name_of(path)}:{node.lineno}"
        assert target in LAYERS, f"{where}: {target} is no layer"
        assert LAYERS.index(target) < LAYERS.index(layer), f"{where}: {layer} stands below {target}"
        assert target not in FORBIDDEN.get(layer, ()), f"{where}: {layer} must not know {target}"


@every_module
def test_what_serves_any_family_names_none(path: Path) -> None:
    if layer_of(path) not in ANY_FAMILY:
        return
    for node, module, name in imports(path):
        if module == "pyro_blr.families" or module.startswith("pyro_blr.families."):
            assert name in FAMILY_NAMES, f"{name_of(path)}:{node.lineno}: {name} is a concrete family"


@every_module
def test_the_mathematics_imports_torch_only(path: Path) -> None:
    layer = layer_of(path)
    if layer not in MATHEMATICS:
        return
    foreign = {"torch", "pyro", "numpy", "scipy", "arviz", "matplotlib", "safetensors", "tqdm"}
    for node, module, name in imports(path):
        if module.split(".")[0] not in foreign:
            continue
        full = f"{module}.{name}" if name else module
        allowed = any(f"{full}.".startswith(f"{prefix}.") for prefix in MATHEMATICS[layer])
        assert allowed, f"{name_of(path)}:{node.lineno}: {layer} may not import {full}"


@pytest.mark.parametrize("package", ["families", "likelihoods"])
def test_members_do_not_import_each_other(package: str) -> None:
    for path in sorted((PACKAGE / package).glob("[!_]*.py")):
        declared = BUILT_ON.get(path.relative_to(PACKAGE).as_posix(), set())
        for node, module, name in imports(path):
            prefix = f"pyro_blr.{package}"
            if module != prefix and not module.startswith(f"{prefix}."):
                continue
            member = str(name) if module == prefix else module.removeprefix(f"{prefix}.")
            assert member.startswith("_") or member in declared, f"{name_of(path)}:{node.lineno}: {member}"


@every_module
def test_private_names_stay_in_their_module(path: Path) -> None:
    aliases = {}
    for node, module, name in imports(path):
        if module.split(".")[0] != "pyro_blr":
            continue
        inside = module.startswith(f"pyro_blr.{layer_of(path)}")
        private_module = any(part.startswith("_") for part in module.split("."))
        where = f"{name_of(path)}:{node.lineno}"
        assert inside or not private_module, f"{where}: {module} is private to its package"
        own_module = inside and module == f"pyro_blr.{layer_of(path)}"  # from . import _special
        assert own_module or not (name or "").startswith("_"), f"{where}: {name} is private to {module}"
        if name:
            aliases[name] = module
    for attribute in ast.walk(tree_of(path)):
        if not isinstance(attribute, ast.Attribute) or not isinstance(attribute.value, ast.Name):
            continue
        private = attribute.attr.startswith("_") and not attribute.attr.startswith("__")
        imported = attribute.value.id in aliases
        assert not (private and imported), f"{name_of(path)}:{attribute.lineno}: .{attribute.attr} is private"


@every_module
def test_imports_stand_at_the_top(path: Path) -> None:
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, FUNCTION)]
    inner = {child for function in functions for child in ast.walk(function)}
    for node, module, _ in imports(path):
        if node in inner:
            assert module.split(".")[0] in OPTIONAL, f"{name_of(path)}:{node.lineno}: {module} in a function"


@every_module
def test_files_and_functions_are_short(path: Path) -> None:
    name, lines = name_of(path), len(path.read_text().splitlines())
    assert lines <= LONG_FILES.get(name, MAX_LINES), "a long file asks for a noun of its own"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, FUNCTION) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONG_FUNCTIONS.get(f"{name}:{node.name}", MAX_FUNCTION_LINES), (node.name, lines)


@pytest.mark.parametrize("name", sorted(LONG_FILES))
def test_no_exception_outlives_its_reason(name: str) -> None:
    path = ROOT / name
    assert path.exists() and len(path.read_text().splitlines()) > MAX_LINES, f"take {name} off LONG_FILES"
