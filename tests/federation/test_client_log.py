"""A client's failure in our own words: what quotes a row stays in the client's own log."""

import os
from pathlib import Path

import pytest

from fedproxy.data.rows import Row
from fedproxy.data.tokenisation import tokenise
from fedproxy.errors import ClientError, DataError
from fedproxy.federation.client.log import told
from fedproxy.federation.engines.environment import client_environment
from fedproxy.modules.trainer import check_trainer_options
from fedproxy.names import file_stem
from fedproxy.strategies.regularizers.base import matching

SECRET = "patient 4711"


def raised(work):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        work()
    return caught.value


def fail(error):
    raise error


class ForeignError(DataError):
    pass


class _UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError(SECRET)


QUOTING = [
    (lambda: fail(ValueError(SECRET)), "ValueError"),
    (lambda: {}[SECRET], "KeyError"),
    (lambda: fail(ClientError(SECRET)), "ClientError"),  # a plugin's: not raised by this package
    (lambda: fail(ForeignError(SECRET)), "ForeignError"),
    (lambda: fail(OSError(5, SECRET)), "OSError"),
    (lambda: Path(SECRET).read_text(), "FileNotFoundError: No such file or directory"),
    (lambda: fail(type(SECRET + "\x1b[31m" + "x" * 1000, (Exception,), {})()), SECRET),
    (lambda: fail(_UnprintableError()), "_UnprintableError"),
]


@pytest.mark.parametrize(("work", "kind"), QUOTING)
def test_foreign_errors_are_told_by_their_kind_alone(tmp_path, work, kind):
    reason = told(raised(work), "ward [/icu]", 3, str(tmp_path / "checkpoints/logs"))
    log = tmp_path / "checkpoints/logs" / f"{file_stem('ward [/icu]')}.log"
    assert reason.startswith(kind)
    assert reason.endswith(f"; details in the client's log checkpoints/logs/{log.name}")
    assert reason.isprintable()
    assert len(reason) < 300
    assert SECRET not in reason or kind == SECRET  # a class may be called anything
    assert "round 3, client 'ward [/icu]':" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o777 == 0o700


def test_our_own_rows_errors_are_not_quoted():
    class Tokenizer:
        bos_token = eos_token = bos_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [[] for _ in texts]}

    error = raised(lambda: tokenise([Row("x", SECRET, "s", "k")], Tokenizer(), max_input_tokens=1, max_target_tokens=1))
    assert told(error, "ann", 1, None).endswith("; no log is kept")
    assert SECRET not in told(error, "ann", 1, None)


def test_our_own_words_about_what_is_no_data_are_kept(tmp_path):
    wrong = raised(lambda: check_trainer_options({"max_epoch": 3}))
    assert told(wrong, "ann", 1, str(tmp_path)).startswith("trainer.max_epoch: lightning.Trainer has no such option")
    assert told(raised(lambda: matching({"w": None}, {}, "anchor")), "ann", 1, None).startswith("parameter 'w' has no")


def test_a_log_is_bounded(tmp_path):
    for _ in range(40):
        told(raised(lambda: fail(ValueError("x" * 10**6))), "ann", 1, str(tmp_path))
    (log,) = tmp_path.iterdir()
    assert log.stat().st_size < 1.2e6


def test_a_log_that_cannot_be_written_is_said_and_no_trap(tmp_path):
    log = tmp_path / f"{file_stem('ann')}.log"
    os.mkfifo(log)
    error = raised(lambda: fail(ValueError(SECRET)))
    assert told(error, "ann", 1, str(tmp_path)).startswith("ValueError; its log cannot be written (")
    log.unlink()
    log.symlink_to(tmp_path / "elsewhere")
    assert told(error, "ann", 1, str(tmp_path)).startswith("ValueError; its log cannot be written (")
    assert not (tmp_path / "elsewhere").exists()


PASSED = {
    **{"PATH": "/bin", "HOME": "/root", "LANG": "C", "LC_ALL": "C", "TMPDIR": "/tmp", "LD_LIBRARY_PATH": "/lib"},
    **{
        "CUDA_VISIBLE_DEVICES": "1",
        "OMP_PROC_BIND": "1",
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/hf",
        "HF_HUB_OFFLINE": "1",
    },
    **{"TORCH_LOGS": "x", "TORCHINDUCTOR_CACHE_DIR": "/c", "PYTORCH_CUDA_ALLOC_CONF": "x", "FEDPROXY_CACHE": "/x"},
    **{"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"},
}
KEPT_BACK = {
    **{"HF_TOKEN": "s", "HF_HUB_TOKEN": "s", "HUGGING_FACE_HUB_TOKEN": "s", "HF_TOKEN_PATH": "s", "AWS_SECRET": "s"},
    **{"AWS_ACCESS_KEY_ID": "s", "WANDB_API_KEY": "s", "MLFLOW_TRACKING_PASSWORD": "s", "GITHUB_TOKEN": "s"},
    **{"FEDPROXY_API_KEY": "s", "HTTPS_PROXY": "http://me:pw@x", "http_proxy": "s", "SSH_AUTH_SOCK": "s", "PWD": "/s"},
    **{"SLURM_NTASKS": "2", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "PIP_INDEX_URL": "https://u:p@x"},
}


def test_a_clients_process_gets_what_it_computes_with_and_no_secret():
    got = client_environment(3, {**PASSED, **KEPT_BACK, "OMP_NUM_THREADS": "8"})
    assert {name: value for name, value in got.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")} == PASSED
    assert got["OMP_NUM_THREADS"] == "3"
