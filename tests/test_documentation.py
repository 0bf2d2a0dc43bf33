"""Everything public is documented: ruff's D rules see modules, classes and functions, and these tests what they leave.

The keys of recipes are counted in tests/config/test_help.py.
"""

import ast
from pathlib import Path

import fedproxy

PACKAGE = Path(fedproxy.__file__).parent


def constructors():
    """Return every public class with a constructor of its own: where it is, and its parameters with their texts."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    text = f"{ast.get_docstring(node)}\n{ast.get_docstring(method)}"
                    names = [own.arg for own in (*method.args.args[1:], *method.args.kwonlyargs)]
                    yield f"{path.relative_to(PACKAGE)}: {node.name}", names, text


def test_every_parameter_of_a_public_constructor_is_documented():
    found = list(constructors())
    assert len(found) > 70
    missing = [f"{where}({name})" for where, names, text in found for name in names if f"    {name}: " not in text]
    assert not missing
