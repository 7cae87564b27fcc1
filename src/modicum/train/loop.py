"""The training loop: steps of accumulated micro-batches, exact resume, clean stops.

One step, on every process: take the global batch's rows, add up loss and gradient over micro-batches,
divide by the number of predictions over all of them, limit the gradient's norm, update. What happened
before a step is in the checkpoint; what happens in it depends on (seed, step) alone, because the random
generators are seeded from both. So a run that was killed repeats its loss curve bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modicum.budget import Deadline
from modicum.budget.meter import resident_peak
from modicum.core.errors import CorruptError, ModicumError
from modicum.core.events import Events, count_text
from modicum.data.stream import EndOfData
from modicum.model import native
from modicum.train import allocation
from modicum.train.callback import Callback
from modicum.train.checkpoint import Checkpoints, Saved
from modicum.train.config import TrainConfig, check_stream, refuse_changes
from modicum.train.engine import TrainEngine
from modicum.train.evaluate import batches_of, whole_loss
from modicum.train.objectives import Step
from modicum.train.stop import StopSignals

RECENT = 20  # steps whose mean is a run's training loss


@dataclass(frozen=True)
class TrainResult:
    """What a run did, over all the processes that worked on it one after the other.

    loss: mean over the last steps, nats per target; heldout_loss: at the end, if held-out data was given.
    seconds: training time, without what a kill undid; flops: forward and backward. stopped: None when
    finished, else "deadline". checkpoint: where a later run goes on from. average_parameters: mean over the
    steps of the parameters that were not removed (see train.surgery); all of them, in a run without surgery.
    """

    loss: float
    heldout_loss: float | None
    tokens: int
    seconds: float
    flops: float
    steps: int
    peak_bytes: int
    resumed_from: int | None = None
    stopped: str | None = None
    skipped: int = 0
    checkpoint: str | None = None
    average_parameters: float | None = None

    @property
    def finished(self) -> bool:
        return self.stopped is None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    model: nn.Module,
    stream: Any,
    config: TrainConfig,
    folder: str | Path | None,
    *,
    events: Events | None = None,
    deadline: Deadline | None = None,
    heldout: Any = None,
    parts: Mapping[str, Callback] | None = None,
    label: str = "train",
) -> TrainResult:
    """Train `model` in place on `stream`, going on from `folder`/checkpoints if there are any.

    model: a Decoder, or any module that gives logits for tokens. stream: see data.stream (next_batch, state,
    load_state). folder: None keeps no checkpoints. deadline: when it passes, the run stops with a checkpoint
    and `result.stopped`. heldout: a stream or an iterable of batches. parts: anything else that acts on the
    run, by the name under which checkpoints keep its state. label: of the progress line, "" for none.
    Afterwards the model holds the trained weights in the dtype trained in (under FSDP2, its shard of them;
    the checkpoint holds them whole). The global random generators are reseeded in every step.

    Raises UserError (a knob that changed since the checkpoint, a combination that is not supported),
    CorruptError (no checkpoint is whole), ModicumError (loss not finite), KeyboardInterrupt after Ctrl-C or
    SIGTERM, once the checkpoint is written.
    """
    trainer = Trainer(
        model,
        stream,
        config,
        folder,
        events=events,
        deadline=deadline,
        heldout=heldout,
        parts=parts,
        label=label,
    )
    try:
        return trainer.run()
    finally:
        trainer.release()  # the model may be trained again


class Trainer(TrainEngine):
    """A run's live state, as parts see it."""

    def __init__(
        self,
        model: nn.Module,
        stream: Any,
        config: TrainConfig,
        folder: str | Path | None = None,
        *,
        events: Events | None = None,
        deadline: Deadline | None = None,
        heldout: Any = None,
        parts: Mapping[str, Callback] | None = None,
        label: str = "train",
    ):
        super().__init__(model, config, parts)
        self.stream, self.heldout, self.label = stream, heldout, label
        check_stream(config, stream)
        self.events = events if events is not None and self.ranks.first else Events()
        self.deadline = deadline or Deadline(None)
        self.steps_done = self.tokens = self.skipped = 0
        self.seconds = self.flops = self.parameter_steps = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.heldout_loss: float | None = None
        self.checkpoints = (
            None
            if folder is None
            else Checkpoints(Path(folder) / "checkpoints", config.keep, self.ranks, self._damaged)
        )

    def open(self) -> Saved | None:
        """Build everything and go on from the latest checkpoint, which is returned."""
        if self.device.type == "cpu":
            allocation.keep()
        saved = self.checkpoints.latest() if self.checkpoints else None
        if saved:
            changed = refuse_changes(saved.state["config"], self.config.resolved(), saved.folder.parents[1])
            self.events.emit(
                "resume",
                step=saved.step,
                tokens=saved.state["tokens"],
                changed={k: list(v) for k, v in changed.items()},
            )
        self.build(saved.part if saved else None)
        if saved:
            self.load_tensors(saved.tensors("model"), saved.folder)
            try:
                for name, part in self.parts.items():
                    part.load_state_dict(saved.part(name))
            except (KeyError, RuntimeError) as error:
                raise CorruptError(
                    f"{saved.folder} does not fit this run ({type(error).__name__}: {error}); "
                    "give the same knobs, or another folder"
                ) from None
            state = saved.state
            self.steps_done, self.tokens, self.skipped = saved.step, state["tokens"], state["skipped"]
            self.seconds, self.flops, self.heldout_loss = (
                state["seconds"],
                state["flops"],
                state["heldout_loss"],
            )
            self.parameter_steps = state.get("parameter_steps", 0.0)
            self.recent.extend(state["recent"])
            self.stream.load_state(state["stream"])
        if self.device.type == "cpu" and self.config.dtype == "bfloat16":
            self.events.emit("kernels", native=native.reason())
        for part in self.parts.values():
            part.start(self)
        return saved

    def run(self) -> TrainResult:
        config, total = self.config, self.config.total_steps
        saved = self.open()
        resumed = saved.step if saved else None
        if saved and saved.state["finished"] and saved.step >= total:
            return TrainResult(**saved.state["result"] | {"resumed_from": resumed, "checkpoint": str(saved.folder)})
        stopped: str | None = None
        last_saved = resumed or 0
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                stack.callback(allocation.release)
            signals = stack.enter_context(StopSignals())
            progress = None
            if self.ranks.first and self.label:
                progress = stack.enter_context(self.events.progress(self.label, config.total_tokens, "tok"))
                progress.resume_at(self.tokens)
            while self.steps_done < total:
                stopped = self._asked_to_stop(signals)
                if stopped:
                    break
                try:
                    report = self.step()
                except EndOfData:
                    self._save(last_saved)
                    raise
                if progress:
                    heldout = {} if self.heldout_loss is None else {"held-out": self.heldout_loss}
                    progress.update(config.step_tokens, loss=report["loss"], **heldout)
                if self._due(config.eval_every) and self.steps_done < total:
                    self._evaluate()
                if self._due(config.checkpoint_every) and self.steps_done < total:
                    last_saved = self._save(last_saved)
            if stopped is None:
                for part in self.parts.values():
                    part.finish(self)
                self.write_back()
                self._evaluate()
                self._save(-1, finished=True)
            else:
                self._save(last_saved)
        if stopped:
            self._say_stopped(stopped)
            if stopped != "deadline":
                raise KeyboardInterrupt
        return self._result(resumed, stopped)

    def step(self) -> dict[str, float]:
        """One optimizer step; returns the fields of its `train` event."""
        began = time.perf_counter()
        config = self.config
        batch = self._next_batch()
        middle = self.tokens + config.step_tokens / 2
        scales = self.schedule.scale(*self.surgery.position(middle, config.total_tokens))
        seed_all(config.seed, self.steps_done, self.ranks.rank, self.device)
        self.optimizer.begin(scales)
        targets = max(batch.n_targets, 1)
        sums, metrics = self.gradients(
            batch, targets, Step(self.steps_done, self.tokens, config.total_tokens, config.seed)
        )
        self.before_step()
        norm = self.norm()
        self.ranks.sum(sums)
        loss_sum, count, norm_value = torch.cat([sums, norm.double().view(1)]).tolist()
        ratio = targets / count if count else math.nan  # an objective may count otherwise than the batch does
        loss, norm_value = loss_sum / count if count else math.nan, norm_value * ratio
        finite = math.isfinite(loss) and math.isfinite(norm_value)
        if finite:
            too_long = config.clip > 0 and norm_value > config.clip
            self.update(scales, ratio * (config.clip / norm_value if too_long else 1.0))
            self.recent.append(loss)
        else:
            self._not_finite(loss, norm_value)
        self.flops += self.surgery.flops(self, self.steps_done) * config.sequences
        self.parameter_steps += self.parameters - self.surgery.removed(self.steps_done)
        self.steps_done += 1
        self.tokens += config.step_tokens
        for part in self.parts.values():
            part.after_step(self)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        report = {
            "step": self.steps_done,
            "tokens": self.tokens,
            "loss": loss,
            "lr": self.lr * scales["lr"],
            "grad_norm": norm_value,
            "tokens_per_second": round(config.step_tokens / seconds, 1),
            "seconds": round(self.seconds, 4),
        }
        report |= {name: float(self.ranks.sum(value)) / max(count, 1) for name, value in metrics.items()}
        self.events.emit("train", **report)
        return report

    def _next_batch(self) -> Any:
        state = self.stream.state()
        batch = self.stream.next_batch(self.config.sequences)
        if len(batch) < self.config.sequences:  # a short last batch is left for a run that has more data
            self.stream.load_state(state)
            raise EndOfData(
                f"the data ended after {self.tokens} of {self.config.total_tokens} tokens; "
                "allow more epochs, or ask for fewer tokens"
            )
        return batch

    def _due(self, every: int) -> bool:
        return every > 0 and self.steps_done % every == 0

    def _asked_to_stop(self, signals: StopSignals) -> str | None:
        """The same answer on every process: rank 0's."""
        words = [None, "deadline", "SIGINT", "SIGTERM"]
        mine = signals.got or ("deadline" if self.deadline.passed else None)
        return words[self.ranks.agree(words.index(mine))]

    def _evaluate(self) -> None:
        if self.heldout is None:
            return
        rows = self.config.micro_batch or max(self.config.sequences // self.ranks.world, 1)
        source = batches_of(self.heldout, rows * self.ranks.world, self.config.eval_sequences)
        self.heldout_loss = whole_loss(self.whole, source, self.device, self.ranks)
        self.events.emit("heldout", step=self.steps_done, tokens=self.tokens, loss=self.heldout_loss)

    def _save(self, last: int, finished: bool = False) -> int:
        """A checkpoint of now, unless there is one (`last`); the step it is of."""
        if self.checkpoints is None or self.steps_done == last:
            return self.steps_done
        began = time.perf_counter()
        state = {
            "config": self.config.resolved(),
            "stream": self.stream.state(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "flops": self.flops,
            "parameter_steps": self.parameter_steps,
            "skipped": self.skipped,
            "recent": list(self.recent),
            "heldout_loss": self.heldout_loss,
            "finished": finished,
            "result": self._result(None, None).as_dict() if finished else None,
        }
        path = self.checkpoints.save(
            self.steps_done,
            self.saved_tensors(),
            {name: part.state_dict() for name, part in self.parts.items()},
            state,
        )
        self.events.emit(
            "checkpoint",
            step=self.steps_done,
            path=str(path),
            finished=finished,
            seconds=round(time.perf_counter() - began, 3),
        )
        return self.steps_done

    def _whole_step_gradients(self) -> bool:
        return "step_gradients" in self.optimizer.capabilities(self.optimizer.config).provides

    def _not_finite(self, loss: float, norm: float) -> None:
        """Raise, or count the step as skipped; its gradients are dropped and its tokens stay consumed."""
        what = f"loss {loss:g}, gradient norm {norm:g} at step {self.steps_done + 1}"
        self.events.emit("nonfinite", step=self.steps_done + 1, loss=str(loss), grad_norm=str(norm))
        if self.config.nonfinite == "skip" and self._whole_step_gradients():
            self.skipped += 1
            self.drop_gradients()
            return
        kept = self.checkpoints.all() if self.checkpoints else []
        hint = "lower lr or lengthen the warm-up" + (", or set nonfinite=skip" if self._whole_step_gradients() else "")
        raise ModicumError(
            f"training diverged: {what} (after {count_text(self.tokens)} tokens)"
            + (f"; the last checkpoint is {kept[-1]}" if kept else "")
            + f"; {hint}"
        )

    def _damaged(self, path: Path, reason: str) -> None:
        print(f"modicum: checkpoint {path} is damaged ({reason}); looking at the one before it", file=sys.stderr)
        self.events.emit("checkpoint_damaged", path=str(path), reason=reason)

    def _say_stopped(self, reason: str) -> None:
        self.events.emit("stopped", reason=reason, step=self.steps_done, tokens=self.tokens)
        if self.ranks.first:
            kept = (
                f"checkpoint in {self.checkpoints.folder}; the same command goes on from there"
                if self.checkpoints
                else "no checkpoint was asked for"
            )
            print(
                f"modicum: {self.label or 'training'} stopped by {reason} after step {self.steps_done} of "
                f"{self.config.total_steps}; {kept}",
                file=sys.stderr,
            )

    def _result(self, resumed: int | None, stopped: str | None) -> TrainResult:
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else resident_peak()
        paths = self.checkpoints.all() if self.checkpoints else []
        return TrainResult(
            loss=sum(self.recent) / len(self.recent) if self.recent else math.nan,
            heldout_loss=self.heldout_loss,
            tokens=self.tokens,
            seconds=self.seconds,
            flops=self.flops,
            steps=self.steps_done,
            peak_bytes=int(peak),
            resumed_from=resumed,
            stopped=stopped,
            skipped=self.skipped,
            checkpoint=str(paths[-1]) if paths else None,
            average_parameters=self.parameter_steps / self.steps_done if self.steps_done else None,
        )


def seed_all(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed every generator from where the run is, so that no generator's state has to be kept."""
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.default_generator.manual_seed(value)  # torch.manual_seed costs a millisecond where CUDA sleeps
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
