"""When a training run logs, measures, saves and generates samples."""

import dataclasses

import ml_collections


@dataclasses.dataclass(frozen=True)
class Cadence:
    """The steps at which each thing happens, by the number of steps done, counted from 1. The last step always logs.

    Attributes:
      steps: of the whole training.
      end: the step at which this run ends; less than `steps` where it is stopped on purpose.
      log_every, validate_every, checkpoint_every, sample_every: steps from one to the next; 0 for never.
    """

    steps: int
    end: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    sample_every: int

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict, until: int | None = None) -> "Cadence":
        """The cadence of a configuration.

        Args:
          until: end at this step instead of `config.steps`.
        """
        return cls(
            steps=config.steps,
            end=config.steps if until is None else min(until, config.steps),
            log_every=config.log_every,
            validate_every=config.validate.every,
            checkpoint_every=config.checkpoint_every,
            sample_every=config.sample_every,
        )

    def measures(self, done: int) -> bool:
        """Whether held-out accuracy is measured after this step."""
        return self._due(done, self.validate_every)

    def logs(self, done: int) -> bool:
        """Whether this step's metrics are written."""
        return done == 1 or done % self.log_every == 0 or done == self.steps or self.measures(done)

    def saves(self, done: int, stopping: bool) -> bool:
        """Whether a checkpoint is written after this step.

        Args:
          stopping: whether a signal asks to stop.
        """
        return stopping or done % self.checkpoint_every == 0 or done == self.end

    def samples(self, done: int) -> bool:
        """Whether sample pictures are generated after this step."""
        return self._due(done, self.sample_every)

    def _due(self, done: int, every: int) -> bool:
        return every > 0 and (done % every == 0 or done == self.steps)
