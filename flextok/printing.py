"""Texts that others wrote, as they may be printed: names of files and classes, metadata, errors."""

import logging

_JOINER = "\u200d"  # inside emoji


def printable(text: object) -> str:
    """text on one line, with whatever could steer a terminal, and what is no character (the bytes
    of a file name that is not UTF-8), written as an escape."""
    return "".join(
        c if c.isprintable() or c == _JOINER else c.encode("unicode_escape").decode("ascii")
        for c in str(text)
    )


def one_line(error: object) -> str:
    """An error's message, printable, its lines joined by spaces."""
    return printable(" ".join(str(error).split("\n")))


class PrintableFormatter(logging.Formatter):
    """Log messages, printable line by line."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))
