"""Tasks of lm-eval on a streamed model, with the share of the original's score that is left. `python -m eval.harness`

Tasks, prompts and metrics are lm-eval's own; what is here is a model for it that stays within a memory budget, and the
original beside. Tasks whose data is on this machine, named by a YAML file in --include-path, need no network.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offload.command import Parser, run, say
from offload.errors import InputError, ResourceError, UsageError
from offload.planning.wishes import Wishes, WishWords, add_wish_flags, words_of
from offload.source import DEFAULT_OUTPUT, check_made, resolve_model


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of a task. stderr: None where lm-eval gives none; original: the uncompressed model's score, if it ran.

    recovery: the score by the original's, or the other way round where less is better; None without an original, or
    where the divisor is 0.
    """

    task: str
    metric: str
    score: float
    stderr: float | None
    higher_is_better: bool
    original: float | None = None

    @property
    def recovery(self) -> float | None:
        """What is left of the original's score, 1 for all of it."""
        if self.original is None:
            return None
        above, below = (self.score, self.original) if self.higher_is_better else (self.original, self.score)
        return above / below if below else None

    def line(self) -> str:
        """Return the score as a line of a terminal."""
        spread = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        beside = ""
        if self.original is not None:
            recovery = "not defined" if self.recovery is None else f"{self.recovery:.1%}"
            beside = f"   original {self.original:.4f}   recovery {recovery}"
        return f"{self.task:24} {self.metric:20} {self.score:.4f}{spread}{beside}"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    for word in ("batch_size", "context", "limit"):
        if (value := getattr(options, word)) is not None and value < 1:
            raise UsageError(f"--{word} {value}: expected at least 1".replace("_", "-"))
    words = words_of(options)
    Wishes.of(words)  # what contradicts itself is refused before seconds of imports
    check_made(options.model)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ResourceError("lm_eval is not installed; `pip install 'int4-offload[harness]'`") from None
    scores = measure(options, words)
    if options.json:
        print(json.dumps([asdict(score) | {"recovery": score.recovery} for score in scores]))
    else:
        print("\n".join(score.line() for score in scores))


def _parser() -> argparse.ArgumentParser:
    parser = Parser("eval.harness", "Run tasks of lm-eval on a streamed checkpoint.")
    add = parser.add_argument
    add("-m", "--model", type=Path, default=DEFAULT_OUTPUT, help="checkpoint directory")
    add("--tasks", required=True, help="of lm-eval or of --include-path, separated by commas")
    add("--include-path", type=Path, metavar="DIR", help="where tasks of your own are, YAML files")
    add("--num-fewshot", type=int, help="examples in the prompt; default: the task's")
    add(
        "--limit", type=int, metavar="N", help="only the first N documents of each task: for trying out, not for scores"
    )
    add("--batch-size", type=int, default=1, help="sequences in a pass")
    add("--context", type=int, default=2048, help="tokens of a sequence at most")
    add("--exact", action="store_true", help="float32 activations instead of int8: slower")
    add("--baseline", action="store_true", help="also run the model the checkpoint was made from, all in memory")
    add("--json", action="store_true", help="print JSON instead of lines")
    add_wish_flags(parser)
    return parser


def measure(options: argparse.Namespace, words: WishWords) -> list[Score]:
    """Run the tasks on the checkpoint, and on its original if asked for. Raises InputError for tasks not known."""
    from transformers import AutoModelForCausalLM

    from offload.checkpoint import Checkpoint
    from offload.executor import executor_of, load
    from offload.planning.words import describe
    from offload.text import load_tokenizer

    model = load(
        options.model,
        context_tokens=options.context,
        batch_size=options.batch_size,
        mode="exact" if options.exact else "fast",
        **words,
    )
    say(describe(executor_of(model).placement))
    tokenizer = load_tokenizer(options.model)
    try:
        found = list(_scores(_evaluate(model, tokenizer, options)))
    finally:
        executor_of(model).close()
    if not options.baseline:
        return found
    del model
    source = resolve_model(Checkpoint.open(options.model).recipe.source)
    original = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    beside = {(one.task, one.metric): one.score for one in _scores(_evaluate(original, tokenizer, options))}
    return [
        Score(s.task, s.metric, s.score, s.stderr, s.higher_is_better, beside[s.task, s.metric]) for s in found
    ]  # fmt: skip


def _evaluate(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return lm-eval's own results."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks, manager = options.tasks.split(","), TaskManager(include_path=options.include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise InputError(f"--tasks {','.join(unknown)}: not known to lm-eval, nor in --include-path")
    evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size, max_length=options.context)
    evaluated._device = torch.device("cpu")  # not that of the first parameter, which may be nowhere between two passes
    results: dict[str, Any] = simple_evaluate(
        evaluated,
        tasks=tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        log_samples=False,
    )
    return results


def _scores(results: dict[str, Any]) -> Iterator[Score]:
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            better = results["higher_is_better"].get(task, {}).get(metric)
            label = metric if kind == "none" else f"{metric}, {kind}"
            spread = float(stderr) if isinstance(stderr, int | float) else None
            yield Score(task, label, float(value), spread, better is not False)


if __name__ == "__main__":
    sys.exit(main())
