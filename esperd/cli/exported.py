"""What ``esper export`` makes of a model that it downloaded: merged, in other forms, and told of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esperd.cli.users_code import make_importable, not_made
from esperd.errors import EsperError
from esperd.messages.card import CARD, is_users_own

if TYPE_CHECKING:
    from torch import nn

    from esperd.cli.output import Output


def require_packages(forms: Sequence[str]) -> None:
    """See that what the forms need is installed.

    Raises:
        MissingExtra: it is not.
    """
    if "onnx" in forms:
        from esperd.growth.onnx import require_packages

        require_packages()


class Exported:
    """A model in a directory, and what was done with it.

    Args:
        directory: where it is.
        files: what the job's files were written to.
        output: told as it happens, or as one JSON document at the end.
    """

    def __init__(self, directory: Path, files: Sequence[Path], output: Output) -> None:
        self._directory = directory
        self._files = list(files)
        self._output = output
        self._told: dict[str, Any] = {"merged": False, "parity": []}
        self._host: Callable[[], dict[str, Any]] = dict
        self._has_host = False
        for path in files:
            self._line(f"written {path}")
        if is_users_own(directory / CARD):
            self._line(f"left alone {directory / CARD}: it is yours, so no model card was written")

    def _line(self, text: str) -> None:
        if not self._output.as_json:
            self._output.line(text)

    def rebuild_from(self, workdir: Path, host: str | None, *, import_host: bool) -> None:
        """Say where the host's code is found when the model is built.

        Args:
            workdir: the job's.
            host: ``module:function``, or None.
            import_host: whether the name in the export may be imported.
        """
        here = Path.cwd()
        if host is not None:
            make_importable(here, workdir)
        elif import_host:
            make_importable(workdir, here)
        self._has_host = host is not None or import_host
        self._host = lambda: {"host": _resolved(host), "import_host": import_host}

    def merge(self) -> None:
        """Fold seeds into the layers around them.

        Raises:
            EsperError: it cannot be built or merged; the message says that the export stands.
        """
        from esperd.growth.card import write_card
        from esperd.growth.merge import merge_export

        result = self._made("it was not merged", lambda: merge_export(self._directory, **self._host()))
        write_card(self._directory)
        self._told |= {"merged": True, "folded": result.folded, "kept": result.kept}
        self._line(f"merged {self._directory}: folded {', '.join(result.folded) or 'nothing'}")
        for seed, reason in result.kept.items():
            self._line(f"kept {seed}: {reason}")

    def write_forms(self, forms: Sequence[str]) -> None:
        """Write the model in other forms.

        Raises:
            EsperError: it cannot be built, or has no such form; the message says that the export stands.
        """
        from esperd.growth.forms import write_forms

        what = f"not in every form asked for ({', '.join(forms)})"
        found = self._made(what, lambda: write_forms(self._directory, forms, **self._host()))
        for parity in found:
            path = self._directory / parity.file
            apart = f"{parity.largest_difference:.1e}" if parity.largest_difference else "none"
            self._files.append(path)
            self._line(
                f"written {path}: {parity.runtime} answers as the network does at batch sizes"
                f" {', '.join(map(str, parity.batch_sizes))} (largest difference: {apart})"
            )
        self._told["parity"] = found

    def _made(self, what: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever is made
        try:
            return make()
        except EsperError as error:
            raise not_made(error, self._directory, what, has_host=self._has_host) from error

    def tell(self) -> None:
        """All of it as JSON, when that was asked for."""
        if self._output.as_json:
            card = self._directory / CARD
            if card not in self._files and card.exists() and not is_users_own(card):
                self._files.append(card)  # of a job that left none: written with the other forms
            files = [str(path) for path in self._files]
            self._output.json({"directory": str(self._directory), "files": files, **self._told})


def _resolved(host: str | None) -> Callable[..., nn.Module] | None:
    from esperd.declarations import resolve

    found: Callable[..., nn.Module] | None = None if host is None else resolve(host)
    return found
