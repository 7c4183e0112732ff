"""A drafter on the Hugging Face hub: its card, its files, and their upload in one commit."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from recurrent_drafting import checkpoint, custom_generate, manifest
from recurrent_drafting.assets import ASSETS
from recurrent_drafting.checkpoint import CONFIG, WEIGHTS
from recurrent_drafting.config import RecurrentDraftingConfig
from recurrent_drafting.errors import DataError, NetworkError, RecurrentDraftingError, UsageError

logger = logging.getLogger(__name__)

CARD = "README.md"
RESULTS = "quick_results.json"
_MARK = "<!-- written by huggingface_deployment.py; remove this line to keep your own changes -->"
_TAGS = ["speculative-decoding", "recurrent-drafter", "redrafter", "text-generation"]
# Of the JSON's summary; the last ones are there after --compare.
_METRICS = ("tau", "tokens_per_second", "speedup_median", "identical")
_NEEDED = (
    "base_model",
    "dtype",
    "device",
    "batch_size",
    "temperature",
    "prompts",
    "tau",
    "acceptance_by_depth",
    "method",
)
# What the summary of an evaluation with a drafter calls itself; the baseline alone is "baseline".
_METHOD = "speculative"
_WAITS = (1, 4)
_LONGEST_WAIT = 60
_BUSY = (429, 500, 502, 503, 504)

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """Measured figures of a drafter.

    Args:
        name: file name of the JSON, which is uploaded beside the card.
        record: its content; ``summary`` holds the figures.
    """

    name: str
    record: Mapping[str, Any]

    @property
    def summary(self) -> Mapping[str, Any]:
        """Return the figures over all prompts."""
        summary: Mapping[str, Any] = self.record["summary"]
        return summary


@dataclass(frozen=True)
class Base:
    """The model that a drafter is for.

    Args:
        name: hub id, None if it has none.
        licence: SPDX name in lower case, None if unknown.
    """

    name: str | None
    licence: str | None


def read_evaluations(directory: Path, named: Sequence[str]) -> list[Evaluation]:
    """Read evaluation files.

    Of the directory's own files, those that evaluate no drafter (sweeps, the baseline alone) are left out with a
    warning.

    Args:
        directory: of the drafter, where they are looked for unless named.
        named: files written by ``--output_file`` or ``--quick``; empty takes those of the directory.

    Raises:
        UsageError: there is none (says how to make one), or one would replace another file in the upload.
        DataError: a file is no evaluation of a drafter.
    """
    if named:
        _check_file_names([Path(name) for name in named])
        return [_evaluation(Path(name), _read_record(Path(name))) for name in named]
    found = []
    for path in sorted(directory.glob("*results*.json")):
        record = _read_record(path)
        if _evaluates_no_drafter(record):
            logger.warning("%s evaluates no drafter: it is left out", path)
        else:
            found.append(_evaluation(path, record))
    if not found:
        raise UsageError(
            f"no evaluation in {directory}: expected {RESULTS} or another *results*.json, whose figures go on the "
            f"card; run python generate_speculator.py --speculator_path {directory} --eval_mt_bench --compare "
            f"--output_file {directory / 'results.json'}, or name a file with --results"
        )
    return found


def _check_file_names(paths: Sequence[Path]) -> None:
    """Refuse evaluation files that would take the place of others in the upload: it has one directory."""
    taken = dict.fromkeys((CARD, CONFIG, manifest.MANIFEST), "the drafter's own file")
    for path in paths:
        if path.name in taken:
            raise UsageError(f"--results {path} would replace {taken[path.name]} in the upload: rename one of them")
        taken[path.name] = str(path)


def _read_record(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} does not read as JSON: {error}; evaluate the drafter again") from error


def _summary(record: Any) -> dict[str, Any]:
    """Return the summary of a record, empty if it has none."""
    summary = record.get("summary") if isinstance(record, dict) else None
    return summary if isinstance(summary, dict) else {}


def _evaluates_no_drafter(record: Any) -> bool:
    """Tell whether a record is another result of this package: a sweep, or the baseline alone."""
    is_sweep = isinstance(record, dict) and "sweep" in record
    return is_sweep or _summary(record).get("method", _METHOD) != _METHOD


def _evaluation(path: Path, record: Any) -> Evaluation:
    summary = _summary(record)
    if _evaluates_no_drafter(record):
        raise DataError(
            f"{path} is no evaluation of a drafter: expected a summary of method {_METHOD!r}, got "
            f"{summary.get('method', 'a sweep')!r}; write one with generate_speculator.py --eval_mt_bench --output_file"
        )
    missing = [key for key in _NEEDED if summary.get(key) is None]
    if missing:
        raise DataError(
            f"{path} is no evaluation of a drafter: its summary lacks {', '.join(missing)}; write it with "
            "generate_speculator.py --eval_mt_bench --output_file"
        )
    return Evaluation(path.name, record)


def base_of(config: RecurrentDraftingConfig, evaluations: Sequence[Evaluation], name: str | None) -> Base:
    """Find the hub id and licence of a drafter's base.

    Args:
        config: the drafter's.
        evaluations: must be of the same base.
        name: hub id given by the user, which overrides all else.

    Raises:
        DataError: an evaluation was run on another base.
    """
    trained_for = config.verifier_name_or_path
    if name is not None:
        return Base(name, None)
    for item in evaluations:
        if item.summary["base_model"] != trained_for:
            raise DataError(
                f"{item.name} was measured on another base: expected {trained_for}, got {item.summary['base_model']}; "
                "evaluate the drafter again, or state the hub id of both with --base_model"
            )
    if trained_for in ASSETS:
        return Base(ASSETS[trained_for].hub_id, ASSETS[trained_for].licence.lower())
    if trained_for is None or trained_for != public_name(trained_for) or Path(trained_for).exists():
        return Base(None, None)
    return Base(trained_for if trained_for.count("/") <= 1 else None, None)


def public_name(name: str) -> str:
    """Return a name without the directories of a machine, if it is a local path of this one or of any other."""
    path = Path(name)
    return path.name if name.startswith("~") or path.is_absolute() or path.exists() else name


def model_card(repo_name: str, config: RecurrentDraftingConfig, evaluations: Sequence[Evaluation], base: Base) -> str:
    """Write the card: metadata, use, figures as they are in the evaluation files."""
    metrics = [name for name in _METRICS if any(item.summary.get(name) is not None for item in evaluations)]
    metadata = ModelCardData(
        base_model=base.name,
        library_name="recurrent_drafting",
        license=base.licence,
        tags=list(_TAGS),
        metrics=metrics,
        model_name=repo_name.partition("/")[2],
        eval_results=[result for item in evaluations for result in _eval_results(item, metrics)],
    )
    verifier = base.name or public_name(config.verifier_name_or_path or "its base model")
    return (
        "\n\n".join(
            [
                f"---\n{metadata.to_yaml()}\n---",
                _MARK,
                f"# {repo_name}",
                f"A recurrent drafter ([ReDrafter](https://arxiv.org/abs/2403.09919)) for `{verifier}`: it proposes "
                "several tokens ahead, the base model checks them in one forward. The text is the base model's own.",
                _usage(repo_name, verifier),
                _shape(config),
                "## Measured",
                *(_figures(item) for item in evaluations),
            ]
        ).rstrip()
        + "\n"
    )


def _eval_results(item: Evaluation, metrics: Sequence[str]) -> Iterator[EvalResult]:
    prompts = f"{item.summary['prompts']} prompts of {item.name}"
    for name in metrics:
        if item.summary.get(name) is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type="prompts",
                dataset_name=prompts,
                metric_type=name,
                metric_value=item.summary[name],
            )


def _usage(repo_name: str, verifier: str) -> str:
    return f"""\
## Use

With the package `recurrent_drafting`:

```python
from recurrent_drafting import Drafter, SpeculativeDecoder, Verifier

decoder = SpeculativeDecoder(Verifier.from_pretrained("{verifier}"), Drafter.from_pretrained("{repo_name}"))
```

or behind transformers' own `generate`, with the package installed:

```python
model = AutoModelForCausalLM.from_pretrained("{verifier}")
model.generate(**inputs, custom_generate="{repo_name}", trust_remote_code=True)
```"""


def _shape(config: RecurrentDraftingConfig) -> str:
    return (
        f"Hidden size {config.hidden_size}, head width {config.exit_dim}, {config.num_draft_layers} residual blocks, "
        f"{config.draft_vocab_size or config.vocab_size} of {config.vocab_size} tokens drafted, trained for "
        f"{config.num_draft_tokens} tokens ahead; default beams {config.beam_width} x {config.beam_length}"
        + (f", up to {config.lookup_length} tokens copied where the text repeats" if config.lookup_length else "")
        + (f", predictions of {config.recycled_nodes} verified nodes used again." if config.recycled_nodes else ".")
    )


def _figures(item: Evaluation) -> str:
    """Show a file's summary as a table."""
    summary, machine = item.summary, item.record.get("machine") or {}
    depths = ", ".join(f"{share:.3f}" for share in summary["acceptance_by_depth"])
    rows = [
        ("base", summary.get("base_note") or public_name(summary["base_model"])),
        ("setting", f"{summary['dtype']} on {summary['device']}, batch {summary['batch_size']}, temperature "
         f"{summary['temperature']}, {summary['prompts']} prompts"),
        ("tau (tokens per verifier step)", f"{summary['tau']:.3f}"),
        ("acceptance by depth", depths),
    ]  # fmt: skip
    if summary.get("tokens_per_second") is not None:
        rows.append(("tokens per second", f"{summary['tokens_per_second']:.1f}"))
    if summary.get("speedup_median") is not None:
        low, high = summary["speedup_min"], summary["speedup_max"]
        rows += [
            ("speed-up over token by token", f"{summary['speedup_median']:.2f} (median; {low:.2f} to {high:.2f})"),
            ("texts equal to token by token", f"{summary['identical']} of {summary['compared']}"),
        ]
    if machine.get("processor"):
        rows.append(("machine", f"{machine['processor']}, {machine.get('threads')} threads"))
    lines = [f"| [{item.name}]({item.name}) | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def write_files(directory: Path, card: str) -> str:
    """Put the card and the script for ``custom_generate`` into a drafter's directory.

    Args:
        directory: of the drafter.
        card: replaces a card that was written here before; a card of the user's own stays.

    Returns:
        The card that the directory now holds.

    Raises:
        UsageError: the directory cannot be written.
    """
    card = own_card(directory) or card
    try:
        for name, text in ((CARD, card), (custom_generate.PATH, custom_generate.SCRIPT)):
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be written: {error.strerror}; copy the drafter first") from error
    return card


def own_card(directory: Path) -> str | None:
    """Return the card of a directory if the user wrote or changed it."""
    path = directory / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text if text.strip() and _MARK not in text else None


def files_to_upload(
    directory: Path, repo_name: str, card: str, evaluations: Sequence[Evaluation]
) -> dict[str, bytes | Path]:
    """List what goes up, by its path there: nothing else of the directory does.

    Evaluations name drafter and base without the places they had on this machine.
    """
    files: dict[str, bytes | Path] = {
        CARD: card.encode(),
        CONFIG: directory / CONFIG,
        custom_generate.PATH: custom_generate.SCRIPT.encode(),
        WEIGHTS: directory / WEIGHTS,
        manifest.MANIFEST: manifest.text([directory / CONFIG, directory / WEIGHTS], {}).encode(),
    }
    for item in evaluations:
        names = {"speculator_path": repo_name, "base_model": public_name(item.summary["base_model"])}
        record = {**item.record, "summary": {**item.summary, **names}}
        files[item.name] = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    return dict(sorted(files.items()))


def require_token() -> str:
    """Return the token of the environment or of a login.

    Raises:
        NetworkError: there is none.
    """
    token = huggingface_hub.get_token()
    if token is None:
        raise NetworkError(
            "not logged in to the hub: expected a token in HF_TOKEN or from `hf auth login`, found neither; make one "
            "with write access at https://huggingface.co/settings/tokens"
        )
    return token


def upload(repo_name: str, files: Mapping[str, bytes | Path], *, private: bool, revision: str | None) -> str:
    """Send files in one commit, so that the repository holds all of them or none.

    Large files go first, by content; what has arrived once is not sent again, so a second try goes on
    where the first was cut off.

    Args:
        repo_name: ``user/name``; made if it is not there.
        files: path there -> content.
        private: make it private.
        revision: branch, made if it is not there; None is main.

    Returns:
        Address of the commit.

    Raises:
        NetworkError: no login, no permission, or no connection.
        UsageError: ``private`` is asked for and the repository is public.
        DataError: the hub refuses the card's metadata.
    """
    api, token = HfApi(), require_token()

    def commit() -> str:
        # Anew for each try: an operation remembers what it believes to have sent.
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=item) for name, item in files.items()]
        message = "Upload a recurrent drafter"
        return str(api.create_commit(repo_name, operations, commit_message=message, revision=revision).commit_url)

    with _translated(repo_name, token):
        _with_retries(lambda: api.create_repo(repo_name, private=private or None, exist_ok=True))
        if private and not _with_retries(lambda: api.repo_info(repo_name)).private:
            raise UsageError(f"{repo_name} exists and is public: make it private in its settings, or drop --private")
        if revision is not None:
            _with_retries(lambda: api.create_branch(repo_name, branch=revision, exist_ok=True))
        return _with_retries(commit)


def _with_retries(call: Callable[[], T]) -> T:
    """Call again, after a wait, where that may help: a cut connection or a busy hub."""
    for wait in _WAITS:
        try:
            return call()
        except (*_FAILURES, RuntimeError) as error:
            asked = _wait_asked_for(_cause(error))
            if asked is None:
                raise
            time.sleep(max(wait, asked))
    return call()


_FAILURES = (checkpoint.HTTP_ERROR, OSError)


def _cause(error: Exception) -> Exception:
    """Return what made the upload of a single file fail, which the hub's client wraps."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _wait_asked_for(error: Exception) -> int | None:
    """Return the seconds that the hub wants us to wait, None where a further try cannot help."""
    if isinstance(error, OfflineModeIsEnabled):
        return None
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        asked = error.response.headers.get("Retry-After", "")
        return min(int(asked) if asked.isdigit() else 0, _LONGEST_WAIT) if error.response.status_code in _BUSY else None
    return 0 if isinstance(error, _FAILURES) else None


@contextmanager
def _translated(repo_name: str, token: str) -> Iterator[None]:
    """Turn the failures of the hub's client into ours."""
    try:
        yield
    except RecurrentDraftingError:
        raise
    except json.JSONDecodeError as error:
        raise NetworkError(f"the hub's answer is no JSON: {error}; is a proxy in between? Try again later") from error
    except ValueError as error:
        if "metadata" in str(error):
            raise DataError(f"the hub refuses {CARD}: {_one_line(error, token)}; correct it and run again") from error
        raise NetworkError(f"{repo_name}: {_one_line(error, token)}; run again to go on") from error
    except (*_FAILURES, RuntimeError) as error:
        cause = _cause(error)
        raise NetworkError(f"{_advice(cause, repo_name)} ({_one_line(cause, token)})") from error


def _advice(error: Exception, repo_name: str) -> str:
    """Say what a failure means and what to do."""
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on and an upload needs the hub: unset HF_HUB_OFFLINE"
    if not isinstance(error, _FAILURES):
        return f"the upload did not succeed, {repo_name} is as it was: run again to go on"
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        hub = huggingface_hub.constants.ENDPOINT
        return f"{hub} was not reached or cut off, {repo_name} is as it was: check the network, then run again to go on"
    status = error.response.status_code
    refused = f"the hub refuses this token for {repo_name}: run `hf auth login` or set HF_TOKEN to one that may write"
    known = {
        401: refused,
        403: refused,
        404: f"the hub has no {repo_name} that this token may see: check the name and what the token may do",
        429: f"the hub takes no more requests for now, {repo_name} is as it was: run again in some minutes",
    }
    return known.get(status, f"the hub answered {status}, {repo_name} is as it was: run again to go on")


def _one_line(error: Exception, token: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(token, "***")
