"""Damage of the kinds that files meet: every draw comes from the generator that is given."""

import copy
import json
from random import Random
from typing import Any

ODD_BYTES = (
    b"",
    b"\x00",
    b"null",
    b"[]",
    b"{}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n",
    b"!!python/object/apply:os.system ['touch RAN']\n",
    b"9" * 10_000,
    b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 10**30, 1e308, -0.5, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x" * 5000,
        "\x1b[31mred",
        "a\nb",
        "../../outside",
        "/etc/passwd",
        "${oc.env:HOME}",
        "${seed}",
        "${nope}",
    ),
    *(
        "None",
        "null",
        "1e3",
        "2026_11_29",
        "=1+1",
        "<script>alert(1)</script>",
        "[/red]",
        "日本",
        "\u202e",
        "asset:nothing",
    ),
    *([], [[]], [None], ["a", "a"], list(range(50)), {}, {"name": "nothing"}, {"a": {"b": {"c": []}}}),
)


def bytes_mutated(data: bytes, random: Random) -> bytes:
    """Return the bytes cut, flipped, filled or replaced."""
    match random.randrange(7):
        case 0:
            return random.choice(ODD_BYTES)
        case 1:
            return data[: random.randrange(len(data) + 1)]
        case 2:
            changed = bytearray(data)
            for _ in range(random.choice((1, 3, 30))):
                if changed:
                    changed[random.randrange(len(changed))] = random.randrange(256)
            return bytes(changed)
        case 3:
            at = random.randrange(len(data) + 1)
            return data[:at] + random.randbytes(random.choice((1, 8, 500))) + data[at:]
        case 4:
            start, stop = sorted(random.randrange(len(data) + 1) for _ in range(2))
            return data[:start] + data[stop:]
        case 5:
            return data + data
        case _:
            start = random.randrange(len(data) + 1)
            return data[:start] + b"\x00" * min(64, len(data) - start) + data[start + 64 :]


def tree_mutated(tree: Any, random: Random, changes: int = 1) -> Any:
    """Return nested mappings and lists with values replaced, keys dropped, added or misspelt."""
    tree = copy.deepcopy(tree)
    for _ in range(changes):
        places = list(_places(tree))
        if not places:
            return random.choice(ODD_VALUES)
        node, key = random.choice(places)
        match random.randrange(5):
            case 0 | 1 | 2:
                node[key] = random.choice(ODD_VALUES)
            case 3:
                del node[key]
            case _ if isinstance(node, dict):
                node[random.choice((f"{key}x", "", "a.b", "\x1b[0m", str(key).upper()))] = node.pop(key)
            case _:
                node.append(random.choice(ODD_VALUES))
    return tree


def json_mutated(data: bytes, random: Random) -> bytes:
    """Return JSON, or JSON lines, with values replaced; sometimes broken as bytes."""
    if random.random() < 0.3:
        return bytes_mutated(data, random)
    lines = data.decode().splitlines()
    try:
        return (json.dumps(tree_mutated(json.loads(data), random, random.choice((1, 1, 3)))) + "\n").encode()
    except ValueError:
        at = random.randrange(len(lines))
        lines[at] = json.dumps(tree_mutated(json.loads(lines[at]), random))
        return ("\n".join(lines) + "\n").encode()


def _places(tree: Any) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)
