"""Around the training run: what it would take, what needs consent, and that it simulates what it serves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recurrent_drafting import continuations, estimate, self_data
from recurrent_drafting.checkpoint import load_drafter
from recurrent_drafting.config import BeamConfig
from recurrent_drafting.decoding import SpeculativeDecoder
from recurrent_drafting.errors import DataError
from recurrent_drafting.sources import Turn
from tests.mutants import Mutant, applied
from tests.test_train_speculator import GIVEN, error_line, run
from tests.text_models import load_verifier, make_tokenizer, save_chats, save_drafter

CONTEXT_FAULT = Mutant("context one too late", "trainer", "hidden[index, at - 1]", "hidden[index, at]")


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return str(save_chats(tmp_path / "chats.jsonl", 40))


# Train equals serve


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["float32", "bf16"])
def test_every_run_ends_with_a_decode_that_confirms_it(
    base: str, chats: str, precision: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, chats, *GIVEN, "--max_eval_samples", "2", *precision) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train equals serve: "))
    found = re.fullmatch(
        r"train equals serve: 2 prompts, 64 tokens, float32: simulated tau (\S+), served tau (\S+), "
        r"steps by accepted length \[\d+(, \d+)+\]",
        line,
    )
    assert found is not None and found[1] == found[2] and float(found[1]) > 1


def test_a_disagreement_of_training_and_serving_is_exit_code_6(
    base: str, chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with applied(CONTEXT_FAULT):
        assert run(base, chats, *GIVEN, "--max_eval_samples", "2") == 6
    line = error_line(capsys)
    assert "training and serving disagree" in line and "simulated [" in line and "served [" in line
    load_drafter("out")  # it is saved before


def test_the_check_can_be_left_out(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    with applied(CONTEXT_FAULT):
        assert run(base, chats, *GIVEN, "--serve_check_prompts", "0") == 0
    assert "train equals serve" not in capsys.readouterr().out
    assert run(base, chats, *GIVEN, "--serve_check_prompts", "-1") == 2
    assert "--serve_check_prompts must be >= 0" in error_line(capsys)


def test_evaluation_prints_simulated_and_served_tau_of_the_same_prompts(
    base: str, chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With regenerated targets the rows hold what the base says, so both walks see one text and one tree."""
    drafter = save_drafter(Path("start"), Path(base), beam_width=6)
    argv = ["--phase", "eval", "--drafter_name_or_path", str(drafter), "--max_eval_samples", "2"]
    assert run(base, chats, *argv, "--max_train_samples", "40") == 0
    out = capsys.readouterr().out
    metrics = json.loads(out[out.index("{\n") :])
    assert metrics["eval_loss"] > 0 and 0 <= metrics["eval_top1_depth_1"] <= metrics["eval_top5_depth_1"] <= 1
    assert metrics["served_prompts"] == 2
    assert metrics["served_tau"] == metrics["served_text_simulated_tau"] > 1
    assert metrics["served_acceptance_by_depth"][0] > 0
    rows = estimate.written_replies(conversations(chats), make_tokenizer(), 96).rows
    prompts = [rows[index].input_ids[: rows[index].loss_mask.index(True)] for index in (0, 20)]
    decoder = SpeculativeDecoder(load_verifier(Path(base)), load_drafter(str(drafter)), BeamConfig(width=6, length=4))
    longest = 96 - len(prompts[0])
    assert decoder.generate(prompts, max_new_tokens=longest).stats.tau == metrics["served_tau"]


def conversations(path: str) -> list[tuple[Turn, ...]]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [(Turn("user", line["prompt"]), Turn("assistant", line["response"])) for line in lines]


# Dry run


def test_a_dry_run_estimates_and_leaves_nothing(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dry_run", "--hidden_state_cache", "states", "--max_steps", "-1", "--num_train_epochs", "3"]
    argv += ["--save_strategy", "steps", "--save_steps", "5", "--save_total_limit", "2"]
    before = sorted(Path().rglob("*"))
    assert run(base, chats, *GIVEN, *argv) == 0
    assert sorted(Path().rglob("*")) == before == []
    out = capsys.readouterr().out
    resolved = json.loads(out[: out.index("\n}") + 2])
    assert (resolved["llm_name_or_path"], resolved["targets"], resolved["save_steps"]) == (base, "ground_truth", 5)
    assert "weight_decay" not in resolved  # as usual
    assert "data: 40 rows of" in out and ", 0 to be written" in out
    assert "trainable parameters: 0.01 M" in out
    assert "h for 30 steps" in out  # 40 rows in batches of 4, three times
    assert "replies at most 0.00 h" in out
    assert out.rstrip().endswith("dry run: nothing was trained or written")


def test_a_dry_run_counts_the_replies_that_would_be_written(
    base: str, chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, chats, "--dry_run") == 0
    assert "data: 40 rows of 96 tokens, 40 to be written" in capsys.readouterr().out
    assert run(base, "self", "--dry_run", "--max_train_samples", "7") == 0
    assert "7 to be written" in capsys.readouterr().out
    assert not Path("out").exists()


def test_estimated_disk_and_steps_are_those_of_the_run(base: str, chats: str) -> None:
    """The estimate of a file's size, against the files of the run itself."""
    argv = [*GIVEN, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    assert run(base, chats, *argv) == 0
    files = [path for path in Path("out").rglob("*") if path.suffix in (".safetensors", ".pt")]
    drafter = load_drafter("out")
    trainable = sum(parameter.numel() for parameter in drafter.parameters())
    estimated = trainable * (4 + 2 * 12)
    assert estimated == pytest.approx(sum(path.stat().st_size for path in files), rel=0.35)


# Consent


def test_many_replies_need_a_word(
    base: str, chats: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "LARGE_HOURS", 0.0)
    assert run(base, chats) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(r"takes 40 replies of the base, at most \d+\.\d\d h: pass --yes", line)
    assert "--targets ground_truth" in line and "--max_train_samples" in line
    assert list(Path("out").iterdir()) == []
    assert run(base, chats, "--max_train_samples", "20") == 0
    assert run(base, chats, "--yes", "--output_dir", "other") == 0


def test_many_rows_of_the_bases_own_need_a_word_too(
    base: str, chats: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "LARGE_HOURS", 0.0)
    assert run(base, "self") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{self_data.SELF_ROWS} replies of the base" in line and "--yes" in line and "--dataset_name" in line
    assert list(Path("out").iterdir()) == []


def test_a_dry_run_times_distilled_targets(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dry_run", "--targets", "distilled", "--distill_max_examples", "10"]
    assert run(base, chats, *argv) == 0
    out = capsys.readouterr().out
    assert "data: 10 rows of" in out and re.search(r"distilled targets \d+\.\d\d h", out)
    assert not Path("out").exists()


def test_few_replies_need_none(base: str, chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, chats) == 0
    assert "data to be written: 40 replies of the base, at most 0.00 h" in capsys.readouterr().out


# Estimates


def test_expected_rows() -> None:
    tokenizer = make_tokenizer()
    two = (Turn("user", "ab"), Turn("assistant", "cd"), Turn("user", "ef"))
    written = estimate.written_replies([two] * 100, tokenizer, 60)
    assert (written.count, written.replies_written, len(written.rows)) == (200, 200, 128)
    assert {len(row.input_ids) for row in written.rows} == {60} and written.tokens_per_row == 60
    asked = [len("@user:ab@@assistant:"), len("@user:ab@@assistant:cd@@user:ef@@assistant:")]
    # First turns first; @ is one special token.
    assert [row.loss_mask.index(True) for row in written.rows] == [asked[0]] * 64 + [asked[1]] * 64
    assert written.new_tokens == 60 - sum(asked) / 2
    part = estimate.written_replies([two] * 100, tokenizer, 60, max_rows=100)
    assert (part.count, part.replies_written, part.rows) == (100, 100, written.rows[:64])
    assert part.new_tokens == 60 - asked[0]
    given = estimate.given_replies([two] * 100, tokenizer, 60, assistant_only=True)
    assert (given.count, given.replies_written, len(given.rows)) == (100, 0, 64)
    with pytest.raises(DataError, match="no user turn"):
        estimate.written_replies([two], tokenizer, 5)
    with pytest.raises(DataError, match="none of 1 conversations has a reply"):
        estimate.given_replies([two[:1]], tokenizer, 60, assistant_only=True)


def test_writing_time_grows_with_the_replies(base: str) -> None:
    verifier, turns = load_verifier(Path(base)), [(Turn("user", "ab"),)]
    short, long = (estimate.written_replies(turns * count, make_tokenizer(), 96) for count in (10, 1000))
    seconds = [estimate.writing_seconds(verifier, expected) for expected in (short, long)]
    assert 0 < 10 * seconds[0] < seconds[1]


def test_distilling_time_grows_with_the_rows(base: str) -> None:
    verifier, turns = load_verifier(Path(base)), [(Turn("user", "ab"), Turn("assistant", "cdefgh"))]
    sets = [estimate.given_replies(turns * count, make_tokenizer(), 96, assistant_only=True) for count in (10, 1000)]
    config = continuations.DistilConfig()
    seconds = [estimate.distilling_seconds(verifier, expected, config) for expected in sets]
    assert 0 < 10 * seconds[0] < seconds[1]
    assert estimate.distilling_seconds(verifier, sets[0], None) == 0.0
