"""What hatchling does beside packing: the README of a package index, and wheels that carry compiled kernels.

Wheels that carry compiled kernels: ``ANABRANCH_BUILD_KERNELS=1 python -m build --wheel``.

Otherwise, and for editable installs, the wheel is pure Python and kernels are compiled where they run. What compiles them is the
package's own code, of which this part needs nothing but Python.
"""

import os
import platform
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

SWITCH = "ANABRANCH_BUILD_KERNELS"
LINK = re.compile(r"(?P<before>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)\s]+)\)")


def readme_of_an_index(text: str, site: str) -> str:
    """The README as a package index shows it, where no file lies beside it: links into docs/ lead to ``site``, others are their text."""

    def linked(found: re.Match[str]) -> str:
        target, _, anchor = found["target"].partition("#")
        if "://" in target or not target:
            return found[0]
        if not target.startswith("docs/"):
            return found["text"]
        page = target.removeprefix("docs/")
        page = f"{page.removesuffix('.md')}/" if page.endswith(".md") else page
        return f"{found['before']}{site}/{page}{f'#{anchor}' if anchor else ''})"

    return LINK.sub(linked, text)


class Readme(MetadataHookInterface):
    """The README of what is built."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling for the fields that are dynamic."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        site = f"{metadata['urls']['Documentation']}/en/latest"
        metadata["readme"] = {"content-type": "text/markdown", "text": readme_of_an_index(text, site)}


class Kernels(BuildHookInterface):
    """Compiles one library for each level of this family of processors into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it packs the wheel. Fails the build if a library cannot be compiled."""
        if version == "editable" or os.environ.get(SWITCH, "0") in ("", "0"):
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from anabranch import native

        compiler = native.find_compiler()
        levels = [level for level in native.LEVELS if level.machine == platform.machine()]
        if not levels:
            raise RuntimeError(f"{SWITCH}: no kernels are known for {platform.machine()}; build the wheel without it")
        place = native.SHIPPED.relative_to(Path(self.root) / "src")
        self._folder = tempfile.TemporaryDirectory(prefix="anabranch-kernels-")
        folder = Path(self._folder.name)
        for level in levels:
            self.app.display_info(f"compiling the kernels for {level.name} with {compiler.name}")
            path = native.compile_kernels(level, folder, compiler).path
            for made in (path, path.with_suffix(".json")):
                build_data["force_include"][str(made)] = str(place / made.name)
        # No Python is linked: one wheel for every version, but for this system alone.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is packed."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
