"""The settings of a server."""

from dataclasses import dataclass

DEFAULT_CHOICES = 16
"""Most answers to one request, where there is room for them."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where a server listens, and how much it takes on."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 or :: for all of this machine, which needs an api_key."""
    port: int = 8000
    """Port to listen at; 0 for any that is free."""
    name: str = ""
    """Name of the model, as clients see it; empty for that of its folder."""
    api_key: str = ""
    """What clients have to send as their key; empty for the environment variable DSJAX_API_KEY, or none."""
    max_body: int = 4 * 2**20
    """Most bytes of a request."""
    max_tokens: int = 0
    """Most tokens that an answer may be asked to have; 0 for no limit but the context."""
    max_choices: int = 0
    """Most answers to one request: its prompts times n; 0 for 16, or as many as slots and queue have room for."""
    queue: int = 128
    """Most answers that wait for a slot of the engine; requests for more are refused with status 429."""
    timeout: float = 600.0
    """Seconds that a request may take from its first byte to its last."""
    grace: float = 30.0
    """Seconds that running requests have after SIGTERM or Ctrl-C."""

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot work."""
        for name, low in (("max_body", 1), ("max_tokens", 0), ("max_choices", 0), ("queue", 0), ("grace", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {low}")
        if not self.timeout > 0:
            raise ValueError(f"timeout = {self.timeout}: must be greater than 0")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port = {self.port}: must be at least 0 and below {2**16}")
        if not self.api_key.isascii() or any(character.isspace() for character in self.api_key):
            raise ValueError("api_key: must be ASCII characters without spaces")

    def most_choices(self, slots: int) -> int:
        """Return the most answers to one request.

        Args:
            slots: of the engine.

        Raises:
            ValueError: there would never be room for so many.
        """
        room = slots + self.queue
        if self.max_choices > room:
            raise ValueError(
                f"max_choices = {self.max_choices}: must be at most slots + queue = {room}, or there would never be "
                "room for so many"
            )
        return self.max_choices or min(DEFAULT_CHOICES, room)
