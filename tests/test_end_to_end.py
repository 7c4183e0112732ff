"""From the command line alone: train on a file, evaluate, compare, and reply to a prompt, with a base on disk.

Run by pytest, or as a script: ``python tests/test_end_to_end.py``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # the scripts and the test helpers are not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate_speculator
import train_speculator
from tests.text_models import save_base, save_questions


def run_everything(folder: Path) -> dict[str, object]:
    """Train and evaluate in a folder; return the summary of the evaluation."""
    base = str(save_base(folder / "base"))
    rows = [{"prompt": f"question {i}", "response": f"answer {i} and so on"} for i in range(24)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = str(save_questions(folder / "questions.jsonl"))
    drafter, results = str(folder / "drafter"), folder / "results.json"
    train = ["--llm_name_or_path", base, "--dataset_name", str(folder / "chats.jsonl"), "--output_dir", drafter]
    train += ["--targets", "regenerated", "--model_max_length", "96", "--max_steps", "10", "--disable_tqdm", "True"]
    assert train_speculator.main([*train, "--save_strategy", "no"]) == 0
    use = ["--base_model", base, "--speculator_path", drafter, "--dtype", "fp32", "--max_generation_length", "24"]
    use += ["--max_tree_nodes", "9"]
    compare = ["--eval_file", questions, "--compare", "--turns", "2", "--output_file", str(results)]
    assert generate_speculator.main([*use, *compare, "--temperature", "0.7"]) == 0
    assert generate_speculator.main([*use, "--prompt", "hello"]) == 0
    summary: dict[str, object] = json.loads(results.read_text())["summary"]
    return summary


def test_train_then_decode_from_the_command_line(tmp_path: Path) -> None:
    summary = run_everything(tmp_path)
    assert summary["compared"] == 6
    assert summary["structural"] == 0
    assert summary["identical"] == 6
    assert summary["tau"] >= 1.0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(run_everything(Path(temporary)))
