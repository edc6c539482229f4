"""A training run as it goes: a live line on a terminal, a line a step elsewhere."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from vramplan.cost.utilisation import Utilisation
from vramplan.search.plan import Plan
from vramplan.spec.data import HELD_OUT
from vramplan.units import format_bytes, format_count, format_seconds

_PHASES = {
    "start": "starting",
    "data": "reading model and data",
    "join": "meeting the other ranks",
    "model_load": "loading the model",
    "engine_init": "building DeepSpeed's engine (its first use on a machine compiles for a minute)",
    "retention": "learning what must be kept (retain)",
    "resume": "reading the checkpoint",
    "evaluation": "evaluating",
    "save": "saving a checkpoint",
    "export": "saving what was trained",
}


class TrainingView:
    """Shows the events of a run; open it around the run."""

    def __init__(self, plan: Plan, console: Console | None = None, utilisation: Utilisation | None = None) -> None:
        self._utilisation = utilisation
        self._predicted = plan.prediction.training_peak_bytes
        self._predicted_of_resumed = plan.prediction.allocated_peak_bytes
        self._console = console or Console(highlight=False)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.fields[doing]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._before: dict[str, float] = {}
        """Perplexities before training, by set; a resumed run knows none."""
        self._announced = (0, 0)
        """From where a recovery was said to go on, and up to where the run had come."""
        self._task: TaskID = self._progress.add_task("", total=None, doing="starting")
        self._figures = Text()
        self._screen = Live(self._lines(), console=self._console, refresh_per_second=4)

    def _lines(self) -> Group:
        """The bar, and below it what the last step said: loss, rate and speed on one line, memory on the next."""
        return Group(self._progress, self._figures)

    def __enter__(self) -> Self:
        if self._live:
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._screen.stop()

    def on_event(self, event: dict[str, Any]) -> None:
        """Shows one event of ``metrics.jsonl`` (or a change of phase)."""
        show = getattr(self, f"_on_{event['event']}", None)
        if show is not None:
            show(event)

    def _on_phase(self, event: dict[str, Any]) -> None:
        doing = _PHASES.get(event["phase"])
        if doing is not None:
            self._progress.update(self._task, doing=doing)

    def _follow(self, event: dict[str, Any]) -> None:
        self._predicted = event.get("predicted_bytes", self._predicted)
        self._predicted_of_resumed = event.get("predicted_bytes", self._predicted_of_resumed)

    def _on_note(self, event: dict[str, Any]) -> None:
        self._follow(event)  # of another plan, which the note is about
        self._say(f"note: {event['text']}")

    def _on_resumed(self, event: dict[str, Any]) -> None:
        self._predicted = max(self._predicted, self._predicted_of_resumed)
        step, (announced, last) = event["step"], self._announced
        more = f"; {_steps(last - step)} to repeat in all" if step < announced else ""  # the newest was damaged
        self._announced = (0, 0)
        self._say(f"goes on after step {step}, from {event['path']}{more}")

    def _on_recovery(self, event: dict[str, Any]) -> None:
        self._follow(event)
        changes = ", ".join(f"{name} {value}" for name, value in event["changes"].items())
        plan = f"{changes} ({event['layout']})" if changes else "the same plan"
        repeated, lost = event["steps_repeated"], format_seconds(event["seconds_lost"])
        self._announced = (event["from_step"], event["from_step"] + repeated)
        where = f"goes on after step {event['from_step']}" if event["from_step"] else "begins again"
        self._say(f"{event['reason']}\nrecovery: {where} with {plan}; {_steps(repeated)} to repeat, {lost} lost")

    def _on_halved(self, event: dict[str, Any]) -> None:
        self._say(
            f"step {event['step'] + 1} ran out of memory ({event['reason']}); it is taken anew, with micro-batches of "
            f"{event['micro_batch_size']} from here on"
        )

    def _on_start(self, event: dict[str, Any]) -> None:
        trained, total = event["numel_trainable"], event["numel_total"]
        self._say(
            f"{format_count(trained)} of {format_count(total)} parameters are trained on {event['num_train']} samples "
            f"({event['num_held_out']} held out), {_steps(event['total_steps'])}"
        )
        self._progress.update(self._task, total=event["total_steps"], completed=event["step"], doing="training")

    def _on_step(self, event: dict[str, Any]) -> None:
        figures = step_figures(event, self._predicted, self._utilisation)
        self._progress.update(self._task, completed=event["step"], doing="training")
        self._figures = Text(figures.replace("  memory ", "\nmemory "))
        self._screen.update(self._lines())
        if not self._live:
            self._say(f"step {event['step']}/{event['total_steps']}  {figures}")

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        name = event.get("set", HELD_OUT)
        shown = "held-out" if name == HELD_OUT else name
        before = self._before.setdefault(name, event["perplexity"]) if event["step"] == 0 else self._before.get(name)
        change = "" if before is None or not event["step"] else f" ({event['perplexity'] / before - 1:+.1%})"
        when = f"after step {event['step']}" if event["step"] else "before training"
        self._say(f"{when}: {shown} loss {event['loss']:.4f}, perplexity {event['perplexity']:.2f}{change}")

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self._say(f"after step {event['step']}: checkpoint {event['path']} ({format_seconds(event['seconds'])})")

    def _on_end(self, event: dict[str, Any]) -> None:
        self._progress.update(self._task, completed=event["step"], doing="done")
        self._say(f"saved: {event['exported']}")

    def _on_merged(self, event: dict[str, Any]) -> None:
        self._say(f"adapters merged into the weights: {event['path']}")

    def _on_lm_eval(self, event: dict[str, Any]) -> None:
        errors = event["stderrs"]
        scores = (
            f"{metric} {score:.4f}" + (f" ± {errors[metric]:.4f}" if metric in errors else "")
            for metric, score in event["scores"].items()
        )
        self._say(f"lm_eval {event['task']}: {', '.join(scores)}")

    def _on_sample(self, event: dict[str, Any]) -> None:
        self._say(f"\nasked:    {event['question']}\nanswered: {event['answer']}")

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def step_figures(event: dict[str, Any], predicted_bytes: int, utilisation: Utilisation | None = None) -> str:
    """Loss, rate, speed (with the share of the devices' peak where that is known) and memory of one step."""
    of = "tensors" if event["memory_of"] == "tensors" else "the whole process"
    peak_of = "tensors" if event["memory_peak_of"] == "tensors" else "the whole process"
    parts = [
        f"loss {event['loss']:.4f}",
        f"lr {event['lr']:.2e}",
        f"{event['tokens_per_s']:,.0f} tokens/s" + _shown_share(event, utilisation),
        f"memory now {format_bytes(event['memory_now'])} ({of}), "
        f"peak {format_bytes(event['memory_peak'])} ({peak_of}), {format_bytes(predicted_bytes)} of tensors predicted",
    ]
    if not event["applied"]:
        parts.append("step skipped (fp16 overflow)")
    return "  ".join(parts)


def _shown_share(event: dict[str, Any], utilisation: Utilisation | None) -> str:
    return "" if utilisation is None else f" ({utilisation.share(event['tokens_per_s']):.1%} of peak FLOP/s)"
