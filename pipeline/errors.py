"""What a rank's error means to the person who started the run."""

import torch.distributed as dist


def error_line(error: BaseException) -> str | None:
    """One line: what, where, what to do; None: a mistake of the program's, which a trace tells better."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split())
    if _lost_contact(error):
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1].partition(". ")[0]
        return (
            f"rank {dist.get_rank()} of {dist.get_world_size()} has lost another one ({reason}); "
            "what is complete on disk stays; the same command goes on from there"
        )
    return None


def _lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or too late."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
