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


def functions(node):
    """Yield every public function and method below a module or a public class."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield from functions(child) if isinstance(child, ast.ClassDef) else [child]


def errors(node):
    """Yield the names of the errors that a function raises itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            yield ast.unparse(child.exc.func)
        elif not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield from errors(child)


def test_a_public_function_that_raises_says_so():
    silent, raising = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in functions(ast.parse(path.read_text())):
            text = ast.get_docstring(function) or ""
            own = {name for name in errors(function) if name[0].isupper()} - {"NotImplementedError"}
            raising += bool(own)
            if own and "Raises:" not in text and not any(name in text for name in own):
                silent.append(f"{path.relative_to(PACKAGE)}: {function.name} raises {', '.join(sorted(own))}")
    assert raising > 200
    assert not silent
