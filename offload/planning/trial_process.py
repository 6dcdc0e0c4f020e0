"""The process that `offload.planning.trial` starts for a trial or a measurement: what was asked is its argument."""

import sys

from offload.command import run


def main(argv: list[str] | None = None) -> int:
    """Answer one request; returns the exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    from offload.planning.trial import answer

    print(answer(argv[0]))


if __name__ == "__main__":
    sys.exit(main())
