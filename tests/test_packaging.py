"""The package as a whole: what importing it costs, which way its imports point, and what its metadata promises."""

import ast
import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sb3_pgplus
from sb3_pgplus import configs

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sb3_pgplus"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

FACADE = "__init__"
#: From the bottom to the top (docs/design.md). A module may import its own layer and the ones below, never one above.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"core"}),
    frozenset({"errors", "files", "guards", "metrics", "hparams", "schedules", "presets"})
    | frozenset({"buffers", "critics", "optimizers", "policies", "engine", "compiled_update", "compiler", "sampling"})
    | frozenset({"callback_tree", "checkpoints", "tracing", "vec_env", "statistics", "processes", "threads"})
    | frozenset(
        {
            "serialization",
            "model_file",
            "sb3_files",
            "interruptions",
            "device_graphs",
            "recorded_update",
            "process_server",
        }
    ),
    frozenset({"building", "construction", "persistence", "rollouts", "updates"})  # parts of on_policy
    | frozenset({"resuming", "training_state"}),
    frozenset({"on_policy"}),
    frozenset({"a2c", "ppo", "trpo"}),
    frozenset({FACADE}),
    frozenset({"configs", "environments", "evaluation", "playing", "training", "run_folder", "callbacks", "reporting"})
    | frozenset({"conversion", "hub", "videos", "resumed_runs"})
    | frozenset({"profiling", "tuning", "zoo", "cli", "benchmarking"}),
)
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
ALGORITHMS = ("a2c", "ppo", "trpo")

#: What the default installation brings, by the name it is imported under.
DEFAULT_PACKAGES = {
    "stable_baselines3": "stable-baselines3",
    "torch": "torch",
    "gymnasium": "gymnasium",
    "numpy": "numpy",
    "cloudpickle": "cloudpickle",
    "typer": "typer",
    "rich": "rich",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
    "tensorboard": "tensorboard",
    "scipy": "scipy",
}
#: Which part of the package an optional package belongs to: only there may it be imported at module level.
OPTIONAL_PACKAGE_OWNERS = {
    "ale_py": (),
    "cv2": (),
    "envpool": ("vec_env",),
    "huggingface_hub": ("hub",),
    "imageio_ffmpeg": (),
    "jax": ("vec_env",),
    "matplotlib": (),
    "moviepy": (),
    "mujoco": ("vec_env",),
    "optuna": ("tuning",),
    "optuna_dashboard": ("tuning",),
    "pandas": (),
    "plotly": ("tuning",),
    "rl_zoo3": ("zoo",),
    "sb3_contrib": (),
    "wandb": ("callbacks",),
}
#: These cost seconds or need an extra, so they have to wait until they are used.
HEAVY = (
    "wandb",
    "huggingface_hub",
    "optuna",
    "plotly",
    "scipy",
    "sb3_pgplus.tuning",
    "rl_zoo3",
    "matplotlib",
    "torch._inductor",
    "mujoco",
    "envpool",
)
HEAVY += tuple(
    f"sb3_pgplus.vec_env.{name}" for name in ("envpool", "gymnasium_adapter", "jax_adapter", "mujoco", "workers")
)


class Import(NamedTuple):
    """One imported module, as written somewhere in the package."""

    module: str
    where: str
    at_module_level: bool
    only_for_types: bool


# --- reading the package's imports ------------------------------------------------------------------------------------


def part_of(path: Path) -> str:
    """Name of a module right below the package (``"ppo"``), or of the subpackage a file belongs to (``"core"``)."""
    inside = path.relative_to(PACKAGE).parts
    return inside[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported_names(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    """Absolute names; ``from sb3_pgplus import ppo`` is an import of ``sb3_pgplus.ppo``, not of the facade."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    origin = node.module or ""
    if node.level:
        package = path.relative_to(ROOT).parent.parts
        base = package[: len(package) - node.level + 1]
        origin = ".".join((*base, *filter(None, [node.module])))
    if origin != "sb3_pgplus":
        return [origin]
    submodules = {part_of(file) for file in python_files()}
    return [f"{origin}.{alias.name}" if alias.name in submodules else origin for alias in node.names]


def imports_below(node: ast.AST, path: Path, *, at_module_level: bool, only_for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            where = f"{path.relative_to(ROOT)}:{child.lineno}"
            for name in imported_names(child, path):
                yield Import(name, where, at_module_level, only_for_types)
        else:
            yield from imports_below(
                child,
                path,
                at_module_level=at_module_level
                and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda),
                only_for_types=only_for_types or is_type_checking(child),
            )


def python_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "zoo_configs" not in path.parts)


def imports_of(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return list(imports_below(tree, path, at_module_level=True, only_for_types=False))


def internal_imports() -> Iterator[tuple[str, str, Import]]:
    """Every import of one part of the package in another: importing part, imported part, where."""
    for path in python_files():
        for found in imports_of(path):
            package, _, rest = found.module.partition(".")
            if package == "sb3_pgplus":
                target = rest.partition(".")[0] or FACADE
                if target != part_of(path):
                    yield part_of(path), target, found


def test_reading_imports_sees_functions_type_checking_and_relative_forms() -> None:
    source = """
import torch.nn
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ..ppo import PPOPlus
try:
    import wandb
except ImportError:
    wandb = None
def f():
    from . import losses
"""
    path = PACKAGE / "core" / "example.py"
    found = imports_below(ast.parse(source), path, at_module_level=True, only_for_types=False)
    assert [(i.module, i.at_module_level, i.only_for_types) for i in found] == [
        ("torch.nn", True, False),
        ("typing", True, False),
        ("sb3_pgplus.ppo", True, True),
        ("wandb", True, False),
        ("sb3_pgplus.core", False, False),
    ]


# --- which way imports point ------------------------------------------------------------------------------------------


def test_every_module_has_a_layer() -> None:
    unplaced = sorted({part_of(path) for path in python_files()} - LEVEL.keys())
    assert not unplaced, f"say in LAYERS of {Path(__file__).name} where these belong: {unplaced}"


def test_imports_point_down_only() -> None:
    upward = [
        f"{found.where}: {importer} imports {imported}, which is above it"
        for importer, imported, found in internal_imports()
        if LEVEL.get(imported, 0) > LEVEL.get(importer, len(LAYERS))  # without a layer: the test above says so
    ]
    assert not upward, "\n".join(upward)


def test_the_algorithms_do_not_import_each_other() -> None:
    sideways = [
        f"{found.where}: {importer} imports {imported}"
        for importer, imported, found in internal_imports()
        if importer in ALGORITHMS and imported in ALGORITHMS
    ]
    assert not sideways, "\n".join(sideways)


def test_no_part_of_the_package_imports_itself_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported, found in internal_imports():
        if not found.only_for_types:
            graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_core_imports_only_torch_and_the_standard_library() -> None:
    allowed = sys.stdlib_module_names | {"torch"}
    strangers = [
        f"{found.where}: {found.module}"
        for path in sorted((PACKAGE / "core").rglob("*.py"))
        for found in imports_of(path)
        if found.module.split(".")[0] not in allowed and not f"{found.module}.".startswith("sb3_pgplus.core.")
    ]
    assert not strangers, "\n".join(strangers)


# --- what importing costs ---------------------------------------------------------------------------------------------


def test_module_level_imports_come_with_the_default_installation() -> None:
    """Or, for an optional package, stand in the one part of the package that is about it."""
    known = sys.stdlib_module_names | DEFAULT_PACKAGES.keys() | {"sb3_pgplus"}
    missing = [
        f"{found.where}: {found.module}"
        for path in python_files()
        for found in imports_of(path)
        if found.at_module_level and not found.only_for_types
        if (package := found.module.split(".")[0]) not in known
        if part_of(path) not in OPTIONAL_PACKAGE_OWNERS.get(package, ())
    ]
    assert not missing, "\n".join(missing)


def test_packages_imported_anywhere_are_declared() -> None:
    known = sys.stdlib_module_names | DEFAULT_PACKAGES.keys() | OPTIONAL_PACKAGE_OWNERS.keys() | {"sb3_pgplus"}
    undeclared = [
        f"{found.where}: {found.module}"
        for path in python_files()
        for found in imports_of(path)
        if found.module.split(".")[0] not in known
    ]
    assert not undeclared, "\n".join(undeclared)


def test_importing_the_package_does_not_reach_for_heavy_or_optional_packages() -> None:
    # The finder also notices a `try: import wandb` where wandb is not installed; sys.modules would not.
    program = f"""
import json, sys
asked_for = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY}:
            asked_for.append(name)
sys.meta_path.insert(0, Watch())
import sb3_pgplus
print(json.dumps(asked_for))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


# --- what the metadata promises ---------------------------------------------------------------------------------------


def requirements() -> Iterator[tuple[str, Requirement]]:
    """Every requirement with the extra that asks for it, without the references of one extra to others."""
    groups = {"default": PROJECT["dependencies"]} | PROJECT["optional-dependencies"]
    for extra, lines in groups.items():
        for requirement in map(Requirement, lines):
            if canonicalize_name(requirement.name) != "sb3-pgplus":
                yield extra, requirement


def constraints() -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, lines))}


def pinned_version(pin: Requirement) -> Version:
    [specifier] = pin.specifier
    assert specifier.operator == "==", f"{pin} is not an exact version"
    return Version(specifier.version)


def test_the_default_packages_are_the_declared_dependencies() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert declared == set(DEFAULT_PACKAGES.values())


def test_the_build_reads_the_version_of_the_package() -> None:
    assert "version" in PROJECT["dynamic"]
    source = ast.parse((ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8"))
    [written] = [
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert written == sb3_pgplus.__version__
    assert str(Version(written)) == written


def test_constraints_pin_every_requirement_to_a_version_it_allows() -> None:
    pins = constraints()
    for extra, requirement in requirements():
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{extra}: {requirement} has no line in constraints.txt"
        assert requirement.specifier.contains(pinned_version(pin)), f"{extra}: {requirement} does not allow {pin}"


def test_constraints_name_plain_versions_that_every_platform_has() -> None:
    for pin in constraints().values():
        assert pinned_version(pin).local is None, f"{pin} exists only where that build is"
        assert pin.url is None


def test_the_extra_all_has_every_extra_but_dev() -> None:
    extras = PROJECT["optional-dependencies"]
    [everything] = map(Requirement, extras["all"])
    assert everything.extras == extras.keys() - {"all", "dev"}


def test_the_console_script_names_a_function_that_exists() -> None:
    module, _, function = PROJECT["scripts"]["sb3-pgplus"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_zoo_configs_are_found_and_travel_inside_the_wheel() -> None:
    files = sorted((ROOT / "zoo_configs").glob("*.yml"))
    assert files
    for path in files:
        assert configs.packaged_config(path.stem).samefile(path)
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"zoo_configs": "sb3_pgplus/zoo_configs"}


def test_every_algorithm_has_its_zoo_config() -> None:
    assert configs.algorithm_names()
    for name in configs.algorithm_names():
        assert configs.packaged_config(name).is_file(), name


def test_users_see_our_type_annotations() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.skipif(os.name != "posix", reason="executable bits are a POSIX matter")
@pytest.mark.parametrize("script", [".ci/run", "scripts/wheel_check.sh"])
def test_scripts_are_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
