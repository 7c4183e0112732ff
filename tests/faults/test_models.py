"""Rows 12-16: drafters and bases that do not fit, are damaged, or mean harm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import generate_speculator
import huggingface_deployment
import train_speculator
from recurrent_drafting import formats
from tests.faults import hostile
from tests.faults.common import Capture, Main, Models, generate, generate_argv, outcome, refused, train_argv
from tests.test_verifier import REFUSED
from tests.text_models import make_tokenizer, save_base, save_drafter

pytestmark = pytest.mark.slow


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything that a checkpoint could write be seen."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


# Fit


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"hidden_size": 16}, "expected hidden_size 32, the drafter has 16"),
        ({"hidden_size": 64, "exit_dim": 8}, "expected hidden_size 32, the drafter has 64"),
        ({"vocab_size": 300}, "expected vocab_size 258, the drafter has 300"),
        ({"vocab_size": 257}, "expected vocab_size 258, the drafter has 257"),
        ({"tokenizer_fingerprint": "ab" * 32}, "expected a vocabulary with SHA-256 abab"),
    ],
)
@pytest.mark.parametrize("override", [[], ["--allow_base_mismatch"]], ids=["plain", "override"])
def test_a_drafter_that_does_not_fit(
    models: Models, chats: str, overrides: dict[str, Any], named: str, override: list[str], capsys: Capture
) -> None:
    """No override makes it fit."""
    other = Models(models.base, str(save_drafter(Path("other"), Path(models.base), **overrides)))
    refused(generate_speculator.main, generate_argv(other, "--prompt", "a", *override), 4, capsys, named)
    argv = train_argv(models.base, chats, "--drafter_name_or_path", "other")
    refused(train_speculator.main, argv, 4, capsys, named)


def test_a_tokenizer_with_tokens_that_the_base_lacks(models: Models, chats: str, capsys: Capture) -> None:
    shutil.copytree(models.base, "wide")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["hello", "answer"])
    tokenizer.save_pretrained("wide")
    argv = generate_argv(models, "--base_model", "wide", "--autoregressive", "--prompt", "hello")
    refused(generate_speculator.main, argv, 3, capsys, "expected a token id of wide in 0..257, got 258")
    refused(train_speculator.main, train_argv("wide", chats), 3, capsys, "in 0..257, got 259")


def test_a_drafter_of_another_base_needs_the_override(models: Models, capsys: Capture) -> None:
    shutil.copytree(models.base, "packaged")
    Path("packaged/asset.json").write_text(json.dumps({"sha256": "b" * 64}))
    fit = {"verifier_fingerprint": "a" * 64, "verifier_name_or_path": "its-base"}
    other = Models("packaged", str(save_drafter(Path("other"), Path("packaged"), **fit)))
    argv = ["--prompt", "hello", "--base_model", "packaged"]
    line = refused(generate_speculator.main, generate_argv(other, *argv), 4, capsys, "--allow_base_mismatch")
    assert "its-base" in line and "a" * 64 in line and "b" * 64 in line
    assert generate(other, *argv, "--allow_base_mismatch") == 0
    speculative = capsys.readouterr().out
    assert generate(other, *argv, "--autoregressive") == 0
    assert capsys.readouterr().out == speculative


def test_a_drafter_of_a_base_that_was_tuned_since(models: Models, chats: str, capsys: Capture) -> None:
    """Any base on disk has an identity: its drafter, and states stored from it, do not pass for another's."""
    shutil.copytree(models.base, "tuned")
    states = ["--hidden_state_cache", "states"]
    assert outcome(train_speculator.main, train_argv("tuned", chats, *states)) == 0
    assert generate(Models("tuned", "out"), "--prompt", "hello", "--base_model", "tuned") == 0
    weights = load_file("tuned/model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, "tuned/model.safetensors", {"format": "pt"})
    argv = ["--prompt", "hello", "--base_model", "tuned"]
    refused(generate_speculator.main, generate_argv(Models("tuned", "out"), *argv), 4, capsys, "--allow_base_mismatch")
    assert generate(Models("tuned", "out"), *argv, "--allow_base_mismatch") == 0
    argv = [*states, "--overwrite_output_dir"]
    refused(train_speculator.main, train_argv("tuned", chats, *argv), 3, capsys, "states/settings.json: expected")


@pytest.mark.parametrize(
    "family", ["encoder-decoder", "state-space", "recurrent", "ALiBi without positions", "local attention"]
)
@pytest.mark.parametrize("command", ["generate", "baseline", "train"])
def test_a_family_that_cannot_verify_a_tree(
    models: Models, chats: str, family: str, command: str, capsys: Capture
) -> None:
    build, kind, _ = REFUSED[family]
    build().save_pretrained("foreign")
    make_tokenizer().save_pretrained("foreign")
    plain = ["--prompt", "a", "--base_model", "foreign"]
    main, argv = {
        "generate": (generate_speculator.main, generate_argv(models, *plain)),
        "baseline": (generate_speculator.main, generate_argv(models, *plain, "--autoregressive")),
        "train": (train_speculator.main, train_argv("foreign", chats)),
    }[command]
    offer = "causal LM" if family == "encoder-decoder" else "Use transformers' generate"
    refused(main, argv, 4, capsys, "foreign", kind, offer)


# Damage


def commands(models: Models, chats: str, drafter: str, base: str) -> dict[str, tuple[Main, list[str]]]:
    """Return every command that loads a drafter or a base."""
    deploy = ["--model_path", drafter, "--repo_name", "a/b", "--dry_run"]
    return {
        "generate": (
            generate_speculator.main,
            generate_argv(Models(base, drafter), "--prompt", "a", "--base_model", base),
        ),
        "train": (train_speculator.main, train_argv(base, chats, "--drafter_name_or_path", drafter)),
        "deploy": (huggingface_deployment.main, deploy),
        "export": (formats.main, ["export", "--format", "apple", drafter, "exported"]),
    }


@pytest.mark.parametrize("what", hostile.DRAFTERS)
def test_a_hostile_drafter_is_refused_by_every_command(
    models: Models, chats: str, tmp_path: Path, what: str, capsys: Capture
) -> None:
    damage, named = hostile.DRAFTERS[what]
    damage(Path(shutil.copytree(models.drafter, tmp_path / "hostile" / "drafter")))
    before = files(tmp_path)
    drafter = str(tmp_path / "hostile" / "drafter")
    for main, argv in commands(models, chats, drafter, models.base).values():
        refused(main, argv, 4, capsys, drafter, named)
        assert files(tmp_path) == before


@pytest.mark.parametrize("what", hostile.BASES)
def test_a_hostile_base_is_refused_by_every_command(
    models: Models, chats: str, tmp_path: Path, what: str, capsys: Capture
) -> None:
    damage, named = hostile.BASES[what]
    damage(Path(shutil.copytree(models.base, tmp_path / "hostile" / "base")))
    before = files(tmp_path)
    base = str(tmp_path / "hostile" / "base")
    for name in ("generate", "train"):
        main, argv = commands(models, chats, models.drafter, base)[name]
        refused(main, argv, 4, capsys, base, named)
        assert files(tmp_path) == before


def test_there_are_enough_hostile_checkpoints() -> None:
    assert len(hostile.DRAFTERS) >= 25 and len(hostile.BASES) >= 25


def test_the_payload_would_run(place: Path) -> None:
    """What the tests above look for is what a load of a pickle leaves."""
    import pickle

    hostile.pickled("x.bin", keep=True)(place)
    pickle.loads((place / "x.bin").read_bytes())
    assert (place / hostile.RAN).exists()


@pytest.mark.parametrize("where", ["drafter", "base"])
def test_code_named_beside_a_known_family_is_not_run(models: Models, tmp_path: Path, where: str) -> None:
    folders = {"drafter": models.drafter, "base": models.base}
    folder = Path(shutil.copytree(folders[where], tmp_path / where))
    (folder / "evil.py").write_text(f"open({hostile.RAN!r}, 'w').close()\nclass Evil: pass\n")
    hostile.config(auto_map=dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil"))(folder)
    folders[where] = str(folder)
    assert generate(Models(folders["base"], folders["drafter"]), "--prompt", "a", "--base_model", folders["base"]) == 0
    assert not Path(hostile.RAN).exists() and not (tmp_path / "modules").exists()


TEMPLATES = {
    "out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "system": "{{ self.__init__.__globals__.os.system('touch " + hostile.RAN + "') }}",
    "without end": "{% for i in range(10**9) %}x{% endfor %}",
    "division": "{{ 1 // 0 }}",
    "types": "{{ 'a' + 1 }}",
    "index": "{{ messages[99]['content'] }}",
    "syntax": "{% for %}",
    "raises": "{{ raise_exception('only four-legged friends') }}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_hostile_chat_template(models: Models, chats: str, tmp_path: Path, what: str, capsys: Capture) -> None:
    base = Path(shutil.copytree(models.base, tmp_path / "base"))
    (base / "chat_template.jinja").write_text(TEMPLATES[what])
    argv = generate_argv(models, "--prompt", "a", "--base_model", str(base))
    refused(generate_speculator.main, argv, 3, capsys, "chat template")
    refused(train_speculator.main, train_argv(str(base), chats), 3, capsys, "chat template")
    assert not Path(hostile.RAN).exists()


def test_a_tokenizer_with_code_of_its_own(models: Models, tmp_path: Path, capsys: Capture) -> None:
    base = Path(shutil.copytree(models.base, tmp_path / "base"))
    (base / "evil.py").write_text(f"open({hostile.RAN!r}, 'w').close()\nclass Evil: pass\n")
    path = base / "tokenizer_config.json"
    settings = {
        **json.loads(path.read_text()),
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil"] * 2},
    }
    path.write_text(json.dumps(settings))
    code = outcome(generate_speculator.main, generate_argv(models, "--prompt", "a", "--base_model", str(base)))
    assert code in (0, 3) and "Traceback" not in capsys.readouterr().err
    assert not Path(hostile.RAN).exists() and not (tmp_path / "modules").exists()


def test_apples_layout_is_recognised(models: Models, capsys: Capture) -> None:
    assert formats.main(["export", "--format", "apple", models.drafter, "apple"]) == 0
    argv = generate_argv(Models(models.base, "./apple"), "--prompt", "a")
    refused(generate_speculator.main, argv, 4, capsys, "checkpoint import --format apple apple NEW_DIRECTORY")


LAYOUTS = {
    "a billion layers": (hostile.config(num_draft_layers=10**9), "declares 1000000000 layers, model.safetensors holds"),
    "a huge vocabulary": (hostile.config(vocab_size=1 << 40, draft_vocab_size=1 << 40), "head"),
    "sizes beyond 64 bits": (hostile.config(exit_dim=1 << 70), "declares sizes that cannot be"),
    "sizes of another kind": (hostile.config(num_draft_layers="many"), "num_draft_layers"),
    **{
        name: hostile.COMMON[name]
        for name in hostile.COMMON
        if name.startswith(("weights that", "config that", "index"))
    },
    **{name: hostile.COMMON[name] for name in ("weights without end", "config without end", "config nested deeply")},
}


@pytest.mark.parametrize("layout", formats.FORMATS)
@pytest.mark.parametrize("what", LAYOUTS)
def test_a_hostile_drafter_in_another_layout(
    models: Models, tmp_path: Path, layout: str, what: str, capsys: Capture
) -> None:
    source, (damage, named) = tmp_path / "hostile" / layout, LAYOUTS[what]
    assert formats.main(["export", "--format", layout, models.drafter, str(source)]) == 0
    damage(source)
    before = files(tmp_path)
    refused(formats.main, ["import", "--format", layout, str(source), "imported"], 4, capsys, layout, named)
    assert files(tmp_path) == before


@pytest.mark.parametrize("settings", [{"proposal_methods": 3}, {"proposal_methods": [1]}, {"verifier": "base"}])
def test_settings_of_the_speculators_layout_of_another_kind(
    models: Models, settings: dict[str, Any], capsys: Capture
) -> None:
    assert formats.main(["export", "--format", "speculators", models.drafter, "theirs"]) == 0
    hostile.config(speculators_config=settings)(Path("theirs"))
    [key] = settings
    argv = ["import", "--format", "speculators", "theirs", "imported"]
    refused(formats.main, argv, 4, capsys, f"theirs/config.json: expected {key} to be")


def test_sharded_bases_load(models: Models, tmp_path: Path, capsys: Capture) -> None:
    """The checks of an index let a sound one pass."""
    base = Path(shutil.copytree(models.base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        part = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(part, base / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    shown = []
    for place in (str(base), models.base):
        assert generate(models, "--prompt", "hello", "--base_model", place) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


def test_a_base_whose_tokenizer_is_missing(models: Models, tmp_path: Path, capsys: Capture) -> None:
    base = save_base(tmp_path / "base")
    for path in base.glob("*token*"):
        path.unlink()
    argv = generate_argv(models, "--prompt", "a", "--base_model", str(base))
    refused(generate_speculator.main, argv, 3, capsys, "no tokenizer for", str(base))


BROKEN_TOKENIZERS = {
    "an empty object": lambda _: {},
    "a list": lambda good: [good],
    "a number": lambda _: 3,
    "no model": lambda good: {**good, "model": {}},
    "a version of another time": lambda good: {**good, "version": "9"},
    "an unknown part": lambda good: {**good, "pre_tokenizer": {"type": "Nope"}},
    "a token id below zero": lambda good: {**good, "added_tokens": [{"id": -3}]},
}


@pytest.mark.parametrize("fault", BROKEN_TOKENIZERS)
def test_a_tokenizer_file_that_is_json_and_no_tokenizer(
    models: Models, fault: str, tmp_path: Path, capsys: Capture
) -> None:
    base = save_base(tmp_path / "base")
    path = base / "tokenizer.json"
    path.write_text(json.dumps(BROKEN_TOKENIZERS[fault](json.loads(path.read_text()))))
    argv = generate_argv(models, "--prompt", "a", "--base_model", str(base))
    refused(generate_speculator.main, argv, 3, capsys, "no tokenizer for", str(base))
