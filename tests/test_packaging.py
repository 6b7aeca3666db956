"""What the wheel holds and needs: imports match the declared dependencies, and floors hold."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import eejax

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "absl": "absl-py", "yaml": "pyyaml"}
# protobuf comes with grpcio's and KServe's messages.
DISTRIBUTIONS |= {"google": "grpcio", "grpc": "grpcio", "prometheus_client": "prometheus-client"}
DISTRIBUTIONS |= {"orbax": "orbax-checkpoint", "tensorflow_datasets": "tensorflow-datasets"}


def imported(path):
    """The full names of all modules that a file imports, and of what it imports from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def third_party(folder):
    """The distributions that a folder imports."""
    return {name for path in (ROOT / folder).rglob("*.py") for name in third_party_of(path)}


def third_party_of(path):
    names = {name.split(".")[0] for name in imported(path)}
    names -= {*sys.stdlib_module_names, "eejax", "experiments", "configs"}
    return {DISTRIBUTIONS.get(name, name) for name in names}


def requirements(lines):
    """The distributions that requirement lines name."""
    return {re.split(r"[\[<>=; ]", line)[0] for line in lines}


# What needs the extra `serving`; its commands are listed without it.
SERVING = {
    "server": {"fastapi", "grpcio", "kserve", "orjson", "prometheus-client", "uvicorn"},
    "tiers": {"zstandard"},
}
# What needs the extra `ray`, beside `serving`.
RAY = {"server": {"ray"}}
# What needs the extra `artifact`; the runtime needs nothing else but NumPy.
ARTIFACT = {
    "artifact": {"flatbuffers"},
    "onnx": {"onnx", "onnxruntime"},
    "runtime": {"onnxruntime"},
    "offline": {"pillow"},
}
# What reads large data sets, named where it is missing.
OFFLINE = {"array_record", "pyarrow", "tensorflow-datasets"}


def test_the_package_imports_what_it_declares_and_declares_what_it_imports():
    found = {part: set() for part in FLOOR}
    for path in (ROOT / "eejax").rglob("*.py"):
        part = path.relative_to(ROOT / "eejax").with_suffix("").parts[0]
        found.setdefault(part, set()).update(third_party_of(path))
    for part, extra in [*ARTIFACT.items(), *SERVING.items(), *RAY.items()]:
        assert extra <= found[part]
        found[part] -= extra
    assert found["runtime"] == {"numpy"}
    assert found["offline"] == {"numpy", *OFFLINE}
    found["offline"] -= OFFLINE
    assert requirements(EXTRAS["offline"]) == {"eejax", *OFFLINE}
    # Matplotlib is named where it is missing.
    found["planning"] -= {"pyyaml", "matplotlib"}
    assert requirements(EXTRAS["planning"]) == {"eejax", "pyyaml"}
    assert set().union(*found.values()) - {"jaxlib"} == requirements(PROJECT["dependencies"])
    assert set().union(*ARTIFACT.values()) == requirements(EXTRAS["artifact"])
    assert {"eejax"}.union(*SERVING.values()) == requirements(EXTRAS["serving"])
    assert {"eejax"}.union(*RAY.values()) == requirements(EXTRAS["ray"])


def test_the_experiments_import_what_the_package_and_their_extra_declare():
    declared = requirements([*PROJECT["dependencies"], *EXTRAS["experiments"]])
    # Contenders of two benchmarks, which name them where they are missing.
    others = {"jaxlib", "torch", "earlyon", "tensorflow"}
    # One experiment needs the extra `serving`, and says so.
    others |= {"grpcio", "kserve"}
    # Backends of the pool, and buckets, which are named where they are missing.
    others |= requirements(EXTRAS["cluster"]) | {"ray"}
    assert third_party("experiments") | third_party("configs") <= declared | others
    assert "eejax[artifact,docs,experiments,serving]" in EXTRAS["dev"]
    assert "eejax[cluster,offline,planning,ray]" in EXTRAS["dev"]


def test_the_package_imports_nothing_of_the_experiments():
    for path in (ROOT / "eejax").rglob("*.py"):
        names = {name.split(".")[0] for name in imported(path)}
        assert not names & {"experiments", "configs", "tests"}, path


# Floors of the package, the ground first, as docs/architecture.md lists them.
FLOORS = (
    ("network", "exits", "compiling", "runtime", "serving"),
    (
        *("cost", "trace", "gates", "links", "backbone", "cascades", "checkpoint", "stablehlo"),
        *("tiers", "offline"),
    ),
    ("models", "policies", "benchmark", "server"),
    ("adapters", "pretrained", "evaluation", "training"),
    ("selection", "inference"),
    ("bundle", "keeping", "onnx", "planning"),
    ("artifact",),
    ("commands",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def test_imports_never_go_up():
    for path in (ROOT / "eejax").rglob("*.py"):
        part = path.relative_to(ROOT / "eejax").with_suffix("").parts[0]
        if part == "__init__":
            continue
        inner = [name.split(".") for name in imported(path) if name.startswith("eejax.")]
        above = {words[1] for words in inner if FLOOR[words[1]] > FLOOR[part]}
        assert not above, f"{path} imports {above} from a floor above"


def test_the_architecture_lists_the_floors():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*) \|$", page, re.MULTILINE)
    listed = [tuple(re.findall(r"`(\w+)`", names)) for _, names in rows]
    assert listed[: len(FLOORS)] == list(FLOORS)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, eejax; eejax.compact; print(*{n.split('.')[0] for n in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"flax", "orbax", "matplotlib", "pandas", "sklearn", "tyro", "rich", "experiments"}
    assert not heavy & set(run.stdout.split())


def test_a_public_name_is_imported_when_it_is_first_used():
    code = "import sys, eejax; print('numpy' in sys.modules); print(len(eejax.__all__))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", str(len(eejax.__all__))]
    stub = ast.parse((ROOT / "eejax" / "__init__.pyi").read_text())
    (listed,) = [n.value for n in stub.body if isinstance(n, ast.Assign)]
    assert sorted(ast.literal_eval(listed)) == sorted(eejax.__all__)
    for name in eejax.__all__:
        assert getattr(eejax, name) is not None
    assert set(eejax.__all__) <= set(dir(eejax))
    for name in ("nothing", "_nothing"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(eejax, name)


PACKAGES = ["eejax"] + [
    module.name for module in pkgutil.walk_packages(eejax.__path__, "eejax.") if module.ispkg
]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_public_name_hides_a_submodule(name):
    """`import eejax.x as c` gives a module, whatever `eejax` exports."""
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__):
        assert inspect.ismodule(getattr(package, module.name, inspect)), module.name
