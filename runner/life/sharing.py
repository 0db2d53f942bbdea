"""Stages that several runs have in common: who has one, who is computing one, and who therefore waits for whom.

A stage is named by its identity, a hash of all that decides its output. Runs of the same identity share the outputs:
whichever gang comes first computes them, the others wait without holding anything and take them. Only runs that hold a
gang are waited for, and these never wait, so that no circle can arise; when such a gang is gone, whatever it has not
finished is anybody's again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from model.report import STAGES
from runner.life.states import Run, State
from runner.spec.sweep import RunKey

STAGE_STATES = (State.TRAIN, State.QUANTIZE, State.EVALUATE, State.TTT)  # in the order of STAGES


class Blocker(NamedTuple):
    """Why a run waits: another one is computing this stage for it."""

    stage: str
    key: RunKey

    @property
    def words(self) -> str:
        """The reason as people read it."""
        return f"waits for {self.stage} of {self.key.words}"


class Sharing:
    """The stages that two or more runs of a sweep have in common. Empty for a sweep without variants.

    identities: for each run the planning identity of each stage. Nothing here reads a disk or a clock.
    """

    def __init__(self, identities: Mapping[RunKey, Mapping[str, str]] | None = None) -> None:
        given = identities or {}
        counts = Counter(identity for stages in given.values() for identity in stages.values())
        numbers = {identity: number for number, (identity, count) in enumerate(counts.items()) if count > 1}
        # identities as small numbers, and only those that matter: a sweep may have thousands of stages
        self.shared = {
            key: {stage: numbers[identity] for stage, identity in stages.items() if identity in numbers}
            for key, stages in given.items()
        }
        self.wanted_by: dict[int, list[RunKey]] = {number: [] for number in numbers.values()}
        for key, stages in self.shared.items():
            for number in stages.values():
                self.wanted_by[number].append(key)
        self.made_by: dict[int, RunKey] = {}  # whose directory has it
        self.missing = {key: {number: stage for stage, number in stages.items()} for key, stages in self.shared.items()}
        self.version = 0  # changes with what runs may have to wait for

    def __bool__(self) -> bool:
        return bool(self.wanted_by)

    def finish(self, key: RunKey, stages: Iterable[str]) -> None:
        """Note that a run's directory has the records of these stages."""
        for stage in stages:
            number = self.shared.get(key, {}).get(stage)
            if number is not None and number not in self.made_by:
                self.made_by[number] = key
                self.version += 1
                for other in self.wanted_by[number]:
                    self.missing[other].pop(number, None)

    def redo(self, key: RunKey, stage: str) -> None:
        """Note that a run is computing a stage after all: what there was is damaged, or of other surroundings."""
        number = self.shared.get(key, {}).get(stage)
        if number is not None and self.made_by.pop(number, None) is not None:
            self.version += 1
            for other in self.wanted_by[number]:
                self.missing[other][number] = stage

    def follow(self, before: Run, run: Run, recorded: Collection[str]) -> None:
        """Take in what a run's new state says of its stages; recorded: those whose records its directory has."""
        self.version += 1  # a gang that is gone claims nothing any more
        if run.state in STAGE_STATES:
            place = STAGE_STATES.index(run.state)
            self.finish(run.key, [stage for stage in STAGES[:place] if stage in recorded])
            if before.state is not run.state:
                self.redo(run.key, STAGES[place])
        else:
            self.finish(run.key, recorded)

    def donors(self, key: RunKey) -> dict[str, str]:
        """Return for each stage that another run has finished for this one the name of that run, in order."""
        stages = self.shared.get(key, {})
        makers = {stage: self.made_by.get(stages[stage]) for stage in STAGES if stage in stages}
        return {stage: maker.name for stage, maker in makers.items() if maker is not None and maker != key}

    def claims(self, runs: Iterable[Run]) -> dict[int, RunKey]:
        """Return who is computing, or is about to compute, each missing stage: whoever holds a gang."""
        return {number: run.key for run in runs if run.has_group for number in self.missing.get(run.key, ())}

    def claim(self, key: RunKey, claims: dict[int, RunKey]) -> None:
        """Add to claims what a run that gets a gang now is going to compute."""
        claims.update(dict.fromkeys(self.missing.get(key, ()), key))

    def blocker(self, key: RunKey, claims: Mapping[int, RunKey]) -> Blocker | None:
        """Return the first stage that a run misses while another run computes it, None if it may start."""
        for number, stage in self.missing.get(key, {}).items():
            maker = claims.get(number)
            if maker is not None and maker != key:
                return Blocker(stage, maker)
        return None

    def in_order(self, waiting: list[Run]) -> list[Run]:
        """Return waiting runs, first those that finish what most others wait for, else in the order of the spec."""
        wanted = Counter(number for run in waiting for number in self.missing.get(run.key, ()))
        # what builds on a stage has the identity of that stage in its own: the most wanted one counts all who wait
        return sorted(
            waiting, key=lambda run: -max((wanted[number] for number in self.missing.get(run.key, ())), default=1)
        )
