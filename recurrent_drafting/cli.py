"""What the command-line scripts share: a parser that helps, and errors as one line with a code."""

from __future__ import annotations

import argparse
import difflib
import errno
import inspect
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from recurrent_drafting import memory
from recurrent_drafting.errors import DISK_FULL, RecurrentDraftingError, ResourceError, UsageError

T = TypeVar("T")
AUTO = "auto"
_INTERRUPTED = 130
_PLACES = "name a writable place in HOME, HF_HOME, TMPDIR or RECURRENT_DRAFTING_CACHE"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and keep the line breaks of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.default == argparse.SUPPRESS:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Take flags by their exact names; name the nearest one for a misspelt flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse unknown flags with the nearest match."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]}{self._nearest(unknown[0])}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with code 2."""
        self.exit(UsageError.exit_code, f"error: {message} (see {self.prog} --help)\n")

    def _nearest(self, flag: str) -> str:
        below = [item.choices.values() for item in self._actions if isinstance(item, argparse._SubParsersAction)]
        parsers: list[argparse.ArgumentParser] = [self, *itertools.chain.from_iterable(below)]
        names = [name for parser in parsers for name in parser._option_string_actions if name.startswith("--")]
        near = difflib.get_close_matches(flag.split("=", maxsplit=1)[0], names, n=1, cutoff=0.5)
        return f"; did you mean {near[0]}?" if near else ""


def user_path(text: str) -> Path:
    """Return a path that a user wrote, its leading ``~`` or ``~name`` replaced.

    Raises:
        UsageError: nobody of that name has a home on this machine.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{text} begins with a home that is not on this machine: write the path in full") from error


def auto_or_int(text: str) -> int | str:
    """Read the value of a flag that takes a number or ``AUTO``."""
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {AUTO} or a number, got {text!r}") from None


def fixed_number(given: int | str | None) -> int | None:
    """Return the number that such a flag fixes, None for ``AUTO`` and where it is not given."""
    return given if isinstance(given, int) else None


def require_least(values: object, least: Mapping[str, int]) -> None:
    """Refuse values of flags below the least ones that work.

    Args:
        values: holds the value of each flag under its name, None where there is none.
        least: what is accepted at least, by name.

    Raises:
        UsageError: names flag, least value and value.
    """
    for name, minimum in least.items():
        value = getattr(values, name)
        if value is not None and value < minimum:
            raise UsageError(f"--{name} must be >= {minimum}, got {value}")


def settings_of(kind: Callable[..., T], args: argparse.Namespace) -> T:
    """Build a settings object from the flags that have the names of its fields.

    Args:
        kind: its class.
        args: what the command line says.

    Raises:
        UsageError: a value is out of range.
    """
    # TrainingArguments has a field "debug" that is no flag: --debug is ours.
    names = inspect.signature(kind).parameters.keys() - {"debug"}
    return kind(**{name: value for name, value in vars(args).items() if name in names})


def note(text: str) -> None:
    """Write a line beside the output, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run(body: Callable[[], int], debug: bool) -> int:
    """Run a script's body; turn errors of the package into one line and an exit code.

    Args:
        body: returns the exit code.
        debug: print tracebacks too.
    """
    try:
        code = body()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output left; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RecurrentDraftingError as error:
        return _report(" ".join(str(error).split()), error.exit_code, debug)
    except KeyboardInterrupt:
        return _report("interrupted", _INTERRUPTED, debug)
    except (MemoryError, RuntimeError, OSError) as error:
        shortage = _shortage(error)
        if shortage is None:
            raise
        return _report(shortage, ResourceError.exit_code, debug)


def _shortage(error: Exception) -> str | None:
    """Say what the machine has run out of, or None if the error is something else."""
    if isinstance(error, OSError):
        if error.errno in DISK_FULL:
            return f"{error.strerror}: {error.filename}; free space and run again"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{error.strerror}: {error.filename}; {_PLACES}"
    return memory.describe(error) if memory.is_shortage(error) else None


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"error: {message}\n")
    return code
