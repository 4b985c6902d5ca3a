"""What one request was answered, and when: the times that every speed test reports."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answered request, or one that failed.

    Attributes:
      start_s, end_s: on one clock for all requests of a test.
      arrivals_s: when each piece came, in order; the first is the first token.
      prompt_tokens, output_tokens: as the server counts them; pieces where it does not.
      error: why it failed, or "".
    """

    start_s: float
    end_s: float
    arrivals_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.arrivals_s[0] - self.start_s

    @property
    def e2el_s(self) -> float:
        """End-to-end latency: to the last token."""
        return self.arrivals_s[-1] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token behind the first; None for an answer of one."""
        if self.output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: between arrivals, which may bring several tokens."""
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]
