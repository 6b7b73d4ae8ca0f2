"""With this folder on PYTHONPATH, imports of pipeline.engine.vllm_engine get the engine beside this file."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path


class _ConstantEngine:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "pipeline.engine.vllm_engine":
            return None
        return importlib.util.spec_from_file_location(name, Path(__file__).with_name("engine.py"))


sys.meta_path.insert(0, _ConstantEngine)
