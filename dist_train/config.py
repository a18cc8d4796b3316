"""The configuration: one frozen dataclass per concern, the bounds of a field beside it. The defaults are the paper's.

Precedence: these defaults < a YAML file < `--optim.lr 0.02` on the command line.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipelines.augment import Augment, Inputs
from pipelines.bounds import above, broken, least, within
from pipelines.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT = CONFIGS / "quickstart.yaml"
TORCHVISION = "torchvision:"  # before the name of a model of torchvision


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key and the remedy."""


@dataclass(frozen=True)
class DataConfig(Augment):
    """Source of the images, and their way to the inputs of the net."""

    train: str = "data/imagenet/train"
    """Shard set to train on."""
    val: str = "data/imagenet/val"
    """Shard set for the validation error."""
    source: str = ""
    """Name of a torchvision data set that is packed first if the shard sets do not exist."""
    inputs: Inputs = "mean_subtracted"
    """Scale of the inputs. The paper only subtracts the mean (section 2), and its weights N(0, 0.01) need inputs of
    that size; [-1, 1] is common in re-implementations; standardized also divides by the standard deviation."""
    shuffle_shards: int = least(1, 16)
    """Samples are shuffled inside blocks of this many shards."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device on which DALI decodes; auto: the model's."""
    threads: int = least(0, 0)
    """DALI's decoding threads per rank; 0: the CPUs of the process divided by the ranks of the node."""
    hw_decoder_load: float = within(0, 1, 0.65, closed=True)
    """On a GPU, the part of a batch that its JPEG decoder takes (0.65 is DALI's default); the rest is CUDA's, which
    rounds otherwise. train.deterministic makes it 1, so that an image has the same decoder in any batch."""
    readers: int = least(1, 32)
    """Threads per rank that read files ahead."""
    ahead: int = least(1, 4)
    """Batches that are read ahead."""
    max_bad: int = least(0, 100)
    """Samples that cannot be decoded and are replaced before the run stops."""


@dataclass(frozen=True)
class ModelConfig:
    """The net."""

    name: str = "alexnet"
    """alexnet (the paper's: two towers, as groups), alexnet_two_tower (the same function as two explicit towers),
    alexnet_one_tower (no groups), or torchvision:<name>. Every field below except outputs and init_from applies only to
    the alexnet models."""
    hidden: int = least(1, 4096)
    """Units of each hidden dense layer, over both towers."""
    dropout: float = within(0, 1, 0.5)
    """Probability that an output of the first two dense layers is set to zero (section 4.2); 0: none."""
    dropout_scaling: Literal["test", "training"] = "test"
    """Multiply these outputs by 1 - dropout at test time, as the paper, or divide them by it in training, as is usual
    now."""
    outputs: int = least(0, 0)
    """Units of the last layer; 0 means one per class. Extra units are never a label."""
    width: float = above(0, 1.0)
    """Kernels of each convolution, as a multiple of the paper's 96-256-384-384-256."""
    activation: Literal["relu", "tanh"] = "relu"
    """Section 3.1."""
    pooling: Literal["overlapping", "plain"] = "overlapping"
    """Windows of 3 every 2 pixels, or of 2 (section 3.4)."""
    lrn: Literal["paper", "every", "none"] = "paper"
    """Response normalisation after conv 1 and 2 (section 3.3), after every convolution, or nowhere."""
    lrn_alpha: float = least(0, 1e-4)
    """Of response normalisation; torch.nn.LocalResponseNorm(5, alpha=1e-4) divides by its size and so means 2e-5."""
    left_out: Literal["none", "conv3", "conv4", "conv5"] = "none"
    """A middle convolution to do without (sections 1 and 7)."""
    biases: Literal["paper", "ones"] = "paper"
    """Initial biases: 1 in conv 2, 4, 5 and the hidden dense layers, else 0 (section 5); or 1 everywhere."""
    init_from: str = ""
    """A run, or one of its checkpoints, whose weights a new run begins with if name and shape agree. A last layer for
    other classes begins anew."""


@dataclass(frozen=True)
class OptimConfig:
    """Section 5: stochastic gradient descent with momentum 0.9 and weight decay 0.0005."""

    name: Literal["sgd", "adam"] = "sgd"
    lr: float = above(0, 0.01)
    momentum: float = least(0, 0.9)
    """For sgd."""
    weight_decay: float = least(0, 0.0005)
    """Added to the gradient, lr-scaled, for every parameter."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Section 5: "divide the learning rate by 10 when the validation error rate stopped improving with the current
    learning rate"; "reduced three times prior to termination"."""

    name: Literal["plateau", "milestones"] = "plateau"
    factor: float = above(1, 10.0, "the learning rate is divided by it, so above 1")
    """Divisor of the learning rate."""
    patience: int = least(1, 5)
    """Epochs without improvement before a division (plateau)."""
    min_improvement: float = least(0, 0.001)
    """Least fall of the top-1 validation error, as a fraction of 1, that counts (plateau)."""
    max_divisions: int = least(0, 3)
    """Divisions at most (plateau)."""
    stop_early: bool = False
    """Stop when the error stops improving after the last division (plateau)."""
    milestones: tuple[int, ...] = ()
    """Epochs before which the learning rate is divided (milestones)."""
    warmup_epochs: float = least(0, 0.0)
    """Epochs over which the learning rate rises linearly to its value. They do not count for the plateau."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    epochs: int = least(1, 90)
    """ "roughly 90 cycles through the training set" (section 5)."""
    global_batch: int = least(1, 128)
    """Samples per update, over all ranks."""
    accumulate: int = least(1, 1)
    """Pieces into which each rank cuts its share of a batch, to save memory."""
    until_error: float = least(0, 0.0)
    """Stop early when the training error, a running mean of top-1 over some 50 steps, falls below this; 0: never."""
    max_steps: int = least(0, 0)
    """Stop early after this many steps; 0: not."""
    tower_parallel: bool = False
    """Put the two towers of alexnet_two_tower on two ranks, as the paper did, with data parallelism over the pairs."""
    seed: int = within(0, 1 << 64, 0)
    """Of weights, order, augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; auto: bf16 on a GPU that has it, else fp16 (off with tower_parallel), and off on the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on a GPU if a compiler works, and not with tower_parallel. On the CPU it gains nothing."""
    deterministic: bool = True
    """Resuming gives the same bits as never having stopped. It costs speed on a GPU, and with torchvision's nets."""
    ddp: Literal["auto", "always"] = "auto"
    """DistributedDataParallel around the net; auto: if batches are shared among ranks; always: also for one rank, so
    that one GPU can try all that several use."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, besides at the end of each epoch."""

    minutes: float = least(0, 10.0)
    """0: not by time."""
    steps: int = least(0, 0)
    """0: not by steps."""
    keep: int = least(2, 2, "keep at least 2, so that a damaged one costs little")
    """Newest checkpoints that are kept, besides the best."""


@dataclass(frozen=True)
class MonitorConfig:
    """Records and display."""

    log_every: int = least(1, 20)
    """Steps between two records in metrics.jsonl."""
    probes: tuple[int, ...] = ()
    """Steps before which activations, gradients and curvature are measured layer by layer (dist_train/probe.py)."""
    wandb: Literal["disabled", "offline", "online"] | None = None
    """null: WANDB_MODE; without that online if WANDB_PROJECT, WANDB_ENTITY or WANDB_DIR is set, else disabled."""
    wandb_project: str | None = None
    """null: WANDB_PROJECT, else dist_train."""
    wandb_entity: str | None = None
    """null: WANDB_ENTITY, else the user's own."""
    wandb_tags: tuple[str, ...] = ()
    """Besides those of WANDB_TAGS."""
    wandb_notes: str | None = None
    """null: WANDB_NOTES."""
    wandb_checkpoint: bool = False
    """Keep the best checkpoint as an artifact, when the run is done."""
    tensorboard: bool = False
    """Write what TensorBoard shows into <run>/tensorboard; needs the extra `tensorboard`."""


@dataclass(frozen=True)
class RunConfig:
    """Name and place of the run, and how long it may be silent."""

    name: str = ""
    """Default: the name of the configuration, date, time and four digits. A run of this name is continued."""
    root: str = "runs"
    dir: str = ""
    """In place of root/name."""
    start_timeout: float = above(0, 1800.0)
    """Seconds without a sign of life, until the first step, after which a process ends itself."""
    step_timeout: float = above(0, 300.0)
    """The same, afterwards."""
    stop_timeout: float = above(0, 120.0)
    """Seconds that a stop, with its save, may take."""

    def path(self, name: str) -> Path:
        """The run directory; `name`: of the run, if the settings give none."""
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
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Refuse impossible values. Raises ConfigError."""
        for group in fields(self):
            if found := broken(getattr(self, group.name)):
                name, message = found
                raise ConfigError(f"{group.name}.{name} {message}")
        for key, default in idle_fields(self.model.name).items():
            if (value := getattr(self.model, key)) != default:
                raise ConfigError(
                    f"model.{key} is {value}, but {self.model.name} does not have it: leave it out, or choose one of "
                    f"the alexnet models"
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
                "train.compile is on, but train.tower_parallel exchanges activations in the midst of the net, which "
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
    """The fields of ModelConfig that mean nothing to a net of this name, with their defaults."""
    if not name.startswith(TORCHVISION):
        return {}
    return {k: v for k, v in asdict(ModelConfig()).items() if k not in ("name", "outputs", "init_from")}


# Options of the trainer without a dot: a file, and each group as a mapping.
UNDOTTED = ("--config", "--print_config", *(f"--{f.name}" for f in fields(Config)))


def dump(config: Config) -> str:
    """YAML that the command line reads back with `--config`."""
    # Names of files as they are where the locale has all characters: YAML knows no surrogates.
    text = json.dumps(asdict(config), ensure_ascii=False).encode(errors="surrogateescape").decode(errors="replace")
    return str(yaml.safe_dump(json.loads(text), sort_keys=False))


def as_dict(config: Any) -> dict[str, Any]:
    """The settings as one flat {dotted key: value}."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            flat |= {f"{f.name}.{key}": inner for key, inner in as_dict(value).items()}
        else:
            flat[f.name] = value
    return flat
