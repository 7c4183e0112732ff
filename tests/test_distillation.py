"""Self-written data: filters, resumption, packing, the command line; regenerated replies."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from recurrent_drafting import (
    AutoregressiveDecoder,
    Verifier,
    assets,
    data,
    distillation,
    engines,
    regeneration,
    self_data,
    token_rows,
)
from recurrent_drafting.engines import Request, TransformersEngine
from recurrent_drafting.errors import DataError, ResourceError, UsageError
from recurrent_drafting.self_data import SelfData, SelfDataConfig
from recurrent_drafting.sources import Turn
from tests.test_data import CHATML
from tests.tiny import VOCAB, llama_config

EOS = 2
TOKENIZER_CLASS: Any = PreTrainedTokenizerFast
SYSTEM_CHATML = "{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}" + CHATML


def make_tokenizer(template: str | None = SYSTEM_CHATML) -> Any:
    """Build a tokenizer with the tiny models' 61 ids, of which only EOS and the turn header are special."""
    pieces = ["<unk>", "one", "<|im_end|>", "<|im_start|>", "\n", " ", "system", "user", "assistant", "be", "kind", "!"]
    pieces += [f"word{index}" for index in range(VOCAB - len(pieces))]
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"<unk>|word\d+|one|system|user|assistant|be|kind|\n|."), "isolated"
    )
    backend.decoder = decoders.Fuse()
    return TOKENIZER_CLASS(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


def make_verifier(dtype: torch.dtype = torch.float64) -> Verifier:
    """Build a random model whose window has room for a written prompt and its reply."""
    config: Any = llama_config()
    config.max_position_embeddings = 512
    torch.manual_seed(0)
    loader: Any = AutoModelForCausalLM
    return Verifier(loader.from_config(config, dtype=dtype), name_or_path="tiny")


class ScriptedEngine:
    """Write given prompts in order, and as replies what a function makes of the request's seed."""

    name, dtype = "scripted", "auto"

    def __init__(self, tokenizer: Any, prompts: Sequence[str], reply: Sequence[int] = (11, 12, 13, EOS)) -> None:
        self.requests: list[Request] = []
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._reply = list(reply)

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        self.requests += requests
        if requests and requests[0].seed % 2 == 1:
            return [self._reply[:max_new_tokens] for _ in requests]
        texts = [self._prompts[item.seed // 2] for item in requests]
        return [[*self._tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in texts]


class InterruptedEngine(TransformersEngine):
    """Stop after a number of calls, as a pressed key would."""

    def __init__(self, verifier: Verifier, calls: int) -> None:
        super().__init__(verifier)
        self.calls = calls

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().generate(requests, max_new_tokens)


@pytest.fixture
def no_openers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_data, "OPENERS", ("",))


@pytest.fixture
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_data, "_MAX_PROMPT_TOKENS_WRITTEN", 24)


def words(count: int, start: int = 0) -> str:
    return " ".join(f"word{(start + index) % 45}" for index in range(count))


def write(engine: Any, directory: Path, *, references: Sequence[str] = (), **settings: Any) -> None:
    config = SelfDataConfig(**{"num_rows": 12, "chunk_rows": 4, "max_new_tokens": 8, **settings})
    SelfData(engine, make_tokenizer(), config, "tiny", references).write(directory)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(directory.iterdir())}


def test_user_header_ends_where_the_users_text_begins() -> None:
    tokenizer = make_tokenizer()
    header = tokenizer.decode(self_data.user_header(tokenizer))
    assert header == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n"
    with pytest.raises(UsageError, match="chat template"):
        self_data.user_header(make_tokenizer(None))


@pytest.mark.usefixtures("no_openers")
def test_filters_count_every_reason_and_rows_are_prompt_plus_reply(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    texts = [
        words(12),
        words(12) + " !",  # the same words
        "word1",  # too short
        words(150),  # too long
        "",  # never finished
        words(20, 7),  # shares a 13-gram
        f"{words(8)} <|im_start|> {words(3)}",
        words(9, 30),
    ]
    engine = ScriptedEngine(tokenizer, texts)
    write(engine, tmp_path, references=[words(40, 5)], num_rows=8, greedy_share=0.5)
    rows, report = self_data.load_rows(tmp_path, tokenizer)
    assert report.skipped == {
        "repeated prompt": 1,
        "prompt length": 2,
        "unfinished prompt": 1,
        "shares a 13-gram with the evaluation prompts": 1,
        "special token in prompt": 1,
    }
    assert (report.prompts, report.read, report.ended, report.loops) == (8, 2, 2, 0)
    for row, text in zip(rows, (texts[0], texts[7]), strict=True):
        start = row.loss_mask.index(True)
        asked = data.render(tokenizer, [{"role": "user", "content": text}], ask=True)
        assert (row.input_ids[:start], row.input_ids[start:]) == (asked, [11, 12, 13, EOS])
        assert all(row.loss_mask[start:])
    replies = [item for item in engine.requests if item.seed % 2]
    assert {row.greedy for row in rows} <= {item.temperature == 0 for item in replies}
    assert {item.temperature for item in replies} <= {0.0, 1.0}


@pytest.mark.usefixtures("no_openers")
def test_share_of_greedy_replies_and_settings_of_the_prompts(tmp_path: Path) -> None:
    engine = ScriptedEngine(make_tokenizer(), [f"{words(5)} {words(4, index)}" for index in range(200)])
    write(engine, tmp_path, num_rows=200, greedy_share=0.7, prompt_temperature=0.5, prompt_min_p=0.1)
    prompts = [item for item in engine.requests if item.seed % 2 == 0]
    replies = [item for item in engine.requests if item.seed % 2 == 1]
    assert {(item.temperature, item.min_p) for item in prompts} == {(0.5, 0.1)}
    assert {item.min_p for item in replies} == {0.0}
    assert 0.6 < sum(item.temperature == 0 for item in replies) / len(replies) < 0.8
    assert len({item.seed for item in engine.requests}) == len(engine.requests)


@pytest.mark.usefixtures("no_openers")
def test_short_replies_are_left_out_and_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    write(ScriptedEngine(tokenizer, [words(9, index) for index in range(12)], [11, EOS]), tmp_path)
    with pytest.raises(DataError, match="expected chunks"):
        self_data.load_rows(tmp_path, tokenizer)
    for damaged in ('{"rows": [', "[]", '{"rows": []}', "[" * 100_000):
        (tmp_path / "chunk-00001.json").write_text(damaged)
        with pytest.raises(DataError, match=r"chunk-00001\.json is no chunk"):
            self_data.load_rows(tmp_path, tokenizer)


@pytest.mark.usefixtures("no_openers")
@pytest.mark.parametrize("damaged", ["{", "5", "{}", "\xff"])
def test_settings_that_are_none_are_a_data_error(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "settings.json").write_bytes(damaged.encode("latin-1"))
    with pytest.raises(DataError, match=r"settings\.json is no settings of self-written data"):
        write(ScriptedEngine(make_tokenizer(), [], [11, EOS]), tmp_path)


@pytest.mark.usefixtures("short_prompts")
def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path: Path) -> None:
    verifier = make_verifier()
    write(TransformersEngine(verifier), tmp_path / "whole")
    for calls in (0, 1, 2, 3, 5):
        parts = tmp_path / f"parts-{calls}"
        with pytest.raises(KeyboardInterrupt):
            write(InterruptedEngine(verifier, calls), parts)
        assert len(list(parts.glob("chunk-*.json"))) == calls // 2
        write(TransformersEngine(verifier), parts)
        assert contents(parts) == contents(tmp_path / "whole")
        write(InterruptedEngine(verifier, 0), parts)  # nothing is missing, so nothing is generated


@pytest.mark.usefixtures("short_prompts")
def test_more_rows_extend_a_directory_and_its_last_part_chunk(tmp_path: Path) -> None:
    verifier = make_verifier()
    write(TransformersEngine(verifier), tmp_path / "whole", num_rows=10)
    write(TransformersEngine(verifier), tmp_path / "parts", num_rows=6)
    first = contents(tmp_path / "parts")["chunk-00000.json"]
    write(TransformersEngine(verifier), tmp_path / "parts", num_rows=10)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert contents(tmp_path / "parts")["chunk-00000.json"] == first


@pytest.mark.usefixtures("short_prompts")
def test_one_directory_holds_one_experiment(tmp_path: Path) -> None:
    engine = TransformersEngine(make_verifier())
    write(engine, tmp_path / "a", num_rows=2)
    with pytest.raises(UsageError, match="seed 0, now 1"):
        write(engine, tmp_path / "a", num_rows=2, seed=1)
    (tmp_path / "a" / "settings.json").unlink()
    with pytest.raises(UsageError, match=r"no settings\.json"):
        write(engine, tmp_path / "a", num_rows=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        write(engine, tmp_path / "file" / "b", num_rows=2)


@pytest.mark.parametrize(
    "setting",
    [{"num_rows": -1}, {"max_new_tokens": 0}, {"greedy_share": 1.5}, {"prompt_temperature": -1}, {"prompt_min_p": 2}],
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SelfDataConfig(**{"num_rows": 1, **setting})


def test_transformers_engine_keeps_order_and_follows_seed_and_temperature() -> None:
    verifier = make_verifier()
    rng = random.Random(0)
    requests = [
        Request([rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 9))], index, temperature)
        for index, temperature in enumerate((0.0, 1.0, 0.0, 1.0, 0.7, 0.0, 1.0))
    ]
    texts = TransformersEngine(verifier, batch_size=2).generate(requests, 8)
    assert texts == [TransformersEngine(verifier).generate([item], 8)[0] for item in requests]
    greedy = AutoregressiveDecoder(verifier).generate([requests[2].prompt], max_new_tokens=8)
    assert texts[2] == greedy.sequences[0]
    other = [Request(item.prompt, item.seed + 100, item.temperature) for item in requests]
    changed = TransformersEngine(verifier).generate(other, 8)
    assert [a == b for a, b in zip(texts, changed, strict=True)].count(False) >= 3
    assert changed[0] == texts[0]


def test_cut_loop_keeps_the_beginning_of_a_loop() -> None:
    rng = random.Random(0)
    prose = [rng.randrange(1000, 50_000) for _ in range(80)]
    assert engines.cut_loop(prose) == prose
    assert engines.cut_loop([]) == []
    for period in (1, 7, 40):
        rounds = prose[:period] * (200 // period)
        looping = prose[40:] + rounds
        cut = engines.cut_loop(looping, keep=16)
        assert cut == looping[: len(cut)]
        # The loop shows from its second round on (4-grams), and 16 tokens of it stay.
        assert 40 + period <= len(cut) - 16 <= 40 + period + 4
    counting = prose[40:] + [token for index in range(12) for token in (*prose[:20], 60_000 + index)]
    assert 40 < len(engines.cut_loop(counting, novelty=0.25)) < 180 < len(counting)
    repeated_once = prose[:30] + prose[40:] + prose[:30] + prose[30:40]
    assert engines.cut_loop(repeated_once) == repeated_once


def test_shared_ngrams_ignore_case_and_punctuation() -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    references = self_data.word_ngrams(f"before, {text.upper()}! after")
    assert self_data.shares_ngram(f"Well... {text.replace(' ', ', ')}.", references)
    assert not self_data.shares_ngram(text.replace("seven", "7"), references)
    assert not self_data.shares_ngram("one two", references)


@pytest.mark.usefixtures("short_prompts")
def test_packing_keeps_rows_counts_and_how_to_make_them_again(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    write(TransformersEngine(make_verifier()), tmp_path / "rows", num_rows=24)
    rows, report = self_data.load_rows(tmp_path / "rows", tokenizer)
    assert report.prompts == 24 == report.read + sum(report.skipped.values())
    settings = json.loads((tmp_path / "rows" / "settings.json").read_text())
    path = tmp_path / "some" / "rows.safetensors"
    self_data.pack(rows, report, path, {**settings, "base": str(tmp_path / "tiny"), "fingerprint": "abc"})
    packed, metadata = token_rows.load_packed(path)
    assert packed.rows == rows
    counts = json.loads(metadata["counts"])
    assert counts["reply_tokens"] == packed.reply_tokens
    assert counts["greedy_rows"] == sum(bool(row.greedy) for row in rows)
    assert metadata["base"] == "tiny"
    assert str(tmp_path) not in json.dumps(metadata)
    options = metadata["command"].split("recurrent_drafting.distillation ")[1].split()
    parsed = distillation.build_parser().parse_args(options)
    assert (parsed.num_rows, parsed.seed, parsed.engine, parsed.dtype) == (24, 0, "transformers", "auto")
    first, part = self_data.load_rows(tmp_path / "rows", tokenizer, max_reply_tokens=1)
    assert first == rows[: len(first)]
    assert part.prompts < 24


@pytest.fixture
def tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "tiny"
    make_verifier(torch.float32).model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "category": "x", "turns": [words(20)]}))
    monkeypatch.setattr(assets, "fetch", lambda _: questions)
    before = signal.getsignal(signal.SIGTERM)
    yield directory
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("short_prompts")
def test_the_engine_computes_in_the_dtype_that_was_asked_for(tiny_base: Path) -> None:
    engine = engines.make_engine("transformers", str(tiny_base), "fp32")
    assert isinstance(engine, TransformersEngine)
    assert engine.dtype == "fp32"
    assert engine._decoder.verifier.dtype == torch.float32
    engine = engines.make_engine("transformers", str(tiny_base), "bf16")
    assert isinstance(engine, TransformersEngine)
    assert engine._decoder.verifier.dtype == torch.bfloat16


@pytest.mark.usefixtures("short_prompts")
def test_a_directory_from_before_there_was_a_choice_of_dtype_goes_on(tmp_path: Path) -> None:
    write(TransformersEngine(make_verifier()), tmp_path, num_rows=6)
    settings = tmp_path / "settings.json"
    old = {name: value for name, value in json.loads(settings.read_text()).items() if name != "dtype"}
    settings.write_text(json.dumps(old))
    write(TransformersEngine(make_verifier()), tmp_path, num_rows=10)
    with pytest.raises(UsageError, match="dtype"):
        write(TransformersEngine(make_verifier(), dtype="bf16"), tmp_path, num_rows=10)


@pytest.mark.usefixtures("short_prompts")
def test_command_line_writes_and_packs(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--llm_name_or_path", str(tiny_base), "--output_dir", str(tmp_path / "rows")]
    engine = ["--engine", "transformers"]
    pack = ["--pack", str(tmp_path / "rows.safetensors")]
    assert distillation.main([*options, *engine, "--num_rows", "24", "--max_new_tokens", "8", *pack]) == 0
    packed, metadata = token_rows.load_packed(tmp_path / "rows.safetensors")
    assert len(packed) > 0
    assert metadata["fingerprint"] == ""
    assert distillation.main([*options, "--num_rows", "0", "--pack_reply_tokens", "1", *pack]) == 0
    for change in (["--seed", "1"], ["--dtype", "fp16"]):
        assert distillation.main([*options, *engine, "--num_rows", "24", *change]) == 2
        assert "was begun with" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        distillation.main([*options, "--num_row", "1"])
    assert caught.value.code == 2
    assert "did you mean --num_rows" in capsys.readouterr().err


@pytest.mark.usefixtures("short_prompts")
def test_sigterm_leaves_whole_chunks_and_code_143(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = TransformersEngine.generate
    calls: list[int] = []

    def terminated(self: TransformersEngine, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
        calls.append(len(requests))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, requests, max_new_tokens)

    monkeypatch.setattr(TransformersEngine, "generate", terminated)
    options = ["--llm_name_or_path", str(tiny_base), "--output_dir", str(tmp_path / "rows"), "--engine", "transformers"]
    with pytest.raises(SystemExit) as caught:
        distillation.main([*options, "--num_rows", "514", "--max_new_tokens", "4"])
    assert caught.value.code == 143
    assert sorted(contents(tmp_path / "rows")) == ["chunk-00000.json", "settings.json"]


def test_vllm_is_asked_for_but_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="vLLM is not installed"):
        engines.make_engine("vllm", "tiny")


def test_vllm_engine_passes_each_request_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Model:
        def __init__(self, path: str, **options: Any) -> None:
            seen.update(path=path, options=options)

        def generate(self, prompts: Any, parameters: Any, use_tqdm: bool) -> list[Any]:
            seen.update(prompts=prompts, parameters=parameters)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(5, EOS))]) for _ in prompts]

    module = SimpleNamespace(LLM=Model, SamplingParams=lambda **options: options)
    monkeypatch.setattr(importlib, "import_module", lambda _: module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    engine = engines.make_engine("auto", "some/base")
    texts = engine.generate([Request([1, 2], 7, 0.0), Request([3], 8, 1.0, 0.1)], 16)
    assert texts == [[5, EOS]] * 2
    assert (engine.name, seen["path"], seen["options"]["dtype"]) == ("vllm", "some/base", "bfloat16")
    assert engines.make_engine("vllm", "some/base", "fp16").dtype == "fp16"
    assert seen["options"]["dtype"] == "float16"
    with pytest.raises(UsageError, match="dtype 'float16' is unknown"):
        engines.make_engine("vllm", "some/base", "float16")
    assert seen["prompts"] == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    asked = [(item["temperature"], item["min_p"], item["seed"], item["max_tokens"]) for item in seen["parameters"]]
    assert asked == [(0.0, 0.0, 7, 16), (1.0, 0.1, 8, 16)]


@pytest.mark.usefixtures("short_prompts")
def test_self_rows_prefers_the_packaged_set_of_the_same_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, tokenizer = make_verifier(), make_tokenizer()
    verifier.fingerprint = "abc"
    monkeypatch.setattr(self_data, "__file__", str(tmp_path / "package" / "self_data.py"))
    written = self_data.self_rows(verifier, tokenizer, tmp_path / "run", 24)
    assert (tmp_path / "run" / "self_data" / "chunk-00000.json").exists()
    packaged = tmp_path / "package" / "data" / "tiny-self.safetensors"
    token_rows.save_packed(written[:2], packaged, {"fingerprint": "another"})
    assert self_data.self_rows(verifier, tokenizer, tmp_path / "run", 24) == written
    token_rows.save_packed(written[:2], packaged, {"fingerprint": "abc"})
    assert self_data.self_rows(verifier, tokenizer, tmp_path / "unused", 24) == written[:2]
    assert not (tmp_path / "unused").exists()


@pytest.mark.usefixtures("short_prompts")
def test_self_rows_of_a_greedy_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, tokenizer = make_verifier(), make_tokenizer()
    verifier.fingerprint = "abc"
    monkeypatch.setattr(self_data, "__file__", str(tmp_path / "package" / "self_data.py"))
    written = self_data.self_rows(verifier, tokenizer, tmp_path / "run", 24, greedy_share=0.0)
    assert written and not any(row.greedy for row in written)
    packaged = tmp_path / "package" / "data" / "tiny-self.safetensors"
    token_rows.save_packed(written, packaged, {"fingerprint": "abc"})
    assert self_data.self_rows(verifier, tokenizer, tmp_path / "unused", None, greedy_share=0.0) == written
    with pytest.raises(DataError, match="give another --greedy_share"):
        self_data.self_rows(verifier, tokenizer, tmp_path / "unused", None, greedy_share=1.0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("greedy", [40, 7, 20])
def test_with_greedy_share_keeps_the_most_rows_and_mixes_the_kinds(share: float, greedy: int) -> None:
    kinds = [index * greedy // 60 != (index + 1) * greedy // 60 for index in range(60)]
    rows = [token_rows.EncodedRow([index], [True], greedy=kind) for index, kind in enumerate(kinds)]
    found = self_data.with_greedy_share(rows, share)
    kept = {kind: [row.input_ids[0] for row in found if row.greedy is kind] for kind in (True, False)}
    for kind, places in kept.items():
        assert places == sorted(set(places)) and all(kinds[place] is kind for place in places)
    # One kind is used up, and what is left of the other comes from all parts of the set.
    assert len(kept[True]) == greedy or len(kept[False]) == 60 - greedy
    places = sorted(kept[True] + kept[False])
    assert places[0] < 12 and places[-1] >= 48
    for count in range(1, len(found) + 1):
        assert abs(sum(bool(row.greedy) for row in found[:count]) - share * count) <= 1 + share


def test_regenerate_answers_every_user_turn_with_the_verifiers_own_text() -> None:
    verifier, tokenizer = make_verifier(), make_tokenizer()
    conversations = [
        (Turn("user", words(3)), Turn("assistant", "gone"), Turn("user", words(2)), Turn("assistant", "gone")),
        (Turn("user", words(4)), Turn("user", words(1))),
    ]
    rows, report = regeneration.regenerate(conversations, verifier, tokenizer, 100)
    assert (len(rows), report.read, report.skipped) == (4, 4, {})
    baseline = AutoregressiveDecoder(verifier)
    for row in rows:
        start = row.loss_mask.index(True)
        own = baseline.generate([row.input_ids[:start]], max_new_tokens=100).sequences[0]
        reply = row.input_ids[start:]
        assert reply == own[: len(reply)]
        assert (row.greedy, len(row.input_ids) <= 100) == (True, True)
        assert "gone" not in tokenizer.decode(row.input_ids)
    for first, later in ((rows[0], rows[3]), (rows[1], rows[2])):
        start = first.loss_mask.index(True)
        answer = tokenizer.decode(first.input_ids[start:], skip_special_tokens=True).strip()
        assert answer in tokenizer.decode(later.input_ids[: later.loss_mask.index(True)])
    with pytest.raises(DataError, match="no reply to regenerate"):
        regeneration.regenerate(conversations, verifier, tokenizer, 5)
