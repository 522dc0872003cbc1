"""The one `TrainingConfig`: every default of HYDRA and every check of it. Importing it does not import torch."""

import dataclasses
import difflib
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, PydanticCustomError

from hydra.attention import available_backends, parse_plan, plan_layers, record_plan_code, refuse_missing_records
from hydra.attention.registry import load_spec_class
from hydra.data import DataSpec
from hydra.errors import ConfigError, RunError
from hydra.runtime import paths
from hydra.runtime.ledger import read_status
from hydra.runtime.paths import CODE, CONFIG, next_free, shown, workspace_root

if TYPE_CHECKING:
    from hydra.model.framework import ModelSpec
    from hydra.optim import OptimizerSpec
    from hydra.runtime.choices import AskedChoices


def as_tuple(value: object) -> object:
    """One path may be given as a plain string, several as a YAML or JSON list."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


ATTENTION_FIELDS = "attention, attention_options"
"""What a message about an attention begins with."""
# What other programs call a field, for messages about names that there are not.
CALLED_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("lr", "rate", "max_lr", "peak_lr", "learning_rate_max"), "learning_rate"),
    **dict.fromkeys(("seq_len", "seq_length", "sequence_length", "block_size", "ctx", "ctx_len"), "context_length"),
    **dict.fromkeys(("max_length", "max_seq_len", "n_ctx", "n_positions"), "context_length"),
    **dict.fromkeys(("bs", "batch", "train_batch_size", "global_batch_size"), "batch_size"),
    **dict.fromkeys(("micro_batch", "mbs"), "micro_batch_size"),
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs", "steps", "n_steps", "iters", "max_iters"), "max_steps"),
    **dict.fromkeys(("layers", "n_layer", "num_layers", "depth", "blocks"), "n_layers"),
    **dict.fromkeys(("heads", "n_head", "num_heads", "num_attention_heads"), "n_heads"),
    **dict.fromkeys(("width", "dim", "hidden_size", "n_embd", "embed_dim", "d"), "d_model"),
    **dict.fromkeys(("ffn", "d_ff", "ff_dim", "intermediate_size", "ffn_dim"), "d_feed_forward"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("warmup", "warmup_iters"), "warmup_steps"),
    **dict.fromkeys(("grad_clip", "clip", "max_grad_norm"), "max_gradient_norm"),
    **dict.fromkeys(("data", "dataset", "text"), "corpus"),
    **dict.fromkeys(("vocab", "n_vocab"), "vocab_size"),
    **dict.fromkeys(("beta1", "beta_1"), "adam_beta1"),
    **dict.fromkeys(("beta2", "beta_2"), "adam_beta2"),
    **dict.fromkeys(("precision", "torch_dtype"), "dtype"),
}


def stays_inside(path: str) -> str:
    """A relative path that leads out of the workspace, or a text that is no plain path, is refused."""
    try:
        paths.check_path(path, "it")
    except ConfigError as error:
        raise PydanticCustomError("path", "{problem}", {"problem": str(error).removeprefix("it ")}) from None
    if os.path.normpath(path).split("/")[0] == "..":
        raise PydanticCustomError("path", "must stay in the workspace; name a place elsewhere by its absolute path")
    return path


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(stays_inside)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True),
)
class TrainingConfig:
    """Everything that decides what a run computes. The defaults are the `debug` preset.

    Raises:
        ConfigError: naming every unknown name, wrong type and impossible combination, with the closest known name.
    """

    module: ClassVar[str] = "scripts.trainer"

    preset_name: Literal["debug", "tiny", "small", "50M", "100M", "250M", "500M", "750M", "1B", "1.5B"] = "debug"
    """The preset these values started from; given as the parameter `preset`."""

    # Data
    corpus: Annotated[tuple[LocalPath, ...], Field(min_length=1), BeforeValidator(as_tuple)] = ("default",)
    """Text to train on: `default` (Python source of pinned packages), or paths of files and folders of UTF-8 text."""
    tokenizer: LocalPath = "bpe"
    """`bpe` (byte-level, trained on the corpus), `bytes`, `characters`, or the path of an existing tokenizer.json."""
    vocab_size: Annotated[int, Field(ge=257, le=2**31)] = 4096
    """Entries of a `bpe` vocabulary, special token included; the other tokenizers bring their own size."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    """Share of the documents, chosen by the hash of their text, that is kept for validation."""
    data_dir: LocalPath = "data"
    """Folder of the tokenized shards, shared by runs; relative to the workspace root."""

    # Model
    d_model: PositiveInt = 256
    """Width of the residual stream, in channels."""
    n_layers: PositiveInt = 4
    """Number of blocks."""
    n_heads: PositiveInt = 4
    """Attention heads; the head width is d_model / n_heads."""
    attention: str = "ccgqa"
    """Attention of the blocks: a backend (`hydra.attention.available_backends()` lists them), a class of your own
    (`path/to/my_attention.py:MyAttention`), or a plan of several that is repeated to the last block, such as
    `3*ccgqa, gqa` or `3*gqa(window=256), gqa`."""
    attention_options: dict[str, Any] = Field(default_factory=dict)
    """Options by name, for every layer whose backend has them; those in a plan's brackets come first."""
    attention_code: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What is known of the files of classes of your own: SHA-256, and options with defaults. Filled in when the config
    is made; the run keeps a copy of the file and runs no other."""
    feed_forward: Literal["swiglu", "squared_relu"] = "squared_relu"
    """Feed-forward layer: SwiGLU (three matrices) or squared ReLU (two)."""
    d_feed_forward: PositiveInt = 1024
    """Inner width of the feed-forward layer, in channels."""
    tie_embeddings: bool = False
    """Whether the output head shares the embedding's weights."""
    zero_init: bool = True
    """Whether what adds to the residual stream starts at zero (Yang et al., arXiv 2203.03466, D.2), not at random."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6
    """Added to the mean square inside RMSNorm."""

    # Optimisation
    context_length: Annotated[int, Field(ge=2)] = 256
    """Tokens per row."""
    batch_size: PositiveInt = 8
    """Rows per optimizer step, over all micro-batches."""
    micro_batch_size: Annotated[int, Field(ge=0)] = 8
    """Rows per forward and backward pass; must divide batch_size. Changes memory and rounding, nothing else. 0: what is
    fast on the device and fits its memory, chosen once, then kept by the run."""
    max_steps: PositiveInt = 800
    """Optimizer steps of the run."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for the rest. `adamw`: no Muon."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: Annotated[float, Field(gt=0.0)] = 0.01
    """Peak learning rate of Muon; a matrix taller than wide gets sqrt(rows / columns) of it."""
    muon_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Muon's decay of the mean of gradients (Nesterov)."""
    muon_weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of Muon's matrices (per step, times its learning rate)."""
    schedule: Literal["warmup_stable_decay", "cosine"] = "warmup_stable_decay"
    """Shape of the learning rate over the steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises linearly from 0 to its peak."""
    decay_fraction: Fraction = 0.6
    """Share of max_steps, at the end, over which `warmup_stable_decay` falls linearly; `cosine` does not read it."""
    final_learning_rate_fraction: Fraction = 0.0
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """AdamW's decoupled weight decay of matrices and tables (per step, times the learning rate); vectors have none."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """AdamW's decay of the mean of squared gradients."""
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of AdamW's second moment."""
    adam_state: Literal["float32", "8bit"] = "float32"
    """How AdamW keeps its two moments: 4 bytes each, or 1 (blocks of 256 with a scale; Dettmers et al., arXiv
    2110.02861, by torchao, whose step is always compiled)."""
    max_gradient_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients are scaled down to this L2 norm over all parameters when they exceed it."""
    spike_deviations: Annotated[float, Field(ge=0.0)] = 12.0
    """A step whose loss or gradient norm lies so many standard deviations (of their medians over the last 128 steps)
    above what was usual is not taken; 0: only those that are not finite are not."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 20
    """Steps of the run that may be skipped so; one more ends it, and so do six in a row."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the initial weights, the order of the data and the text samples."""

    # Run
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a CUDA device when there is one. Chosen once, then kept by the run."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of one operation; 0: all cores this process may use. Chosen once, then kept by the run."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Numbers of matrix products and activations; weights are kept in float32 beside them. `auto` takes bfloat16 where
    the machine multiplies it fast. Chosen once, then kept by the run."""
    attention_kernel: Literal["auto", "blocked", "flash", "flex", "scaled_dot_product", "tiled"] = "auto"
    """How softmax attention is computed: by torch's own choice, by matrix products over blocks of queries (`blocked`)
    or over tiles of queries and keys in constant memory (`tiled`), both on a CPU, by flash-attn (`flash`) or by torch's
    FlexAttention (`flex`), both on a GPU. `auto` takes what is faster on the device. Chosen once, then kept by the
    run."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes norms, rotary embedding, activations, convolutions of ccgqa, lightning attention and the loss:
    torch's operators, or kernels in Triton, for GPUs. `auto` takes what was faster where it was measured (README of
    hydra/kernels). Chosen once, then kept by the run."""
    compile_from_step: Annotated[int, Field(ge=0)] | None = 1
    """Finished steps after which blocks run as compiled code (the compiler is waited for); None: never."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What a block keeps for its backward pass: all it needs, its matrix products (compiled: half of it), or its input
    alone; the rest is computed again. `auto` keeps what fits the memory. Chosen once, then kept by the run."""
    optimizer_offload: Literal["auto", "no", "yes"] = "auto"
    """Whether float32 weights and optimizer state stay in the host's memory and are stepped there, for a GPU that is
    too small for them. `auto`: when nothing else fits. Chosen once, then kept by the run."""
    memory_limit_mib: Annotated[int, Field(ge=0)] = 0
    """Most memory the trainer may take, in MiB; 0: nine tenths of what host or GPU allow. What would take more is met
    by smaller micro-batches and checkpointing where those are left to choose, else refused before the first step."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: PositiveInt = 300
    """Steps between two evaluations on the whole validation text; there is one at the end as well."""
    checkpoint_every: PositiveInt = 300
    """Steps between two checkpoints; there is one at the end and when it is asked to stop as well. Where
    evaluations come at the same steps, the best one needs none of its own."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Whether the checkpoint with the lowest loss on the validation text is written and kept as well."""
    checkpoints_in_background: bool = False
    """Whether training goes on while a checkpoint is written, from a copy of weights and optimizer state that takes as
    much memory as they do."""
    when_disk_is_full: Literal["stop", "go_on"] = "stop"
    """What is done when there is no room for what a run writes: end it, or go on, with records kept in memory and
    checkpoints left out until there is room again."""
    allow_changes: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Fields in which a run that goes on may differ from how it was started, such as max_steps. Any other difference
    is refused, but for micro_batch_size, which changes rounding alone."""
    sample_tokens: Annotated[int, Field(ge=0)] = 120
    """Tokens of the text sample that is written at each evaluation; 0: no samples."""
    sample_prompt: str = "def "
    """What the text samples go on from."""
    wandb_mode: Literal["disabled", "offline", "online"] = "disabled"
    """Whether Weights & Biases gets the config and the metrics too: `online`, or `offline` into the run's folder
    `wandb/`, for `wandb sync` later. What it gets, and whether it answers, changes nothing in the run."""
    wandb_project: Annotated[str, Field(min_length=1)] = "hydra"
    """Project that the run appears in at Weights & Biases; `disabled` does not read it."""

    def __post_init__(self) -> None:
        must(
            self.micro_batch_size == 0 or self.batch_size % self.micro_batch_size == 0,
            "micro_batch_size",
            f"divide batch_size={self.batch_size}, or be 0 (chosen by memory)",
            self.micro_batch_size,
        )
        must(self.d_model % self.n_heads == 0, "n_heads", f"divide d_model={self.d_model}", self.n_heads)
        must(
            self.warmup_steps <= self.max_steps,
            "warmup_steps",
            f"be at most max_steps={self.max_steps}",
            self.warmup_steps,
        )
        unknown = sorted(set(self.allow_changes) - CHANGEABLE)
        must(
            not unknown,
            "allow_changes",
            f"name fields that may change while a run goes on ({', '.join(sorted(CHANGEABLE))}; others need a new run)",
            unknown,
        )
        try:
            code = record_plan_code(self.attention, self.attention_code, workspace_root())
            object.__setattr__(self, "attention_code", code)
            plan_layers(
                self.attention,
                d_model=self.d_model,
                n_heads=self.n_heads,
                n_layers=self.n_layers,
                options=self.attention_options,
                code=code,
            )
        except ConfigError as error:
            raise PydanticCustomError("attention", "{problem}", {"problem": f"{ATTENTION_FIELDS}: {error}"}) from None

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _refuse_plainly(cls, values: Any, build: Callable[[Any], Self]) -> Self:
        try:
            return build(values)
        except pydantic.ValidationError as error:
            names = ["preset", *(field.name for field in dataclasses.fields(cls) if field.name != "preset_name")]
            raise ConfigError(describe_problems(error, names)) from None

    @classmethod
    def preset(cls, name: str, /, **fields: object) -> Self:
        """The preset `name` with `fields` in place of its own.

        Raises:
            ConfigError: naming every unknown name, wrong type and impossible combination, with the closest known name.
        """
        if name not in PRESETS:
            raise ConfigError(
                f"preset must be one of {', '.join(PRESETS)}, but got {name!r}{closest(str(name), PRESETS)}"
            )
        problems = []
        if "preset_name" in fields:
            problems.append("preset_name: there is no such parameter; did you mean preset?")
        values: dict[str, Any] = {**PRESETS[name], **fields, "preset_name": name}
        try:
            config = cls(**values)
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return config

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, object]) -> Self:
        """The config that a notebook's parameters ask for: `preset` and any field by its own name.

        Raises:
            ConfigError: as `preset` does.
        """
        fields = dict(parameters)
        return cls.preset(str(fields.pop("preset", "debug")), **fields)

    def to_json(self) -> str:
        """Every field, as config.json holds it."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config that `to_json` wrote.

        Raises:
            ConfigError: a field is missing, unknown or invalid; a config holds every field, so that no default that
                has changed since can slip in. What was written before a field existed gets what it then meant.
        """
        try:
            stored = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"a stored config must be JSON, but is not: {error}") from None
        if not isinstance(stored, dict):
            raise ConfigError(f"a stored config must be a JSON object, but is a {type(stored).__name__}")
        if "arms" in stored:
            raise ConfigError("this is a comparison, not a training run; python -m scripts.compare DIR goes on with it")
        stored = {**ADDED_LATER, **stored}
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in stored]
        if missing:
            raise ConfigError(f"a stored config must hold every field, but lacks {', '.join(missing)}; start a new run")
        refuse_missing_records(stored["attention"], stored["attention_code"])
        return cls.from_parameters({"preset": stored.pop("preset_name"), **stored})

    def data_spec(self) -> DataSpec:
        """What `hydra.data` needs to know."""
        return DataSpec(
            corpus=self.corpus,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            validation_fraction=self.validation_fraction,
        )

    def model_spec(self, vocab_size: int | None = None) -> "ModelSpec":
        """The model; `vocab_size` is that of the tokenizer in use (left out: the config's)."""
        from hydra.model.framework.spec import ModelSpec

        return ModelSpec(
            vocab_size=self.vocab_size if vocab_size is None else vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            attention=self.attention,
            attention_options=self.attention_options,
            attention_code=self.attention_code,
            feed_forward=self.feed_forward,
            d_feed_forward=self.d_feed_forward,
            tie_embeddings=self.tie_embeddings,
            norm_eps=self.norm_eps,
            zero_init=self.zero_init,
        )

    def optimizer_spec(self) -> "OptimizerSpec":
        """The optimizers."""
        from hydra.optim.optimizers import OptimizerSpec

        return OptimizerSpec(
            kind=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            adam_betas=(self.adam_beta1, self.adam_beta2),
            adam_eps=self.adam_eps,
            adam_state=self.adam_state,
            muon_learning_rate=self.muon_learning_rate,
            muon_momentum=self.muon_momentum,
            muon_weight_decay=self.muon_weight_decay,
        )

    def asked_choices(self) -> "AskedChoices":
        """What is asked for of what a run chooses once; `auto` is resolved on the machine that begins it."""

        def choose_attention_kernel(device: str) -> tuple[str, str]:
            from hydra.attention.core import check_kernel, choose_kernel

            if self.attention_kernel == "auto":
                return choose_kernel(device, self.context_length)
            check_kernel(self.attention_kernel, device)
            return self.attention_kernel, "asked for"

        def choose_kernels(device: str) -> tuple[str, str]:
            from hydra.kernels import dispatch

            if self.kernels == "auto":
                return dispatch.choose_kernels(
                    device,
                    is_compiled=self.compile_from_step is not None,
                    has_linear_attention=any(name == "lightning" for name, _ in parse_plan(self.attention)),
                )
            dispatch.check_kernels(self.kernels, device)
            return self.kernels, "asked for"

        return {
            "device": self.device,
            "threads": self.threads,
            "dtype": self.dtype,
            "attention_kernel": self.attention_kernel,
            "choose_attention_kernel": choose_attention_kernel,
            "kernels": self.kernels,
            "choose_kernels": choose_kernels,
        }

    def may_change(self) -> frozenset[str]:
        """Fields in which a run that goes on with this config may differ from how it was started."""
        return ALWAYS_CHANGEABLE | frozenset(self.allow_changes)

    def differences(self, other: "TrainingConfig | None" = None) -> dict[str, tuple[object, object]]:
        """Fields that differ from `other` (left out: from its own preset), as (other's value, own value)."""
        theirs = asdict(other or TrainingConfig.preset(self.preset_name))
        return {name: (theirs[name], mine) for name, mine in asdict(self).items() if theirs[name] != mine}

    def is_met_by(self, n_done: int) -> bool:
        """Whether n_done optimizer steps are all that is asked for: max_steps may have been raised since."""
        return n_done >= self.max_steps

    def question(self) -> str:
        """What is asked for, in words."""
        changed = [
            f"{name} {json.dumps(value)} (preset: {json.dumps(theirs)})"
            for name, (theirs, value) in self.differences().items()
            if name != "attention_code"
        ]
        corpus = "the default corpus" if self.corpus == ("default",) else ", ".join(self.corpus)
        return (
            f"How well does a model of {self.n_layers} blocks, {self.d_model} wide, with {self.attention} attention "
            f"learn {corpus} in {self.max_steps:,} steps of {self.batch_size * self.context_length:,} tokens? "
            f"Preset {self.preset_name}, {'with ' + ', '.join(changed) if changed else 'unchanged'}; seed {self.seed}."
        )

    def papermill_arguments(self) -> list[str]:
        """The `papermill` arguments that ask for this config of a notebook that assigns nothing but `preset`."""
        arguments = [] if self.preset_name == "debug" else ["-p", "preset", self.preset_name]
        return arguments + as_papermill_arguments({name: mine for name, (_, mine) in self.differences().items()})


def as_papermill_arguments(values: Mapping[str, object]) -> list[str]:
    """The `papermill` arguments that assign `values`, but for attention_code, which is read from files again."""
    arguments: list[str] = []
    for name, value in values.items():
        if name == "attention_code":
            continue
        if isinstance(value, str):
            arguments += ["-r", name, value]
        elif isinstance(value, bool | int | float):
            arguments += ["-p", name, repr(value)]
        else:
            arguments += ["-y", json.dumps({name: value})]
    return arguments


def _size(d_model: int, n_layers: int, head_width: int, n_kv_heads: int, **fields: object) -> Mapping[str, object]:
    """A preset that is named by its number of parameters, counted with a vocabulary of 32,768.

    A decoder with grouped queries and a feed-forward layer four times as wide as the model, trained on about 20 tokens
    for each parameter (Hoffmann et al., arXiv 2203.15556, table 3). Micro-batch and checkpointing fit the machine.
    """
    return {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": d_model // head_width,
        "d_feed_forward": 4 * d_model,
        "attention": "gqa",
        "attention_options": {"n_kv_heads": n_kv_heads, "qk_norm": True},
        "vocab_size": 32768,
        "micro_batch_size": 0,
        "warmup_steps": 500,
        "eval_every": 1000,
        "checkpoint_every": 500,
        **fields,
    }


PRESETS: Mapping[str, Mapping[str, object]] = {
    # What `make report` trains: 2 CPU cores, a few minutes.
    "debug": {},
    # Seconds, for tests and for trying a notebook's wiring.
    "tiny": {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "d_feed_forward": 64,
        "tokenizer": "bytes",
        "context_length": 32,
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_steps": 20,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 10,
        "checkpoint_every": 5,
        "sample_tokens": 16,
        "dtype": "float32",
        "compile_from_step": None,
    },
    # What attentions are compared with: seconds for each of many runs on 2 CPU cores.
    "small": {
        "d_model": 128,
        "n_layers": 4,
        "n_heads": 4,
        "d_feed_forward": 512,
        "vocab_size": 1024,
        "validation_fraction": 0.005,
        "context_length": 128,
        "batch_size": 8,
        "micro_batch_size": 8,
        "max_steps": 120,
        "learning_rate": 9e-3,
        "muon_learning_rate": 0.03,
        "warmup_steps": 10,
        "eval_every": 10_000,
        "checkpoint_every": 10_000,
        "sample_tokens": 0,
        "compile_from_step": None,
    },
    # By number of parameters.
    "50M": _size(
        512, 12, 64, 2, tie_embeddings=True, context_length=1024, batch_size=64, max_steps=15_000, learning_rate=2e-3
    ),
    "100M": _size(
        768, 12, 64, 3, tie_embeddings=True, context_length=1024, batch_size=128, max_steps=15_000, learning_rate=1.5e-3
    ),
    "250M": _size(1024, 16, 64, 4, context_length=1024, batch_size=256, max_steps=19_000, learning_rate=1e-3),
    "500M": _size(1280, 24, 64, 5, context_length=2048, batch_size=128, max_steps=38_000, learning_rate=8e-4),
    "750M": _size(1536, 26, 128, 3, context_length=2048, batch_size=192, max_steps=38_000, learning_rate=6e-4),
    "1B": _size(2048, 20, 128, 4, context_length=2048, batch_size=256, max_steps=38_000, learning_rate=5e-4),
    "1.5B": _size(2304, 24, 128, 6, context_length=2048, batch_size=256, max_steps=57_000, learning_rate=4e-4),
}


# Fields that came later, with the values under which a run of before computes as it did.
ADDED_LATER: Mapping[str, object] = {
    "attention_code": {},
    "zero_init": False,
    "optimizer": "adamw",
    "adam_state": "float32",
    "muon_learning_rate": 0.02,
    "muon_momentum": 0.95,
    "muon_weight_decay": 0.0,
    "dtype": "float32",
    "attention_kernel": "scaled_dot_product",
    "kernels": "torch",
    "compile_from_step": None,
    "activation_checkpointing": "none",
    "optimizer_offload": "no",
    "memory_limit_mib": 0,
    "spike_deviations": 0.0,
    "max_skipped_steps": 0,
    "keep_best": False,
    "checkpoints_in_background": False,
    "when_disk_is_full": "stop",
    "allow_changes": (),
    "wandb_mode": "disabled",
    "wandb_project": "hydra",
}

# What a run may change while it goes on, when allow_changes names it: nothing that its weights, their optimizer's
# state or its data are made by. What it chose in its first session stays, but for what CHANGE_MEMORY plans anew.
CHANGEABLE = frozenset(
    {
        "max_steps",
        "batch_size",
        "context_length",
        "learning_rate",
        "muon_learning_rate",
        "muon_momentum",
        "muon_weight_decay",
        "schedule",
        "warmup_steps",
        "decay_fraction",
        "final_learning_rate_fraction",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "max_gradient_norm",
        "spike_deviations",
        "max_skipped_steps",
        "memory_limit_mib",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best",
        "checkpoints_in_background",
        "when_disk_is_full",
        "sample_tokens",
        "sample_prompt",
    }
)
# Differences that need no leave: the first changes rounding alone, the others nothing.
ALWAYS_CHANGEABLE = frozenset({"micro_batch_size", "allow_changes", "wandb_mode", "wandb_project"})
# What may change and changes the memory that a step takes.
CHANGE_MEMORY = ("micro_batch_size", "batch_size", "context_length", "checkpoints_in_background")

# What an engine leaves in a run directory before the trainer has begun.
NOT_YET_A_RUN = (r".*\.ipynb", r"report\.html", r"\..*", CODE)
# What only a run or a comparison leaves.
LEFT_BY_RUNS = frozenset({paths.CHECKPOINTS, paths.STATE, paths.METRICS, paths.RESULTS})


class JobConfig(Protocol):
    """What a folder under runs/ is made from: a TrainingConfig or a ComparisonConfig."""

    module: ClassVar[str]
    """What `python -m` starts on the folder."""

    @property
    def attention_code(self) -> Mapping[str, Mapping[str, Any]]:
        """What is known of code that the folder is to hold."""

    def to_json(self) -> str:
        """Every field."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config that `to_json` wrote."""

    def differences(self, other: Any = None) -> dict[str, tuple[object, object]]:
        """Fields that differ from `other`."""

    def may_change(self) -> frozenset[str]:
        """Fields in which what is made already may differ."""

    def is_met_by(self, n_done: int) -> bool:
        """Whether a folder that is done, with so many steps or runs, has nothing left to do."""


def refuse_changed_config(config: JobConfig, run_dir: Path) -> None:
    """Return if `run_dir` is new or holds this very config.

    Raises:
        RunError: it holds another, or steps beyond those that are asked for, or is a file or a folder of something
            else; the message says what to do.
    """
    path = run_dir / CONFIG
    if run_dir.exists() and not run_dir.is_dir():
        raise RunError(f"run_dir must be a folder, but {run_dir} is a file; give another run_dir")
    if path.is_file():
        is_comparison = "arms" in paths.read_json(path)
        if is_comparison != (config.module == "scripts.compare"):
            kind = "a comparison" if is_comparison else "a training run"
            raise RunError(
                f"run_dir must be a new folder or hold what is asked for, but {run_dir} is {kind}; give another "
                f"run_dir, such as {shown(next_free(run_dir))}"
            )
        try:
            stored = type(config).from_json(path.read_text())
        except ConfigError as error:
            raise RunError(f"{path}: {error}") from None
        refuse_difference(config, stored, run_dir)
        n_done = read_status(run_dir).step
        if isinstance(config, TrainingConfig) and config.max_steps < n_done:
            raise RunError(
                f"max_steps must be at least {n_done}, the steps that {shown(run_dir)} has taken, but got "
                f"{config.max_steps}; for a shorter run give another run_dir"
            )
    elif run_dir.exists():
        foreign = [
            entry.name
            for entry in run_dir.iterdir()
            if not any(re.fullmatch(pattern, entry.name) for pattern in NOT_YET_A_RUN)
        ]
        if of_a_run := LEFT_BY_RUNS.intersection(foreign):
            raise RunError(
                f"{CONFIG} must be in the folder of a run, but it is missing from {run_dir}, which looks like one (it "
                f"holds {min(of_a_run)}); put back a copy of it, or give another run_dir, "
                f"such as {shown(next_free(run_dir))}"
            )
        if foreign:
            raise RunError(
                f"a new run needs a folder of its own, but {run_dir} is no run and holds {sorted(foreign)[0]}; "
                f"give another run_dir, such as {shown(next_free(run_dir))}"
            )


def refuse_difference(config: JobConfig, stored: JobConfig, run_dir: Path) -> None:
    """Return if the two are the same, but for what the config allows to change.

    Raises:
        RunError: naming the differences, and a name for a new run.
    """
    may_change = config.may_change()
    differences = {name: both for name, both in config.differences(stored).items() if name not in may_change}
    if not differences:
        return
    lines = describe_changed_code(config, stored, Path(shown(run_dir)))
    lines += [
        f"{name}: {theirs!r} there, {mine!r} asked for"
        for name, (theirs, mine) in differences.items()
        if name != "attention_code"
    ]
    listed = "\n".join(f"  {line}" for line in lines)
    new_name = shown(next_free(run_dir))
    allowable = sorted(CHANGEABLE & differences.keys()) if isinstance(config, TrainingConfig) else []
    leave = f" To change {', '.join(allowable)} of this run, name it in allow_changes." if allowable else ""
    raise RunError(
        f"{run_dir} must hold the config that is asked for, but it was started with another:\n{listed}\n"
        f"For a run of its own give another run_dir, such as {new_name} (papermill: -r run_dir "
        f"{shlex.quote(new_name)}).{leave}"
    )


def describe_changed_code(config: JobConfig, stored: JobConfig, run_dir: Path) -> list[str]:
    """In words: the files of attention classes that both name, and that have changed since."""
    before, now = stored.attention_code, config.attention_code
    return [
        f"{path} has changed since the run began; its copy in {run_dir / CODE} is what the run goes on with: "
        f"python -m {config.module} {shlex.quote(str(run_dir))}"
        for path in before
        if path in now and before[path]["sha256"] != now[path]["sha256"]
    ]


def must(holds: bool, field: str, what: str, got: object) -> None:
    """Refuse a combination of fields, inside of a check of pydantic's."""
    if not holds:
        raise PydanticCustomError(
            "combination", "{problem}", {"problem": f"{field} must {what}, but got {field}={got!r}"}
        )


def closest(name: str, known: "list[str] | Mapping[str, object]") -> str:
    """The end of a message that names the known name closest to a wrong one; empty when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def describe_unknown(name: str, value: object, names: list[str]) -> str:
    """One line for a parameter that there is not: what was meant by it, or where all are listed."""
    backends = [backend for backend in available_backends() if name in load_spec_class(backend).option_names()]
    if backends:
        as_given = f"-y '{{attention_options: {{{name}: {value}}}}}'"
        in_brackets = f"in the brackets of an arm, as {backends[0]}({name}={value})"
        return (
            f"{name}: there is no such parameter; it is an option of attention {' and '.join(backends)}: write "
            f"{in_brackets if 'arms' in names else as_given}"
        )
    meant = CALLED_ELSEWHERE.get(name.lower())
    hint = f"; did you mean {meant}?" if meant in names else closest(name, names)
    return f"{name}: there is no such parameter{hint or '; scripts/config.py lists all, also for notebooks'}"


def describe_problems(error: pydantic.ValidationError, names: list[str]) -> str:
    """A line for each of pydantic's findings; `names` are the known ones."""
    problems = error.errors()
    with_bad_items = {problem["loc"][0] for problem in problems if len(problem["loc"]) > 1}
    # Of a list with a bad item it also says how few items were good, which is not what was given.
    told = [
        problem
        for problem in problems
        if not (problem["type"] == "too_short" and len(problem["loc"]) == 1 and problem["loc"][0] in with_bad_items)
    ]
    return "\n".join(_describe_problem(problem, names) for problem in told)


def _describe_problem(problem: ErrorDetails, names: list[str]) -> str:
    """The field, what must hold, what was got."""
    if not problem["loc"]:
        return problem["msg"]
    field = str(problem["loc"][0])
    must, got = problem["msg"], problem["input"]
    if problem["type"] == "unexpected_keyword_argument":
        if field == "preset":
            return "preset: a preset is taken by TrainingConfig.preset(name, **fields)"
        return describe_unknown(field, got, names)
    if problem["type"] == "tuple_type":
        must = "input should be a list"
    must = must.replace("Tuple should", "list should").replace(" after validation", "")
    return f"{field}: {must[0].lower()}{must[1:]}, but got {got!r} ({type(got).__name__})"
