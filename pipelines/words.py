"""Words that are not ours: misspelt ones, and those of other programs with what is typed here in their place.

An option that has a counterpart here is answered and never accepted in silence: there is one way to do a thing.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

NEAR = 0.75  # least similarity of a misspelt word, as difflib counts it
BEGINNING = 4  # least letters of a word that is the beginning of ours
YAML = (".yaml", ".yml")
TRAINER = "python -m dist_train"
RANKS = ("dist_train", "evaluate", "speed")  # commands whose work the ranks of torchrun share

# Ours, of which the first that a command has is named; the words of others; what is to be known of ours with a dot.
OPTIONS = (
    ("--config", "cfg c config-file yaml hparams", ""),
    (
        "--batch --train.global_batch",
        "batch batch-size batchsize bs b train-batch-size per-device-train-batch-size samples-per-gpu mini-batch-size",
        "samples per update, over all ranks",
    ),
    (
        "--train.accumulate",
        "accum-iter grad-accum grad-accum-steps gradient-accumulation-steps accumulate-grad-batches update-freq",
        "",
    ),
    ("--train.epochs", "epoch num-epochs max-epochs n-epochs nepochs num-train-epochs", ""),
    (
        "--steps --train.max_steps",
        "steps max-iter max-iters iterations iters num-steps total-steps max-train-steps",
        "0: as many as the epochs have",
    ),
    ("--seed --train.seed", "manual-seed random-seed rng-seed", ""),
    ("--device --train.device", "device accelerator use-cuda cuda no-cuda cpu", "auto, cpu or cuda"),
    ("--train.precision", "amp use-amp mixed-precision fp16 bf16 half float16 bfloat16", "auto, off, bf16 or fp16"),
    ("--train.compile", "torch-compile compile-model", "auto, on or off"),
    ("--optim.name", "optimizer opt optimiser", "sgd, adam, or torch.optim:AdamW and its like"),
    ("--optim.lr", "learning-rate base-lr init-lr initial-lr blr", ""),
    ("--optim.weight_decay", "wd weight-decay l2", ""),
    ("--schedule.name", "lr-scheduler scheduler sched lr-policy lr-schedule", "plateau, milestones or cosine"),
    ("--schedule.factor", "gamma lr-gamma lr-decay decay-rate", "a divisor: 10 divides the learning rate by 10"),
    (
        "--schedule.milestones",
        "lr-step-size step-size lr-steps decay-epochs lr-milestones",
        "such as 30,60, with --schedule.name milestones",
    ),
    ("--schedule.warmup_epochs", "warmup warm-up lr-warmup-epochs", ""),
    ("--schedule.stop_early", "early-stopping early-stop", ""),
    ("--schedule.patience", "patience-epochs lr-patience", ""),
    ("--model.name", "arch a backbone net architecture model-name", "torchvision:resnet18 is one of torchvision's"),
    ("--model.init_from", "pretrained finetune fine-tune init-weights weights", "a run of this program"),
    ("--model.dropout", "drop dropout-rate drop-rate", ""),
    (
        "--data --split --data.train",
        "data data-dir data-path data-root dataset dataset-dir train-data train-dir traindir train-path",
        "a shard set; --data.val: the validation set",
    ),
    ("--split --data.val", "val-data val-dir valdir val-path validation-data test-data test-dir", "a shard set"),
    (
        "--shorter-side --crop --data.crop",
        "image-size img-size imgsz crop-size input-size resolution size train-crop-size",
        "side of the input, cut from images of --data.resize",
    ),
    ("--shorter-side --resize --data.resize", "resize-size val-resize-size scale", ""),
    (
        "--workers --data.threads --jobs",
        "workers num-workers j dataloader-workers num-threads n-workers processes",
        "DALI's decoding threads per rank; --data.readers: threads that read files",
    ),
    ("--data.ahead", "prefetch prefetch-factor", ""),
    ("--checkpoint.steps", "save-freq save-interval save-every save-steps checkpoint-interval", "besides every epoch"),
    ("--checkpoint.keep", "keep-last save-total-limit", ""),
    (
        "--monitor.log_every",
        "print-freq log-interval log-freq log-steps logging-steps log-every-n-steps",
        "steps between two records",
    ),
    ("--monitor.wandb", "use-wandb report-to", "online, offline or disabled"),
    ("--monitor.wandb_project", "project project-name", ""),
    ("--run.name", "name run-name exp experiment exp-name experiment-name job-name n", ""),
    (
        "--out --json --run.dir",
        "output-dir output outdir out-dir out o save-dir log-dir logdir default-root-dir work-dir save-path",
        "the directory of the run",
    ),
    ("--checkpoint", "weights ckpt ckpt-path checkpoint-path", ""),
    ("--crops", "tta ten-crop num-crops", ""),
    ("--images --rows", "num-images n-images samples", ""),
    ("--neighbours", "neighbors k num-neighbours", ""),
    ("--gpus-per-node", "gpus gpu num-gpus ngpus gres ntasks-per-node nproc-per-node", ""),
    ("--nodes", "num-nodes nnodes", ""),
    ("--cpus-per-gpu", "cpus-per-task", ""),
    ("--time", "walltime time-limit t", ""),
    ("--quality", "jpeg-quality", ""),
    ("--shard-mb", "shard-size maxsize", ""),
)
# Options of the trainer that have no counterpart, and what is done in their place.
INSTEAD = (
    (
        "resume resume-from resume-from-checkpoint resume-path ckpt ckpt-path checkpoint checkpoint-path load continue "
        "restore auto-resume",
        "a run resumes by itself from its newest checkpoint, if it is named by --run.name; --model.init_from begins a "
        "new run with the weights of another",
    ),
    (
        "num-nodes nodes nnodes node-rank world-size rank local-rank master-addr master-port dist-url dist-backend",
        "the processes are those of torchrun, or of a cluster's job: "
        "`python -m slurm submit --nodes N --gpus-per-node N --time HH:MM:SS`",
    ),
    (
        "num-classes nb-classes n-classes classes",
        "a net has one output per class of its training set; --model.outputs gives it more",
    ),
    ("evaluate eval e test validate eval-only test-only only-test", "type `python -m dist_train evaluate RUN`"),
    (
        "label-smoothing smoothing mixup cutmix random-erase auto-augment autoaugment aa color-jitter ema model-ema "
        "clip-grad clip-grad-norm max-grad-norm gradient-clip-val nesterov drop-path",
        "there is nothing like it, the recipe is that of the paper (docs/paper.md)",
    ),
)
GPUS = (
    "gpus gpu gpu-ids num-gpus ngpus n-gpus n-gpu devices num-devices nproc nproc-per-node num-processes multi-gpu "
    "distributed ddp multiprocessing-distributed"
)

# Verbs of others, by program: {rest} is what follows them on the command line, {run} the same, or RUN.
INSTEAD_OF_VERBS = {
    TRAINER: (
        ("train fit run start main finetune", "training has none, type `python -m dist_train{rest}`"),
        ("resume continue restart", "a run resumes by itself: repeat the command that began it, with its --run.name"),
        ("eval test val valid validate validation score accuracy", "type `python -m dist_train evaluate{run}`"),
        ("prediction classify infer inference label", "type `python -m dist_train predict RUN IMAGE`"),
        ("save convert deploy onnx torchscript trace", "type `python -m dist_train export RUN FILE`"),
        ("page html web serve dashboard browser", "type `python -m dist_train report{run}`"),
        ("plot draw figure visualize visualise show kernels", "type `python -m dist_train figures{run}`"),
        (
            "sweep tune search experiment",
            "type `python -m dist_train experiments`, or `python -m slurm submit --array`",
        ),
        ("benchmark profile throughput timing", "type `python -m dist_train speed{rest}`"),
        ("doctor check diagnose gpu gpu_report", "type `python -m dist_train gpu-report`"),
        ("pack index verify preview bench", "type `python -m pipelines {verb}{rest}`"),
        ("submit status logs cancel requeue", "type `python -m slurm {verb}{rest}`"),
        ("list ls ps", "type `python -m dist_train runs{rest}`"),
    ),
    "python -m pipelines": (
        (
            "make create convert build shard prepare write imagefolder",
            "type `python -m pipelines pack imagefolder SRC DST`",
        ),
        ("download fetch fashion-mnist", "type `python -m pipelines pack fashion-mnist DST`"),
        ("check validate validation test", "type `python -m pipelines verify{rest}`"),
        ("show view draw plot visualize visualise look", "type `python -m pipelines preview{rest}`"),
        ("benchmark throughput profile", "type `python -m pipelines bench{rest}`"),
        ("train fit run", "type `python -m dist_train`"),
        (
            "runs report evaluate predict figures export experiments speed gpu-report",
            "type `python -m dist_train {verb}{rest}`",
        ),
        ("submit status logs cancel requeue", "type `python -m slurm {verb}{rest}`"),
    ),
    "python -m slurm": (
        ("run train start launch sbatch srun queue-up", "type `python -m slurm submit{rest}`"),
        ("stop kill delete scancel remove rm", "type `python -m slurm cancel{run}`"),
        ("list ls ps queue squeue show top", "type `python -m slurm status`"),
        ("log tail follow output cat", "type `python -m slurm logs{run}`"),
        ("resume restart retry continue resubmit", "type `python -m slurm requeue{run}`"),
        ("pack", "type `python -m slurm submit pack{rest}`"),
        (
            "runs report evaluate predict figures export experiments speed gpu-report",
            "type `python -m dist_train {verb}{rest}`",
        ),
        ("index verify preview bench", "type `python -m pipelines {verb}{rest}`"),
    ),
}


def nearest(word: str, known: Collection[str]) -> str:
    """The known word that this one is a misspelling or the beginning of; empty if there is none."""
    return next(_near(word, known), "")


def instead_of_option(word: str, known: Collection[str], command: str, argv: Sequence[str] = ()) -> str:
    """What to type in place of an option, to follow a colon: the counterpart of another program's, the nearest known
    one, or where all are listed.

    Args:
        word: the option, `--lr`, or the key of a file, `optim.learning_rate`.
        known: the options of the command, with their dashes.
        command: `python -m dist_train evaluate`.
        argv: the words that follow it, among them the option.
    """
    plain, dashes = _plain(word), "" if word.startswith("-") else "--"
    known = [option for option in known if not any(other.startswith(f"{option}.") for other in known)]  # no groups
    for ours, theirs, note in OPTIONS:
        if plain in theirs.split() and (option := next((o for o in ours.split() if o in known), "")):
            return f"here it is {option.removeprefix(dashes)}" + (f" ({note})" if note and "." in option else "")
    if plain in GPUS.split() and command.split()[-1] in RANKS:
        return f"torchrun starts one process per GPU, type `{_torchrun(word, command, argv)}`"
    found = next((told for theirs, told in INSTEAD if plain in theirs.split()), "")
    if found and any("." in option for option in known):
        return found
    same = [option for option in known if plain in (_plain(option), _plain(option.replace(".", "-")))]
    if len(same) == 1 and "." in same[0] and "." not in word:
        return f"here it is {same[0].removeprefix(dashes)}"
    if (meant := nearest(word, known)) and meant.lstrip("-") != word.lstrip("-"):
        return f"did you mean {meant.removeprefix(dashes)}?"
    return f"see `{command} --help`"


def instead_of_verb(argv: Sequence[str], known: Collection[str], program: str) -> str:
    """What to type in place of a command line whose verb is not known, to follow a colon."""
    verb, *others = argv
    rest = f" {shlex.join(others)}" if others else ""
    for theirs, told in INSTEAD_OF_VERBS.get(program, ()):
        if verb.lower() in theirs.split():
            return told.format(verb=verb.lower(), run=rest or " RUN", rest=rest)
    if Path(verb).suffix in YAML and program == TRAINER:
        return f"type `{program} --config {shlex.quote(verb)}{rest}`"
    if meant := nearest(verb, known):
        return f"did you mean {meant}?"
    return f"the verbs are {', '.join(known)}"


def instead_of_argument(word: str, known: Collection[str]) -> str:
    """What to type in place of an argument that is one too many; empty if nothing is known of it."""
    return f"did you mean --config {word}?" if Path(word).suffix in YAML and "--config" in known else ""


def _near(word: str, known: Collection[str]) -> Iterator[str]:
    """The known words that one may be a misspelling of. Of keys with a dot the last part decides."""
    group, plain = word.lstrip("-").rpartition(".")[0], _plain(word)
    if not plain:
        return
    inside = [name for name in known if group and name.lstrip("-").startswith(f"{group}.")]
    begun = [name for name in inside if _plain(name).startswith(plain)]
    if len(begun) == 1:
        yield begun[0]
    ratios = {name: (_ratio(plain, _plain(name)), _ratio(word, name)) for name in known}
    yield from sorted((name for name in known if ratios[name][0] >= NEAR), key=ratios.__getitem__, reverse=True)
    begun = [name for name in known if len(plain) >= BEGINNING and _plain(name).startswith(plain)]
    if len(begun) == 1:
        yield begun[0]


def _plain(word: str) -> str:
    """The last part of a key, as all programs might write it: `batch-size` of --batch_size and of train.batch_size."""
    return re.sub("[_ ]", "-", word.lstrip("-").rpartition(".")[2].lower())


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _torchrun(word: str, command: str, argv: Sequence[str]) -> str:
    """The command line with as many processes as an option asks for."""
    many, kept, words = "N", list[str](), iter(argv)
    for one in words:
        name, given, value = one.partition("=")
        if name != word:
            kept.append(one)
            continue
        if not given:
            value = next(words, "")
        if value.isdecimal():
            many = str(max(1, int(value)))  # 0 is the number of the first one
        elif re.fullmatch(r"\d+(,\d+)+", value):  # as CUDA_VISIBLE_DEVICES lists them
            many = str(value.count(",") + 1)
        elif value and not given and value not in ("-1", "auto", "all", "true", "True"):
            kept.append(value)
    return shlex.join(["torchrun", f"--nproc_per_node={many}", *command.split()[1:], *kept])
