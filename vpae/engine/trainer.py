"""The loop: one turn of one player at a time, the same for every method and any number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpae import recipe as recipes
from vpae.draws import Draws
from vpae.engine import checkpoint as checkpoints
from vpae.engine import optim, signals
from vpae.engine.adam import stored
from vpae.engine.host import local_bytes, require_memory
from vpae.engine.parallel import Processes, autocast, average_gradients, local, reshard
from vpae.engine.stream import Stream
from vpae.engine.tracking import Tracker
from vpae.engine.watch import Collapse, Watch, vital_signs
from vpae.engine.writer import Writer
from vpae.errors import UserError
from vpae.methods.base import Batch, Method, Player
from vpae.recipe import Engine
from vpae.runs import first_difference, stored_identity, what_is_learnt

_START_LEFT = 0.05  # of an EMA's first weights, at the end of a run, without a word


@dataclass
class Run:
    """Everything around a method that the loop needs.

    Attributes:
        folder: of this phase: checkpoints, log, TensorBoard.
        settings: the recipe's engine section.
        seed: of this phase.
        identity: what a checkpoint must agree on to be resumed (recipe and data fingerprints).
        recipe_text: the resolved recipe.
        fetch: ``(sample indices, Draws) -> Batch`` on the right device.
        samples: length of the data.
        modules: sharded modules, to be resharded after each turn.
        portion: turn -> (first stream position, samples of all ranks); None: ``global_batch`` each turn.
        watch: the collapse alarm, None for methods without a student sample.
        gallery: called every ``sample_every`` steps of the player ``student`` as ``gallery(turn, tracker)``; what it
            returns goes to the watch.
    """

    folder: Path
    settings: Engine
    seed: int
    identity: dict[str, Any]
    recipe_text: str
    fetch: Callable[[list[int], Draws], Any]
    samples: int
    modules: list[nn.Module]
    portion: Callable[[int], tuple[int, int]] | None = None
    watch: Watch | None = None
    gallery: Callable[[int, Tracker], dict[str, float]] | None = None


@dataclass
class _Gathered:
    """Scalars of a player since the last log line, as device tensors: they are read when a line is due."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.sums[key] = self.sums[key] + value.double() if key in self.sums else value.double()
            self.counts[key] = self.counts.get(key, 0) + 1

    def copy(self) -> _Gathered:
        return _Gathered(dict(self.sums), dict(self.counts))

    def means(self) -> dict[str, float]:
        return {k: float(v) / self.counts[k] for k, v in self.sums.items()}

    def state(self, processes: Processes) -> dict[str, Any]:
        """For a checkpoint: the mean over ranks, from which every rank can go on."""
        return {"sums": processes.mean({k: float(v) for k, v in self.sums.items()}), "counts": self.counts}

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> _Gathered:
        sums = {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in state["sums"].items()}
        return cls(sums, dict(state["counts"]))


def slow_ema(player: Player) -> str | None:
    """What to tell the user where an EMA, which is what ships, will still be largely the weights it started from.

    V-PAE's own 0.995 in 1000 steps (arXiv 2508.21019) leaves 0.7 % of them: its horizon is a fifth of the run.
    """
    if player.ema is None or player.steps == 0:
        return None
    left = player.ema.decay**player.steps
    if left <= _START_LEFT:
        return None
    better = math.floor(1e4 * max(0.0, 1 - 5 / player.steps)) / 1e4
    return (
        f"ema_decay {player.ema.decay:g} over {player.steps} {player.name} steps leaves {left:.0%} of the weights it "
        "starts from in the EMA, which is what is evaluated and exported (and, in phase II, the unified judge); "
        f"{better:g} would leave under 1 %"
    )


class Trainer:
    """Trains a method to its last turn, or until a signal.

    A turn is one optimiser step of one player: it sees ``global_batch`` samples, in micro-batches on each rank.
    """

    def __init__(self, method: Method, run: Run, processes: Processes) -> None:
        self.method, self.run, self.processes = method, run, processes
        processes.share(run.settings.global_batch)
        processes.together(lambda: require_memory(self._on_host()))  # machines differ
        self.optimisers = {
            name: optim.build_optimiser(player, run.settings.optimiser_state, processes.device, run.seed)
            for name, player in method.players.items()
        }
        self.steps = dict.fromkeys(method.players, 0)
        self.turn = 0
        self.seconds = 0.0  # spent in turns, over all calls of this run
        self.stream = Stream(run.samples, run.seed)
        self.stopped = False  # by a signal, on whichever rank
        self.gathered: dict[str, _Gathered] = {}
        self.writer = Writer(
            self.checkpoint_root, run.settings.keep_checkpoints, processes, run.settings.async_checkpoints
        )

    def _on_host(self) -> dict[str, int]:
        """Bytes that this rank will keep in host memory besides the EMA, by the keys that ask for it."""
        settings, moments = self.run.settings, {"fp32": 8, "cpu": 8, "bf16": 4, "int8": 2}
        players = self.method.players.values()
        state = moments[settings.optimiser_state] * sum(
            local(p).numel() for player in players for p in player.parameters.values()
        )
        wanted = {}
        if settings.optimiser_state == "cpu":
            wanted["engine.optimiser_state: cpu"] = state
        if settings.async_checkpoints:
            emas = [list(player.ema.parameters.values()) for player in players if player.ema is not None]
            weights = [*emas, *(list(player.parameters.values()) for player in players)]
            wanted["engine.async_checkpoints: true"] = state + sum(map(local_bytes, weights))
        return wanted

    @property
    def checkpoint_root(self) -> Path:
        return self.run.folder / "checkpoints"

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint holds, by name (parameters themselves, not copies)."""
        found: dict[str, Tensor] = {}
        for name, player in self.method.players.items():
            for key, parameter in player.parameters.items():
                found[f"{name}.{key}"] = parameter.detach()
                for moment, tensor in stored(self.optimisers[name], parameter).items():
                    found[f"optimiser.{name}.{key}.{moment}"] = tensor
            if player.ema is not None:
                for key, parameter in player.ema.parameters.items():
                    found[f"{player.ema.name}.{key}"] = parameter.detach()
        return found

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False if there is none.

        Raises:
            UserError: the checkpoint is damaged, or is of another recipe, teacher or cache.
        """
        found = checkpoints.find_agreed(self.checkpoint_root, self.processes)
        if found is None:
            return False
        difference = first_difference(stored_identity(found.part("identity", dict)), self.run.identity)
        if difference:
            raise UserError(
                f"checkpoint {found.folder} is of another run ({difference}); use the recipe it was made with, "
                "or another output folder"
            )
        reshard(self.run.modules)
        checkpoints.load(found, self.tensors(), self.processes, everything=True)
        try:
            self._take_up(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise checkpoints.damaged(found.folder, f"its state does not say how to go on: {error!r}") from None
        return True

    def _take_up(self, found: checkpoints.Checkpoint) -> None:
        """Go on where a checkpoint's state says; its tensors are in place."""
        state, names = found.state, self.method.players
        self.turn, self.steps = found.turn, {name: int(state["steps"][name]) for name in names}
        if any(step < 0 for step in self.steps.values()):
            raise ValueError(f"steps are {self.steps}")
        self.seconds = float(state["seconds"])
        for name, player in names.items():
            late = state["late_parameters"][name]
            for key, parameter in player.parameters.items():
                self.optimisers[name].state[parameter]["step"].fill_(late.get(key, self.steps[name]))
        device = self.processes.device
        self.gathered = {name: _Gathered.of(means, device) for name, means in state["gathered"].items()}
        if self.run.watch is not None:
            self.run.watch.broken = dict(state["watch"])
        if self.processes.is_main:
            print(f"{self.method.name}: goes on from turn {self.turn} of {self.method.turns}", flush=True)

    def save(self) -> Path:
        """Write a checkpoint of this moment, or begin to, where the recipe has it written beside training."""
        reshard(self.run.modules)
        state = {
            "steps": self.steps,
            "turns": self.method.turns,
            "seconds": round(self.seconds, 3),
            "late_parameters": {name: self._late_parameters(name) for name in self.method.players},
            "identity": self.run.identity,
            "seed": self.run.seed,
            "position": sum(self._portion(self.turn - 1)) if self.turn else 0,
            "world_size": self.processes.size,
            "gathered": {name: gathered.state(self.processes) for name, gathered in sorted(self.gathered.items())},
            "watch": {} if self.run.watch is None else self.run.watch.state(),
            "recipe": self.run.recipe_text,
        }
        return self.writer.save(self.turn, self.tensors(), state)

    def _late_parameters(self, name: str) -> dict[str, int]:
        """Adam's own step count of the parameters that some turns gave no gradient and that it left alone."""
        state = self.optimisers[name].state
        counts = {key: int(state[p]["step"]) for key, p in self.method.players[name].parameters.items()}
        return {key: count for key, count in counts.items() if count != self.steps[name]}

    def train(self, until: int | None = None) -> bool:
        """Take turns to the end (or to turn ``until``); True if the end was reached.

        The last state is always checkpointed. SIGTERM and SIGINT end the turn at hand after this micro-batch (which may
        be long before the turn's own end, hence before a machine is taken away), drop what it has done, save the state
        of the turn before and return False.

        Raises:
            UserError: a loss or gradient is not finite, the watch stops the run, or the disk is full.
        """
        end = self.method.turns if until is None else min(until, self.method.turns)
        with signals.noted() as noted:
            # no rank takes a turn before all of them listen: one that a signal ends earlier would fail the others
            self.stopped = self.processes.agree([bool(noted)])[0]
            run, method, processes = self.run, self.method, self.processes
            tracker = processes.together(
                lambda: Tracker(run.folder, method.turns, self.turn, method.name, processes.is_main)
            )
            saved = self.turn if self.turn else -1
            if self.turn == 0 and processes.is_main:
                for slow in map(slow_ema, method.players.values()):
                    if slow:
                        print(f"warning: {method.name}: {slow}", flush=True)
            try:
                if self.turn == 0 and self.run.gallery is not None and not self.stopped:
                    self.run.gallery(0, tracker)
                while self.turn < end and not self.stopped:
                    if not self._take_turn(tracker, noted):
                        self.stopped = True
                        break
                    self.stopped, unwritten = self.processes.agree([bool(noted), self.writer.failed])
                    if unwritten:
                        self.writer.wait()
                    due = self.turn % self.run.settings.checkpoint_every == 0
                    if due and self.turn < end and not self.stopped:
                        self.save()
                        saved = self.turn
                if saved != self.turn:
                    self.save()
                self.writer.wait()
            except Collapse:
                self.save()
                self.writer.wait()
                raise
            finally:
                tracker.close()
                self.writer.close()
            self.stopped = self.processes.agree([bool(noted)])[0]
        return self.turn >= self.method.turns

    def _portion(self, turn: int) -> tuple[int, int]:
        """First stream position and number of samples of a turn."""
        if self.run.portion is not None:
            return self.run.portion(turn)
        batch = self.run.settings.global_batch
        return turn * batch, batch

    def _micro_batches(self) -> list[list[int]]:
        """Stream positions of this rank's micro-batches in this turn."""
        (first, batch), micro = self._portion(self.turn), self.run.settings.micro_batch
        mine = batch // self.processes.data_size
        start = first + self.processes.data_rank * mine
        return [list(range(p, min(p + micro, start + mine))) for p in range(start, start + mine, micro)]

    def _take_turn(self, tracker: Tracker, noted: Sequence[int] = ()) -> bool:
        """One turn; False if a signal in ``noted``, on whichever rank, ended it before anything moved."""
        name = self.method.player_of(self.turn)
        player = self.method.players[name]
        for other in self.method.players.values():
            for parameter in other.parameters.values():
                parameter.requires_grad_(other is player)
        started = time.perf_counter()
        gathered = self.gathered.get(name, _Gathered()).copy()
        micro = self._micro_batches()
        finite = torch.ones((), dtype=torch.bool, device=self.processes.device)
        for number, positions in enumerate(micro):
            # before the first one all ranks have just been asked
            if number and self.processes.agree([bool(noted)])[0]:
                _drop_gradients(player)
                return False
            draws = Draws(self.run.seed, positions, self.processes.device)
            indices = [self.stream.index(p) for p in positions]
            batch = self.processes.together(lambda i=indices, d=draws: self.run.fetch(i, d))
            if isinstance(batch, Batch):
                batch = replace(batch, turn=self.turn)
            with autocast(self.processes, self.run.settings.precision):
                outcome = self.method.loss(name, batch)
            finite &= outcome.loss.isfinite()
            (outcome.loss * (len(positions) / sum(map(len, micro)))).backward()
            gathered.add(outcome.scalars)
            if outcome.student_x0 is not None and isinstance(batch, Batch):
                gathered.add({f"watch/{k}": v for k, v in vital_signs(outcome.student_x0, batch.x0).items()})
        norm = self._step(player, finite)
        gathered.add({"gradient_norm": norm})
        self.seconds += time.perf_counter() - started
        gathered.add({"seconds": torch.tensor(time.perf_counter() - started)})
        self.gathered[name] = gathered
        self.steps[name] += 1
        self.turn += 1
        tracker.advance()
        self._report(name, tracker)
        return True

    def _step(self, player: Player, finite: Tensor) -> Tensor:
        parameters = list(player.parameters.values())
        average_gradients(parameters, self.processes)
        norm = optim.gradient_norm(parameters)
        if self.processes.agree([not bool(finite & norm.isfinite())])[0]:
            _drop_gradients(player)
            raise UserError(
                f"turn {self.turn} ({player.name}): loss or gradient is not finite on at least one rank; nothing was "
                "updated, the last checkpoint is whole. --resume takes the same turns again: use it if the machine was "
                "at fault; else check the data, or lower the learning rate and start in another --output"
            )
        optim.clip_(parameters, norm, player.optimiser.clip_norm)
        optimiser = self.optimisers[player.name]
        rate = optim.learning_rate(player.optimiser, self.steps[player.name], player.steps)
        optim.set_rate(optimiser, rate)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        reshard(self.run.modules)
        if player.ema is not None:
            optim.follow(player.ema, player)
        return norm

    def _report(self, name: str, tracker: Tracker) -> None:
        step, settings = self.steps[name], self.run.settings
        if step % settings.log_every == 0 or self.turn == self.method.turns:
            means = self.processes.mean(self.gathered[name].means())
            self.gathered[name] = _Gathered()
            player = self.method.players[name]
            rate = optim.learning_rate(player.optimiser, step - 1, player.steps)
            values = {key if "/" in key else f"{name}/{key}": value for key, value in means.items()}
            values |= {f"{name}/learning_rate": rate, f"{name}/step": step}
            self.processes.together(lambda: tracker.scalars(self.turn - 1, values), main_only=True)
            self._look({f"{name}/{key.split('/')[-1]}": value for key, value in means.items()}, tracker)
        if name == "student" and self.run.gallery is not None and step % settings.sample_every == 0:
            # under the turn just taken: what stands at the next one is dropped when that is where the run is resumed
            signs = self.run.gallery(self.turn - 1, tracker)
            self._look({f"samples/{key}": value for key, value in signs.items()}, tracker)

    def _look(self, signs: dict[str, float], tracker: Tracker) -> None:
        if self.run.watch is None:
            return
        for alarm in self.run.watch.look(self.steps.get("student", 0), signs):
            tracker.say(alarm)


def _drop_gradients(player: Player) -> None:
    for parameter in player.parameters.values():
        parameter.grad = None


def identity_of(recipe: recipes.Recipe, data: str, phase: str) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes it: all that changes the numbers.

    Args:
        data: fingerprint of what is trained on; it stands for the recipe's words about it.
        phase: of the run.
    """
    plain = what_is_learnt(recipes.to_plain(recipe))
    for words in ("data", "source"):
        plain.pop(words, None)
    return {"phase": phase, "data": data, **plain}
