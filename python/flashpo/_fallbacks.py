"""What FlashPO has left to other code in this process, and why: each sentence once, for reports at the end of a run."""

said: dict[str, None] = {}  # in the order in which they came


def note(sentence: str) -> None:
    said[sentence] = None
