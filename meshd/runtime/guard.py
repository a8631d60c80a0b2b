"""Becomes an engine that cannot outlive its parent.

Run as a program, by path and with `-I -S`, so it imports nothing of meshd:

    guard.py PARENT_PID OOM_SCORE_ADJ [SIGNAL] -- PROGRAM ARGUMENT...

Asks the kernel for SIGNAL (a number; SIGKILL) when the parent dies (Linux; elsewhere pid files have
to do), checks that the parent did not die before that, closes what was inherited beyond standard
error (uvloop passes it on), puts signals back to their defaults, lets the kernel prefer this
process to the daemon when memory runs out, forbids core files (as large as the model, into a
directory of sockets), and executes PROGRAM. It runs in place of code between fork
and exec, which Python cannot do safely in a process with threads.

Exit status: 125 the parent is gone, 127 the program cannot be executed (with one line why).
"""

import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    parent, oom_score_adj, end = int(argv[1]), argv[2], argv.index("--")
    death_signal = int(argv[3]) if end > 3 else signal.SIGKILL
    program = argv[end + 1 :]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:
        return 125
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 (nothing to import for)
        if int(name) > 2:
            try:  # noqa: SIM105 (nothing to import for)
                os.close(int(name))
            except OSError:
                pass  # the one that listed them
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 (nothing to import for)
            file.write(oom_score_adj)
    except OSError:
        pass  # not this kernel, or not allowed: the engine runs all the same
    hard_limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard_limit))
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execv(program[0], program)
    except OSError as error:
        sys.stderr.write(f"meshd guard: {program[0]} cannot be executed: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv))
