"""What of the server's environment a process that trains clients gets: what it needs to compute, and no secrets."""

import os
import sys
from collections.abc import Mapping

_NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "TZ", "LANG", "LANGUAGE", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "XDG_CACHE_HOME", "SYSTEMROOT"),
        *("PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE", "PYTHONUTF8", "PYTHONFAULTHANDLER"),
    }
)
_PREFIXES = (
    *("LC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "NCCL_", "GLOO_"),
    *("HIP_", "ROCR_", "HSA_", "ROCM_", "ZE_", "TORCH", "PYTORCH_", "TRITON_", "HF_", "TRANSFORMERS_", "TOKENIZERS_"),
    *("BNB_", "BITSANDBYTES_", "FEDPROXY_"),
)
_SECRET = frozenset(
    {"TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "KEY", "KEYS", "CREDENTIAL", "CREDENTIALS", "AUTH"}
)
"""Words of a variable's name that keep it back, whatever it begins with."""


def client_environment(threads: int, server: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process that trains clients.

    Tokens, passwords, proxies and whatever else is not on the list stay with the server. A plugin that needs a
    variable of its own gets it under a name that begins with ``FEDPROXY_``.

    Args:
        threads: CPU threads inside an operation.
        server: The server's environment; this process's by default.
    """
    kept = {name: value for name, value in (os.environ if server is None else server).items() if _may_pass(name)}
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}


def _may_pass(name: str) -> bool:
    return (name in _NAMES or name.startswith(_PREFIXES)) and _SECRET.isdisjoint(name.upper().split("_"))
