import subprocess
import sys
from importlib import metadata

import pytest

import fedproxy
from fedproxy.reporting import model_card, provenance, with_means
from fedproxy.reporting.provenance import PACKAGES, git_commit


def test_versions_are_those_installed():
    found = provenance(target_sha256="ab").versions
    assert found["fedproxy"] == fedproxy.__version__
    assert {name: found[name] for name in PACKAGES} == {name: metadata.version(name) for name in PACKAGES}


def test_gathering_imports_nothing_heavy():
    code = (
        "import sys; from fedproxy.reporting import provenance; provenance(); "
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_hardware_names_cpu_cores_and_memory():
    found = provenance().hardware
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28


def test_commit_is_none_outside_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "fedproxy" / "__init__.py"
    package.parent.mkdir(parents=True)
    (tmp_path / ".git").mkdir()  # a user's own repository around the environment is not FedProxy's
    monkeypatch.setattr(fedproxy, "__file__", str(package))
    assert git_commit() is None


def test_commit_of_a_checkout_says_when_files_were_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "fedproxy").mkdir()
    (tmp_path / "fedproxy" / "__init__.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("-c", "core.hooksPath=/dev/null", "commit", "-q", "-m", "start")
    monkeypatch.setattr(fedproxy, "__file__", str(tmp_path / "fedproxy" / "__init__.py"))
    assert git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "fedproxy" / "__init__.py").write_text("changed = True\n")
    assert git_commit() == git("rev-parse", "HEAD") + "-dirty"


SCORES = with_means(
    {
        model: {"arc_easy": {"acc_norm": value, "acc_norm_stderr": 0.02, "n": 150}}
        for model, value in (("target", 0.385), ("proxy", 0.337), ("proxy_tuned", 0.41), ("fused", 0.477))
    }
)


def test_proxy_card_names_neither_target_nor_method_nor_its_scores():
    card = model_card(
        "proxy", SCORES, method="fedproxy-secret", base_model="Owner/SecretLM", parameters=7, notes=("SecretLM, 4-bit",)
    )
    for word in ("target", "base_model", "secret", "block", "sha256", "38.5", "47.7"):
        assert word not in card.lower()
    assert "33.7 ± 2.0" in card


def test_fused_card_has_both_scores_base_model_and_notes():
    card = model_card("fused", SCORES, base_model="Owner/LM", parameters=1_234_567, notes=("4-bit source",))
    assert 'base_model: "Owner/LM"' in card
    assert "38.5 ± 2.0" in card
    assert "47.7 ± 2.0 (+9.2)" in card
    assert "1,234,567" in card
    assert "4-bit source" in card


def test_card_says_what_its_numbers_are():
    scores = with_means({"fused": {"notes": {"answer_nll": 2.5, "n": 20}}})
    card = model_card("fused", scores)
    assert "nats per token of the right answers, lower is better" in card
    assert "er cent" not in card


def test_card_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be proxy or fused, got 'adapter'"):
        model_card("adapter", {})
