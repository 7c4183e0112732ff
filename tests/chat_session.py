"""A chat of twelve turns at a terminal: every command, an interrupt, a long paste, and the end of input.

python -m tests.chat_session                                        a tiny random base, a few seconds
python -m tests.chat_session --base smollm2-135m-instruct --drafter DIR
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path

from tests.text_models import save_base, save_drafter

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "> "
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PASTE = "\x1b[200~", "\x1b[201~"
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
# What a line editor says to the terminal before and after a line, and carriage returns.
_MODES = re.compile(r"\x1b\[\?2004[hl]|\r")
_NOTICE = re.compile(r"\s*\([^)\n]*(\)\n|$)")
FIGURES = re.compile(r"\[(\d+) tokens, [\d.]+ s, [\d.]+ tok/s(, tau [\d.]+)?\]")
# Opening its own terminal makes it the controlling one of a new session: Ctrl-C then comes as a signal.
_TAKE_TERMINAL = (
    "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.executable, sys.orig_argv[:1] + "
    "sys.argv[1:])"
)


class TerminalChat:
    """A chat behind a pseudo-terminal.

    Args:
        arguments: of the generation script, without ``--interactive``.
        cwd: where it runs.
        environment: changes to this process's.
    """

    def __init__(self, arguments: Sequence[str], cwd: Path, environment: dict[str, str] | None = None) -> None:
        self._main, other = pty.openpty()
        ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        script = [str(ROOT / "generate_speculator.py"), "--interactive", *arguments]
        kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        kept |= {"TERM": "xterm", "PYTHONPATH": str(ROOT), **(environment or {})}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *script],
            **{"stdin": other, "stdout": other, "stderr": other},
            cwd=cwd,
            env=kept,
            start_new_session=True,
        )
        os.close(other)
        self.seen = ""
        self._unread = ""
        self._raw = b""

    def send(self, text: str) -> None:
        """Type a text; what the terminal cannot take yet waits while its echo is read."""
        data = text.encode()
        while data:
            self._read(0.0)
            _, writable, _ = select.select([], [self._main], [], 1.0)
            if writable:
                data = data[os.write(self._main, data[:512]) :]

    def wait_for(self, what: str, seconds: float) -> str:
        """Read until a text comes; return what came since the last call, up to it.

        Raises:
            AssertionError: it does not come.
        """
        end, open_ = time.monotonic() + seconds, True
        while what not in self._unread:
            if time.monotonic() > end or not open_:
                raise AssertionError(f"expected {what!r}, got {self._unread[-2000:]!r}")
            open_ = self._read(0.2)
        found, _, self._unread = self._unread.partition(what)
        return found + what

    def wait_for_reply(self, seconds: float) -> None:
        """Read until something of a reply is there; a notice in brackets that goes before it is none."""
        end = time.monotonic() + seconds
        while not _NOTICE.sub("", self._unread).strip() and time.monotonic() < end:
            self._read(0.05)

    def end(self, seconds: float = 300.0) -> int:
        """Read to the end and return the exit code."""
        until = time.monotonic() + seconds
        while self._read(0.2) and time.monotonic() < until:
            continue
        return self._process.wait(max(until - time.monotonic(), 1.0))

    def close(self) -> None:
        """End the process if it is still there."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._main)

    def _read(self, seconds: float) -> bool:
        """Take what is there; false at the end."""
        while select.select([self._main], [], [], seconds)[0]:
            try:
                data = os.read(self._main, 65536)
            except OSError:  # the other side was closed
                return False
            if not data:
                return False
            self._raw += data
            text = self._raw.decode("utf-8", errors="ignore")
            self._raw = self._raw[len(text.encode()) :]
            self.seen += text
            self._unread = _MODES.sub("", self._unread + text)
            seconds = 0.0
        return True


@dataclass
class Session:
    """What a scripted chat showed.

    Args:
        replies: what was shown in answer to each message, its line of figures included.
        commands: what was shown after each command.
        transcript: all of it.
        saved: the conversation as ``/save`` wrote it.
        code: of the exit.
    """

    replies: list[str] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    transcript: str = ""
    saved: list[dict[str, str]] = field(default_factory=list)
    code: int = -1


LONG = "".join(f"word {number} " for number in range(2000))[:10_000]


class Player:
    """Types and keeps what is shown.

    Args:
        chat: at its first prompt soon.
        patience: seconds for one reply.
    """

    def __init__(self, chat: TerminalChat, patience: float) -> None:
        self.chat = chat
        self.session = Session()
        self._patience = patience

    def until(self, what: str) -> str:
        """Wait for a text."""
        return self.chat.wait_for(what, self._patience)

    def until_prompt(self) -> str:
        """Wait for the next message to be wanted."""
        return self.until("\n" + PROMPT)

    def ask(self, text: str) -> None:
        """Take a turn."""
        self.chat.send(text + "\r")
        self.session.replies.append(self.until("tok/s") + self.until_prompt())

    def command(self, text: str) -> None:
        """Give a command."""
        self.chat.send(text + "\r")
        self.session.commands[text] = self.until_prompt()

    def interrupt(self, text: str) -> None:
        """Take a turn, and stop the reply as soon as something of it is there."""
        self.chat.send(text + "\r")
        self.until(text)
        self.chat.wait_for_reply(self._patience)
        self.chat.send(CTRL_C)
        self.session.replies.append(self.until_prompt())


def play(chat: TerminalChat, folder: Path, patience: float = 300.0) -> Session:
    """Hold the conversation of twelve turns.

    Args:
        chat: at its first prompt soon.
        folder: where the conversation is saved.
        patience: seconds for one reply.
    """
    player = Player(chat, patience)
    player.until(PROMPT)
    _four_turns_with_settings(player)
    _three_messages_of_several_lines(player)
    player.interrupt("One more.")  # 8
    player.ask("Still there?")  # 9
    player.command(f"/save {folder / 'chat.json'}")
    player.command("/nonsense")
    chat.send(f"{PASTE[0]}{LONG}{PASTE[1]}\r")  # 10: over a small context window
    player.session.replies.append(player.until_prompt())
    player.ask("Never mind.")  # 11
    player.command("/reset")
    chat.send(UP + UP)  # the history has the message before the command
    player.until("Never mind.")
    player.ask("")  # 12
    chat.send(CTRL_D)
    player.session.code = chat.end()
    player.session.transcript = chat.seen
    player.session.saved = json.loads((folder / "chat.json").read_text(encoding="utf-8"))["messages"]
    return player.session


def _four_turns_with_settings(player: Player) -> None:
    player.ask("Hello there.")  # 1
    player.command("/help")
    player.ask("What is a draft?")  # 2
    player.command("/stats")
    player.command("/temperature 0.7")
    player.ask("And a tree?")  # 3
    player.command("/temperature hot")
    player.command("/speculation off")
    player.ask("Say it without drafting.")  # 4
    player.command("/speculation on")
    player.command("/temperature 0")


def _three_messages_of_several_lines(player: Player) -> None:
    player.ask(f"{PASTE[0]}first line\rsecond line\r\rlast line{PASTE[1]}")  # 5: pasted
    for line in ('"""', "fenced one", "fenced two"):
        player.chat.send(line + "\r")
        player.until("\n. ")
    player.ask('"""')  # 6
    player.chat.send("Tell me a long story.\\\r")
    player.until("\n. ")
    player.ask("Go on.")  # 7


def tiny_arguments(folder: Path) -> list[str]:
    """Save a tiny base with a drafter; return the arguments that chat with them."""
    base = save_base(folder / "base", window=600)
    drafter = save_drafter(folder / "drafter", base)
    return ["--speculator_path", str(drafter), "--dtype", "fp32", "--device", "cpu", "--max_tree_nodes", "8"]


def main() -> int:
    """Run the session and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="default: a tiny random base")
    parser.add_argument("--drafter", help="default: the newest for the base")
    parser.add_argument("--max_generation_length", default="32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        arguments = ["--base_model", args.base] if args.base else tiny_arguments(folder)
        if args.drafter:
            arguments += ["--speculator_path", str(Path(args.drafter).resolve())]
        chat = TerminalChat([*arguments, "--max_generation_length", args.max_generation_length], Path.cwd())
        try:
            session = play(chat, folder, patience=600.0)
        finally:
            sys.stdout.write(chat.seen)
            chat.close()
    sys.stdout.write(f"\n{len(session.replies)} turns, {len(session.commands)} commands, exit code {session.code}\n")
    return session.code


if __name__ == "__main__":
    sys.exit(main())
