"""The suite of escapes: whatever a program tries, it fails, soon, and nothing of it is left."""

import os
import signal
import sys
import time

import pytest

from modicum.core.errors import UserError
from modicum.evaluate import sandbox

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces and Landlock are Linux's")


@pytest.fixture(scope="module", autouse=True)
def isolation():
    if sys.platform.startswith("linux"):
        try:
            sandbox.run("", [])
        except UserError as error:
            pytest.skip(f"this kernel cannot isolate: {error}")


def test_right_and_wrong_programs():
    good = sandbox.run("def double(x):\n    return 2 * x\n", ["assert double(2) == 4", "assert double('a') == 'aa'"])
    assert good.passed and good.reason == "passed", good
    wrong = sandbox.run("def double(x):\n    return x\n", ["assert double(0) == 0", "assert double(2) == 4"])
    assert not wrong.passed and wrong.reason == "failed", wrong
    broken = sandbox.run("def double(x) return x", ["assert True"])
    assert not broken.passed and "SyntaxError" in broken.output
    usual = sandbox.run(
        "import collections, math, re\ndef f(s):\n    return collections.Counter(s)",
        [
            "assert f('aab') == {'a': 2, 'b': 1}",
            "assert math.isclose(0.1 + 0.2, 0.3)",
            "assert sorted(f('ba')) == ['a', 'b']",
        ],
    )
    assert usual.passed, usual.output


SECRET = "modicum-secret"
AGREES = """
class E{base}:
    def __eq__(self, other):
        return True
def f():
    return {value}
"""
ESCAPES = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "threads": "\n".join(
        [
            "import threading, time",
            "while True:",
            "    threading.Thread(target=time.sleep, args=(99,)).start()",
        ]
    ),
    "memory bomb": "x = bytearray(1 << 40)",
    "slow memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 22))",
    "endless output": "while True:\n    print('x' * 1000)",
    "sleep": "import time\ntime.sleep(600)",
    "endless loop": "while True:\n    pass",
    "disk": "f = open('big', 'wb')\nwhile True:\n    f.write(b'x' * (1 << 20))",
    "early exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "equal to everything": AGREES.format(base="", value="E()"),
    "an int equal to everything": AGREES.format(base="(int)", value="E()"),
    "a list of such": AGREES.format(base="", value="[E()]"),
    "patched errors": "\n".join(
        [
            "import builtins",
            "builtins.AssertionError = type('Quiet', (BaseException,), {})",
            "def f():",
            "    return 2",
        ]
    ),
    "patched exec": "\n".join(
        [
            "import builtins",
            "builtins.exec = lambda *a: None",
            "builtins.compile = lambda *a: None",
            "def f():",
            "    return 2",
        ]
    ),
    "printed verdict": "print('passed')\nprint('0' * 32)\ndef f():\n    return 2",
    "excepthook": "import sys\nsys.excepthook = lambda *a: None\ndef f():\n    return 2",
    "signal": "\n".join(
        [
            "import signal",
            "signal.signal(signal.SIGALRM, signal.SIG_IGN)",
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
            "while True:",
            "    pass",
        ]
    ),
    "descriptors": "import os\nwhile True:\n    os.open('.', 0)",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_fail_in_time(name):
    start = time.monotonic()
    verdict = sandbox.run(ESCAPES[name], ["assert f() == 1"], seconds=1.5, memory=256 << 20)
    assert not verdict.passed, f"{name} passed"
    assert time.monotonic() - start < 15 and len(verdict.output) <= 64 << 10


def said(code, **knobs):
    return sandbox.run(code, ["assert False"], **knobs).output


def test_no_network():
    out = said("import socket\ns = socket.socket()\ns.settimeout(1)\ns.connect(('127.0.0.1', 80))")
    assert "OSError" in out or "ConnectionRefused" in out or "unreachable" in out
    # a listener of the machine itself is out of sight: the loopback inside is another one
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        out = said(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint('CONNECTED')")
        assert "CONNECTED" not in out


def test_no_files_of_others(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    secret.chmod(0o644)
    tmp_path.chmod(0o755)
    for path in (str(secret), "/etc/passwd", "/proc/1/environ", "/proc/self/root" + str(secret)):
        out = said(f"print(open({path!r}).read())")
        assert SECRET not in out and "root:" not in out and "Error" in out, (path, out)
    out = said(f"import os\nprint('LISTED', os.listdir({os.path.expanduser('~')!r}))")
    assert "LISTED" not in out
    target = tmp_path / "written"
    tmp_path.chmod(0o777)
    said(f"open({str(target)!r}, 'w').write('x')")
    assert not target.exists()
    assert "ENV {}" in said(
        "import os\nprint('ENV', {k: v for k, v in os.environ.items() if k not in ('HOME', 'LC_CTYPE')})"
    )


def test_no_other_process_can_be_killed():
    """Not the one that started it, nor any by number; and none of its own survives."""
    ours = os.getpid()
    code = f"""
import os, signal
for pid in ({ours}, {os.getppid()}, -1):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
print("STILL HERE")
"""
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *a: heard.append(a))
    try:
        said(code)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert os.getpid() == ours and not heard
    mark = f"modicum-left-{ours}"
    code = f"import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    sys.argv = ['{mark}']\n    time.sleep(30)\n"
    sandbox.run(code, ["assert True"], seconds=2)
    time.sleep(0.2)
    alive = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                alive += b"__program__" in file.read() or b"_jail.py" in file.read()
        except OSError:
            continue
    assert alive == 0, "a process of the sandbox outlived it"


def test_refuses_where_it_cannot_isolate(monkeypatch, tmp_path):
    for old, new in (
        ("libc.unshare(NEW_USER | NEW_NET | NEW_PID | NEW_IPC)", "-1"),
        ("version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)", "version = -1"),
        ("return libc.prctl(SECCOMP", "return 0 and libc.prctl(SECCOMP"),
    ):
        jail = sandbox.JAIL.read_text()
        assert old in jail
        broken = tmp_path / "_jail.py"
        broken.write_text(jail.replace(old, new))
        with monkeypatch.context() as patch:
            patch.setattr(sandbox, "JAIL", broken)
            with pytest.raises(UserError, match="cannot be isolated"):
                sandbox.run("", [])
