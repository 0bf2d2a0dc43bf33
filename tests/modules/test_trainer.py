import logging
import time

import lightning
import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler

from fedproxy.errors import ConfigError
from fedproxy.modules.trainer import adamw, attention, autocast_dtype, fit, is_slow, make_trainer, trainer_options


class Line(lightning.LightningModule):
    """Loss = w, so that every step's gradient is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(10.0))
        self.noise: list[float] = []

    def training_step(self, batch, batch_idx):
        self.noise.append(torch.rand(()).item())
        self.log("w", self.w.detach())
        return self.w * batch

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=1.0)


class Ones:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([torch.ones(()) for _ in range(self.count)])


def test_epochs_accumulation_and_clipping_are_wired():
    module = Line()
    trainer = make_trainer({"accelerator": "cpu"}, max_epochs=3, accumulate=2, max_grad_norm=0.25)
    fit(trainer, module, Ones(4))
    # 3 epochs of 2 steps; each mean gradient 1 is clipped to 0.25: 10 - 6 * 0.25 (norm + 1e-6 in the divisor).
    assert trainer.global_step == 6
    assert module.w.item() == pytest.approx(8.5, abs=1e-5)


def test_max_steps_ends_the_fit():
    trainer = make_trainer({"accelerator": "cpu"}, max_epochs=-1, max_steps=5)
    fit(trainer, Line(), Ones(2))
    assert trainer.global_step == 5


@pytest.mark.parametrize(
    "option",
    [{"deterministic": "warn"}, {"precision": 32}, {"limit_val_batches": 3}, {"devices": 1}, {"benchmark": None}],
)
def test_values_of_the_right_kind_pass(option):
    make_trainer({"accelerator": "cpu", **option})


def test_every_trainer_option_is_reachable():
    assert {"accelerator", "devices", "strategy", "precision", "deterministic", "profiler"} <= set(trainer_options())
    trainer = make_trainer({"accelerator": "cpu", "precision": "bf16-mixed", "log_every_n_steps": 7})
    assert trainer.precision == "bf16-mixed"
    assert trainer.log_every_n_steps == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precison": 16}, r"trainer\.precison: lightning\.Trainer has no such option; did you mean 'precision'"),
        ({"max_epochs": 3}, r"trainer\.max_epochs is set by client\.epochs"),
        ({"gradient_clip_val": 1.0}, r"set by client\.max_grad_norm"),
        ({"limit_train_batches": 2}, r"trainer\.limit_train_batches is set by data\.rows_per_task; use that instead"),
        ({"max_steps": 2}, r"trainer\.max_steps is set by client\.max_steps"),
        ({"use_distributed_sampler": False}, r"trainer\.use_distributed_sampler is set by trainer\.devices"),
        (
            {"callbacks": "a.B"},
            r"trainer\.callbacks must be a list of classes like \[my_plugin\.MyCallback\], got 'a\.B'",
        ),
        (
            {"callbacks": ["os.abort"]},
            r"trainer\.callbacks: os\.abort is not a Callback of .* plugin; write module\.Class",
        ),
        (
            {"callbacks": ["my_plugin.Mine"]},
            r"trainer\.callbacks: my_plugin\.Mine is not .*, and plugins=\[my_plugin\] on",
        ),
        (
            {"profiler": "my_plugin.Mine"},
            r"trainer\.profiler: my_plugin\.Mine is not a Profiler of Lightning's or of a p",
        ),
        ({"profiler": "simpel"}, r"^trainer: .*`profiler` .* one of \['simple', 'advanced'"),
        ({"precision": "7-bit"}, r"^trainer\.precision must be .*bf16-mixed or .*, got '7-bit'"),
        ({"deterministic": "abc"}, r"trainer\.deterministic must be true or false or null or warn, got 'abc'"),
        ({"detect_anomaly": 2}, r"trainer\.detect_anomaly must be true or false, got 2"),
        ({"log_every_n_steps": "often"}, r"trainer\.log_every_n_steps must be a whole number or null, got 'often'"),
        ({"check_val_every_n_epoch": True}, r"trainer\.check_val_every_n_epoch must be a whole number or null, got Tr"),
        ({"limit_val_batches": [1]}, r"trainer\.limit_val_batches must be a .*number or null, got \[1"),
        ({"gradient_clip_algorithm": 3}, r"trainer\.gradient_clip_algorithm must be a text or null, got 3"),
        ({"accelerator": "abacus"}, r"^trainer: .*abacus"),
        ({"logger": "csvv"}, r"trainer\.logger: unknown logger 'csvv'; did you mean 'csv'"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_trainer(options)
    assert "\n" not in str(error.value)


def test_csv_logger_writes_below_the_root(tmp_path):
    trainer = make_trainer({"accelerator": "cpu", "logger": "csv", "log_every_n_steps": 1}, root=tmp_path)
    fit(trainer, Line(), Ones(2))
    assert "10.0" in (tmp_path / "metrics.csv").read_text()


class Counting(lightning.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.batches = getattr(module, "batches", 0) + 1


class Profiling(SimpleProfiler):
    def summary(self):
        return "of my own"


def test_own_callbacks_and_profilers_are_reached_and_write_below_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, root = Line(), tmp_path / "root"
    options = {"accelerator": "cpu", "callbacks": [f"{__name__}.Counting"], "logger": True}
    fit(make_trainer({**options, "profiler": f"{__name__}.Profiling"}, root=root), module, Ones(3))
    assert module.batches == 3
    assert (root / "fit-profile.txt").read_text() == "of my own"
    fit(make_trainer({**options, "profiler": "simple"}, root=root / "named"), module, Ones(1))
    assert "optimizer_step" in (root / "named/fit-profile.txt").read_text()
    assert module.batches == 4
    assert [path.name for path in tmp_path.iterdir()] == ["root"]  # no lightning_logs in the working folder


def test_naming_a_class_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "not_named.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"not_named\.Mine is not a Callback"):
        make_trainer({"callbacks": ["not_named.Mine"]})


def test_a_fit_says_nothing_and_restores_log_levels(capfd, recwarn):
    before = logging.getLogger("lightning.pytorch").level
    fit(make_trainer({"accelerator": "cpu"}), Line(), Ones(1))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert logging.getLogger("lightning.pytorch").level == before


def test_a_seed_fixes_the_noise_of_the_fit_and_leaves_the_global_generator():
    first, second = Line(), Line()
    torch.manual_seed(0)
    wanted = torch.rand(())
    torch.manual_seed(0)
    fit(make_trainer({"accelerator": "cpu"}), first, Ones(3), seed=5)
    assert torch.rand(()) == wanted
    fit(make_trainer({"accelerator": "cpu"}), second, Ones(3), seed=5)
    assert first.noise == second.noise


def test_an_interrupt_reaches_the_caller():
    class Interrupted(Line):
        def training_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    import signal

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        fit(make_trainer({"accelerator": "cpu"}), Interrupted(), Ones(1))
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_fit_costs_little():
    fit(make_trainer({"accelerator": "cpu"}), Line(), Ones(1))
    started = time.process_time()  # CPU time, so that a busy machine does not fail it
    fit(make_trainer({"accelerator": "cpu"}), Line(), Ones(1))
    assert time.process_time() - started < 0.3  # 0.05 to 0.1 s


def test_nothing_large_outlives_a_fit():
    class Adam(Line):
        def configure_optimizers(self):
            return torch.optim.Adam([self.w])

    module, trainer = Adam(), make_trainer({"accelerator": "cpu"})
    fit(trainer, module, Ones(2))
    assert module.w.grad is None
    assert not trainer.optimizers[0].state


def test_bfloat16_is_slow_only_on_a_cpu_that_cannot_multiply_it(monkeypatch):
    for able in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda able=able: able)
        assert is_slow({"precision": "bf16-mixed"}, torch.device("cpu")) is not able
        assert not is_slow({"precision": "bf16-mixed"}, torch.device("cuda"))
        assert not is_slow({"precision": "32-true"}, torch.device("cpu"))
        assert not is_slow({}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("precision", "tokens", "flash"),
    [("32-true", 8, True), ("bf16-mixed", 8, False), ("bf16-mixed", 256, False), ("bf16-mixed", 257, True)],
)
def test_short_rows_in_bfloat16_on_a_cpu_leave_the_slow_flash_kernel_out(precision, tokens, flash):
    ids = torch.ones(2, tokens, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with autocast, attention(ids):
        assert torch.backends.cuda.flash_sdp_enabled() is flash
    assert torch.backends.cuda.flash_sdp_enabled()  # as before, afterwards


class Tuned(Line):
    def configure_optimizers(self):
        self.optimizer = adamw(self.trainer, [self.w], lr=0.5, weight_decay=0.0)
        return self.optimizer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_kernel_steps_and_gradients_are_clipped(precision):
    module = Tuned()
    seen = []
    module.on_after_backward = lambda: seen.append(module.w.grad.item())
    module.configure_gradient_clipping = lambda optimizer, gradient_clip_val, gradient_clip_algorithm: (
        module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm),
        seen.append(module.w.grad.item()),
    )
    fit(make_trainer({"accelerator": "cpu", "precision": precision}, max_grad_norm=0.25), module, Ones(2))
    assert module.optimizer.defaults["fused"]
    assert seen == pytest.approx([1.0, 0.25, 1.0, 0.25], abs=1e-5)
    assert module.w.item() == pytest.approx(9.0, abs=1e-4)


def test_the_dtype_of_mixed_precision():
    assert autocast_dtype({"precision": "bf16-mixed"}) == torch.bfloat16
    assert autocast_dtype({"precision": "16-mixed"}) == torch.float16
    assert autocast_dtype({"precision": "32-true"}) is autocast_dtype({}) is None
