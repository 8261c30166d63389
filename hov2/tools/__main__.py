"""`python -m hov2.tools`: the list of the tools, each with what it is for."""

import ast
import pkgutil
from importlib.util import find_spec
from pathlib import Path

from hov2 import tools


def main() -> None:
    """Print how each tool is called and the first line of its docstring; no tool is imported for it."""
    for module in pkgutil.iter_modules(tools.__path__, prefix="hov2.tools."):
        if not module.name.endswith(".__main__"):
            source = Path(find_spec(module.name).origin).read_text(encoding="utf-8")
            first_line = ast.get_docstring(ast.parse(source)).splitlines()[0]
            print(f"python -m {module.name}\n    {first_line}")


if __name__ == "__main__":
    main()
