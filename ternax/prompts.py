"""What speed tests ask: five kinds of prompt, and workloads of fixed length.

The kinds are those that speed tests of chat servers use: short and long prompts, short and long
answers, code, reasoning. The texts are ours.
"""

import dataclasses
import re

from ternax.errors import UsageError

_REPORT = (
    "The harbour office keeps a book of every ship that enters. For each one the clerk writes the "
    "hour, the wind, the draught at bow and stern, what lies in the hold and who answers for it. "
    "In spring the pages fill quickly, since the ice upriver breaks and the barges come down "
    "together; in autumn a page may last a week. Twice in its history the book has been lost: once "
    "to a flood that reached the second shelf, and once to a harbour master who took it home to "
    "settle a wager and forgot it on a tram. Both times it was written again from the letters of "
    "the agents, and both times the new book disagreed with the customs ledger by three ships. "
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One request, sent as often as asked for.

    Attributes:
      name: "short/short" and so on, or llama-bench's "pp128+tg64".
      max_tokens: of the answer.
      text: of the prompt; None: `prompt_tokens` random ones.
      prompt_tokens: of a prompt of fixed length, else 0.
    """

    name: str
    max_tokens: int
    text: str | None = None
    prompt_tokens: int = 0


KINDS = {
    workload.name: workload
    for workload in (
        Workload("short/short", 32, "Name the largest planet of the solar system."),
        Workload("short/long", 512, "Explain how a sailing ship can move against the wind."),
        Workload("long/short", 32, f"{_REPORT * 4}\nIn one sentence: how was the book lost?"),
        Workload(
            "code",
            256,
            "Write a Python function that merges two sorted lists into one sorted list, and a "
            "test for it.",
        ),
        Workload(
            "reasoning",
            384,
            "A train leaves at 8:40 and travels 90 km at 60 km/h, waits 12 minutes, then travels "
            "70 km at 84 km/h. When does it arrive? Think step by step.",
        ),
    )
}


def workloads(text: str, longest: int | None = None) -> list[Workload]:
    """ "all" for the five kinds, or names of them and fixed lengths, "code,128:64".

    longest: cuts every answer to so many tokens. UsageError for what is neither.
    """
    found = []
    for word in (word.strip() for word in text.split(",")):
        fixed = re.fullmatch(r"(\d{1,7}):(\d{1,7})", word, re.ASCII)
        if word == "all":
            found += list(KINDS.values())
        elif word in KINDS:
            found.append(KINDS[word])
        elif fixed and int(fixed[1]) and int(fixed[2]) > 1:
            prompt, answer = int(fixed[1]), int(fixed[2])
            found.append(Workload(f"pp{prompt}+tg{answer}", answer, None, prompt))
        else:
            raise UsageError(
                f"--workload must be all, {', '.join(KINDS)} or PROMPT:ANSWER in tokens (an answer "
                f"of 2 at least), found {word!r}"
            )
    if longest is not None:
        found = [dataclasses.replace(w, max_tokens=min(w.max_tokens, longest)) for w in found]
    return list({workload.name: workload for workload in found}.values())


def filler(count: int, seed: int) -> str:
    """So many short words, for a server whose tokenizer is unknown: by most, a token each.
    Differs by seed, so that no server finds it in its prefix cache."""
    words = ("tree", "river", "stone", "light", "house", "road", "hand", "star", "rain", "door")
    state, out = seed + 1, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(words[(state >> 16) % len(words)])
    return " ".join(out)
