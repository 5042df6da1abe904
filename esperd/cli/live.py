"""Shows a watched job while it runs: redrawn on a terminal, a line per event in a pipe, JSON when asked."""

from __future__ import annotations

from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import TYPE_CHECKING, Any, Self

from esperd.cli.job_view import JobView, begin, fold, metric_name_of
from esperd.cli.lines import describe
from esperd.errors import JobFailed
from esperd.messages.jobs import JobInfo, JobState

if TYPE_CHECKING:
    from esperd.cli.output import Output
    from esperd.client import JobHandle

REFRESH_PER_SECOND = 8


async def follow(handle: JobHandle, output: Output, after: int = 0) -> JobView:
    """Show a job's events until it is over.

    Args:
        handle: the job.
        output: where to show it.
        after: skip events up to this sequence; on a terminal they still count, so that the picture is whole.

    Returns:
        The view at the end.

    Raises:
        JobNotFound: when there is no such job.
    """
    info = await handle.info()
    view = begin(info)
    screen = Screen(view, output) if output.is_live else None
    with screen or nullcontext():
        async with aclosing(handle.watch(0 if screen else after)) as events:
            async for event in events:
                view = fold(view, event)
                if screen is not None:
                    screen.show(view)
                elif output.as_json:
                    output.json(event)
                elif line := describe(event, metric_name_of(info.job)):
                    output.line(line)
    return view


def require_success(info: JobInfo) -> None:
    """Turn a job that ended otherwise into an error.

    Raises:
        JobFailed: when the job did not succeed; carries the job's own error.
    """
    if info.state is JobState.SUCCEEDED:
        return
    error = info.error
    because = f": {error.message}; `esper explain-failure {info.id}` says more" if error else ""
    fields: dict[str, Any] = {"job": info.id, "state": str(info.state)}
    if error is not None:
        fields |= {"error_code": error.code, "traceback": error.traceback}
    raise JobFailed(f"job {info.id} is {info.state}{because}", **fields)


class Screen(AbstractContextManager["Screen"]):
    """A live region of a terminal, redrawn a few times a second by rich's own thread."""

    def __init__(self, view: JobView, output: Output) -> None:
        from rich.live import Live

        from esperd.cli.picture import draw

        self._draw = draw
        self._live = Live(draw(view), console=output.console, refresh_per_second=REFRESH_PER_SECOND)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *ending: object) -> None:
        self._live.stop()

    def show(self, view: JobView) -> None:
        """Draw this from the next refresh on."""
        self._live.update(self._draw(view))
