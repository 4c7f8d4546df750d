"""How every script starts and how it fails: constants from the command line, errors as one sentence."""

import os
import re
import sys
from collections.abc import Callable

import tyro


class UserError(Exception):
    """Something only the user can mend: one sentence that names the file or constant and the remedy."""


def run(main: Callable, constants: type, description: str) -> None:
    """Fill the script's constants from the command line and call `main` with them.

    A `UserError` ends the program with its sentence and exit code 1; Ctrl-C with a hint and exit code 130.
    """
    paragraphs = re.sub(r"\n(?=Reads|Writes)", "\n\n", description)  # tyro joins the lines of a paragraph
    values = tyro.cli(constants, description=paragraphs)
    try:
        main(values)
    except UserError as error:
        # a reading process hands its error on wrapped in its traceback; only our sentence is for the user
        print(f"error: {str(error).rpartition('UserError: ')[2].strip()}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues with what is left", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # no space left, no permission, an unreadable disk: the system's own words and the file
        if os.environ.get("PRC_TRACEBACK"):
            raise
        print(f"error: {error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def check(condition: bool, sentence: str) -> None:
    """Raise `UserError(sentence)` unless the condition holds; for constants, before any work is done."""
    if not condition:
        raise UserError(sentence)


def stop(sentence: str) -> None:
    """Raise `UserError`, where a function is wanted that takes the sentence."""
    raise UserError(sentence)
