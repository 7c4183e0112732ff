"""Feed damaged inputs to every reader, and random states to tree, mask and cache, against brute force.

A reader may take an input or refuse it with an error of the package; anything else, and anything that takes
ten seconds, is a finding. Inputs are functions of reader, seed and number, so that a finding can be made
again; what was found once is kept in ``KEPT``.

    python -m tests.fuzz [--inputs N] [--states N] [--seed N] [--reader NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import signal
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers.utils import logging

from recurrent_drafting import checkpoint, data, manifest, prompt_files, sources
from recurrent_drafting.draft_tree import Beams, DraftTree
from recurrent_drafting.errors import RecurrentDraftingError
from recurrent_drafting.kv_cache import VerifierCache
from recurrent_drafting.verifier import Verifier
from tests.text_models import TEMPLATE, make_tokenizer, save_base, save_drafter

SECONDS = 10
# Pieces that mean something to one reader or another.
PIECES = (
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"9" * 5000, b'""', b"{}", b"[]", b"[[", b'{"a":', b"\\ud800",
    b"\xff", b"\x00", b"\r\n", b"../", b"/etc/passwd", b"{{", b"}}", b"{% if", b"{% endfor %}", b"{{ messages }}",
    b"{{ 1 // 0 }}", b"|tojson", b".__class__", b"[0]", b" \xe2\x80\xa8", b'"dtype":"F64"', b'"shape":[4294967296]',
    b"[" * 3000, b"false", b'"weight_map"', b'"files"', b"\xf0\x9f\x98\x80", b"1" * 20,
)  # fmt: skip
VALUES = (None, True, -1, 0, 1, 2**31, 2**63, 1e999, 0.5, "", "x", "../x", "\ud800", [], {}, [[]], {"a": 1}, [1, "x"])


class TooSlowError(BaseException):
    """An input took too long; no handler of the code under test may swallow it."""


@contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    """Raise TooSlowError if the block takes too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Reader:
    """What takes a file's content, and sound contents to start from."""

    read: Callable[[bytes], object]
    sound: list[bytes]


def readers(folder: Path) -> dict[str, Reader]:
    """Make the readers, with the files they need beside the damaged one."""
    base = save_base(folder / "base")
    drafter = save_drafter(folder / "drafter", base)
    sealed = folder / "sealed"
    checkpoint.save_drafter(checkpoint.load_drafter(str(drafter)), sealed)
    tokenizer = make_tokenizer()
    raw = (drafter / checkpoint.WEIGHTS).read_bytes()
    names = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, checkpoint.WEIGHTS)}
    rows = [
        {"question_id": 1, "category": "c", "turns": ["a", "b"]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "response": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
        {"text": "a"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    chat = [TEMPLATE.encode() + b"\0" + json.dumps(row).encode() for row in rows]
    beside = folder / "indexed"
    save_base(beside)
    return {
        "drafter config": Reader(file_reader(drafter / "config.json", lambda: checkpoint.load_drafter(str(drafter))),
                                 [(drafter / "config.json").read_bytes()]),
        "base config": Reader(file_reader(base / "config.json", lambda: checkpoint.check_base(base)),
                              [(base / "config.json").read_bytes()]),
        "safetensors header": Reader(header_reader(drafter, raw), [raw[: 8 + struct.unpack("<Q", raw[:8])[0]]]),
        "index": Reader(file_reader(beside / checkpoint.INDEX, lambda: checkpoint.check_base(beside)),
                        [json.dumps(index).encode()]),
        "manifest": Reader(file_reader(sealed / manifest.MANIFEST, lambda: manifest.read(sealed)),
                           [(sealed / manifest.MANIFEST).read_bytes()]),
        "prompts": Reader(prompt_reader(folder), [lines, *(line + b"\n" for line in lines.splitlines())]),
        "chat template": Reader(lambda raw: encode_with(tokenizer, raw), chat),
    }  # fmt: skip


def file_reader(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Write an input to a file and read it; the sound content comes back afterwards."""
    sound = path.read_bytes() if path.exists() else None

    def write_and_read(raw: bytes) -> object:
        path.write_bytes(raw)
        try:
            return read()
        finally:
            if sound is not None:
                path.write_bytes(sound)

    return write_and_read


def header_reader(drafter: Path, sound: bytes) -> Callable[[bytes], object]:
    """Put a damaged header before the sound tensors."""
    start = 8 + struct.unpack("<Q", sound[:8])[0]
    read = file_reader(drafter / checkpoint.WEIGHTS, lambda: checkpoint.load_drafter(str(drafter)))
    return lambda raw: read(raw + sound[start:])


def prompt_reader(folder: Path) -> Callable[[bytes], object]:
    def read(raw: bytes) -> object:
        for suffix in (".jsonl", ".json", ".txt"):
            path = folder / f"rows{suffix}"
            path.write_bytes(raw)
            for skip in (False, True):
                for reader in (sources.read_conversations, read_questions):
                    try:
                        reader(path, skip_bad_rows=skip)
                    except RecurrentDraftingError:
                        continue
        return None

    return read


def read_questions(path: Path, *, skip_bad_rows: bool) -> object:
    questions, _ = prompt_files.load_questions(str(path), skip_bad_rows=skip_bad_rows)
    for question in questions:
        question.request_id(0)
        for turn in question.turns:
            turn.encode()
    return questions


def encode_with(tokenizer: Any, raw: bytes) -> object:
    """Take a chat template and a row, parted by a zero byte."""
    template, _, row = raw.partition(b"\0")
    tokenizer.chat_template = template.decode(errors="replace")
    try:
        parsed = json.loads(row)
    except (ValueError, RecursionError):
        parsed = {"prompt": "a", "response": "b"}
    return data.encode(sources.parse_conversation(parsed, "row"), tokenizer, 64)


def damage(raw: bytes, rng: random.Random) -> bytes:
    """Damage an input in one to four places, as JSON where it is JSON and luck will have it."""
    if rng.random() < 0.5 and (changed := damage_json(raw, rng)) is not None:
        return changed
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(raw) + 1), rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and raw:
            at = min(at, len(raw) - 1)
            raw = raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
        elif kind == 1:
            raw = raw[:at]
        elif kind == 2:
            raw = raw[:at] + rng.choice(PIECES) + raw[at:]
        elif kind == 3:
            raw = raw[:at] + rng.choice(PIECES) + raw[at + size :]
        elif kind == 4:
            raw = raw[:at] + rng.randbytes(size) + raw[at + size :]
        else:
            raw = raw[:at] + raw[at + size :]
    return raw


def damage_json(raw: bytes, rng: random.Random) -> bytes | None:
    """Exchange, add or take away a value somewhere inside; None if there is no JSON."""
    start = next((at for at in (0, 8, raw.find(b"\0") + 1) if raw[at : at + 1] in (b"{", b"[")), None)
    if start is None:
        return None
    try:
        content = json.loads(raw[start:].splitlines()[0] if raw.count(b"\n{") else raw[start:])
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.randint(1, 3)):
        change_somewhere(content, rng)
    new = json.dumps(content).encode()
    return struct.pack("<Q", len(new)) + new if start == 8 else raw[:start] + new


def change_somewhere(content: Any, rng: random.Random) -> None:
    """Change a value at a random depth."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = content[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
            content = inner
            continue
        if rng.random() < 0.2:
            del content[key]
        elif isinstance(content, dict) and rng.random() < 0.2:
            content[rng.choice(("", "x", "../x", "a\0", "\ud800", "__class__"))] = copy.deepcopy(rng.choice(VALUES))
        else:
            content[key] = copy.deepcopy(rng.choice(VALUES))
        return


def finding(reader: Reader, raw: bytes) -> str | None:
    """Return what is wrong with a reader's answer to an input, None if nothing is."""
    try:
        with limited():
            reader.read(raw)
    except RecurrentDraftingError as error:
        return None if str(error).strip() else f"an empty message of {type(error).__name__}"
    except TooSlowError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - any other error is what is looked for
        return f"{type(error).__name__}: {error}"[:300]
    return None


def fuzz(name: str, reader: Reader, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield what was found, and the input."""
    for number in range(count):
        rng = random.Random(f"{name}/{seed}/{number}")
        raw = damage(rng.choice(reader.sound), rng)
        if (found := finding(reader, raw)) is not None:
            yield f"{name} {seed}/{number}: {found}", raw


# Inputs that were findings once.
KEPT: dict[str, list[bytes]] = {
    "prompts": [
        b'{"question_id": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"question_id": "\\ud800", "turns": ["a"]}',
    ],
    "chat template": [template + b"\0{}" for template in (b"{{ 1 // 0 }}", b"{{ 'a' + 1 }}", b"{{ range(10**9) }}")],
    "manifest": [b"[" * 100_000, b'{"format_version": 1}'],
    "index": [
        b"[" * 100_000,
        b'{"weight_map": [1]}',
        b'{"weight_map": {"a": 7}}',
        b'{"weight_map": {"a": "' + b"9" * 5000 + b'.safetensors"}}',
        b'{"weight_map": {"a": "mod\\ud800el.safetensors"}}',
    ],
    "drafter config": [
        b'{"model_type": "recurrent_drafting_drafter", "num_draft_layers": 1000000000}',
        b"[" * 100_000,
        b'{"model_type": "recurrent_drafting_drafter", "hidden_size": 32, "vocab_size": 258,'
        b'"num_draft_layers": 1, "dtype": true}',
        b'{"model_type": "recurrent_drafting_drafter", "vocab_size": 9223372036854775808}',
    ],
    "base config": [b'{"num_hidden_layers": 1000000000}', b"[" * 100_000],
}


# States


def random_tree(rng: random.Random, rows: int) -> tuple[DraftTree, list[list[tuple[int, ...]]]]:
    """Build trees from random beams; return them with each beam's path of tokens, root first, in node order."""
    width, length = rng.randint(1, 4), rng.randint(1, 4)
    tokens = torch.tensor([[rng.sample(range(9), width) for _ in range(length)] for _ in range(rows)])
    parents = torch.tensor([[[rng.randrange(width) if depth else 0 for _ in range(width)] for depth in range(length)]
                            for _ in range(rows)])  # fmt: skip
    steps = -torch.tensor([rng.random() for _ in range(rows * length * width)]).view(rows, length, width)
    scores, paths = [], [[(0,)] for _ in range(rows)]
    for depth in range(length):
        step = steps[:, depth]
        scores.append(step if not depth else step + scores[-1].gather(1, parents[:, depth]))
        for row in range(rows):
            for beam in range(width):
                parent = paths[row][1 + (depth - 1) * width + int(parents[row, depth, beam])] if depth else (0,)
                paths[row].append((*parent, 1 + depth * width + beam))
    tree = DraftTree.from_beams(torch.zeros(rows, dtype=torch.long), Beams(tokens, parents, torch.stack(scores, dim=1)))
    return tree, paths


def check_tree(rng: random.Random, rows: int) -> int:
    """Compare geometry, pruning and masks of trees with their paths; return the number of states."""
    tree, paths = random_tree(rng, rows)
    most = rng.randint(1, tree.num_nodes)
    small, mask = tree.prune(most), tree.prune(most).ancestor_mask()
    lengths = torch.tensor([rng.randint(1, 6) for _ in range(rows)])
    positions = lengths.unsqueeze(1) + small.depths
    allowed, keys = Verifier._tree_mask(None, small, lengths, positions, int(lengths.max()))  # type: ignore[arg-type]
    for row in range(rows):
        scores = tree.log_probs[row].tolist()
        kept = sorted(sorted(range(tree.num_nodes), key=lambda node: (-scores[node], node))[:most])
        own = [[kept.index(step) for step in paths[row][node]] for node in kept]
        require(small.tokens[row].tolist() == [int(tree.tokens[row, node]) for node in kept], "pruned tokens", rng)
        require(small.depths[row].tolist() == [len(path) - 1 for path in own], "depths", rng)
        require(small.parents[row].tolist() == [path[-2] if len(path) > 1 else 0 for path in own], "parents", rng)
        start = int(lengths[row])
        for node, path in enumerate(own):
            require(mask[row, node].nonzero().flatten().tolist() == sorted(path), "ancestors", rng)
            sees = [*range(start), *(start + step for step in sorted(path))]
            require(allowed[row, node].nonzero().flatten().tolist() == sees, "visible slots", rng)
            require(
                [int(keys[row, start + step]) for step in path] == list(range(start, start + len(path))), "keys", rng
            )
            children = [other for other, theirs in enumerate(own) if len(theirs) > 1 and theirs[-2] == node]
            token = rng.randrange(9)
            expected = next((other for other in children if int(small.tokens[row, other]) == token), 0)
            require(small.child(row, node, token) == expected, "child", rng)
    return rows


@torch.inference_mode()
def check_cache(rng: random.Random, steps: int) -> int:
    """Compare a cache with lists of what was written; return the number of states."""
    rows, layers = rng.randint(1, 4), rng.randint(1, 2)
    cache, texts, written = VerifierCache(layers, rows, 200), [list[int]() for _ in range(rows)], 0
    for _ in range(steps):
        count = rng.randint(1, 5)
        if cache.max_length + count > cache.capacity:
            break
        new = [[written + row * count + i for i in range(count)] for row in range(len(texts))]
        written += count * len(texts)
        states = torch.tensor(new, dtype=torch.float64).view(len(texts), 1, count, 1).expand(-1, 2, -1, 3)
        for layer in range(layers):
            seen = cache.append(layer, states, -states)
        for row, text in enumerate(texts):
            require(seen[0][row, 0, : len(text) + count, 0].tolist() == [*text, *new[row]], "keys", rng)
            require(seen[1][row, 1, : len(text) + count, 2].tolist() == [-x for x in (*text, *new[row])], "values", rng)
        paths = [[0, *sorted(rng.sample(range(1, count), rng.randint(0, count - 1)))] for _ in texts]
        cache.keep(paths)
        texts = [text + [new[row][node] for node in paths[row]] for row, text in enumerate(texts)]
        if rng.random() < 0.1:
            texts = [text[: rng.randint(0, len(text))] for text in texts]
            cache.rewind([len(text) for text in texts])
        if rng.random() < 0.1:
            chosen = rng.sample(range(len(texts)), rng.randint(1, len(texts)))
            cache.select(chosen)
            texts = [texts[row] for row in chosen]
        require(cache.lengths == [len(text) for text in texts], "lengths", rng)
    return steps * rows


def require(condition: bool, what: str, rng: random.Random) -> None:
    if not condition:
        raise AssertionError(f"{what} differ from brute force")


def check_states(count: int, seed: int) -> int:
    """Check at least so many states; return how many."""
    done = number = 0
    while done < count:
        rng = random.Random(f"states/{seed}/{number}")
        try:
            done += check_cache(rng, 20) if number % 4 == 0 else check_tree(rng, 8)
        except AssertionError as error:
            raise AssertionError(f"states {seed}/{number}: {error}") from error
        number += 1
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz the readers and check the states; return the number of findings, at most 1."""
    parser = argparse.ArgumentParser(description="Feed damaged inputs to every reader.")
    parser.add_argument("--inputs", type=int, default=2000, help="per reader (default %(default)s)")
    parser.add_argument("--states", type=int, default=20_000, help="of tree and cache (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all of them (default %(default)s)")
    parser.add_argument("--reader", nargs="+", default=[], help="only these (default: all)")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    findings = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        for name, reader in readers(Path(scratch)).items():
            if args.reader and name not in args.reader:
                continue
            before = findings
            for found, raw in fuzz(name, reader, args.inputs, args.seed):
                findings += 1
                print(f"{found}\n  {raw[:200]!r}", flush=True)
            print(f"{name}: {args.inputs} inputs, {findings - before} findings", flush=True)
    print(
        f"tree and cache: {check_states(args.states, args.seed) if args.states else 0} states, 0 findings", flush=True
    )
    return int(findings > 0)


if __name__ == "__main__":
    raise SystemExit(main())
