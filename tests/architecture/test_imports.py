"""Who may import whom (the floors of the house), and what importing must not bring along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The longest matching prefix rules. Every module may import its own package.
ALLOWED: dict[str, set[str]] = {
    "hydra.errors": set(),
    "hydra.kernels": {"hydra.errors"},
    "hydra.layers": {"hydra.kernels", "hydra.errors"},
    "hydra.attention": {"hydra.layers", "hydra.kernels", "hydra.errors"},
    "hydra.model": {"hydra.attention", "hydra.routing", "hydra.layers", "hydra.kernels", "hydra.errors"},
    "hydra.compare": {"hydra.errors"},
    "hydra.convert": {"hydra.model", "hydra.attention", "hydra.errors"},
    "hydra.data": {"hydra.errors"},
    "hydra.optim": {"hydra.errors"},
    "hydra.runtime": {"hydra.errors"},
    "hydra.notebook": {"hydra.runtime", "hydra.compare", "hydra.errors"},
    "hydra.testing": {"hydra"},
    "scripts": {"hydra"},
}
TORCH_FREE = (
    "hydra.compare",
    "hydra.errors",
    "hydra.runtime",
    "hydra.data",
    "hydra.notebook",
    "hydra.attention",
    "scripts.config",
    "papermill",  # loads scripts.papermill_engine, its entry point
)


def modules() -> dict[str, Path]:
    found = {}
    for package in ("hydra", "scripts"):
        for path in (ROOT / package).rglob("*.py"):
            if "tests" not in path.parts:
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(module: str) -> str | None:
    matching = [floor for floor in ALLOWED if module == floor or module.startswith(f"{floor}.")]
    return max(matching, key=len) if matching else None


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down_only(module: str) -> None:
    if module == "hydra":
        return
    floor = floor_of(module)
    assert floor is not None, f"{module} stands on no floor; add it to ALLOWED with what it may import"
    for name in imported(modules()[module]):
        if name.split(".")[0] not in ("hydra", "scripts"):
            continue
        if name == "hydra" and module != "scripts":
            pytest.fail(f"{module} imports the bare package hydra; name the module")
        assert is_within(name, floor) or any(is_within(name, below) for below in ALLOWED[floor]), (
            f"{module} imports {name}"
        )


def test_backends_do_not_import_each_other() -> None:
    for module, path in modules().items():
        if module.startswith("hydra.attention.backends."):
            own = ".".join(module.split(".")[:4])
            for name in imported(path):
                assert not name.startswith("hydra.attention.backends.") or is_within(name, own), f"{module}: {name}"


def test_triton_is_imported_in_triton_folders_only() -> None:
    for module, path in modules().items():
        if "_triton" not in path.parts:
            assert not any(is_within(name, "triton") for name in imported(path)), module


def test_tests_helpers_are_not_imported_by_the_product() -> None:
    for module, path in modules().items():
        if not is_within(module, "hydra.testing"):
            assert not any(is_within(name, "hydra.testing") for name in imported(path)), module


def test_importing_for_a_check_of_parameters_needs_no_torch() -> None:
    code = f"import sys\nfor name in {TORCH_FREE!r}: __import__(name)\nassert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_module_of_a_clean_clone_imports_without_gpu_and_triton(tmp_path: Path) -> None:
    """The files git knows, and no others: an ignore rule that swallows a package shows here."""
    files = subprocess.run(
        ["git", "ls-files", "hydra", "scripts"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    # What lies under _triton/ is loaded when it is asked for, after dispatch has seen that triton is there.
    names = [name for name in sorted(modules()) if not name.endswith(".die_with_parent") and "._triton." not in name]
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "for absent in ('triton', 'flash_attn', 'transformers'): sys.modules[absent] = None\n"
        "import importlib, warnings, papermill\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        f"for name in {names!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin"}
    )


def test_a_folder_called_hydra_in_the_working_directory_is_not_the_package(tmp_path: Path) -> None:
    """As beside a checkout of that name."""
    (tmp_path / "hydra").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import scripts, hydra; print(hydra.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == str(ROOT / "hydra" / "__init__.py"), done.stderr


def test_hydra_core_in_the_way_is_said_plainly(tmp_path: Path) -> None:
    """Facebook's hydra-core brings a package of the same name."""
    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra" / "__init__.py").write_text("")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import scripts"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "hydra-core" in done.stderr
    assert "uninstall" in done.stderr
