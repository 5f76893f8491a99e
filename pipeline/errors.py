"""What an error means to the person who started the program: something to mend, or a fault of the program.

This is the one place that decides. A `UserError` can be mended by the user, and so can what the machine refuses: a disk
that is full or may not be written. Contact with another rank is lost through that rank's error, which that rank tells.
All else is a fault of the program.

Ctrl-C raises `KeyboardInterrupt` wherever the program happens to be. Libraries make other errors of it, or print and
forget it where it falls into one of their callbacks, and a module that is half imported stays broken. So it is noted
here that there was one, and the edge of the program goes by that.
"""

import _thread
import atexit
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from schemas.errors import StoppedError, UserError
from schemas.errors import printable as printable

TYPE_CHECKING = False
if TYPE_CHECKING:  # What this module loads is loaded before an interrupt can be told as a line.
    from types import FrameType
    from typing import NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
FAULT = 70
"""Exit code after a fault of the program: EX_SOFTWARE of sysexits.h."""
LAST_WORDS: list[Callable[[str], object]] = []
"""Called with the reason, in another thread, when a process ends though its main thread cannot: see `jobs.ranks`."""
FAULT_LINE = "this is a fault of the program, not of your input; please report it with the lines above"

REFUSALS = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.EIO, errno.ESTALE, errno.ENAMETOOLONG),
    )
)
"""Error numbers of what a machine refuses, whatever the program does: space, permission, a disk that works."""
SPACE = frozenset((errno.ENOSPC, errno.EDQUOT))


def error_line(error: BaseException) -> str | None:
    """One line for the user: what, where, what to do. None: a fault of the program, which a trace tells better."""
    # After Ctrl-C, libraries raise all kinds of errors.
    if isinstance(error, KeyboardInterrupt) or (interrupts.raised and not isinstance(error, StoppedError)):
        return "interrupted"
    if isinstance(error, UserError):
        return _one_line(str(error))
    if is_out_of_memory(error):
        return _memory_line(error)
    if is_refusal(error):
        assert isinstance(error, OSError)
        return _one_line(f"{error.filename or 'the disk'}: {refusal_reason(error)}")
    if is_lost_contact(error):
        return _lost_contact_line(error)
    return None


def description(error: BaseException) -> str:
    """One line about any error, for the record of a run."""
    return error_line(error) or _one_line(f"{type(error).__name__}: {error}")


def tell(error: BaseException) -> int:
    """Tell on standard error what ended the command: a line, or a trace and a line if it is a fault of the program.

    Returns:
        The exit code.
    """
    line = error_line(error)
    show_trace(error, fault=line is None)
    print(f"dare: {line or FAULT_LINE}", file=sys.stderr, flush=True)
    return exit_code(error)


def show_trace(error: BaseException, *, fault: bool) -> None:
    """Print the trace of a fault of the program; with ``DARE_TRACEBACK=1`` in the environment, of any error."""
    if fault or os.environ.get("DARE_TRACEBACK") == "1":
        import traceback

        traceback.print_exception(error)


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with ``error``: 1, `INTERRUPTED` or `FAULT`."""
    if isinstance(error, KeyboardInterrupt) or interrupts.raised:
        return INTERRUPTED
    if isinstance(error, StoppedError) and interrupts.asked:
        return INTERRUPTED
    return FAULT if error_line(error) is None else 1


def flush_output() -> None:
    """Write out what was printed.

    Raises:
        OSError: it cannot be written, as where standard output is a file on a disk that is full.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads it has seen enough (`dare runs | head -1`). The interpreter would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from None


def is_refusal(error: BaseException) -> bool:
    """Whether the machine refused something that is right: no space left, no permission, a broken disk."""
    return isinstance(error, OSError) and error.errno in REFUSALS


MEMORY = ("can't allocate memory", "not enough memory: you tried", "CUDA out of memory", "std::bad_alloc", "bad alloc")
"""What libraries say in a RuntimeError where memory is lacking."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for that there is not: by Python, numpy, Arrow, torch on a CPU or on a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY)
    )


def _memory_line(error: BaseException) -> str:
    # torch begins with a source file in brackets; CUDA's message goes on with advice about its allocator.
    reason = (str(error).strip().splitlines() or ["out of memory"])[0].rpartition("] ")[2].partition(". GPU ")[0]
    return _one_line(
        f"does not fit in memory: {reason}; take smaller settings (stream.batch_size, stream.history_length, "
        "stream.prefetch_batches, model.hidden, dims); `dare plan` estimates what they need"
    )


def refusal_reason(error: BaseException) -> str:
    """What the machine said when it refused (`is_refusal`)."""
    assert isinstance(error, OSError)
    return "no space left" if error.errno in SPACE else _one_line(str(error.strerror))


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or too late."""
    if "torch.distributed" not in sys.modules:  # commands that need no torch do not wait for its import
        return False
    import torch.distributed as dist

    # gloo raises plain RuntimeErrors, which only their text tells from a fault of the program.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _lost_contact_line(error: BaseException) -> str:
    import torch.distributed as dist

    # gloo begins with a source file in brackets, and ends with advice in a second sentence.
    reason = str(error).splitlines()[0].rsplit("] ", 1)[-1].partition(". ")[0]
    if not dist.is_initialized():
        return f"the ranks cannot meet ({reason}); are all of them started, and can they reach each other?"
    return (
        f"rank {dist.get_rank()} of {dist.get_world_size()} has lost another one ({reason}); "
        "what is complete on disk stays; the same command goes on from there"
    )


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


class Interrupts:
    """Whether this process was interrupted."""

    raised = False
    """`KeyboardInterrupt` was raised: the command is to end now."""
    asked = False
    """A piece of work that is to stop in order, such as training, took the signal."""


interrupts = Interrupts()


def listen() -> None:
    """From here on an interrupt is noted, and raised; within an import it ends the process. In the main thread only."""
    # A shell script starts background jobs with SIGINT ignored: Ctrl-C is not for them.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, interrupt)
    former = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _thread.interrupt_main()  # It fell into a callback that has swallowed it: once more.
        else:
            former(unraisable)

    sys.unraisablehook = hook


def interrupt(number: int, frame: "FrameType | None") -> None:
    """Handle a SIGINT."""
    interrupts.raised = True
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            # Raised in the middle of an import it would come out as some ImportError, or crash a library.
            end_interrupted()
        frame = frame.f_back
    raise KeyboardInterrupt


def end_interrupted(line: str = "interrupted") -> "NoReturn":
    """Say that the process was interrupted and end it: temporary files are removed, no thread is waited for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # An impatient second Ctrl-C would only make a trace of the end.
    with suppress(OSError, ValueError):
        print(f"dare: {line}", file=sys.stderr)
    end_at_once(INTERRUPTED)


def end_at_once(code: int) -> "NoReturn":
    """End the process with an exit code: exit functions run, streams are flushed, the interpreter is not shut down."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
