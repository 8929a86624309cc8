"""`AdapterFile`: the tensors beside an adapter_config.json, sorted by the layers that they are of, and read with care."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from anabranch.bounds import shown
from anabranch.errors import CheckpointError
from anabranch.lm.tensors import FLOATS, PickleFiles, SafetensorsFiles, TensorSource

__all__ = ["INNER", "PICKLE", "PREFIX", "WEIGHTS", "AdapterFile", "Sorted", "check_numbers"]

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
# Characters of a tensor's name, which errors tell, and how great a number may be: beyond it nothing that is computed with it is one.
_MOST_NAME, _MOST = 500, 1e30
# What peft calls a layer that another stands around.
INNER = ".base_layer"
# VeLoRA's vectors, by which gradients alone are computed: what comes out is plain LoRA.
_OF_GRADIENTS = ".lora_velora_embed"
# What an adapter may hold that is not of its kind, by what is in the names, and what that is.
_OTHER = {
    ".lora_magnitude_vector": "DoRA, which adapter_config.json does not say (use_dora)",
    ".lora_embedding_": "adapters of embeddings, which cannot be computed here",
    ".lora_A.": "parts of lora_A, which cannot be computed here",
    ".lora_B.": "parts of lora_B, which cannot be computed here",
    ".token_adapter.": "single learned tokens, which cannot be computed here",
    ".ia3_l": "IA3, which adapter_config.json does not say (peft_type)",
    ".poly_": "Poly, which adapter_config.json does not say (peft_type)",
    "prompt_embeddings": "virtual tokens, which adapter_config.json does not say (peft_type)",
}


@dataclass
class Sorted:
    """Names of tensors as they are stored.

    Attributes:
        layers: by module, and by what stands behind its name.
        saved: those that are brought whole, by the names that transformers gives them.
    """

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)


class AdapterFile:
    """The tensors in ``folder``.

    Attributes:
        path: of the file, for messages.

    Raises CheckpointError where there is none, it cannot be read, or tensors have names that are none of modules.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._source = _open(folder)
        odd = next((name for name in self.names if len(name) > _MOST_NAME or not name.isprintable()), None)
        if odd is not None:
            raise CheckpointError(
                f"{self.path} holds a tensor called {shown(odd)}; a name has at most {_MOST_NAME} characters, none of which is for control"
            )

    @property
    def names(self) -> Collection[str]:
        """As they are stored."""
        return self._source.names

    def sorted(self, endings: Collection[str]) -> Sorted:
        """The tensors of layers, whose names have one of ``endings`` behind the module, and those that are brought whole.

        What only peft's gradients need is left out.

        Raises CheckpointError for tensors of another kind of adapter, and one tensor under two names.
        """
        pattern = re.compile(rf"(?P<module>.+)\.(?P<ending>{'|'.join(map(re.escape, endings))})")
        found = Sorted()
        for stored in sorted(self.names):
            name = stored.removeprefix(PREFIX)
            if name.endswith(_OF_GRADIENTS):
                continue
            match = pattern.fullmatch(name)
            if match:
                _put(found.layers.setdefault(match["module"], {}), match["ending"], stored, self.path)
                continue
            other = next((what for part, what in _OTHER.items() if part in name), None)
            if other is not None:
                raise CheckpointError(f"{self.path} holds {shown(stored)}: {other}")
            whole = name.replace(".modules_to_save.", ".").replace(f"{INNER}.", ".")
            _put(found.saved, whole, stored, self.path)
        return found

    def read(self, name: str) -> Tensor:
        """A tensor of finite numbers, as a copy that needs the file no longer.

        Raises CheckpointError for one that is no plain tensor of floats, or holds NaN, infinity or numbers near that.
        """
        source, where = self._source, self.path
        if source.dtype(name) not in FLOATS:
            kind = str(source.dtype(name)).removeprefix("torch.")
            raise CheckpointError(
                f"{shown(name)} in {where} is stored as {kind}; it must be float32, float16 or bfloat16"
            )
        tensor = source.read(name)
        # A pickled file of a few bytes may say a tensor of any size: one number for all places, or none.
        is_plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested
        if not is_plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise CheckpointError(
                f"{shown(name)} in {where} is no plain tensor with a number for each of its places; save it again, as safetensors"
            )
        tensor = tensor.clone()
        check_numbers(name, tensor, where)
        return tensor

    def read_all(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """`read` of each of the values, by key."""
        return {key: self.read(name) for key, name in names.items()}


def check_numbers(name: str, tensor: Tensor, where: Path | str) -> None:
    """Raise CheckpointError where a tensor holds NaN, infinity or numbers near that."""
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{shown(name)} in {where} holds NaN or infinity; the adapter is damaged, or its training failed"
        )
    greatest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    if greatest > _MOST:
        raise CheckpointError(
            f"{shown(name)} in {where} holds a number of the size {greatest:.3g}; the adapter is damaged, or its training failed: "
            f"numbers are at most {_MOST:g}"
        )


def _put(found: dict[str, str], name: str, stored: str, where: Path) -> None:
    before = found.setdefault(name, stored)
    if before != stored:
        raise CheckpointError(f"{where} holds {shown(stored)} and {shown(before)}, which are of one tensor")


def _open(folder: Path) -> tuple[Path, TensorSource]:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS, SafetensorsFiles([folder / WEIGHTS])
    if (folder / PICKLE).is_file():
        return folder / PICKLE, PickleFiles([folder / PICKLE])
    raise CheckpointError(f"no weights in {folder} (looked for {WEIGHTS} and {PICKLE})")
