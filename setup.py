"""What pyproject.toml can't say: files of the repository's root that `refcache new` writes go into the wheel as well.

They stand in the repository once. An editable installation finds them there (pipeline/project/sources.py).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ["params.yaml", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots/cells.json", ".dvcignore"]
FILES += [".gitignore", "data/input/README.md"]


class BuildWithProjectFiles(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file in [*FILES, *map(str, Path("presets").glob("*.yaml"))]:
            target = Path(self.build_lib, "pipeline/project/files", file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildWithProjectFiles})
