"""Follows the tries of one job from the question to the end, whatever strategy decides it. Pure.

The book of a job is kept beside the decision log and written with every new answer, so it stands where the log stands: an
answer that is replayed to a resumed job turns no page.
"""

from __future__ import annotations

import msgspec

from esperd.errors import StoreFailed
from esperd.messages.evidence import TriedSeed, TryOutcome
from esperd.messages.growth import LIVE_STAGES, SeedRecord, Stage
from esperd.messages.policy import Arm, Conclude, Decide, Decided, Observation, PolicySettings
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


class Living(msgspec.Struct, frozen=True, kw_only=True):
    """A seed whose end is not known yet."""

    begun: Begun
    record: SeedRecord
    """As it was last reported."""


class Book(msgspec.Struct, frozen=True, kw_only=True):
    """The tries of a job. Tuples are in the order of the seeds' names, or of the decisions."""

    living: tuple[Living, ...] = ()
    asked: tuple[Begun, ...] = ()
    """Germinations of the last answer."""
    ended: tuple[str, ...] = ()
    """Seeds whose end was told: each is told once, even when a rollback brings it back to life."""

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
    was asked for and is not reported for refused, and one whose kernel could not be provided for no try at all.

    Args:
        book: as the last answer left it.
        request: the decision point.
        answer: to it.
        at: seconds since the epoch, for the records.

    Returns:
        The new book, and the tries that ended since.
    """
    observation, settings = request.observation, request.settings
    known = {entry.record.seed: entry.begun for entry in book.living}
    last = {entry.record.seed: entry.record for entry in book.living}
    asked = {entry.arm: entry for entry in book.asked}
    ended = set(book.ended)
    living: list[Living] = []
    tried: list[TriedSeed] = []
    arrived: set[Arm] = set()
    when = (request.job, observation.epoch, request.point, at)

    def tell(record: SeedRecord, outcome: TryOutcome) -> None:
        if record.seed not in ended:
            tried.append(_tried(known[record.seed], record, outcome, *when))
        ended.add(record.seed)

    for record in sorted(observation.seeds, key=lambda record: record.seed):
        if record.seed in ended and record.stage not in LIVE_STAGES:
            continue
        if record.seed not in known:
            arm = Arm(slot=record.slot, blueprint=record.blueprint)
            arrived.add(arm)
            known[record.seed] = _arrived(record, asked.get(arm), observation, settings)
        if record.stage in LIVE_STAGES:
            living.append(Living(begun=known[record.seed], record=record))
        else:
            tell(record, _ended_as(record))
    reported = {record.seed for record in observation.seeds}
    for seed in sorted(last.keys() - reported):
        tell(last[seed], "culled")
    refused = (begun for begun in book.asked if begun.arm not in arrived and begun.arm not in observation.unavailable)
    tried.extend(_tried(begun, None, "refused", *when) for begun in refused)
    turned = Book(living=tuple(living), asked=_asked(request, answer), ended=tuple(sorted(ended)))
    return turned, tuple(tried)


def conclude(book: Book, ending: Conclude, at: float) -> tuple[Book, tuple[TriedSeed, ...]]:
    """Close a book: the last decisions kept and culled seeds, and no observation tells of it. What still lived is not told of.

    Args:
        book: as the last answer left it.
        ending: how the seeds ended.
        at: seconds since the epoch, for the records.

    Returns:
        The closed book, and the tries that ended since its last page.
    """
    outcomes = {outcome.seed: outcome for outcome in ending.seeds if outcome.stage in (Stage.FOSSILIZED, Stage.CULLED)}
    ended = set(book.ended)
    tried = []
    for entry in book.living:
        outcome = outcomes.get(entry.record.seed)
        if outcome is None or outcome.seed in ended:
            continue
        record = msgspec.structs.replace(
            entry.record, stage=outcome.stage, contribution=outcome.contribution, trial=outcome.trial
        )
        tried.append(_tried(entry.begun, record, _ended_as(record), ending.job, ending.epoch, ending.point, at))
        ended.add(outcome.seed)
    return Book(ended=tuple(sorted(ended))), tuple(tried)


def _ended_as(record: SeedRecord) -> TryOutcome:
    return "fossilized" if record.stage is Stage.FOSSILIZED else "culled"


def _asked(request: Decide, answer: Decided) -> tuple[Begun, ...]:
    """What the answer germinates. An arm that the observation does not offer has no price: whoever carries it out refuses it,
    and that teaches nothing.
    """
    options = {option.arm: option for option in request.observation.options}
    arms = (decision.arm for decision in answer.decisions if decision.action == "germinate" and decision.arm in options)
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
    arm = Arm(slot=record.slot, blueprint=record.blueprint)
    now = _begun(arm, record.parameters, record.flops_per_sample, observation, settings)
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
