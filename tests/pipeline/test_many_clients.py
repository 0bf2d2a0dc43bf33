"""Many clients, a few per round: short form of benchmarks/many_clients.py."""

import json

from fedproxy.federation.client.rows import ClientExamples


def test_only_sampled_clients_are_read_and_the_cache_stays_small(run_tiny, monkeypatch):
    opened, sizes = [], []
    read = ClientExamples.__getitem__

    def watch(self, client_id):
        got = read(self, client_id)
        opened.append(client_id)
        sizes.append(len(self))
        return got

    monkeypatch.setattr(ClientExamples, "__getitem__", watch)
    report, folder = run_tiny(
        "data.rows_per_task=300", "data.partition={name: iid, clients: 400}", "federation.clients_per_round=6",
        "federation.rounds=5", "federation.sampling=weighted", "evaluation.models=[]",
    )  # fmt: skip
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    trained = {client for line in rounds for client in line["clients"]}
    assert all(len(line["clients"]) == 6 for line in rounds)
    assert len(trained) > 20
    assert set(opened) == trained
    assert max(sizes) == 16  # 30 clients trained, the latest 16 are in memory
    assert len(list((folder / "rows").iterdir())) == 400
    assert [len(line.clients) for line in report.rounds] == [6] * 5
