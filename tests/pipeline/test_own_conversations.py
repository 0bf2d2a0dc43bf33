"""Runs on conversations of one's own: formats that are found out, templates, held-out rows, weights and owners."""

import json
import shutil

import pytest

from fedproxy.comparison.execution import examples_seen
from fedproxy.config import load_config
from fedproxy.data.assets import resolve
from fedproxy.data.owned_texts import OwnedTexts
from fedproxy.data.partition.rows import ClientRows, read_client_rows
from fedproxy.data.rows import Row
from fedproxy.data.tokenisation import tokenise
from fedproxy.errors import CheckpointError, ConfigError, DataError
from fedproxy.federation.client.rows import ClientExamples
from fedproxy.models import load_tokenizer
from fedproxy.pipeline.data import client_rows, count_examples, deal, file_rows, target_tokenizer
from fedproxy.pipeline.folder import RunFolder
from fedproxy.pipeline.validation import held_out

TINY = "recipe=fedproxy_tiny"
NAMED = "{% for m in messages %}{{ m.role + ' of Acmecorp: ' + m.content + '\n' }}{% endfor %}"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(question, *answers):
    turns = [{"role": "user", "content": question}]
    for answer in answers:
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and then?"}]
    return {"messages": turns[:-1]}


@pytest.fixture
def site(tmp_path):
    """Two files of chat messages and one of Alpaca rows."""
    write(tmp_path / "a.jsonl", [chat(f"Where does cow {k} live?", "farm", f"field {k}") for k in range(12)])
    said = [[{"from": "human", "value": f"Color of rose {k}?"}, {"from": "gpt", "value": "red"}] for k in range(10)]
    write(tmp_path / "b.jsonl", [{"conversations": turns} for turns in said])
    asked = [{"instruction": "Name the color.", "input": f"sky {k}", "output": "blue"} for k in range(10)]
    write(tmp_path / "c.jsonl", asked)
    files = (f"data.files.{name}={tmp_path / name}.jsonl" for name in "abc")
    return ("data.tasks=[]", "data.rows_per_task=null", "data.format.name=auto", *files)


def data(*words):
    return load_config([TINY, *words]).data


def test_chat_and_alpaca_files_are_tuned_on_and_fused_by_one_command(run_tiny, site):
    report, folder = run_tiny(*site, "data.holdout=0.25", "federation.rounds=1")
    assert report.run.status == "completed"
    assert {f"data.files.{name} was read as {form} (data.format.name=auto)." for name, form in
            (("a", "chat"), ("b", "chat"), ("c", "instruction"))} <= set(report.notes)  # fmt: skip
    assert "7 of 32 rows are held out: nobody trains on them." in report.notes
    config = load_config([TINY, *site])
    assert examples_seen(RunFolder(folder), config, report) == (32 - 7) * config.client.epochs
    trained = {name: read_client_rows(folder / "rows", name) for name in "abc"}
    kept = {name: read_client_rows(folder / "rows", name, held_out=True) for name in "abc"}
    assert {name: (len(trained[name]), len(kept[name])) for name in "abc"} == {"a": (9, 3), "b": (8, 2), "c": (8, 2)}
    assert all(row.held_out for rows in kept.values() for row in rows)
    # A client renders with the proxy's folder alone, and gets what the server counted.
    proxy = load_tokenizer(folder / "proxy")
    config = load_config([TINY, *site])
    limits = {"max_input_tokens": 96, "max_target_tokens": 16}
    [example] = tokenise(trained["a"][:1], proxy, **limits)
    assert [example] == tokenise(trained["a"][:1], target_tokenizer(config), **limits)
    assert len(example.spans) == 2
    fused = load_tokenizer(folder / "fused")
    assert "generation %}" not in fused.chat_template
    turns = list(trained["a"][0].messages)
    assert fused.apply_chat_template(turns, tokenize=False) == proxy.apply_chat_template(turns, tokenize=False)


def test_files_of_prompts_write_the_rows_that_older_versions_wrote_and_send_no_template(tiny_run):
    _, folder = tiny_run
    lines = [json.loads(line) for path in (folder / "rows").iterdir() for line in path.read_text().splitlines()]
    assert {tuple(line) for line in lines} == {("prompt", "target", "source", "key", "label", "ends")}
    assert not list((folder / "proxy").glob("*.jinja"))


def test_held_out_rows_are_the_same_whoever_owns_them(site):
    splits = ("{name: by_task}", "{name: pooled}", "{name: iid, clients: 3}")
    kept = []
    for split in splits:
        rows = [row for own in client_rows(data(*site, "data.holdout=3", f"data.partition={split}"), seed=1).values()
                for row in own]  # fmt: skip
        kept.append({row.key for row in rows if row.held_out})
        assert len(rows) == 32
    assert len(kept[0]) == 9
    assert kept[0] == kept[1] == kept[2]
    assert kept[0] != {row.key for own in client_rows(data(*site, "data.holdout=3"), seed=2).values() for row in own
                       if row.held_out}  # fmt: skip


def test_a_held_out_row_that_is_trained_on_elsewhere_is_dropped_and_counted(tmp_path, site):
    write(tmp_path / "d.jsonl", [chat(f"Color of rose {k}?", "pink") for k in range(10)])
    words = (*site, f"data.files.d={tmp_path / 'd.jsonl'}", "data.holdout=4")
    dealt = deal(data(*words), seed=1)
    rows = [row for own in dealt.clients.values() for row in own]
    asked = [" ".join(row.prompt.split()) for row in rows if not row.held_out]
    kept = [row for row in rows if row.held_out]
    assert not {" ".join(row.prompt.split()) for row in kept} & set(asked)
    dropped = 42 - len(rows)
    assert 0 < dropped == 16 - len(kept)
    assert f"{dropped} further held-out rows were dropped: training rows have the same prompts." in dealt.notes


def test_a_holdout_that_leaves_nothing_is_refused(tmp_path, site):
    with pytest.raises(
        DataError, match=r"data.holdout=12: all 12 rows of client 'a' would be held out; hold out fewer"
    ):
        client_rows(data(*site, "data.holdout=12"), seed=1)
    same = write(tmp_path / "same.jsonl", [chat("Same?", f"yes {k}") for k in range(6)])
    with pytest.raises(
        DataError, match=r"data.holdout=2: none of 2 held-out rows is left, as training rows have the same"
    ):
        client_rows(data("data.tasks=[]", "data.format.name=chat", f"data.files.s={same}", "data.holdout=2"), seed=1)
    with pytest.raises(
        DataError, match=r"data.holdout=0.04: that share of the largest of 3 groups of rows, 12 rows, is less than half"
    ):
        client_rows(data(*site, "data.holdout=0.04"), seed=1)


def test_held_out_rows_count_as_clients_text_and_lie_in_a_file_of_their_own(tmp_path, site):
    clients = client_rows(data(*site, "data.holdout=2"), seed=1)
    kept = ClientRows(clients, tmp_path / "rows")
    (row, *_) = (row for row in clients["a"] if row.held_out)
    assert f"{row.prompt}\n{row.target}" in kept.owned
    assert kept.held_out("a") == [own for own in clients["a"] if own.held_out]
    assert kept["a"] == 10
    assert ClientRows(client_rows(data(*site), seed=1), tmp_path / "other").held_out("a") == []


def test_weights_are_how_often_rows_stand_in_an_epoch(tmp_path, site):
    words = (*site, "data.weights={a: 2.25, b: 0.5}", "data.holdout=2")
    clients = client_rows(data(*words), seed=1)
    assert sorted(row.copies for row in clients["a"] if not row.held_out) == [2] * 8 + [3] * 2  # 2.25 of 10 rows: 22.5
    assert [row.copies for row in clients["b"]] == [1] * 6  # a half of 8, and the two that are held out
    rows = ClientRows(clients, tmp_path / "rows")
    assert (rows["a"], rows["b"], rows["c"]) == (22, 4, 8)
    tokenizer = target_tokenizer(load_config([TINY, *words]))
    examples = ClientExamples(tmp_path / "rows", tokenizer, max_input_tokens=96, max_target_tokens=16)
    assert len(examples["a"]) == 22


def test_a_column_names_the_clients(run_tiny, tmp_path):
    rows = [{**chat(f"Cow {k}?", "farm"), "site": ["north", "south", 3][k % 3]} for k in range(12)]
    path = write(tmp_path / "all.jsonl", rows)
    words = ("data.tasks=[]", "data.format.name=chat", f"data.files.all={path}", "data.holdout=1",
             "data.partition={name: by_column, column: site}")  # fmt: skip
    _, folder = run_tiny(*words, "federation.rounds=1", "federation.clients_per_round=3")
    owners = json.loads((folder / "partition.json").read_text())["clients"]
    assert {name: len(keys) for name, keys in owners.items()} == {"3": 4, "north": 4, "south": 4}
    kept = {row.key for own in client_rows(data(*words), seed=42).values() for row in own if row.held_out}
    pooled = client_rows(data(*words[:-1], "data.partition={name: pooled, column: site}"), seed=42)["pooled"]
    assert {row.key for row in pooled if row.held_out} == kept
    assert len(kept) == 3
    with pytest.raises(
        ConfigError, match=r"federation.clients_per_round must be at most the 3 clients there are, got 4"
    ):
        run_tiny(*words, "federation.clients_per_round=4")
    with pytest.raises(DataError, match=r"all.jsonl line 1 has no column 'ward'; known: messages, site"):
        run_tiny(*words[:-1], "data.partition={name: by_column, column: ward}")


def test_clients_of_whom_no_row_was_drawn_are_not_waited_for(run_tiny, tmp_path):
    rows = [{**chat(f"Cow {k}?", "farm"), "site": f"site{k}"} for k in range(6)]
    words = ("data.tasks=[]", "data.format.name=chat", f"data.files.all={write(tmp_path / 'all.jsonl', rows)}",
             "data.partition={name: by_column, column: site}", "data.rows_per_task=3")  # fmt: skip
    for key in ("clients_per_round", "min_clients"):
        with pytest.raises(ConfigError, match=rf"federation.{key} must be at most the 3 clients there are, got 5"):
            run_tiny(*words, f"federation.{key}=5", folder=tmp_path / "out")
    assert not (tmp_path / "out/proxy").exists()


@pytest.mark.parametrize("long_rows", ["cut", "split", "drop"])
def test_long_rows_are_counted_and_updates_have_as_many_examples(run_tiny, tmp_path, long_rows):
    rows = [chat(f"Where does cow {k} live?", *["farm field wood"] * (1 + k % 2 * 6)) for k in range(12)]
    path = write(tmp_path / "long.jsonl", rows)
    words = ("data.tasks=[]", "data.format.name=chat", f"data.files.a={path}", f"data.long_rows={long_rows}",
             "data.max_input_tokens=40", "data.max_target_tokens=24", "federation.rounds=1")  # fmt: skip
    report, folder = run_tiny(*words)
    found = count_examples({"a": read_client_rows(folder / "rows", "a")}, load_config([TINY, *words]))
    [record] = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert (record["clients"], record.get("dropped", {})) == (["a"], {})  # the server expected as many as came
    assert found.lengths["rows"] == 12
    said = {
        "cut": "6 of 12 rows are cut to fit: prompts of 6, targets of 0",
        "split": "6 of 12 rows are split into windows (data.long_rows=split).",
        "drop": "6 of 12 rows are left out: too long (data.long_rows=drop).",
    }
    assert any(note.startswith(said[long_rows]) for note in report.notes)
    assert (found.examples["a"] > 12, found.examples["a"] < 12) == (long_rows == "split", long_rows == "drop")


def test_a_client_whose_rows_are_all_too_long_is_named(site):
    config = load_config([TINY, *site, "data.long_rows=drop", "data.max_input_tokens=2", "data.max_target_tokens=2"])
    with pytest.raises(
        DataError, match=r"data.long_rows=drop: all 12 rows of client 'a' are too long; raise data.max_inp"
    ):
        count_examples(client_rows(config.data, seed=1), config)


@pytest.fixture
def named_target(tmp_path):
    """A target whose folder and chat template have one name."""
    folder = tmp_path / "acmecorp-med-7b"
    shutil.copytree(resolve("asset:tiny-llama"), folder)
    (folder / "chat_template.jinja").write_text(NAMED)
    return folder


def test_a_template_that_names_the_target_goes_to_clients_only_where_the_recipe_says_so(run_tiny, site, named_target):
    words = (*site, f"target.path={named_target}", "federation.rounds=1")
    message = (
        r"^data.template=auto: the chat template holds 'acmecorp', which names the target, and clients would get it; "
    )
    with pytest.raises(ConfigError, match=message + r"use data.template=chatml, a file .*template_names_target=true$"):
        run_tiny(*words)
    _, folder = run_tiny(*words, "data.template=chatml")
    assert b"acmecorp" not in b"".join(path.read_bytes().lower() for path in (folder / "proxy").iterdir())
    assert load_tokenizer(folder / "fused").chat_template == NAMED  # the target's own stays its own
    _, folder = run_tiny(*words, "data.template_names_target=true")
    assert load_tokenizer(folder / "proxy").chat_template == NAMED


def test_a_target_with_a_template_uses_it_and_one_without_uses_plain_lines(site, named_target):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    own = target_tokenizer(load_config([TINY, *site, f"target.path={named_target}"]))
    assert own.apply_chat_template(turns, tokenize=False) == "user of Acmecorp: Hi\nassistant of Acmecorp: Ho\n"
    plain = target_tokenizer(load_config([TINY, *site]))
    begin = plain.bos_token if plain("a")["input_ids"][0] == plain.bos_token_id else ""
    assert plain.apply_chat_template(turns, tokenize=False) == f"{begin}User: Hi\nAssistant: Ho{plain.eos_token}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read as a chat template \(No such file or directory\); give a file of Jinja text, or auto"),
        (b"\xff", r"cannot be read as a chat template \(.*utf-8.*\); give a file"),
        (b" \n", r"is empty; give another file$"),
        (b"x" * (2**18 + 1), r"cannot be read as a chat template \(it has 262145 bytes, 262144 are the most.*\); give"),
    ],
)
def test_template_files_that_cannot_be_used_are_refused(tmp_path, site, content, message):
    path = tmp_path / "template.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^data.template={path} {message}") as error:
        target_tokenizer(load_config([TINY, *site, f"data.template={path}"]))
    assert "\n" not in str(error.value)


def test_a_run_goes_on_with_the_template_that_it_began_with(run_tiny, tmp_path, site):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    words = (*site, f"data.template={path}", "federation.rounds=1")
    _, folder = run_tiny(*words)
    path.write_text("{% for m in messages %}{{ m.role + '> ' + m.content + '\n' }}{% endfor %}")
    with pytest.raises(
        CheckpointError, match=r"resume=auto: tokenizer changed since the run .*data.template had SHA-256"
    ):
        run_tiny(*words, "federation.rounds=2", "resume=auto", folder=folder)


def test_validation_asks_in_the_form_of_the_template(site):
    config = load_config([TINY, *site, "data.rows_per_task=6", "federation.validation={every: 1, rows: 2}"])
    clients = client_rows(config.data, seed=config.seed)
    questions = held_out(config, clients)
    assert len(questions) == 6
    tokenizer = target_tokenizer(config)
    for question in questions:
        [(row)] = [row for row in file_rows(config.data, question.source) if row.key == question.key]
        [(prompt, answer)] = question.requests
        assert prompt + answer == tokenizer.apply_chat_template(list(row.messages), tokenize=False)
        assert row.target in answer


def test_prompts_in_chat_form_and_formats_of_single_files(tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "Hi?", "target": "Ho."}])
    texts = write(tmp_path / "t.jsonl", [{"text": "One two three."}])
    words = ("data.tasks=[]", f"data.files={{p: {prompts}, t: {texts}}}", "data.formats={t: text}")
    clients = client_rows(data(*words, "data.format={name: prompt_target, chat: true}"), seed=1)
    assert [turn["content"] for turn in clients["p"][0].messages] == ["Hi?", "Ho."]
    assert (clients["t"][0].is_text, clients["t"][0].ends, clients["p"][0].ends) == (True, True, False)
    plain = client_rows(data(*words, "data.end_token=always"), seed=1)
    assert plain["p"] == [Row("Hi?", " Ho.", "p", "p/train/0", ends=True)]


def test_a_conversation_is_a_clients_text_however_it_is_framed():
    row = Row("a\nb", "it is so", "s", "k", messages=({"role": "user", "content": "b"},))
    assert "a\nb it is so" in OwnedTexts([row])
    assert "Text before: A b\n\nit is so" not in OwnedTexts([row])  # fewer than ten words are compared whole
    assert "a\nbit is so" not in OwnedTexts([row])  # where one turn ends, a word does
