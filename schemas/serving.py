"""Settings of a server: what it is reached by, and how much it takes on."""

from typing import Annotated

from pydantic import Field

from schemas.settings import Settings


class ServeSettings(Settings):
    """How a server answers requests; what is beyond its limits is refused in one line. Defaults: see `dare serve`."""

    host: str
    """Address to listen on; 0.0.0.0: all addresses of this machine."""
    port: Annotated[int, Field(ge=0, le=65_535)]
    """TCP port; 0: a free one."""
    threads: Annotated[int, Field(ge=1, le=1024)]
    """Requests that are worked on at the same time."""
    queue: Annotated[int, Field(ge=0, le=100_000)]
    """Requests that may wait for a thread; further ones are refused with 503."""
    timeout: Annotated[float, Field(gt=0, le=3600)]
    """Seconds from a request's arrival until it is answered with 504."""
    max_body: Annotated[int, Field(ge=1024, le=2**31)]
    """Bytes of a request's body."""
    max_candidates: Annotated[int, Field(ge=1, le=10_000_000)]
    """Candidates of a request."""
    max_behaviors: Annotated[int, Field(ge=1, le=100_000_000)]
    """Behaviours of a history, or events to append, in a request."""
    watch_every: Annotated[float, Field(gt=0, le=3600)]
    """Seconds between two looks for a newer model, with ``--watch``."""
