"""Replaces characters that a terminal cannot show: by their usual ASCII form, or by an escape."""

import codecs

ERRORS = "trialyard-plain"  # for the `errors` of a stream
WRITTEN = {"\u00b1": "+-", "\u2022": "*", "\u00d7": "x", "\u2026": "...", "\u2013": "-", "\u2019": "'"}


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(
        WRITTEN.get(each) or each.encode("ascii", "backslashreplace").decode() for each in unknown
    ), error.end


def plain(text: str, encoding: str) -> str:
    """`text` as a stream of this encoding shows it. Columns are aligned by it.

    >>> plain("0.59 \N{PLUS-MINUS SIGN} 0.08", "ascii")
    '0.59 +- 0.08'
    """
    return text.encode(encoding, ERRORS).decode(encoding)


codecs.register_error(ERRORS, _replaced)
