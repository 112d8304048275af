"""Imports point downward only: what CONTRIBUTING says about the layers, read from the import statements."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashpo

PACKAGE = Path(flashpo.__file__).parent
KERNELS = PACKAGE.parents[1] / "kernels"
# Modules of ops/ that define no operator: checks of arguments, losses and their formulas, statistics and constants.
# Operators and kernels both use them.
SPECIFICATIONS = {
    f"flashpo.ops.{name}"
    for name in (
        "_check", "_layout", "_masked_attention", "_policy_loss_reference", "_product", "_wide", "loss_spec",
        "policy_stats",
    )
}  # fmt: skip
# From top to bottom. A module may import from its own layer and from those below.
LAYERS = ("programs", "trl and verl", "rollout", "packing", "_recurrent", "ops", "kernels", "specifications", "base")
FOLDERS = {"trl": "trl and verl", "verl": "trl and verl"} | {name: name for name in LAYERS}
PROGRAMS = ("__init__", "__main__", "bench", "cli", "doctor", "_doctor_model", "_probes", "run")
NO_MODULES = {"flashpo._C", "flashpo.__version__"}  # the compiled extension and a constant, which anyone may import
# Kernels whose imports point upward still
KNOWN = {("flashpo.kernels.linear_divergence", "flashpo.ops.divergence_stats")}


def layer(module: str) -> int:
    if module in SPECIFICATIONS:
        return LAYERS.index("specifications")
    part = module.split(".")[1] if "." in module else "__init__"
    return LAYERS.index("programs" if part in PROGRAMS else FOLDERS.get(part, "base"))


def modules() -> dict[str, Path]:
    found = {}
    for root, package in ((PACKAGE, "flashpo"), (KERNELS, "flashpo.kernels")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """The modules of flashpo that import statements name, those within functions too, but not those for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "flashpo")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would escape this test"
            if (node.module or "").partition(".")[0] == "flashpo":
                full = {f"{node.module}.{alias.name}" for alias in node.names} - NO_MODULES
                yield from (name if name in known else str(node.module) for name in full)


def upward(module: str, source: str, known: dict[str, Path]) -> set[tuple[str, str]]:
    return {(module, other) for other in imported(ast.parse(source), known) if layer(other) < layer(module)}


def test_no_import_points_upward():
    known = modules()
    assert len(known) > 150
    assert known.keys() >= SPECIFICATIONS
    assert set().union(*(upward(name, path.read_text(), known) for name, path in known.items())) == KNOWN


def test_every_file_outside_of_the_folders_is_in_the_lowest_layer_or_a_program():
    names = {name.split(".")[1] for name in modules() if name.count(".") == 1}
    assert names - {*FOLDERS, *PROGRAMS} == {
        "_causal_lm", "_cuda_library", "_fallbacks", "_hosts", "_huge_pages", "_memory", "_on_import", "_op",
        "_ownership", "_precision", "_twin",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("flashpo.packing.x", "from flashpo.rollout.cache import BLOCK"),
        ("flashpo.rollout.x", "def f():\n    import flashpo.trl"),
        ("flashpo.kernels.x", "from flashpo.ops import token_stats"),
        ("flashpo.kernels.x", "from flashpo.ops import gae"),
        ("flashpo.ops._check", "from flashpo.kernels import gae"),
        ("flashpo._op", "from flashpo.ops._check import check_flag"),
        ("flashpo.ops.x", "from flashpo import pack"),
    ],
)
def test_an_import_upward_is_found(module, statement):
    assert upward(module, statement, modules())
