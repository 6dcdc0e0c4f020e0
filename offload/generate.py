"""Generate text from a checkpoint inside a memory budget, as it comes. `python -m offload.generate --prompt "..."`"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offload.command import Parser, format_bytes, run, say
from offload.errors import InputError, UsageError
from offload.planning.wishes import Wishes, WishWords, add_wish_flags, words_of
from offload.source import DEFAULT_OUTPUT

_DEFAULT_PROMPT = "Explain in a few sentences why the sky is blue."
_PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did, beside what the machine could have done.

    bytes_per_token: weights that decoding one token reads, wherever they lie. disk_bytes_per_token: those of them read
    from disk. limit: "disk" or "memory", whichever bounds decoding; limit_bytes_per_second: measured in this run, just
    after; fraction: of that limit, reached while decoding.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    decode_tokens_per_second: float
    bytes_per_token: int
    disk_bytes_per_token: int
    limit: str
    limit_bytes_per_second: float
    fraction: float
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
    if not options.model.is_dir() and options.model == DEFAULT_OUTPUT:
        raise InputError(f"{options.model}: not made yet; `python -m quant.awq --bits 4` makes it, or name a --model")
    report = generate(options, prompt, words)
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        _print_report(report)


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


def generate(options: argparse.Namespace, prompt: str, words: WishWords) -> Report:
    """Load, print the plan, stream the answer to stdout, and measure."""
    import torch

    from offload.memory import peak_memory_bytes, trim_memory

    trim_memory()  # between imports too: the peak is to be that of the run
    from transformers import TextStreamer

    from offload.executor import executor_of, load
    from offload.planning.costs import recall_costs
    from offload.planning.placement import describe
    from offload.skeleton import read_config
    from offload.text import load_tokenizer
    from offload.trace import Trace

    trim_memory()
    _check_checkpoint(options.model)
    tokenizer = load_tokenizer(options.model)
    tokens = _encode(tokenizer, prompt, options)
    longest = read_config(options.model).get_text_config(decoder=True).max_position_embeddings
    context = options.context or len(tokens) + options.max_new_tokens
    if len(tokens) + 1 > min(context, longest):
        raise InputError(f"the prompt has {len(tokens)} tokens, the context only {min(context, longest)}")
    new_tokens = min(options.max_new_tokens, min(context, longest) - len(tokens))
    model = load(
        options.model,
        context_tokens=context,
        prefill_chunk_tokens=_PREFILL_CHUNK_TOKENS,
        mode="exact" if options.exact else "fast",
        costs=recall_costs(options.model, context // 2),
        **words,
    )
    executor = executor_of(model)
    say(describe(executor.placement))
    clock = _Clock(None if options.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    torch.manual_seed(options.seed)
    trace = Trace(executor) if options.trace is not None else None
    before = executor.stats
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
            max_new_tokens=new_tokens,
            streamer=clock,
            prefill_chunk_size=_PREFILL_CHUNK_TOKENS if len(tokens) > _PREFILL_CHUNK_TOKENS else None,
            **_sampling(options),
        )[0][len(tokens) :]
    if trace is not None:
        trace.write(options.trace)
        say(f"trace    {options.trace}, to be opened in ui.perfetto.dev")
    stats = executor.stats
    steps = max(1, len(clock.times) - 1)
    passes = len(clock.times) + (len(tokens) - 1) // _PREFILL_CHUNK_TOKENS
    decode_seconds = clock.times[-1] - clock.times[0]
    disk_bytes = (stats.bytes_read - before.bytes_read) // passes
    bytes_per_token = executor.bytes_per_token
    peak = peak_memory_bytes()
    limit, bandwidth = _limit(executor)
    bound = disk_bytes if limit == "disk" else bytes_per_token
    rate = steps / decode_seconds if decode_seconds else 0.0
    return Report(
        text=tokenizer.decode(output, skip_special_tokens=True),
        prompt_tokens=len(tokens),
        new_tokens=len(output),
        prompt_seconds=clock.times[0] - clock.started,
        decode_tokens_per_second=rate,
        bytes_per_token=bytes_per_token,
        disk_bytes_per_token=disk_bytes,
        limit=limit,
        limit_bytes_per_second=bandwidth,
        fraction=bound * rate / bandwidth,
        direct_reads=stats.direct,
        wait_seconds=stats.wait_seconds - before.wait_seconds,
        peak_memory_bytes=peak,
        budget_bytes=executor.placement.budget_bytes,
    )


class _Clock:
    """A streamer that notes when each token came, and hands it on."""

    def __init__(self, streamer: Any) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self._streamer = streamer
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt first, then one token after the other."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """Flush what is left."""
        if self._streamer is not None:
            self._streamer.end()


def _check_checkpoint(directory: Path) -> None:
    from offload.checkpoint import is_checkpoint

    if directory.is_dir() and not is_checkpoint(directory):
        raise InputError(
            f"{directory}: not a quantized checkpoint; `python -m quant.awq --model {directory}` makes one of it"
        )


def _encode(tokenizer: Any, prompt: str, options: argparse.Namespace) -> list[int]:
    if options.no_chat or not tokenizer.chat_template:
        tokens: list[int] = tokenizer(prompt).input_ids
        return tokens
    messages = [{"role": "user", "content": prompt}]
    if options.system:
        messages.insert(0, {"role": "system", "content": options.system})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    chat: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return chat


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    if options.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k or None,
    }


def _limit(executor: Any) -> tuple[str, float]:
    """Measure what bounds decoding: reading the streamed layers from disk, or all weights from memory."""
    from kernels.cpu_matmul import read_seconds
    from offload.read_queue import read_blob

    if executor.slots is None:
        head = executor.head_memory
        return "memory", head.nbytes / min(read_seconds(head) for _ in range(5))
    executor.slots.reset()
    arena, blobs = executor.slots.arenas[0], executor.streamed_blobs
    started = time.perf_counter()
    total = 0
    while (elapsed := time.perf_counter() - started) < 0.5:
        for blob in blobs:
            read_blob(executor.reader, blob, arena)
            total += blob.nbytes
    return "disk", total / elapsed if elapsed else 0.0


def _print_report(report: Report) -> None:
    budget = f" of {format_bytes(report.budget_bytes)}" if report.budget_bytes else ""
    how = "past the page cache" if report.direct_reads else "pages dropped after use"
    disk = f", {format_bytes(report.disk_bytes_per_token)} from disk ({how})" if report.disk_bytes_per_token else ""
    say(f"prompt   {report.prompt_tokens} tokens in {report.prompt_seconds:.2f} s")
    say(f"decode   {report.new_tokens} tokens, {report.decode_tokens_per_second:.1f} tokens/s")
    say(f"weights  {format_bytes(report.bytes_per_token)} read per token{disk}")
    say(f"limit    {report.fraction:.0%} of the {report.limit}'s {report.limit_bytes_per_second / 1e9:.2f} GB/s")
    say(f"memory   peak {format_bytes(report.peak_memory_bytes)}{budget}")


if __name__ == "__main__":
    sys.exit(main())
