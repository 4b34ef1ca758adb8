"""`mlx-gemma4 chat`: in a terminal (keys by pexpect, the screen by pyte) and in a pipe."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
import pytest
from recorded import HERE

from mlx_gemma4.cli.repl import COMMANDS

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "mlx_gemma4", "chat"]
OTHER_MODEL = HERE / "e2b-q4_k_m.gguf"
CTRL_C, CTRL_D, ALT_ENTER, ENTER = "\x03", "\x04", "\x1b\r", "\r"


def pasted(text: str) -> str:
    """As terminals send it."""
    return "\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~"


# In a terminal


class Terminal:
    """A terminal with `mlx-gemma4 chat` in it."""

    def __init__(self, home: Path, *flags: str, width: int = 80, height: int = 24, **env: str) -> None:
        known = {k: v for k, v in os.environ.items() if k not in ("TERM_PROGRAM", "VTE_VERSION", "NO_COLOR")}
        known |= {"TERM": "xterm-256color", "XDG_STATE_HOME": str(home), **env}
        self._child = pexpect.spawn(
            COMMAND[0], [*COMMAND[1:], *flags], dimensions=(height, width), env=known, encoding="utf-8", timeout=60
        )
        self.screen = pyte.HistoryScreen(width, height, history=5000, ratio=0.5)
        self.screen.write_process_input = self._child.send  # it answers where its cursor stands
        self._stream = pyte.Stream(self.screen)
        self.raw = ""
        self._closed = False

    def update(self) -> bool:
        """Show what has come; False: the program has ended."""
        try:
            new = self._child.read_nonblocking(1 << 16, timeout=0.03)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += new
        self._stream.feed(new)
        return True

    @property
    def text(self) -> str:
        """All lines, those that scrolled away first."""
        past = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        return "\n".join(line.rstrip() for line in (*past, *self.screen.display)).rstrip()

    def wait(self, for_what: str | Callable[[], bool], seconds: float = 60) -> None:
        """Until a pattern is found on the screen, or the function says so."""
        end = time.monotonic() + seconds
        while not (re.search(for_what, self.text) if isinstance(for_what, str) else for_what()):
            assert self.update() or self.update(), f"ended before {for_what}:\n{self.text}"
            assert time.monotonic() < end, f"never came: {for_what}\n{self.text}"

    def ready(self) -> str:
        """The prompt waits: its toolbar is the last line. All that is on the screen."""
        self.wait(lambda: bool(re.search(r"[\d,]+ / [\d,]+ tokens, [\d.,]+ MB(, thinking)?$", self.text)))
        return self.text

    def type(self, keys: str) -> None:
        self._child.send(keys)

    def say(self, line: str) -> str:
        """Send a line; what came of it, up to the next prompt."""
        self.ready()
        before = len(self.raw)
        self.type(line + ENTER)
        self.wait(lambda: "\x1b[?2004l" in self.raw[before:])  # the prompt was left
        after = self.raw.index("\x1b[?2004l", before)
        self.wait(lambda: "\x1b[?2004h" in self.raw[after:])  # and the next one is there
        self.ready()
        return plain(self.raw[after : self.raw.index("\x1b[?2004h", after)])

    def resize(self, width: int, height: int) -> None:
        self._child.setwinsize(height, width)
        self.screen.resize(height, width)

    def end(self) -> int:
        """The exit code, once it has ended by itself."""
        while self.update():
            pass
        self._child.close()
        return int(self._child.exitstatus if self._child.exitstatus is not None else -self._child.signalstatus)

    def hang_up(self) -> None:
        """Close its window."""
        process = self._child.ptyproc
        process.fileobj.close()  # the program gets SIGHUP, and errors when it writes
        os.waitpid(process.pid, 0)
        # Or it would close the descriptor again, which may be another terminal's by then.
        process.closed = self._closed = True

    def close(self) -> None:
        if not self._closed:
            self._child.close(force=True)


def plain(raw: str) -> str:
    """What a program wrote, without escape codes and what a slow machine shows while it reads a prompt."""
    return re.sub(r"\x1b\[[\d;?>]*[a-zA-Z]|Reading \d+ of \d+ tokens|\r", "", raw)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*flags: str, **rest: object) -> Terminal:
        opened.append(Terminal(tmp_path, *flags, **rest))  # type: ignore[arg-type]
        return opened[-1]

    yield open_terminal
    for each in opened:
        assert "Traceback" not in each.raw
        each.close()


def saved_messages(path: Path) -> list[dict[str, str]]:
    return json.loads(path.read_text(encoding="utf-8"))["messages"]


def test_send_stop_go_on_leave(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    """A reply streams; Ctrl-C stops one and keeps what it said; Ctrl-C at the prompt tells how to leave."""
    t = terminal("--seed", "1", "-n", "90")
    t.ready()
    assert not (tmp_path / "mlx-gemma4").exists(), "a history is made only when there is something in it"
    t.type("Once upon a time" + ENTER)
    t.wait(r"\nOnce upon a time there was a \w+")
    early = t.text
    t.type("Tell me")  # while the reply is written: kept for the prompt, and not echoed into the reply
    t.wait(lambda: len(t.text) > len(early) + 60)
    assert "Tell me" not in t.text
    t.type(CTRL_C)
    t.wait(r"\(stopped\)\n\n> Tell me")
    tokens = int(re.findall(r"(\d+) / 2,048 tokens", t.ready())[-1])
    assert tokens > 30
    t.say(" more")
    assert "reused" in t.say("/stats")
    reused = int(re.findall(r"(\d+) reused", t.text)[-1])
    assert reused >= tokens - 1, "the stopped reply is part of the conversation and isn't read again"
    t.type(CTRL_C)
    t.wait("Ctrl-D leaves. /help lists the commands.\n>")
    t.say(f"/save {tmp_path / 'talk.json'}")
    said = saved_messages(tmp_path / "talk.json")
    assert [m["role"] for m in said] == ["user", "assistant"] * 2
    assert said[1]["content"].startswith("Once upon a time there was")
    assert said[2]["content"] == "Tell me more"
    t.type(CTRL_D)
    assert t.end() == 0
    history = tmp_path / "mlx-gemma4" / "history"
    assert "+Once upon a time\n" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0


def test_lines_of_one_message(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    """Pasted lines, Alt+Enter and Ctrl-J stay in one message; history brings it back whole."""
    t = terminal("-n", "4", "--system", "Be brief.")
    t.ready()
    t.type(pasted("first line\n/undo\n  third"))
    t.wait(r"> first line\n  /undo\n    third")
    t.say("")
    t.say(f"a{ALT_ENTER}b\nc")
    t.type("\x1b[A")
    t.wait(r"> a\n  b\n  c\n[^\n]*tokens" if t.screen.cursor.y > 18 else r"> a\n  b\n  c\n\n")
    t.type(CTRL_C)
    t.say("//help is no command")
    t.say(f"/save {tmp_path / 'talk.json'}")
    said = [m["content"] for m in saved_messages(tmp_path / "talk.json") if m["role"] != "assistant"]
    assert said == ["Be brief.", "first line\n/undo\n  third", "a\nb\nc", "/help is no command"]


def test_thinking(terminal: Callable[..., Terminal]) -> None:
    t = terminal("--seed", "1", "--think", "-n", "45")
    out = t.say("Tell me about a goose")
    # A word or two of it: what is drawn between others depends on how fast this machine is.
    assert re.search("reader|answer", plain(t.raw)), "the thought is seen while it is made"
    assert re.search(r"Thought for \d+\.\d s \(\d+ tokens\)", out)
    assert re.search(r"> Tell me about a goose\nThought for [^\n]*\n\n\w", t.text), "and then folded"
    assert "I will answer with a story" in t.say("/think")
    t.say("Tell me about a fox")
    assert re.search(r"fox\nThe reader says[^\n]*\nThought for", t.text), "thoughts stay now"
    t.say("/think off")
    assert "thinking" not in t.ready().splitlines()[-1]
    assert "Thought for" not in t.say("Tell me about a hen")


def test_resize_during_a_reply(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    t = terminal("--seed", "1", "-n", "110", width=50, height=30)
    t.ready()
    t.type("Once upon a time" + ENTER)
    t.wait(r"cheerful\s+old\s+woman")
    t.resize(100, 30)
    t.ready()
    t.say(f"/save {tmp_path / 'talk.json'}")
    reply = saved_messages(tmp_path / "talk.json")[1]["content"]
    shown = t.text.split("> Once upon a time\n")[1].split("(cut")[0]
    # Each character once: a word may break where the window does.
    assert "".join(shown.split()) == "".join(reply.split())
    assert max(map(len, shown.splitlines())) > 60, "in the new width"
    t.type("Once upon a time" + ENTER)
    t.wait(lambda: len(t.text.split("Once upon a time\n")) > 2)
    t.resize(40, 10)
    before = len(t.raw)
    t.wait(lambda: len(t.raw) > before + 100)  # it goes on
    t.type(CTRL_C)
    t.ready()
    t.say("Hello!")
    shown = re.split(r"\n>|\(cut", t.text.split("> Hello!\n")[1])[0]
    t.say(f"/save {tmp_path / 'talk.json'}")
    reply = saved_messages(tmp_path / "talk.json")[-1]["content"]
    assert shown.split() == reply.split(), "laid out for 40 columns: the terminal breaks no word"
    t.type(CTRL_D)
    assert t.end() == 0


def test_commands_in_a_terminal(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    """Each of them at the prompt."""
    t = terminal("-n", "12", "--seed", "1")
    file = tmp_path / "talk.json"
    t.say("Hello!")
    t.say("Tell me a tale")
    assert "Took back: Tell me a tale" in t.say("/undo")
    first = t.say("Tell me a tale")
    assert first.strip() != t.say("/retry").strip(), "another reply, though the seed is fixed"
    t.say("/stats")
    assert re.search(r"Prompt: 1 token read, [\d.]+ a second; \d\d+ reused", t.text)
    t.type("/edit" + ENTER)
    t.wait(r"/edit\n> Tell me a tale")
    t.say(" of a fox")
    assert f"Saved as {file}" in t.say(f"/save {file}").replace("\n", "")
    assert [m["content"] for m in saved_messages(file)][::2] == ["Hello!", "Tell me a tale of a fox"]
    assert "Now on other" in t.say("/fork other")
    assert re.search(r"\nother>", t.ready())
    assert "* other: 2 messages" in t.say("/fork")
    assert "Now on main" in t.say("/fork main")
    assert "A new conversation" in t.say("/clear")
    assert "0 / 2,048 tokens" in t.ready().splitlines()[-1]
    assert "2 messages of yours loaded" in t.say(f"/load {file}")
    assert "System prompt set" in t.say("/system Be brief.")
    assert "Now e2b-q4_k_m.gguf" in t.say(f"/model {OTHER_MODEL}")
    assert "/ 512 tokens" in t.ready().splitlines()[-1]
    assert "Thinking is on" in t.say("/think on")
    out = t.say("/help")
    assert all(name in out for name in COMMANDS)
    assert "the nearest is /undo" in t.say("/undoo")
    t.type("/sy\t")
    t.wait(r"> /system")
    t.type(CTRL_C + "/quit" + ENTER)
    assert t.end() == 0


def test_no_color(terminal: Callable[..., Terminal]) -> None:
    t = terminal("-n", "8", NO_COLOR="1")
    t.say("Hello!")
    colors = [code for codes in re.findall(r"\x1b\[([\d;]*)m", t.raw) for code in codes.split(";")]
    assert not [code for code in colors if re.fullmatch(r"[34]\d|9\d|10\d", code)]


def test_dumb_terminal(terminal: Callable[..., Terminal]) -> None:
    """No escape codes at all; Ctrl-C still stops a reply and no more."""
    t = terminal("--seed", "1", TERM="dumb")
    t.wait("\n> ?$")
    t.type("Once upon a time\n")
    t.wait("castle")
    t.type(CTRL_C)
    t.wait(r"\(stopped\)\n> ?$")
    t.type("/undo\n")
    t.wait("Took back: Once upon a time\n>")
    t.type(CTRL_D)
    assert t.end() == 0
    assert "\x1b" not in t.raw


# In a pipe


def piped(text: str | bytes, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run([*COMMAND, *flags], input=data, capture_output=True, timeout=300, env={**os.environ, **env})
    assert b"Traceback" not in done.stderr
    return subprocess.CompletedProcess([], done.returncode, done.stdout.decode(), done.stderr.decode())


def test_piped(tmp_path: Path) -> None:
    """Each line is answered; no escape codes; no history; a mistake is told, changes nothing, and shows at the end."""
    nowhere = str(tmp_path / "none")
    done = piped("Hello!\n/fork a\nHello!\n", "-n", "8", "--temperature", "0", XDG_STATE_HOME=nowhere)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] and lines[1] == "Now on a, branched from main." and lines[2]
    assert "\x1b" not in done.stdout + done.stderr and "> " not in done.stdout
    assert not Path(nowhere).exists()
    done = piped(b"/udno\n\nnot \xff UTF-8\n/load nowhere.json\n/stats", "-n", "4")
    assert done.returncode == 2
    assert "the nearest is /undo" in done.stderr and "nowhere.json" in done.stderr
    assert "1 message of yours" in done.stdout


def test_state_is_gone_on_with(tmp_path: Path) -> None:
    state = str(tmp_path / "talk.json")
    piped("Hello!\n", "-n", "8", "--state", state, "--temperature", "0")
    done = piped("Tell me more\n/stats\n", "-n", "8", "--state", state, "--system", "", "--temperature", "0")
    read, reused = map(int, re.findall(r"(\d+) tokens? read.*?; (\d+) reused", done.stdout)[0])
    assert reused > read, "what the first run read was kept"
    assert len(saved_messages(tmp_path / "talk.json")) == 4
    (tmp_path / "talk.json").write_text("{}")
    done = piped("Hello!\n", "--state", state)
    assert done.returncode == 2
    assert "is no conversation" in done.stderr
    assert (tmp_path / "talk.json").read_text() == "{}"


@pytest.mark.parametrize("during", ["prompt", "reply"])
def test_state_is_saved_when_the_terminal_is_closed(
    terminal: Callable[..., Terminal], tmp_path: Path, during: str
) -> None:
    t = terminal("--state", str(tmp_path / "talk.json"), "--seed", "1", *(["-n", "4"] if during == "prompt" else []))
    t.ready()
    t.type("Once upon a time" + ENTER)
    if during == "prompt":
        t.wait(r"\(cut")
        t.ready()
    else:
        t.wait("castle")
    t.hang_up()
    said = saved_messages(tmp_path / "talk.json")
    assert [m["role"] for m in said] == ["user", "assistant"]
    assert said[1]["content"].startswith("Once upon a")
    assert "Once upon a" in piped("/retry\n", "--state", str(tmp_path / "talk.json"), "-n", "8", "--seed", "1").stdout


def test_ctrl_c_ends_a_pipe() -> None:
    # A runner in the background ignores Ctrl-C, and so would its children.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*COMMAND, "--seed", "1"], preexec_fn=heed, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(b"Once upon a time\n")
        process.stdin.flush()
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"Traceback" not in errors


def test_other_commands_load_none_of_it() -> None:
    code = "import sys; from mlx_gemma4.cli.main import main; main(sys.argv[1:], standalone_mode=False);"
    code += "print([m for m in ('rich', 'prompt_toolkit', 'markdown_it') if m in sys.modules])"
    args = ["generate", "-m", str(OTHER_MODEL), "-p", "the", "-n", "2"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
