"""Damage of the kinds that files meet: every draw comes from the generator that is given."""

import copy
import json
import os
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

LAUGHS = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}' if n else 'ha'] * 9)}]\n" for n in range(9)).encode()
"""YAML of a few lines that stands for 9 ** 9 texts."""
SPARSE_BYTES = 3 << 29
"""Size of a file of nothing but zeros, which takes no room on the disk and must not be read into memory: 1.5 GiB."""
ODD_BYTES = (
    *(b"", b"\x00", b"null", b"[]", b"{}", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf", b"9" * 10_000, b"\r\n" * 500),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"- " * 2_000 + b"x", b"{" * 2_000),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    *(LAUGHS, b"a: &a [*a]\n", b"a: &a {b: *a}\n", b"<<: [{seed: 1}, {seed: 2}]\n", b"a: 1\n---\nb: 2\n", b"\ta: 1\n"),
    b"!!python/object/apply:os.system ['touch RAN']\n",
    b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 10**30, 1e308, -0.5, float("nan"), float("inf")),
    *("", " ", "x" * 5000, "\x1b[31mred", "a\nb", "\x00", "\ud800", "=1+1", "<script>alert(1)</script>", "[/red]"),
    *("../../outside", "/etc/passwd", "/dev/zero", "~", ".", "asset:nothing", "asset:../tiny-llama", "file:///etc"),
    *("${oc.env:HOME}", "${seed}", "${nope}", "${", "${.}", "None", "null", "1e3", "2026_11_29", "日本", "\u202e"),
    *([], [[]], [None], ["a", "a"], list(range(50)), {}, {"name": "nothing"}, {"a": {"b": {"c": []}}}, {1: 2}),
    *({"name": None}, {"name": ["a"]}, {f"k{n}": n for n in range(3000)}, ["x" * 40] * 500),
)
ODD_YAML = (
    *("2024-01-01", "12:30:45", "0x1F", ".inf", "-.NaN", "0o17", "1_000", "!!binary aGk=", "!!set {a}", "? [a]"),
    *(
        "*nowhere",
        "&a [*a]",
        "&a {b: *a}",
        "{seed: 1, seed: 2}",
        "{<<: {seed: 1}}",
        "|\n  x",
        "!!python/name:os.system",
    ),
    *("!!int many", "!!timestamp x", "!mine x", "- a", "%", "@x", "`x`", "yes", "2024-99-99", "!!omap [a: 1]", "[[[["),
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


def odd_value(random: Random) -> Any:
    """Return a value that nobody meant, of any type."""
    return copy.deepcopy(random.choice(ODD_VALUES))


def _alike(value: Any, random: Random) -> Any:
    """Return another value of the same type, small enough to cost little where it is good."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((0, 1, 2, 3, 5, -1))
    if isinstance(value, float):
        return random.choice((0.0, 1e-30, 0.3, 1.0, 2.5, 1e6, 1e300, -1.0))
    if isinstance(value, str):
        return random.choice((value.upper(), f"{value} ", value[1:], f"{value}/{value}", f"./{value}"))
    return odd_value(random)


def tree_mutated(tree: Any, random: Random, changes: int = 1) -> Any:
    """Return nested mappings and lists with values replaced or swapped, keys dropped, added or misspelt."""
    tree = copy.deepcopy(tree)
    for _ in range(changes):
        found = list(_places(tree))
        if not found:
            return odd_value(random)
        node, key = random.choice(found)
        match random.randrange(8):
            case 0 | 1 | 2:
                node[key] = odd_value(random)
            case 6 | 7:
                node[key] = _alike(node[key], random)
            case 3:
                del node[key]
            case 4:
                other, its = random.choice(found)
                node[key] = copy.deepcopy(other[its])
            case _ if isinstance(node, dict):
                node[random.choice((f"{key}x", "", "a.b", "\x1b[0m", str(key).upper()))] = node.pop(key)
            case _:
                node.append(odd_value(random))
    return tree


def json_mutated(data: bytes, random: Random) -> bytes:
    """Return JSON, or JSON lines, with values replaced; sometimes broken as bytes, or with a key twice."""
    if random.random() < 0.25:
        return bytes_mutated(data, random)
    if random.random() < 0.1:
        return re.sub(rb'("[^"]*": ?)(?=["\d])', rb"\1 7, \1", data, count=random.choice((1, 0)))
    lines = data.decode().splitlines()
    try:
        return (json.dumps(tree_mutated(json.loads(data), random, random.choice((1, 1, 3)))) + "\n").encode()
    except ValueError:
        at = random.randrange(len(lines))
        lines[at] = json.dumps(tree_mutated(json.loads(lines[at]), random))
        return ("\n".join(lines) + "\n").encode()


def yaml_mutated(text: str, random: Random) -> str:
    """Return YAML in whose text a value became what only YAML knows: anchors, tags, dates, keys twice."""
    found = list(re.finditer(r"(?<=: )\S.*", text))
    if not found:
        return random.choice(ODD_YAML)
    spot = random.choice(found)
    return text[: spot.start()] + random.choice(ODD_YAML) + text[spot.end() :]


def csv_mutated(data: bytes, random: Random) -> bytes:
    """Return a CSV table whose quotes, columns or characters are odd; sometimes broken as bytes."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    match random.randrange(8):
        case 0:
            lines[at] = lines[at].replace(b"e", b"\x00")
        case 1:
            lines[at] += random.choice((b",", b",extra", b'"', b'"x', b"\r", b'""'))
        case 2:
            lines[0] = random.choice((b"prompt,prompt", b"prompt", b",", b"prompt,target,", b"\x1b[0m,target", b"p,t"))
        case 3:
            lines[at] = b'"' + b"long " * 60_000 + b'",1'
        case 4:
            lines = [line.replace(b",", random.choice((b";", b"\t", b", "))) for line in lines]
        case 5:
            return data.decode().encode(random.choice(("utf-16", "utf-32", "utf-8-sig")))
        case _:
            return bytes_mutated(data, random)
    return b"\n".join(lines)


def path_mutated(path: Path, random: Random, outside: Path) -> None:
    """Put something else where a file was: nothing, a folder, a pipe, a link, or a file that is far too large."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    match random.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(random.choice((outside, outside.parent, Path("nowhere"), path, Path("/dev/zero"))))
        case 3:
            path.write_bytes(b"")
            os.truncate(path, SPARSE_BYTES)
        case 4:
            path.symlink_to(Path("/dev") / random.choice(("null", "full", "stdin")))
        case _:
            pass


def _places(tree: Any) -> Any:
    """Yield every mapping or list in a tree with each of its keys."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)
