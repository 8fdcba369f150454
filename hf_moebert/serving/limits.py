"""Limits of a server and their defaults, which are those of the command line too.

The command line loads this file without the package: it imports the standard library alone.
"""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class ServingLimits:
    """Sizes and times beyond which a server refuses requests.

    Raises:
        ValueError: If a limit is too small; the message names rule and remedy.
    """

    max_batch: int = field(default=32, metadata={"help": "Most inputs in a batch, and in a request."})
    max_wait_ms: float = field(default=5.0, metadata={"help": "Milliseconds a request waits for others to join."})
    queue_size: int | None = field(
        default=None, metadata={"help": "Most inputs that wait; by default eight batches, 8 x `max_batch`."}
    )
    max_body_bytes: int = field(default=1_000_000, metadata={"help": "Largest body of a request."})
    max_characters: int = field(default=20_000, metadata={"help": "Most characters of an input."})
    timeout_s: float = field(default=30.0, metadata={"help": "Seconds until a request is given up."})
    max_header_bytes: int = field(default=16_384, metadata={"help": "Largest headers of a request."})
    header_timeout_s: float = field(
        default=10.0, metadata={"help": "Seconds until a connection without whole headers is closed."}
    )
    keep_alive_s: float = field(
        default=5.0, metadata={"help": "Seconds an answered connection is kept for its next request."}
    )
    max_connections: int = field(
        default=2000, metadata={"help": "Most open connections; beyond, those that send no request are closed first."}
    )
    grace_s: float = field(
        default=20.0, metadata={"help": "Seconds within which the process ends after SIGTERM, whatever is unanswered."}
    )

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"`max_batch` must be at least 1, got {self.max_batch}. Use 32.")
        if self.max_wait_ms < 0:
            raise ValueError(f"`max_wait_ms` must be at least 0, got {self.max_wait_ms}. Use 5.")
        if self.queue_size is not None and self.queue_size < self.max_batch:
            raise ValueError(
                f"`queue_size` must be at least `max_batch` = {self.max_batch}, got {self.queue_size}. Leave it out "
                f"for {8 * self.max_batch}, or lower `max_batch`."
            )
        for name in (one.name for one in fields(self)[3:]):
            if not (value := getattr(self, name)) > 0:
                default = type(self).__dataclass_fields__[name].default
                raise ValueError(f"`{name}` must be above 0, got {value}. Use {default}.")

    @property
    def max_waiting(self) -> int:
        """Most inputs that wait."""
        return 8 * self.max_batch if self.queue_size is None else self.queue_size
