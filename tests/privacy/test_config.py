import pytest

from fedproxy.config import load_config
from fedproxy.errors import ConfigError
from fedproxy.pipeline.checks import check_components
from fedproxy.pipeline.privacy import check_budget, ledger_folder, promised
from fedproxy.privacy.accounting import Release, spent

EXAMPLE = ("privacy.unit=example", "privacy.epsilon=8", "privacy.delta=1e-5", "privacy.accountant=rdp")
CLIENT = ("privacy.unit=client", *EXAMPLE[1:])
FEDAVG = ("aggregator.name=fedavg",)
AT_SERVER = (*CLIENT, *FEDAVG, "privacy.noise_at=server")


def config(*overrides):
    return load_config(["recipe=fedproxy_tiny", "output_dir=runs/none", *overrides])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["privacy.epsilon=8"], r"privacy.unit must be example or client where privacy.epsilon is set, got none"),
        (["privacy.unit=example"], r"privacy.epsilon or privacy.noise_multiplier must be set"),
        (["privacy.unit=example", "privacy.epsilon=8"], r"privacy.delta must be set, .* number of rows.* got null"),
        (["privacy.unit=client", "privacy.epsilon=8"], r"privacy.delta must be set, .* number of clients"),
        ([*CLIENT, "privacy.delta=1"], r"privacy.delta must be in \(0, 1\), got 1"),
        ([*CLIENT, "privacy.epsilon=0"], r"privacy.epsilon must be positive, or null, got 0"),
        ([*CLIENT, "privacy.epsilon=.inf"], r"privacy.epsilon must be finite, got inf"),
        (
            [*CLIENT, "privacy.epsilon=1e300"],
            r"privacy.epsilon must be at most 1000, or null for no bound, got 1e\+3",
        ),
        ([*CLIENT, "privacy.noise_multiplier=1e300"], r"privacy.noise_multiplier must be at most 1e\+06, got 1e\+300"),
        ([*CLIENT, "privacy.clip=0"], r"privacy.clip must be positive, or null, got 0"),
        ([*CLIENT, "privacy.clip=null"], r"privacy.clip must be a number where there is noise"),
        ([*CLIENT, "privacy.noise_multiplier=0"], r"privacy.noise_multiplier must be above 0 to keep privacy.epsilon"),
        ([*CLIENT, "privacy.noise_multiplier=-1"], r"privacy.noise_multiplier must be at least 0, got -1"),
        ([*CLIENT, "privacy.sampling=poisson"], r"privacy.sampling must be one of auto, none, without_replacement"),
        ([*EXAMPLE, "privacy.sampling=none"], r"privacy.sampling must be one of auto, poisson with"),
        ([*EXAMPLE, "privacy.noise_at=server"], r"privacy.noise_at must be client with privacy.unit=example"),
        ([*CLIENT, "privacy.sampling=without_replacement"], r"privacy.sampling must be none where clients add the"),
        (
            [*CLIENT, "privacy.sampling=without_replacement", "privacy.noise_at=server", "privacy.accountant=pld"],
            r"privacy.accountant must be rdp with privacy.sampling=without_replacement",
        ),
        ([*CLIENT, "privacy.quantile=1"], r"privacy.quantile must be in \(0, 1\), or null, got 1"),
        ([*EXAMPLE, "privacy.quantile=0.5"], r"privacy.quantile must be null with privacy.unit=example, got 0.5"),
        (["privacy.quantile=0.5"], r"privacy.unit must be example or client where privacy.quantile is set, got none"),
        (
            ["privacy.unit=client", "privacy.quantile=0.5", "privacy.noise_multiplier=0", "privacy.clip=null"],
            r"privacy.clip must be a number with privacy.quantile, got null",
        ),
        (
            [*CLIENT, "privacy.quantile=0.5", "privacy.secure_aggregation=true"],
            r"privacy.quantile must be null with privacy.secure_aggregation, got 0.5",
        ),
        ([*EXAMPLE, "privacy.physical_batch=0"], r"privacy.physical_batch must be at least 1, or null, got 0"),
        (["parts.privacy.clip=1"], r"parts.privacy comes with the node privacy; use privacy.unit"),
    ],
)
def test_a_node_that_promises_nothing_whole_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*EXAMPLE, "aggregator.name=fisher"], r"privacy.unit=example does not account for the statistics"),
        (
            [*CLIENT, "aggregator.name=fedsa_lora"],
            r"privacy.unit=client covers updates that are merged, .* 'fedsa_lora'",
        ),
        ([*CLIENT, "aggregator.name=none"], r"privacy.unit=client covers updates that are merged, .* 'none'"),
        ([*CLIENT, "parts.clip_noise.clip=1"], r"parts.clip_noise adds noise that nobody accounts for"),
        ([*CLIENT, "federation.sampling=weighted"], r"federation.sampling must be uniform with privacy.unit=client"),
        ([*CLIENT, "privacy.noise_at=server"], r"privacy.noise_at=server covers a mean .* 'h_ties' is not linear"),
        ([*AT_SERVER, "federation.space=product"], r"federation.space must be factors with privacy.noise_at=server"),
        (
            [*AT_SERVER, "regularizer.name=conflict"],
            r"all clients are sent what regularizer 'conflict' makes of single",
        ),
        (
            [*AT_SERVER, "regularizer.name=scaffold"],
            r"all clients are sent what regularizer 'scaffold' makes of single",
        ),
        (
            [*CLIENT, *FEDAVG, "aggregator.weighting=tokens"],
            r"aggregator.weighting must be examples or uniform with pri",
        ),
        ([*EXAMPLE, "trainer.devices=2"], r"trainer.devices must be 1 with privacy.unit=example, got 2"),
        ([*EXAMPLE, "trainer.precision=16-mixed"], r"trainer.precision must be 32-true or bf16-mixed with"),
    ],
)
def test_components_that_would_let_something_out_are_refused(overrides, said):
    rest = ["regularizer.name=none", *overrides]
    with pytest.raises(ConfigError, match=said):
        check_components(config(*rest))


@pytest.mark.parametrize("term", ["none", "proximal"])
def test_a_mean_under_noise_at_the_server_is_let_through(term):
    check_components(config(*AT_SERVER, f"regularizer.name={term}", "parts.precision.up=int8"))


def test_a_plan_past_its_budget_is_refused_before_any_work():
    rows = {"a": 100, "b": 300}
    plan = config(*CLIENT, "privacy.noise_multiplier=1", "federation.rounds=6")
    with pytest.raises(ConfigError, match=r"privacy.epsilon=8 is less than the 1\d.* that 6 rounds spend"):
        check_budget(plan, rows)
    check_budget(config(*CLIENT, "privacy.noise_multiplier=3", "federation.rounds=6"), rows)


def test_a_plan_that_no_noise_keeps_is_refused_before_any_work():
    plan = config(*EXAMPLE, "privacy.epsilon=1e-5", "privacy.delta=1e-9", "federation.rounds=60")
    with pytest.raises(ConfigError, match=r"privacy.epsilon=1e-05 is less than 60 rounds spend with any noise"):
        check_budget(plan, {"a": 100})
    check_budget(config(*EXAMPLE, "federation.rounds=60"), {"a": 100})


def test_the_smallest_client_spends_most_and_every_client_keeps_the_budget():
    plan = config(*EXAMPLE, "federation.rounds=6", "client.batch_size=16", "client.epochs=1")
    promise = promised(plan, {"a": 100, "b": 300})
    # Of 100 rows 7 samples of 16 make an epoch, 6 rounds 42.
    assert (promise.release.rate, promise.release.steps) == (0.16, 42)
    assert 7.98 < promise.epsilon <= 8
    assert promise.epsilon == spent([promise.release], 1e-5, "rdp")


def test_draws_that_the_server_knows_count_where_they_fall():
    names = {f"client_{index}": 10 for index in range(20)}
    options = ("federation.rounds=10", "federation.clients_per_round=2", "aggregator.name=fedavg")
    known = promised(config(*CLIENT, *options), names)
    secret = promised(
        config(*CLIENT, *options, "privacy.noise_at=server", "privacy.sampling=without_replacement"), names
    )
    # 20 draws over 20 clients: somebody is drawn twice or more, nobody ten times.
    assert 2 <= known.release.steps < 10
    assert secret.release == Release(secret.noise_multiplier, "without_replacement", 0.1, 2, 20, steps=10)


def test_a_ledger_lies_beside_the_data(tmp_path):
    (tmp_path / "ward.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other/clinic.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    one = [*CLIENT, f"data.files.ward={tmp_path}/ward.jsonl"]
    assert ledger_folder(config(*one), tmp_path / "rows") == tmp_path / ".privacy_ledger"
    assert ledger_folder(config(*CLIENT), tmp_path / "rows") == tmp_path / "rows/.privacy_ledger"
    assert ledger_folder(config(*CLIENT, "privacy.ledger=/x"), tmp_path / "rows").as_posix() == "/x"
    with pytest.raises(ConfigError, match=r"privacy.ledger must name one folder where data.files lie in several"):
        ledger_folder(config(*one, f"data.files.clinic={tmp_path}/other/clinic.jsonl"), tmp_path)
