"""The entry of the `dare` command: the edge at which errors become lines and exit codes.

It loads nothing slow before an interrupt is told as a line; the commands themselves are in `jobs.app`.
"""

import os
import sys

from pipeline.errors import (
    INTERRUPTED,
    end_interrupted,
    error_line,
    exit_code,
    flush_output,
    interrupts,
    listen,
    show_trace,
    tell,
)

RANKED = ("train", "online", "evaluate", "score")
"""Commands that several ranks run together."""


def main() -> None:
    """Run a command.

    A user's mistake is one line on standard error and exit code 1, a fault of the program its trace and exit code 70,
    Ctrl-C one line and exit code 130; see `pipeline.errors`.
    """
    listen()
    from jobs.launcher_watch import watch_launcher

    # Threads that wait for each other sleep instead of spinning: the readers need the cores. OpenMP looks at this when
    # torch is loaded, and torch at how much its C++ parts may print: the errors that they raise are told by us.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("DARE_TRACEBACK") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # What a command prints may have names of files that are no text in this terminal's encoding.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        watch_launcher()
        _run()
    except SystemExit as end:
        if interrupts.raised or end.code == INTERRUPTED:  # typer has turned Ctrl-C into it
            _end_interrupted()
        raise
    except (Exception, KeyboardInterrupt) as error:
        if interrupts.raised:
            show_trace(error, fault=False)
            end_interrupted()
        line = error_line(error)
        if line is None or isinstance(error, KeyboardInterrupt):
            sys.exit(tell(error))
        # A launcher's processes all make the same mistake.
        if not _speaks():
            sys.exit(exit_code(error))
        show_trace(error, fault=False)
        if exit_code(error) != 1:
            sys.exit(tell(error))
        sys.exit(f"dare: {line}")


def _run() -> None:
    from pipeline.progress import log_to_standard_error
    from pipeline.versions import check_versions

    log_to_standard_error(quiet=not _speaks())
    # First: with packages that do not fit, the imports behind a command would crash in a library.
    check_versions()
    from jobs.app import app

    try:
        app(prog_name="dare")
    except SystemExit as end:
        # A full disk behind standard output is told, and not found out when the interpreter is gone.
        if not end.code:
            flush_output()
        raise


def _speaks() -> bool:
    """Whether this process is the one that speaks for all; a command of one process always is."""
    from pipeline.progress import first_rank

    return first_rank() or not (len(sys.argv) > 1 and sys.argv[1] in RANKED)


def _end_interrupted() -> None:
    if interrupts.raised:
        end_interrupted()
    print("dare: interrupted", file=sys.stderr)


if __name__ == "__main__":
    main()
