"""The chat at a terminal, by a script that types."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import chat_session
from tests.chat_session import CTRL_C, FIGURES, GREEN, PROMPT, ROOT, TerminalChat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LENGTH = ["--max_generation_length", "48"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*chat_session.tiny_arguments(tmp_path_factory.mktemp("models")), *LENGTH]


def test_twelve_turns_with_every_command(arguments: list[str], tmp_path: Path) -> None:
    chat = TerminalChat(arguments, tmp_path)
    try:
        session = chat_session.play(chat, tmp_path)
    finally:
        chat.close()
    assert (session.code, len(session.replies)) == (0, 12)
    answered = [reply for number, reply in enumerate(session.replies, 1) if number != 10]
    assert [reply for reply in answered if not FIGURES.search(reply)] == []
    # A legend at the start; drafted tokens are coloured, those of the baseline are not.
    assert f"{GREEN}drafted tokens{chat_session.PLAIN}, the base's own tokens" in session.transcript
    assert any(GREEN in reply for reply in session.replies[:3]) and GREEN not in session.replies[3]
    assert "Traceback" not in session.transcript
    assert "(stopped)" in session.replies[7] and int(FIGURES.search(session.replies[7])[1]) < 48  # type: ignore[index]
    assert "context window is 600" in session.replies[9] and "conversation is unchanged" in session.replies[9]
    assert any("oldest turn" in reply and "dropped to fit" in reply for reply in session.replies)
    shown = session.commands
    assert all(name in shown["/help"] for name in ("/reset", "/stats", "/temperature", "/speculation", "/save"))
    assert "2 replies" in shown["/stats"] and "speculation on" in shown["/stats"]
    assert "temperature 0.7" in shown["/temperature 0.7"] and "takes a number" in shown["/temperature hot"]
    assert "speculation off" in shown["/speculation off"] and "unknown command" in shown["/nonsense"]
    assert "conversation forgotten" in shown["/reset"]
    asked = [message["content"] for message in session.saved if message["role"] == "user"]
    assert asked[-1] == "Still there?"
    # What was shown is what was kept, character by character.
    shown_text = re.sub(r"\x1b\[\d*m", "", session.transcript).replace("\r\n", "\n")
    assert all(message["content"] in shown_text for message in session.saved if message["role"] == "assistant")
    everything = "\n".join(message["content"] for message in session.saved)
    assert [message["role"] for message in session.saved] == ["user", "assistant"] * len(asked)
    assert "fenced one\nfenced two" in everything and "Tell me a long story.\nGo on." in everything


def test_a_paste_of_several_lines_is_one_message(arguments: list[str], tmp_path: Path) -> None:
    chat = TerminalChat(arguments, tmp_path)
    try:
        chat.wait_for(PROMPT, 300)
        chat.send(f"{chat_session.PASTE[0]}first\rsecond\r\rlast{chat_session.PASTE[1]}\r")
        chat.wait_for("tok/s", 300)
        chat.wait_for("\n" + PROMPT, 300)
        time.sleep(1.0)  # Python's prompt misses an interrupt between its first character and its first wait
        chat.send(CTRL_C)  # at the prompt it does not leave
        chat.wait_for("(/exit leaves)\n" + PROMPT, 300)
        chat.send("/stats\r")
        assert "1 replies" in chat.wait_for("\n" + PROMPT, 300)
        chat.send("/save chat.json\r/exit\r")
        assert chat.end(300) == 0
    finally:
        chat.close()
    assert '"content": "first\\nsecond\\n\\nlast"' in (tmp_path / "chat.json").read_text()


def test_no_colour_where_none_is_wanted(arguments: list[str], tmp_path: Path) -> None:
    chat = TerminalChat(arguments, tmp_path, {"NO_COLOR": "1"})
    try:
        chat.wait_for(PROMPT, 300)
        chat.send("Hello.\r")
        assert FIGURES.search(chat.wait_for("\n" + PROMPT, 300))
        chat.send("/exit\r")
        assert chat.end(300) == 0
    finally:
        chat.close()
    assert GREEN not in chat.seen
    piped = subprocess.run(
        [sys.executable, str(ROOT / "generate_speculator.py"), "--interactive", *arguments],
        input="Hello.\n/stats\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "\x1b" not in piped.stdout and "1 replies" in piped.stdout and PROMPT not in piped.stdout
