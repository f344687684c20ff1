"""Guards against input from outside: how text that may hold control characters is shown.

It reads no files; rows of data files are checked in parts/rows.py.
"""

import unicodedata


def visible(text: str) -> str:
    """Replace characters that cannot be seen, or would act on a page or a terminal, by signs.

    Control characters, also those of the writing direction, become signs or names like ⟨U+202E⟩.
    Newlines and tabs keep their effect and get a sign in front.
    """
    return "".join(map(visible_character, text))


def visible_character(character: str) -> str:
    """Return a character, or the sign that `visible` shows in its place."""
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥\t"
    if character < " ":
        return chr(0x2400 + ord(character))
    if character == "\x7f":
        return "␡"
    if character in "\u200c\u200d":  # they join letters and emoji
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character
