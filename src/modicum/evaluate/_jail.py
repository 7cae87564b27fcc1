"""What a sandboxed program is started through: run as a script, never imported (`evaluate.sandbox`).

    python -I _jail.py SETTINGS-AS-JSON

It takes namespaces of its own (user, network, processes, shared memory), and starts a supervisor as the first process
of the new process namespace, whose end is the end of every process inside. The program runs below the supervisor as
nobody: limits of memory, time, files and descriptors, no new privileges, by seccomp no new processes (root is exempt
from the limit of their number), and by Landlock no file but the interpreter's to read and its own folder to write.
"""

import ctypes
import json
import os
import resource
import signal
import sys

NEW_USER, NEW_NET, NEW_PID, NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
NO_NEW_PRIVS, PARENT_DEATH, SECCOMP = 38, 1, 22
NOBODY = 65534
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read folder
ALL_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # rights on files that a version of Landlock knows
FAILED = 97  # exit code: isolation was not to be had
libc = ctypes.CDLL(None, use_errno=True)


def fail(what: str) -> None:
    os.write(2, f"isolation: {what}: {os.strerror(ctypes.get_errno())}\n".encode())
    os._exit(FAILED)


def landlock(readable: list[str], writable: list[str]) -> bool:
    """Only these files and folders from here on; False where the kernel has no Landlock."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << ALL_BITS.get(min(version, 5), 13)) - 1
    ruleset = ctypes.create_string_buffer(rights.to_bytes(8, "little"), 8)
    handle = libc.syscall(LANDLOCK_CREATE, ruleset, 8, 0)
    if handle < 0:
        return False
    for paths, allowed in ((readable, READ), (writable, rights)):
        for path in paths:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            own = allowed if os.path.isdir(path) else allowed & (1 << 0 | 1 << 1 | 1 << 2)
            rule = ctypes.create_string_buffer(own.to_bytes(8, "little") + descriptor.to_bytes(4, "little"), 12)
            if libc.syscall(LANDLOCK_ADD, handle, 1, rule, 0):
                fail(f"landlock rule for {path}")
            os.close(descriptor)
    return libc.syscall(LANDLOCK_RESTRICT, handle, 0) == 0


def no_processes() -> bool:
    """Threads may be started, processes not; False on a processor whose system calls are not known here."""
    numbers = {"x86_64": (0xC000003E, 56, (57, 58)), "aarch64": (0xC00000B7, 220, ())}.get(os.uname().machine)
    if numbers is None:
        return False
    machine, clone, forks = numbers
    allow, denied, absent = 0x7FFF0000, 0x00050001, 0x00050026  # EPERM, ENOSYS
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, denied), (load, 0, 0, 0)]
    for number, answer in [(n, denied) for n in forks] + [(435, absent)]:  # without clone3 libraries fall back on clone
        code += [(equal, 0, 1, number), (give, 0, 0, answer)]
    code += [(equal, 1, 0, clone), (give, 0, 0, allow), (load, 0, 0, 16), (bits, 0, 1, 0x10000)]
    code += [(give, 0, 0, allow), (give, 0, 0, denied)]
    program = b"".join(
        op.to_bytes(2, "little") + bytes([yes, no]) + value.to_bytes(4, "little") for op, yes, no, value in code
    )
    memory = ctypes.create_string_buffer(program, len(program))
    head = len(code).to_bytes(2, "little") + bytes(6) + ctypes.addressof(memory).to_bytes(8, "little")
    return libc.prctl(SECCOMP, 2, ctypes.create_string_buffer(head, len(head)), 0, 0) == 0


def main() -> None:
    settings = json.loads(sys.argv[1])
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_NET | NEW_PID | NEW_IPC):
        if not settings["unsafe_network"]:
            fail("no namespaces of its own")
    else:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    supervisor = os.fork()
    if supervisor:
        os.waitpid(supervisor, 0)
        os._exit(0)
    libc.prctl(PARENT_DEATH, signal.SIGKILL)
    program = os.fork()
    if program:
        _, status = os.waitpid(program, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)  # the first process ends, and with it all others
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0):
        fail("no_new_privs")
    if not landlock(settings["readable"], [settings["folder"], "/dev/null"]) and not settings["unsafe_files"]:
        fail("no Landlock, so files outside would be readable")
    if not no_processes() and not settings["unsafe_files"]:
        fail("no seccomp filter, so processes could be started without end")
    for name, value in settings["limits"].items():
        number = getattr(resource, name)
        resource.setrlimit(number, (value, value))
    os.chdir(settings["folder"])
    command = [settings["python"], "-I", "-S", "-B", "-c", settings["program"]]
    try:
        os.execve(settings["python"], command, {"HOME": settings["folder"]})
    except OSError as error:
        ctypes.set_errno(error.errno or 0)
        fail(f"nobody cannot start {settings['python']}")


if __name__ == "__main__":
    main()
