"""Follows the tries of one job from the question to the end, whatever strategy decides it. Pure.

The book of a job is kept beside the decision log and written with every new answer, so it stands where the log stands: an
answer that is replayed to a resumed job turns no page. Where training went back, an end that was told may come undone: the last
end of a seed is the one that counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from esperd.errors import StoreFailed
from esperd.messages.evidence import TriedSeed, TryOutcome
from esperd.messages.growth import LIVE_STAGES, SeedRecord, Stage
from esperd.messages.policy import Arm, Conclude, Decide, Decided, Observation, PolicySettings
from esperd.messages.reports import SeedOutcome
from esperd.policy.circumstances import circumstances_of
from esperd.policy.credit import reward
from esperd.policy.rent import rent, seconds_share_of
from esperd.policy.state import Circumstances


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """A try as it began."""

    arm: Arm
    topology: str | None
    circumstances: Circumstances | None
    parameters: int
    flops_per_sample: float
    rent: float
    seconds_share: float | None = None
    """Forward seconds of a seed of the arm over the host's, as far as the rent charges for them; None: not measured."""
    gate_loss: float
    epoch: int


class Followed(msgspec.Struct, frozen=True, kw_only=True):
    """A seed of which something was reported."""

    begun: Begun
    record: SeedRecord
    """As it was last reported."""


class Book(msgspec.Struct, frozen=True, kw_only=True):
    """The tries of a job. Tuples are in the order of the seeds' names, or of the decisions."""

    living: tuple[Followed, ...] = ()
    """Seeds whose end is not known yet."""
    asked: tuple[Begun, ...] = ()
    """Germinations of the last answer."""
    ended: tuple[str, ...] = ()
    """Seeds whose end was told, and stands."""
    over: tuple[Followed, ...] = ()
    """The same seeds as they were told of; less those of a book that an older esperd wrote, which kept the names alone."""
    point: int | None = None
    """Decision point of the last page; None: no page was turned, or an older esperd turned it."""
    state_sha256: str = ""
    """Of the state that the last answer returned: where a request does not say which answer was heard, it tells."""

    def encode(self) -> bytes:
        """Msgpack, the same bytes for the same book."""
        return msgspec.msgpack.encode(self, order="deterministic")


def decode_book(data: bytes, job: str) -> Book:
    """Read a book; empty bytes are the book of a new job.

    Raises:
        StoreFailed: when the bytes are no book.
    """
    if not data:
        return Book()
    try:
        return msgspec.msgpack.decode(data, type=Book)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreFailed(f"what was kept about the tries of job {job} cannot be read: {error}", job=job) from error


def follow(book: Book, request: Decide, answer: Decided, at: float) -> tuple[Book, tuple[TriedSeed, ...]]:
    """Turn one page: take in an observation, and what was answered to it.

    As in :func:`esperd.policy.credit.observe`, a living seed that is no longer reported is taken for culled, a germination that
    was asked for and is not reported for refused, and one whose kernel could not be provided for no try at all. A germination of
    an answer that was not heard, or from which training went back, is no try either.

    The last end of a seed counts. One that was told of and lives again has no end until it is told of anew; one that was kept
    and is no longer reported went with the network that training went back from, and is told of as culled. :func:`undone` says
    which records that makes void.

    Args:
        book: as the last answer left it.
        request: the decision point. One before that of the last page, which a resumed job asks about because nobody answered it
            before, changes nothing: what is observed there is older than what the book knows.
        answer: to it.
        at: seconds since the epoch, for the records.

    Returns:
        The new book, and the tries that ended since, or ended otherwise than was told.
    """
    if book.point is not None and request.point < book.point:
        return book, ()
    observation, settings = request.observation, request.settings
    asked = {begun.arm: begun for begun in book.asked} if _was_heard(book, request) else {}
    known, ends = {entry.record.seed: entry for entry in (*book.living, *book.over)}, _Ends(book)
    living: list[Followed] = []
    tried: list[TriedSeed] = []
    arrived: set[Arm] = set()
    when = (request.job, observation.epoch, request.point, at)

    def tell(entry: Followed) -> None:
        if ends.tell(entry):
            tried.append(_tried(entry.begun, entry.record, _ended_as(entry.record), *when))

    reported = {record.seed: record for record in (*observation.screened_out, *observation.seeds)}
    for seed, record in sorted(reported.items()):
        arm, before = _arm(record), known.get(seed)
        if before is not None and before.begun.arm == arm:
            begun = before.begun
        else:  # new; of a name that another seed had, where a resumed job went another way
            begun = _arrived(record, asked.get(arm), observation, settings)
            if before is not None or not ends.told(seed):
                arrived.add(arm)
        entry = Followed(begun=begun, record=record)
        if record.stage in LIVE_STAGES:
            living.append(entry)
            ends.undo(seed)
        else:
            tell(entry)
    for seed in sorted(known.keys() - reported.keys()):
        tell(_as_ended(known[seed], Stage.CULLED))
    refused = (begun for arm, begun in asked.items() if arm not in arrived and arm not in observation.unavailable)
    tried.extend(_tried(begun, None, "refused", *when) for begun in refused)
    turned = Book(
        living=tuple(living),
        asked=_asked(request, answer),
        ended=ends.names(),
        over=ends.entries(),
        point=request.point,
        state_sha256=_digest(answer.state),
    )
    return turned, tuple(tried)


def conclude(book: Book, ending: Conclude, at: float) -> tuple[Book, tuple[TriedSeed, ...]]:
    """Close a book: the last decisions kept and culled seeds, and no observation tells of it. What still lived is not told of.

    Args:
        book: as the last answer left it.
        ending: how the seeds ended.
        at: seconds since the epoch, for the records.

    Returns:
        The closed book, and the tries that ended since its last page, or ended otherwise than was told.
    """
    known, ends = {entry.record.seed: entry for entry in (*book.living, *book.over)}, _Ends(book)
    tried: list[TriedSeed] = []
    for outcome in sorted(ending.seeds, key=lambda outcome: outcome.seed):
        entry = _concluded(outcome, known.get(outcome.seed), book.asked)
        if entry is not None and ends.tell(entry):
            told = _tried(entry.begun, entry.record, _ended_as(entry.record), ending.job, ending.epoch, ending.point, at)
            tried.append(told)
    return Book(ended=ends.names(), over=ends.entries(), point=ending.point), tuple(tried)


def undone(before: Book, after: Book, tried: Iterable[TriedSeed]) -> frozenset[str]:
    """Seeds of whom a record stands that is void: they live again, or ended otherwise.

    Args:
        before: the book before its last page was turned, or before it was closed.
        after: the book since then.
        tried: what was told with it.
    """
    again = {one.seed for one in tried}
    return frozenset(seed for seed in before.ended if seed in again or seed not in after.ended)


class _Ends:
    """Seeds whose end was told, and stands."""

    def __init__(self, book: Book) -> None:
        self._names = set(book.ended)
        self._entries = {entry.record.seed: entry for entry in book.over}

    def told(self, seed: str) -> bool:
        """Whether the end of this seed was told."""
        return seed in self._names

    def tell(self, entry: Followed) -> bool:
        """Take in the end of a seed; False when it was told so before. Of those that an older esperd told nobody knows how: they
        stay as they are.
        """
        seed = entry.record.seed
        told = self._entries.get(seed)
        if seed in self._names and (told is None or _same_end(told, entry)):
            return False
        self._names.add(seed)
        self._entries[seed] = entry
        return True

    def undo(self, seed: str) -> None:
        """It lives again."""
        self._names.discard(seed)
        self._entries.pop(seed, None)

    def names(self) -> tuple[str, ...]:
        """All of them, in order."""
        return tuple(sorted(self._names))

    def entries(self) -> tuple[Followed, ...]:
        """Those of which it is known how they were told of, in the order of their names."""
        return tuple(self._entries[seed] for seed in sorted(self._entries))


def _same_end(one: Followed, other: Followed) -> bool:
    return one.begun.arm == other.begun.arm and _ended_as(one.record) == _ended_as(other.record)


def _was_heard(book: Book, request: Decide) -> bool:
    """Whether the trainer went by the book's last answer. Strategies of plugins may return one state again and again, so its
    bytes are asked only where the request does not name the answer. A book of an older esperd knows neither.
    """
    if book.point is None:
        return True
    if request.heard is not None:
        return request.heard == book.point
    return _digest(request.state) == book.state_sha256


def _digest(state: bytes) -> str:
    return hashlib.sha256(state).hexdigest()


def _concluded(outcome: SeedOutcome, known: Followed | None, asked: Iterable[Begun]) -> Followed | None:
    """A seed as it ended: one that was observed, or one that came and went since the last answer asked for it. None: neither, or
    it did not end.
    """
    if outcome.stage not in (Stage.FOSSILIZED, Stage.CULLED):
        return None
    arm = Arm(slot=outcome.slot, blueprint=outcome.blueprint)
    if known is not None and known.begun.arm == arm:
        ended = _as_ended(known, outcome.stage)
        record = msgspec.structs.replace(ended.record, contribution=outcome.contribution, trial=outcome.trial)
        return msgspec.structs.replace(ended, record=record)
    begun = next((begun for begun in asked if (begun.arm, begun.epoch) == (arm, outcome.germinated_epoch)), None)
    return None if begun is None else Followed(begun=begun, record=_record_of(outcome))


def _record_of(outcome: SeedOutcome) -> SeedRecord:
    """What an outcome tells of a seed; the rest is not known."""
    return SeedRecord(
        seed=outcome.seed,
        slot=outcome.slot,
        blueprint=outcome.blueprint,
        stage=outcome.stage,
        alpha=outcome.alpha or 0.0,
        parameters=outcome.parameters,
        flops_per_sample=outcome.flops_per_sample,
        germinated_epoch=outcome.germinated_epoch,
        epochs_in_stage=0,
        contribution=outcome.contribution,
        trial=outcome.trial,
        reason=outcome.reason,
    )


def _as_ended(entry: Followed, stage: Stage) -> Followed:
    return msgspec.structs.replace(entry, record=msgspec.structs.replace(entry.record, stage=stage))


def _arm(record: SeedRecord) -> Arm:
    return Arm(slot=record.slot, blueprint=record.blueprint)


def _ended_as(record: SeedRecord) -> TryOutcome:
    return "fossilized" if record.stage is Stage.FOSSILIZED else "culled"


def _asked(request: Decide, answer: Decided) -> tuple[Begun, ...]:
    """What the answer germinates. An arm that the observation does not offer has no price: whoever carries it out refuses it,
    and that teaches nothing; nor does it when what a person asked for is refused.
    """
    options = {option.arm: option for option in request.observation.options}
    germinates = (made for made in answer.decisions if made.action == "germinate" and not made.by)
    arms = (made.arm for made in germinates if made.arm in options)
    wanted = (options[arm] for arm in arms)
    return tuple(
        _begun(option.arm, option.parameters, option.flops_per_sample, request.observation, request.settings) for option in wanted
    )


def _begun(arm: Arm, parameters: int, flops_per_sample: float, observation: Observation, settings: PolicySettings) -> Begun:
    slot = next((record for record in observation.slots if record.slot == arm.slot), None)
    seconds_share = seconds_share_of(arm, observation)
    return Begun(
        arm=arm,
        topology=None if slot is None else slot.topology,
        circumstances=circumstances_of(arm.slot, parameters, flops_per_sample, observation),
        parameters=parameters,
        flops_per_sample=flops_per_sample,
        rent=rent(parameters, flops_per_sample, observation, settings, seconds_share),
        seconds_share=seconds_share,
        gate_loss=observation.gate_loss,
        epoch=observation.epoch,
    )


def _arrived(record: SeedRecord, asked: Begun | None, observation: Observation, settings: PolicySettings) -> Begun:
    """The try of a seed that is reported for the first time. Its price is of now, as its arm is credited: how long a seed takes
    is measured when it germinates.
    """
    now = _begun(_arm(record), record.parameters, record.flops_per_sample, observation, settings)
    return now if asked is None else msgspec.structs.replace(asked, rent=now.rent, seconds_share=now.seconds_share)


def _tried(
    begun: Begun, record: SeedRecord | None, outcome: TryOutcome, job: str, epoch: int, point: int, at: float
) -> TriedSeed:
    """One record; without a seed's it is of a germination that was refused."""
    where = begun.circumstances
    told = TriedSeed(
        job=job,
        seed=None,
        slot=begun.arm.slot,
        blueprint=begun.arm.blueprint,
        topology=begun.topology,
        depth=None if where is None else where.depth,
        width=None if where is None else where.width,
        outcome=outcome,
        parameters=begun.parameters,
        flops_per_sample=begun.flops_per_sample,
        reward=-begun.rent,
        rent=begun.rent,
        seconds_share=begun.seconds_share,
        gate_loss=begun.gate_loss,
        begun_epoch=begun.epoch,
        ended_epoch=epoch,
        point=point,
        recorded_at=at,
    )
    if record is None:
        return told
    return msgspec.structs.replace(
        told,
        seed=record.seed,
        contribution=record.contribution,
        trial=record.trial,
        incubation_loss=record.incubation_loss,
        gradient_ratio=record.gradient_ratio,
        activation_bytes=record.activation_bytes,
        parameters=record.parameters,
        flops_per_sample=record.flops_per_sample,
        reward=reward(record, begun.rent) if outcome == "fossilized" else -begun.rent,
    )
