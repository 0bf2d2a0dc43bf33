"""Odd values: each is one line that names the key, what it must be and, where there is one, the way out."""

import pytest

from fedproxy.config import check_arguments
from fedproxy.errors import ConfigError

WHOLE, NUMBER, TRUTH = (f"must be {rule}, got " for rule in ("a whole number", "a number", "true or false"))
WORDS = r"must be a list of words like \[a,b\]"
CASES = [
    ("data..tasks=[a]", r"^data..tasks: a key is made of names with one dot between; correct it"),
    (".data=1", r"^.data: a key is made of names"),
    ("data.tasks.=3", r"^data.tasks.: a key is made of names"),
    ("data tasks=[a]", r"^data tasks: unknown key; did you mean 'data'"),
    ("data.tasks[0]=x", r"^data.tasks\[0\]: unknown key; did you mean 'tasks'"),
    ("${seed}=3", r"^\$\{seed\}: \$\{seed\} is not|^\$\{seed\}: unknown key; did you mean 'seed'"),
    ("federation=3", r"^federation must be a mapping of options, got 3$"),
    ("target=asset:tiny", r"^target must be a mapping of options, got 'asset:tiny'; write target.KEY=asset:tiny"),
    ("aggregator=fedavg", r"^aggregator must be a mapping of options, got 'fedavg'; write aggregator.name=fedavg"),
    ("aggregator=null", r"^aggregator must be a mapping of options, got None$"),
    ("aggregator.name=3", r"^aggregator.name must be one of the names, got 3; known: .*fedavg"),
    ("aggregator.name=[a]", r"^aggregator.name must be one of the names, got \['a'\]; known: "),
    ("aggregator.name=", r"^aggregator.name must be one of the names, got None; known: "),
    ("data.partition=iid", r"^data.partition must be .* write data.partition.name=iid"),
    ("data.partition.name=iidd", r"^data.partition.name: unknown .* did you mean 'iid'"),
    ("engine.name=worker", r"^engine.name: unknown engine 'worker'; did you mean 'workers'"),
    ("seed=null", rf"^seed {WHOLE}None"),
    ("seed=true", rf"^seed {WHOLE}True"),
    ("seed=", rf"^seed {WHOLE}None"),
    ("seed=[1]", rf"^seed {WHOLE}\[1\]"),
    ("seed=1.5", rf"^seed {WHOLE}1.5"),
    ("seed=seven", rf"^seed {WHOLE}'seven'"),
    ("seed=" + "9" * 5000, r"^seed: 9+\.\.\. cannot be read as YAML \(Exceeds the limit"),
    ("federation.rounds=1:30", rf"^federation.rounds {WHOLE}'1:30'"),
    ("client.batch_size=1e3", rf"^client.batch_size {WHOLE}1000.0"),
    ("client.lr=inf", rf"^client.lr {NUMBER}'inf'|^client.lr must be finite, got inf; give a number"),
    ("client.lr=.inf", r"^client.lr must be finite, got inf; give a number"),
    ("client.lr=.nan", r"^client.lr must be finite, got nan"),
    ("client.lr=1e999", r"^client.lr must be finite, got inf"),
    ("client.lr=1e-3x", rf"^client.lr {NUMBER}'1e-3x'"),
    ("client.lr=1,5", rf"^client.lr {NUMBER}'1,5'"),
    ("client.lr=true", rf"^client.lr {NUMBER}True"),
    (
        "federation.round_timeout_s=.inf",
        r"^federation.round_timeout_s must be finite.*; write null where there is no limi",
    ),
    ("overwrite=maybe", rf"^overwrite {TRUTH}'maybe'"),
    ("overwrite=[true]", rf"^overwrite {TRUTH}\[True\]"),
    ("resume=true", r"^resume must be one of auto, never, got True"),
    ("resume=Auto", r"^resume must be one of auto, never, got 'Auto'"),
    ("target.dtype=[a]", r"^target.dtype must be one of float32, bfloat16, float16, got \['a'\]"),
    ("data.prompt_column=???", r"^data.prompt_column is missing: \?\?\? stands for a value to be given; give it"),
    ("data.tasks=arc_easy", rf"^data.tasks {WORDS}, got 'arc_easy'"),
    ("data.tasks={a: b}", rf"^data.tasks {WORDS}"),
    ("data.tasks=[[a]]", rf"^data.tasks {WORDS}"),
    ("data.tasks=[arc_easy,arc_easy]", r"^data.tasks names 'arc_easy' twice; name each once"),
    ("evaluation.models=[fused,fused]", r"^evaluation.models names 'fused' twice"),
    ("evaluation.tasks=[a,a]", r"^evaluation.tasks names 'a' twice"),
    ("loggers=[csv,csv]", r"^loggers names 'csv' twice"),
    ("data.files=a.jsonl", r"^data.files must be a mapping of names to texts like \{a: b\}, got 'a.jsonl'"),
    ("trainer=[a]", r"^trainer must be a mapping like \{a: b\}, got \['a'\]"),
    ("trainable.r=9223372036854775807", r"^trainable.r must be from 1 to 65536, got 9223372036854775807"),
    ("distillation.lora_r=65537", r"^distillation.lora_r must be at most 65536, got 65537"),
    ("engine={name: in_process, threads: 100000}", r"^engine.threads must be from 1 to 1024, or null, got 100000"),
    ("engine={name: workers, threads: 100000}", r"^engine.threads must be from 1 to 1024, got 100000"),
    ("trainer.foo=1", r"^trainer.foo: lightning.Trainer has no such option"),
    ("trainable.modules=q_proj", rf"^trainable.modules {WORDS}, got 'q_proj'"),
    ("compression.keep=[1,1.5]", r"^compression.keep must be a list of whole numbers like \[0,1\], or null, got"),
    ("federation.clients_per_round=1.5", r"^federation.clients_per_round must be a whole number or a text, got 1.5"),
    ("trainer.a=@x", r"^trainer.a: @x cannot be read as YAML \(.*\); put a text into quotes"),
    ("trainer.a=[a", r"^trainer.a: \[a cannot be read as YAML \(line \d, column \d: "),
    ("trainer.a=*x", r"^trainer.a: \*x cannot be read as YAML \(.*found undefined alias"),
    ("seed=!!python/name:os.system", r"^seed: .*the tag tag:yaml.org,2002:python/name:os.system is not read"),
    (
        "trainer.a=" + "[" * 9000,
        r"^trainer.a: \[+\.\.\. cannot be read as YAML \(line 1[:,] .*nest",
    ),  # PyYAML's own bound
    ("x\x1b[31m\n=1", r"^x: unknown key"),
    ("recipe=[a]", r"^recipe=\[a\]: unknown recipe; known: "),
    ("recipe=fedproxy_tiny.yaml", r"^recipe=fedproxy_tiny.yaml: no such file; .* lists the shipped recipes"),
    ("recipe=/etc/passwd", r"^recipe=/etc/passwd: unknown recipe; the name of a recipe file ends in .yaml"),
    ("recipe=" + "a" * 5000 + ".yaml", r"^recipe=a+\.\.\.: no such file"),
    ("nonsense", r"^'nonsense' is not a key=value argument; write, for example, federation.rounds=3"),
    ("=3", r"^'=3' is not a key=value argument"),
]


@pytest.mark.parametrize(("word", "message"), CASES, ids=[word[:30] for word, _ in CASES])
def test_an_odd_value_is_one_clear_line(word, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_arguments(["recipe=fedproxy_tiny", word])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
