"""What FlashPO left to other code in this process, and why: each sentence once, for the report at the end of a run."""

said: dict[str, None] = {}  # in the order of their first occurrence


def note(sentence: str) -> None:
    said[sentence] = None
