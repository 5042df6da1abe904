"""The user's own modules, for the commands that rebuild a model in this process."""

from __future__ import annotations

import sys
from pathlib import Path

from esperd.errors import EsperError, ExportRejected


def make_importable(*directories: Path) -> None:
    """Put directories that exist here in front of ``sys.path``, in this order."""
    sys.path[:0] = [str(directory.absolute()) for directory in directories if directory.is_dir()]


def not_made(error: EsperError, directory: Path, what: str, *, has_host: bool) -> EsperError:
    """The error of a merge, or of another form, as its user needs it: the export stands, and what to add to the command.

    Args:
        error: what was raised.
        directory: the export.
        what: what did not come of it, such as "it was not merged".
        has_host: whether the command said where the host comes from.
    """
    told = error.message
    host = error.fields.get("host")
    if isinstance(error, ExportRejected) and host is not None and not has_host:
        told = (
            f"its host {host!r} is code that is not part of esperd. Add --import-host to import it by that name from the job's"
            " workdir, or --host module:function to name it"
        )
    return type(error)(f"the model is written to {directory} and loads as it is, but {what}: {told}", **error.fields)
