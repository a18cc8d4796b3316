"""The configuration: one frozen dataclass per concern, the bounds of a field beside it. The defaults are the paper's,
or docs/defaults.md says why not.

Precedence: these defaults < a YAML file < `--optim.lr 0.02` on the command line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dist_train import choices
from dist_train.data_config import DataConfig
from pipelines.bounds import above, broken, folder_name, folder_path, least, within
from pipelines.errors import UserError
from pipelines.remote.places import is_url

Options = dict[str, bool | int | float | str | list[bool | int | float | str] | None]
# Not Any: for a mapping with a class_path, jsonargparse would import and call what it names.


class ConfigError(UserError):
    """Invalid configuration; the message names the key and the remedy."""


@dataclass(frozen=True)
class ModelConfig:
    """The net."""

    name: str = "alexnet"
    """alexnet (the paper's: two towers, as groups), alexnet_two_tower (the same function as two explicit towers),
    alexnet_one_tower (no groups), four_layers (for figure 1), blog and blog_two_tower (docs/blog.md),
    torchvision:<name>, or module:name, called as (classes, crop, **options). Every field below except options, outputs
    and init_from is only for alexnet models."""
    options: Options = field(default_factory=dict)
    """Arguments of any other net: --model.options.KEY value."""
    hidden: int = least(1, 4096)
    """Units per hidden dense layer, both towers together."""
    dropout: float = within(0, 1, 0.5)
    """Probability that an output of the first two dense layers is set to zero (section 4.2); 0: none."""
    dropout_scaling: Literal["test", "training"] = "test"
    """Multiply these outputs by 1 - dropout at test time, as in the paper, or divide them by it in training, as is
    usual today."""
    outputs: int = least(0, 0)
    """Units of the last layer; 0 means one per class. Extra units are never a label."""
    width: float = above(0, 1.0)
    """Kernels per convolution, as a multiple of the paper's 96-256-384-384-256."""
    activation: Literal["relu", "tanh"] = "relu"
    """Nonlinearity (section 3.1)."""
    pooling: Literal["overlapping", "plain"] = "overlapping"
    """Pooling windows of 3 pixels at stride 2, or of 2 pixels (section 3.4)."""
    lrn: Literal["paper", "every", "none"] = "paper"
    """Response normalisation after conv 1 and 2 (section 3.3), after every convolution, or nowhere."""
    lrn_alpha: float = least(0, 1e-4)
    """Of response normalisation. torch.nn.LocalResponseNorm(5, alpha=1e-4) divides it by 5, which is 2e-5 here."""
    left_out: Literal["none", "conv3", "conv4", "conv5"] = "none"
    """Middle convolution to leave out (sections 1 and 7)."""
    biases: Literal["paper", "ones", "zeros"] = "paper"
    """Initial biases: 1 in conv 2, 4, 5 and the hidden dense layers, else 0 (section 5); or 1, or 0, everywhere."""
    init_from: str = ""
    """Run, or one of its checkpoints, whose weights initialise a new run if name and shape agree. A last layer for
    other classes is initialised afresh."""


@dataclass(frozen=True)
class OptimConfig:
    """Section 5: stochastic gradient descent with momentum 0.9 and weight decay 0.0005."""

    name: str = "sgd"
    """sgd, adam, or module:name, called as (parameters, lr, **options): torch.optim:AdamW."""
    lr: float = above(0, 0.01)
    options: Options = field(default_factory=dict)
    """Other arguments of the optimizer: --optim.options.KEY value."""
    momentum: float = least(0, 0.9)
    """For sgd, and any other optimizer with an argument of that name."""
    weight_decay: float = least(0, 0.0005)
    """L2 penalty of every parameter: added to its gradient, and so scaled by lr. For an optimizer with an argument of
    that name."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Section 5: "divide the learning rate by 10 when the validation error rate stopped improving with the current
    learning rate"; "reduced three times prior to termination"."""

    name: str = "plateau"
    """plateau, milestones, cosine (to 0 at the last epoch), blog (docs/blog.md), or module:name, called as
    (**options)."""
    options: Options = field(default_factory=dict)
    """Arguments of a schedule of one's own: --schedule.options.KEY value."""
    factor: float = above(1, 10.0, "the learning rate is divided by it, so above 1")
    """Divisor of the learning rate."""
    patience: int = least(1, 5)
    """Epochs without improvement before a division (plateau)."""
    patience_steps: int = least(0, 0)
    """Least number of steps in that patience (plateau): on a small set, five epochs may be a few dozen steps."""
    min_improvement: float = least(0, 0.001)
    """Smallest fall of the top-1 validation error, as a fraction of 1, that is an improvement (plateau)."""
    max_divisions: int = least(0, 3)
    """Maximum number of divisions (plateau)."""
    stop_early: bool = False
    """Stop when the error stops improving after the last division (plateau)."""
    milestones: tuple[int, ...] = ()
    """Numbers of epochs after which the learning rate is divided (milestones)."""
    warmup_epochs: float = least(0, 0.0)
    """Epochs over which the learning rate rises linearly to optim.lr. The plateau does not count them."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = least(1, 90)
    """ "roughly 90 cycles through the training set" (section 5)."""
    global_batch: int = least(1, 128)
    """Samples per update, over all ranks."""
    accumulate: int = least(1, 1)
    """Pieces into which each rank splits its share of a batch, to save memory (gradient accumulation)."""
    until_error: float = least(0, 0.0)
    """Stop early when the training error, a running mean of top-1 over some 50 steps, falls below this; 0: never."""
    max_steps: int = least(0, 0)
    """Stop early after this many steps; 0: no limit."""
    tower_parallel: bool = False
    """Put the two towers of alexnet_two_tower on two ranks, as the paper did, with data parallelism over the pairs."""
    seed: int = within(0, 1 << 64, 0)
    """Seed of weights, order, augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; auto: bf16 on a GPU that has it, else fp16 (off with tower_parallel), and off on the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on a GPU if a compiler works, and not with tower_parallel. On the CPU it gains nothing."""
    deterministic: bool = True
    """Make a resumed run bit-identical to one that never stopped. Costs speed on a GPU, and with torchvision's nets."""
    ddp: Literal["auto", "always"] = "auto"
    """Wrap the net in DistributedDataParallel; auto: if several ranks share a batch; always: for a single rank too, so
    that one GPU exercises what several use."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, besides at the end of every epoch."""

    minutes: float = least(0, 10.0)
    """Minutes between two saves; 0: none by time."""
    steps: int = least(0, 0)
    """Steps between two saves; 0: none by steps."""
    keep: int = least(2, 2, "keep at least 2, so that a damaged one costs little")
    """Newest checkpoints to keep, besides the best."""


@dataclass(frozen=True)
class MonitorConfig:
    """Records and display."""

    log_every: int = least(1, 20)
    """Steps between two records in metrics.jsonl."""
    probes: tuple[int, ...] = ()
    """Steps before which activations, gradients and curvature are measured layer by layer (dist_train/probe.py)."""
    wandb: Literal["disabled", "offline", "online"] | None = None
    """null: WANDB_MODE; if unset, online if WANDB_PROJECT, WANDB_ENTITY or WANDB_DIR is set, else disabled."""
    wandb_project: str | None = None
    """null: WANDB_PROJECT, else dist_train."""
    wandb_entity: str | None = None
    """null: WANDB_ENTITY, else the user's own."""
    wandb_tags: tuple[str, ...] = ()
    """Tags, besides those in WANDB_TAGS."""
    wandb_notes: str | None = None
    """null: WANDB_NOTES."""
    wandb_checkpoint: bool = False
    """Log the best checkpoint as an artifact when the run is done."""
    tensorboard: bool = False
    """Write event files for TensorBoard to <run>/tensorboard; needs the extra `tensorboard`."""
    page: bool = True
    """Rewrite <run>/report.html every minute and at the end: see `python -m dist_train report`."""


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps for a viewer, and where their time went (docs/performance.md#profile)."""

    steps: int = within(0, 100, 0, closed=True)
    """Consecutive steps to record, in each start of the run; 0: none."""
    at: int = least(0, 0)
    """First of them, from 1. If this start has passed it, or for 0: 20 steps after those that it resumes from."""


@dataclass(frozen=True)
class RunConfig:
    """Name, directory and timeouts of the run."""

    name: str = folder_name("")
    """An existing run of this name is continued. Default: name of the configuration, date, time and four digits."""
    root: str = "runs"
    dir: str = folder_path("")
    """Run directory, in place of root/name."""
    start_timeout: float = above(0, 1800.0)
    """Seconds without a sign of life, before the first step, after which a process ends itself."""
    step_timeout: float = above(0, 300.0)
    """The same after the first step."""
    stop_timeout: float = above(0, 120.0)
    """Seconds that a stop may take, including its save."""

    def path(self, name: str) -> Path:
        """The run directory. `name` is the run's if the settings give none."""
        return Path(self.dir or Path(self.root) / (self.name or name))


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Raises ConfigError for impossible values."""
        for group in fields(self):
            if found := broken(getattr(self, group.name)):
                raise ConfigError(f"{group.name}.{' '.join(found)}")
        try:
            choices.check(self.model.name, self.optim.name, self.schedule.name)
        except UserError as error:
            raise ConfigError(str(error)) from error
        chosen = {"model": self.model.options, "optim": self.optim.options, "schedule": self.schedule.options}
        for name, value in ((f"{of}.options.{key}", value) for of in chosen for key, value in chosen[of].items()):
            if any(str(word).lstrip().startswith("{") for word in (value if isinstance(value, list) else [value])):
                raise ConfigError(f"{name} is {value}: it takes a number, a word, or a list of these")
        for key in ("train", "val"):
            if is_url(place := getattr(self.data, key)) and not self.data.cache:
                raise ConfigError(f"data.{key} is {place}, which is read through a cache: name a folder by data.cache")
        for key, default in idle_fields(self.model.name).items():
            if (value := getattr(self.model, key)) != default:
                raise ConfigError(
                    f"model.{key} is {value}, but {self.model.name} does not have it: leave it out"
                    + ("" if key == "options" else ", or choose one of the alexnet models")
                )
        if self.train.tower_parallel and self.model.name != "alexnet_two_tower":
            raise ConfigError(
                f"train.tower_parallel needs two towers, and model.name is {self.model.name}: make it alexnet_two_tower"
            )
        if self.train.tower_parallel and self.train.precision == "fp16":
            raise ConfigError(
                "train.precision is fp16, whose scale would follow the overflows of one tower alone with "
                "train.tower_parallel: set it to bf16 or off"
            )
        if self.train.tower_parallel and self.train.compile == "on":
            raise ConfigError(
                "train.compile is on, but train.tower_parallel exchanges activations in the middle of the net, which "
                "is not compiled: set it to auto or off"
            )
        if self.train.deterministic and self.data.hw_decoder_load != DataConfig.hw_decoder_load:
            raise ConfigError(
                f"data.hw_decoder_load is {self.data.hw_decoder_load}, but train.deterministic fixes it at 1: leave it "
                f"out, or set train.deterministic to false"
            )
        if self.data.crop > self.data.resize:
            raise ConfigError(
                f"data.crop {self.data.crop} is larger than data.resize {self.data.resize}, the shorter side that "
                f"it is cut from: raise data.resize"
            )


def idle_fields(name: str) -> dict[str, Any]:
    """Fields of ModelConfig that do not apply to a net of this name, with their defaults."""
    defaults = asdict(ModelConfig())
    if name in choices.PAPER_NETS:
        return {"options": defaults["options"]}
    return {k: v for k, v in defaults.items() if k not in ("name", "options", "outputs", "init_from")}
