"""The command line in this process."""

import pytest

from longvid.cli.commands import main


@pytest.fixture
def run(capsys):
    """Runs `longvid` with these arguments: exit code, standard output and standard error."""

    def call(*args):
        try:
            code = main([str(a) for a in args])
        except SystemExit as exc:  # argparse
            code = exc.code
        out, err = capsys.readouterr()
        return code, out, err

    return call
