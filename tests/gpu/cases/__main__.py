"""python -m gpu.cases MODULE.FUNCTION JSON: calls the function with these arguments and prints what it returns."""

from __future__ import annotations

import importlib
import json
import sys

from gpu.alone import RESULT

if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(".")
    found = getattr(importlib.import_module(f"gpu.cases.{module}"), function)(**json.loads(sys.argv[2]))
    print(f"\n{RESULT}{json.dumps(found)}", flush=True)
