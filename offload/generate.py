"""Generate text from a checkpoint inside a memory budget, as it comes. `python -m offload.generate --prompt "..."`"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offload.command import Parser, format_bytes, run, say
from offload.errors import InputError, UsageError
from offload.planning.wishes import Wishes, WishWords, add_wish_flags, words_of
from offload.source import DEFAULT_OUTPUT, check_made

if TYPE_CHECKING:
    from offload.clock import Clock
    from offload.sampling import Sampling
    from offload.session import Prompts, Session
    from offload.streaming_stats import StreamingStats

_DEFAULT_PROMPT = "Explain in a few sentences why the sky is blue."


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did, beside what the machine could have done.

    predicted_tokens_per_second: what the plan said of decoding, None for a model that `offload.plan` has not rehearsed.
    bytes_per_token: weights that decoding one token reads, wherever they lie. disk_bytes_per_token: those of them read
    from disk. cache_bytes_per_token: keys and values that a pass copied between host memory and a GPU. limit: the link
    that bounds decoding, see `offload.limit`; limit_bytes_per_second: measured in this run, just after; fraction: of
    that limit, reached while decoding. None of the three after an interruption: who interrupts does not wait for it.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    decode_tokens_per_second: float
    predicted_tokens_per_second: float | None
    bytes_per_token: int
    disk_bytes_per_token: int
    cache_bytes_per_token: int
    limit: str | None
    limit_bytes_per_second: float | None
    fraction: float | None
    direct_reads: bool
    wait_seconds: float
    peak_memory_bytes: int
    budget_bytes: int | None


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: expected at least 1")
    words = words_of(options)
    Wishes.of(words)  # what contradicts itself is refused before seconds of imports
    prompt = _prompt(options)
    check_made(options.model)
    report, interrupted = generate(options, prompt, words)
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        _print_report(report)
    if interrupted:
        raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = Parser("offload.generate", "Generate text with a quantized checkpoint, inside a memory budget.")
    add = parser.add_argument
    add("-m", "--model", type=Path, default=DEFAULT_OUTPUT, help="checkpoint directory")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", default=_DEFAULT_PROMPT, help="what to answer")
    source.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file, - for stdin")
    add("--system", help="system message of the chat")
    add("--no-chat", action="store_true", help="continue the prompt as it is, without the chat template")
    add("--context", type=int, help="tokens to plan for; default: prompt and new tokens")
    add("--max-new-tokens", type=int, default=128, help="tokens to generate at most")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest tokens of this total probability")
    add("--top-k", type=int, default=0, help="sample among this many likeliest tokens; 0 for all")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--exact", action="store_true", help="float32 activations instead of int8: slower, for proofs")
    add("--trace", type=Path, metavar="FILE", help="write what was read and computed when, for ui.perfetto.dev")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add_wish_flags(parser)
    return parser


def _prompt(options: argparse.Namespace) -> str:
    prompt: str = options.prompt
    if options.prompt_file == "-":
        prompt = sys.stdin.read()
    elif options.prompt_file is not None:
        try:
            prompt = Path(options.prompt_file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompt-file {options.prompt_file}: cannot be read ({error})") from None
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt


def generate(options: argparse.Namespace, prompt: str, words: WishWords) -> tuple[Report, bool]:
    """Load, print the plan, stream the answer to stdout, and measure; returns also whether it was interrupted."""
    from offload.memory import trim_memory

    trim_memory()  # what the import of torch left, before that of transformers comes on top
    from offload.formats.convert import opened
    from offload.planning.words import describe
    from offload.sampling import Sampling
    from offload.session import Prompts, Session

    trim_memory()
    prompts = Prompts(opened(options.model, plain=True))
    tokens = _encode(prompts, prompt, options)
    context = min(options.context or len(tokens) + options.max_new_tokens, prompts.longest_tokens)
    if len(tokens) + 1 > context:
        raise InputError(f"the prompt has {len(tokens)} tokens, the context only {context}")
    sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
    with closing(Session(prompts, context, words, options.exact)) as session:
        say(describe(session.executor.placement))
        return _answer(session, tokens, min(options.max_new_tokens, context - len(tokens)), sampling, options)


def _answer(
    session: "Session", tokens: list[int], new_tokens: int, sampling: "Sampling", options: argparse.Namespace
) -> tuple[Report, bool]:
    """Stream the answer, write the trace that was asked for, and measure."""
    from transformers import TextStreamer

    from offload.clock import Clock
    from offload.trace import Trace

    prompts = session.prompts
    streamer = None if options.json else TextStreamer(prompts.tokenizer, skip_prompt=True, skip_special_tokens=True)
    trace = Trace(session.executor) if options.trace is not None else None
    before, interrupted = session.executor.stats, False
    with _live_line(session) as on_token:
        clock = Clock(streamer, on_token)
        try:
            session.generate(tokens, new_tokens, sampling, clock)
        except KeyboardInterrupt:
            interrupted = True
            clock.end()
    if trace is not None:
        trace.write(options.trace)
        say(f"trace    {options.trace}, to be opened in ui.perfetto.dev; {trace.describe_links()}")
    return _report(session, clock, before, len(tokens), measured=not interrupted), interrupted


@contextmanager
def _live_line(session: "Session") -> Iterator["Callable[[Clock], None] | None"]:
    """Yield what a clock is to call at every token: a line at the foot of the terminal, where there is one."""
    from offload.limit import measure_links
    from offload.live import Meter, StatusLine

    with StatusLine() as line:
        yield Meter(line, measure_links(session.executor), session.executor) if line.active else None


def _report(session: "Session", clock: "Clock", before: "StreamingStats", prompt_tokens: int, measured: bool) -> Report:
    """Hold what was done against what bounds it, to be measured now if at all."""
    from offload.limit import measure_limit
    from offload.memory import peak_memory_bytes
    from offload.session import PREFILL_CHUNK_TOKENS

    executor, stats = session.executor, session.executor.stats
    passes = max(1, len(clock.times)) + (prompt_tokens - 1) // PREFILL_CHUNK_TOKENS
    disk_bytes = (stats.bytes_read - before.bytes_read) // passes
    peak = peak_memory_bytes()
    cache_bytes = (stats.cache_bytes_copied - before.cache_bytes_copied) // passes
    limit = measure_limit(executor, disk_bytes, cache_bytes) if measured else None
    return Report(
        text=session.prompts.text(clock.tokens),
        prompt_tokens=prompt_tokens,
        new_tokens=len(clock.tokens),
        prompt_seconds=clock.prompt_seconds,
        decode_tokens_per_second=clock.tokens_per_second,
        predicted_tokens_per_second=session.predicted_tokens_per_second,
        bytes_per_token=executor.bytes_per_token,
        disk_bytes_per_token=disk_bytes,
        cache_bytes_per_token=cache_bytes,
        limit=None if limit is None else limit.link,
        limit_bytes_per_second=None if limit is None else limit.bytes_per_second,
        fraction=None if limit is None else limit.seconds_per_token * clock.tokens_per_second,
        direct_reads=stats.direct,
        wait_seconds=stats.wait_seconds - before.wait_seconds,
        peak_memory_bytes=peak,
        budget_bytes=executor.placement.budget_bytes,
    )


def _encode(prompts: "Prompts", prompt: str, options: argparse.Namespace) -> list[int]:
    if options.no_chat or not prompts.has_template:
        return prompts.plain(prompt)
    system = [{"role": "system", "content": options.system}] if options.system else []
    return prompts.chat([*system, {"role": "user", "content": prompt}])


def _print_report(report: Report) -> None:
    budget = f" of {format_bytes(report.budget_bytes)}" if report.budget_bytes else ""
    how = "past the page cache" if report.direct_reads else "pages dropped after use"
    disk = f", {format_bytes(report.disk_bytes_per_token)} from disk ({how})" if report.disk_bytes_per_token else ""
    say(f"prompt   {report.prompt_tokens} tokens in {report.prompt_seconds:.2f} s")
    predicted = report.predicted_tokens_per_second
    plan = "not predicted; `python -m offload.plan` rehearses it" if predicted is None else f"{predicted:.1f} predicted"
    say(f"decode   {report.new_tokens} tokens, {report.decode_tokens_per_second:.1f} tokens/s; {plan}")
    say(f"weights  {format_bytes(report.bytes_per_token)} read per token{disk}")
    if report.cache_bytes_per_token:
        say(f"cache    {format_bytes(report.cache_bytes_per_token)} of keys and values copied per token")
    if report.fraction is not None and report.limit_bytes_per_second is not None:
        say(f"limit    {report.fraction:.0%} of the {report.limit}'s {report.limit_bytes_per_second / 1e9:.2f} GB/s")
    say(f"memory   peak {format_bytes(report.peak_memory_bytes)}{budget}")


if __name__ == "__main__":
    sys.exit(main())
