"""One run, from a configuration to a folder.

1. Lock the folder.
2. Tokenizer and shards, made by the main rank first.
3. The model: new, or the base run's for fine-tuning.
4. Train, resuming from the newest checkpoint if there is one.
5. Evaluate every domain and save `model/`.
"""

import os
import re
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerFast

from kanlm.config import Config, DataSettings
from kanlm.data.corpus import Corpus, check_few_documents, open_corpus
from kanlm.data.loader import Batches
from kanlm.data.tokenizer import vocabulary_size
from kanlm.errors import UserError
from kanlm.evaluation.perplexity import Evaluation
from kanlm.faults import fault_point
from kanlm.model import KanLMForCausalLM
from kanlm.model.accounting import Accounting, account
from kanlm.model.grids import with_grid_size
from kanlm.slow_notices import announce_if_slow
from kanlm.training.arithmetic import arithmetic
from kanlm.training.callbacks import Callback
from kanlm.training.checkpointing.export import (
    load_trained,
    model_config,
    run_tokenizer,
    write_model,
)
from kanlm.training.compilation import compile_model, is_compiled, recompute_blocks
from kanlm.training.distributed import gather_results, run_on_main
from kanlm.training.gpus import reported_gpu
from kanlm.training.grids import GridChanges
from kanlm.training.kernel_choice import KernelChoice
from kanlm.training.lbfgs_polish import PolishAtEnd
from kanlm.training.metrics import TrainLog
from kanlm.training.penalties import Penalties
from kanlm.training.resolve import count_parameters
from kanlm.training.run_folder import lock_folder, write_config
from kanlm.training.sampling import Samples
from kanlm.training.sharding import accelerator_options, check_engine, uses_fsdp
from kanlm.training.state import TrainingState
from kanlm.training.stopping import Stop
from kanlm.training.strategies import OldText, make_strategy, open_earlier
from kanlm.training.tracking import print_line
from kanlm.training.trainer import Trainer
from kanlm.training.validation import Evaluator, Validation


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to say, on the main process."""

    folder: Path
    accounting: Accounting
    progress: TrainingState
    #: Of this process: on the GPU if there is one, else resident.
    peak_memory_bytes: int
    #: Domain → figures over `evaluation.split`, the domain trained on first.
    evaluations: dict[str, Evaluation]
    corpora: dict[str, Corpus]


def run(
    config: Config, keep: ExitStack | None = None, *, callbacks: Sequence[Callback] = ()
) -> Outcome | None:
    """Bring the run of a resolved configuration to its end, short of writing its results.

    Args:
        config: whose folder is new or this run's (`claim`).
        keep: keeps other jobs out of the folder until it is closed, as this does without it.
        callbacks: called after the loop's own.

    Returns the outcome on the main process and None on the others.

    Raises:
        UserError: anything the user can put right, before a step is taken where possible.
        Interrupted: a signal stopped the loop, which saved itself.
    """
    folder = Path(config.output_dir)
    _check_host(config)
    limit = config.training.time_limit_minutes
    stop = Stop(None if limit is None else 60 * limit)
    accelerator = _accelerator(config)
    with ExitStack() as own:
        said = own.enter_context(arithmetic(config.training, accelerator.device))
        if said and accelerator.is_main_process:
            print_line(f"{accelerator.device}: {said}")
        run_on_main(accelerator, lambda: (keep or own).enter_context(lock_folder(folder)))
        kernels = own.enter_context(closing(_kernel_choice(config, accelerator)))
        return _run(config, accelerator, stop, folder, kernels, callbacks)


def _run(
    config: Config,
    accelerator: Accelerator,
    stop: Stop,
    folder: Path,
    kernels: KernelChoice,
    callbacks: Sequence[Callback],
) -> Outcome | None:
    """`run` in a folder that is locked for it."""
    # The main process prepares what the others then find.
    prepared: list[_Text] = []
    run_on_main(accelerator, lambda: prepared.append(_text(config, print_line)))
    built: list[tuple[_Text, KanLMForCausalLM]] = []

    def build() -> None:
        text = prepared[0] if prepared else _text(config, _silent)
        built.append((text, _model(config, text.tokenizer)))

    report = print_line if accelerator.is_main_process else _silent
    with announce_if_slow("building the model", report):
        gather_results(accelerator, build)
    ((text, model),) = built
    tokenizer, corpora = text.tokenizer, text.corpora
    evaluator = Evaluator(config, accelerator, corpora)
    with announce_if_slow("placing the model and looking for a checkpoint", report):
        own = [kernels, *_own_callbacks(config, accelerator, model, text, evaluator)]
        trainer = _trainer(config, accelerator, model, corpora, [*own, *callbacks], stop)
    # Nothing is wrong with the settings: the folder becomes this run's.
    fault_point("before-config")
    run_on_main(accelerator, lambda: write_config(folder, config))
    try:
        trainer.train()
        trainer.finish()
        split, evaluations = config.evaluation.split, {}
        for domain in corpora:
            with announce_if_slow(f"evaluating on {domain} ({split})", report):
                evaluations[domain] = evaluator.evaluate(trainer.model, domain, split)
        model = trainer.placement.whole_model()

        def save() -> None:
            assert model is not None
            write_model(folder, model, tokenizer)

        with announce_if_slow("writing the model", report):
            run_on_main(accelerator, save)
    finally:
        trainer.leave()
    if model is None:
        return None
    fault_point("before-results")
    return Outcome(
        folder=folder,
        accounting=account(model.config),
        progress=trainer.state,
        peak_memory_bytes=peak_memory_bytes(),
        evaluations=evaluations,
        corpora=corpora,
    )


def check_corpus(corpus: Corpus, config: Config) -> None:
    """Check that a text can be trained and measured on, as far as the settings ask for it.

    Raises:
        UserError: a split holds no document, or the text is shorter than a context.
    """
    for split in ("validation", config.evaluation.split):
        corpus.split(split)
    if corpus.data == config.data:
        make_batches(corpus, config)


def _check_host(config: Config) -> None:
    """Refuse what this machine cannot hold however it is trained, before anything is made.

    Raises:
        UserError: the weights, or the tokens of a process's share of a batch, are larger than
            its memory.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A vocabulary that the tokenizer will state is at least this large.
    parameters = count_parameters(config.model, config.model.vocab_size or 2)
    weights = parameters * (8 if config.training.precision == "fp64" else 4)
    rows = config.training.batch_size // int(os.environ.get("WORLD_SIZE", "1"))
    # Inputs and labels, as 64-bit integers.
    batch = 2 * 8 * rows * config.model.context_length
    for what, size in (
        (f"model: {parameters:,} parameters", weights),
        (f"training.batch_size = {config.training.batch_size}: the tokens of one step", batch),
    ):
        if size > memory:
            raise UserError(
                f"{what} take {size / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB"
            )


def _accelerator(config: Config) -> Accelerator:
    # Without cpu=True, processes that torchrun starts on a CPU would each train alone.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if config.training.precision == "bf16" else "no",
        **accelerator_options(config.training.sharding),
    )
    check_engine(accelerator)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started and {accelerator.num_processes} joined: "
            f"Accelerate does not divide {accelerator.device.type} work among processes"
        )
    if config.training.batch_size % started:
        raise UserError(
            f"training.batch_size = {config.training.batch_size} does not divide among "
            f"{started} processes"
        )
    return accelerator


def _silent(line: str) -> None:
    """Take a line that the main process prints already."""


@dataclass(frozen=True)
class _Text:
    """What a run reads.

    Attributes:
        corpora: domain → its tokens.
        old: that of the runs that this one starts from, where the strategy reads it.
    """

    tokenizer: PreTrainedTokenizerFast
    corpora: dict[str, Corpus]
    old: OldText | None


def _text(config: Config, report: Callable[[str], None]) -> _Text:
    """Open the text and its tokenizer, which are prepared where they are not yet."""
    for data in _domains(config):
        check_few_documents(data, ("validation", config.evaluation.split))
    tokenizer = run_tokenizer(config, report)
    corpora = {
        data.domain: open_corpus(data, tokenizer, report=report) for data in _domains(config)
    }
    for corpus in corpora.values():
        check_corpus(corpus, config)
    old = None
    if make_strategy(config.strategy).reads_old_text:
        old = OldText(config, open_earlier(config, tokenizer, report))
    return _Text(tokenizer, corpora, old)


def _model(config: Config, tokenizer: PreTrainedTokenizerFast) -> KanLMForCausalLM:
    if config.initialize_from is not None:
        model = load_trained(Path(config.initialize_from), dropout=config.model.dropout)
    else:
        needed = vocabulary_size(tokenizer)
        size = config.model.vocab_size or needed
        if size < needed:
            raise UserError(f"model.vocab_size = {size} is less than the tokenizer's {needed}")
        schedule = config.training.grid_schedule
        settings = config.model if schedule is None else with_grid_size(config.model, schedule[0])
        set_seed(config.seed)
        model = KanLMForCausalLM(model_config(settings, size, tokenizer))
    if config.training.activation_checkpointing:
        recompute_blocks(model)
    return model.double() if config.training.precision == "fp64" else model


def _kernel_choice(config: Config, accelerator: Accelerator) -> KernelChoice:
    return KernelChoice(
        compiled=is_compiled(config.training.compile, accelerator.device),
        on_main=lambda measure: run_on_main(accelerator, measure),
        report=print_line if accelerator.is_main_process else _silent,
    )


def _own_callbacks(
    config: Config,
    accelerator: Accelerator,
    model: KanLMForCausalLM,
    text: _Text,
    evaluator: Evaluator,
) -> list[Callback]:
    """What the settings ask for at the moments of the run."""
    train = evaluator.corpora[config.data.domain].split("train")
    validation = Validation(evaluator)
    strategy = make_strategy(config.strategy)
    if text.old is not None:
        strategy.old_text = text.old
    return [
        TrainLog(
            train.n_tokens / int(train.document_bytes.sum()),
            _peak_tokens_per_second(model, config, accelerator),
        ),
        GridChanges(),
        Penalties(config.penalties),
        validation,
        PolishAtEnd(validation),
        Samples(text.tokenizer),
        strategy,
    ]


def _trainer(
    config: Config,
    accelerator: Accelerator,
    model: KanLMForCausalLM,
    corpora: dict[str, Corpus],
    callbacks: Sequence[Callback],
    stop: Stop,
) -> Trainer:
    by_block = uses_fsdp(accelerator, config.training.sharding)
    compiled = compile_model(model, config.training.compile, accelerator, by_block=by_block)
    corpus = corpora[config.data.domain]
    if accelerator.is_main_process:
        print_line(_introduction(config, model, corpus, compiled))
    # Dropout differs between processes and is the same in a resumed run.
    torch.manual_seed(config.seed + 1000003 * (1 + accelerator.process_index))
    return Trainer(
        config, accelerator, model, make_batches(corpus, config), corpora, callbacks, stop
    )


def _peak_tokens_per_second(
    model: KanLMForCausalLM, config: Config, accelerator: Accelerator
) -> float | None:
    """Tokens a second of all processes' GPUs at their peak; None where that is not known."""
    if accelerator.device.type != "cuda":
        return None
    gpu = reported_gpu(torch.cuda.get_device_name(accelerator.device))
    tf32 = bool(config.training.tf32)
    peak = None if gpu is None else gpu.peak(config.training.precision, tf32=tf32)
    if peak is None:
        return None
    return accelerator.num_processes * peak / account(model.config).training_flops_per_token


def make_batches(corpus: Corpus, config: Config) -> Batches:
    return Batches(
        corpus,
        seed=config.seed,
        batch_size=config.training.batch_size,
        context_length=config.model.context_length,
        attention_within_documents=config.data.attention_within_documents,
    )


def _domains(config: Config) -> tuple[DataSettings, ...]:
    return (config.data, *config.evaluation.domains)


def peak_memory_bytes() -> int:
    """Largest memory of this process: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Largest memory of this process on the host."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found is not None:
        return 1024 * int(found[1])
    # Not on Linux, where this is at least what the parent had when it started the process.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024)


def _introduction(config: Config, model: KanLMForCausalLM, corpus: Corpus, compiled: str) -> str:
    """What is about to be trained on what, in a line."""
    cost = account(model.config)
    total, active = cost.parameters["total"], cost.active_parameters
    parameters = f"{total:,} parameters" + (
        f", {active:,} of them active" if active < total else ""
    )
    return (
        f"{config.output_dir}: {cost.feed_forward}, {parameters} "
        f"({cost.parameters['feed_forward']:,} in feed-forward blocks); {config.data.domain}: "
        f"{corpus.split('train').n_tokens:,} training tokens; {compiled}"
    )
