"""Nothing that is loaded can run code, but compiled programs, which nobody else may write."""

import ast
from pathlib import Path

import jaxserve

PACKAGE = Path(jaxserve.__file__).parent
RUN_CODE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch", "yaml"}
# Programs are pickles (JAX knows no other form); the peers are what benchmarks compare with.
EXPECTED = {"runner/program_cache.py", "bench/peers/machine.py", "bench/peers/transformers_peer.py"}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_only_expected_files_import_what_unpickles() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        dangerous = imported(ast.parse(path.read_text())) & RUN_CODE
        if dangerous:
            found[path.relative_to(PACKAGE).as_posix()] = dangerous
    assert set(found) <= EXPECTED, found
    assert "runner/program_cache.py" in found


def test_arrays_are_loaded_without_pickles() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("allow_pickle") == "False", f"{path}: {ast.unparse(node)}"
            assert not (
                isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec")
            ), f"{path}: {ast.unparse(node)}"
