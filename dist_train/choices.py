"""Nets, optimizers and learning-rate schedules by name, for `model.name`, `optim.name` and `schedule.name`.

An entry says where a callable is; how it is called is told in docs/architecture.md, "To add". `module:name` in place of
a name needs no entry. Imports no torch.
"""

from __future__ import annotations

from pipelines import resolve
from pipelines.words import nearest

TORCHVISION = "torchvision:"  # prefix of the names of torchvision's nets

NETS = {
    "alexnet": "dist_train.models.alexnet:AlexNet",
    "alexnet_two_tower": "dist_train.models.two_tower:TwoTowers",
    "alexnet_one_tower": "dist_train.models.alexnet:one_tower",
    "four_layers": "dist_train.models.four_layers:FourLayers",
    "blog": "dist_train.models.blog:BlogAlexNet",
    "blog_two_tower": "dist_train.models.blog:BlogTwoTowers",
}
PAPER_NETS = ("alexnet", "alexnet_two_tower", "alexnet_one_tower")  # of the fields of ModelConfig, not model.options
OPTIMIZERS = {
    "sgd": "dist_train.optim:sgd",
    "adam": "dist_train.optim:adam",
}
SCHEDULES = {
    "plateau": "dist_train.schedules:Plateau",
    "milestones": "dist_train.schedules:Milestones",
    "cosine": "dist_train.schedules:Cosine",
    "blog": "dist_train.schedules:BlogRule",
}


def check(model: str, optim: str, schedule: str, *, imports: bool = False) -> None:
    """Raises UserError, with the nearest name, for one that no table has.

    Args:
        imports: also for a `module:name` that cannot be imported, as far as this shows without importing it.
    """
    if not model.startswith(TORCHVISION) and (imports or not resolve.is_code(model)):
        if model not in NETS and not resolve.is_code(model):
            raise resolve.NameProblem(unknown_net(model))
        resolve.check("model.name", model, NETS)
    for key, name, table in (("optim.name", optim, OPTIMIZERS), ("schedule.name", schedule, SCHEDULES)):
        if imports or not resolve.is_code(name):
            resolve.check(key, name, table)


def unknown_net(name: str) -> str:
    """Sentence on a name that is neither in the table nor one of torchvision's nets, with the nearest."""
    from torchvision import models  # only now: it takes seconds

    plain = name.removeprefix(TORCHVISION)
    names = {known: TORCHVISION + known for known in models.list_models(module=models)}
    if not name.startswith(TORCHVISION):
        names |= {known: known for known in NETS}
    meant = resolve.of_a_module(name) or names.get(nearest(plain, names))
    remedy = f"did you mean {meant!r}?" if meant else f"choose {', '.join(NETS)}, torchvision:<name>, or module:name"
    return f"model.name {name!r} is unknown: {remedy}"
