"""Tables of pages that a command measures, between two lines of theirs."""

from pathlib import Path


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Puts `text` between the lines `begin` and `end` of a page.

    Raises:
        ValueError: where the page has not both.
    """
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"page must have the lines {begin!r} and {end!r}, got {str(page)!r}")
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")
