"""The registries of federated methods and of the problems they are run on; a name costs nothing until it is used."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from neurocl.errors import NeuroclError, UserError
from neurocl.registry import Entry, Registry

if TYPE_CHECKING:
    from neurocl.federated.config import FederatedConfig
    from neurocl.federated.method import FederatedMethod
    from neurocl.federated.network import Classifier
    from neurocl.federated.problem import Problem, Source

FEDERATED = Registry(
    "aggregators",
    [
        Entry("fedavg", "neurocl.federated.fedavg:FedAvg", "average the clients' weights", ("federated",)),
        Entry("lora", "neurocl.federated.lora:Lora", "average both factors of LoRA separately", ("federated",)),
        Entry("ffa-lora", "neurocl.federated.lora:FfaLora", "LoRA with A frozen and shared", ("federated",)),
        Entry("lorm", "neurocl.federated.lorm:Lorm", "closed-form merging of LoRA factors", ("federated",)),
        Entry("livar", "neurocl.federated.livar:Livar", "layer importance and variance weights", ("federated",)),
        Entry("fedcof", "neurocl.federated.fedcof:FedCof", "covariances out of class means", ("federated",)),
        Entry("fed3r", "neurocl.federated.fed3r:Fed3r", "ridge regression on a frozen backbone", ("federated",)),
        Entry("fedncm", "neurocl.federated.fedncm:FedNcm", "nearest class mean of a frozen backbone", ("federated",)),
        Entry("ccvr", "neurocl.federated.ccvr:Ccvr", "head re-trained on draws of the task", ("federated",)),
        Entry("l2p", "neurocl.federated.l2p:L2p", "prompts out of a shared pool", ("federated",)),
        Entry("dualprompt", "neurocl.federated.dualprompt:DualPrompt", "shared and tasks' prompts", ("federated",)),
        Entry("coda-prompt", "neurocl.federated.coda_prompt:CodaPrompt", "prompts of components", ("federated",)),
        Entry("pilora", "neurocl.federated.pilora:PiLora", "orthogonal LoRAs and prototypes", ("federated",)),
        Entry("hgp", "neurocl.federated.hgp:Hgp", "prompts, and a head re-trained on all classes", ("federated",)),
        Entry("prompt", "neurocl.federated.hgp:Prompt", "average prompts and head, frozen backbone", ("federated",)),
        Entry("fedproto", "neurocl.federated.fedproto:FedProto", "pull class means to prototypes", ("federated",)),
        Entry("dolfin", "neurocl.federated.dolfin:Dolfin", "adapters that avoid earlier tasks", ("federated",)),
        Entry("fedprox", "neurocl.federated.fedprox:FedProx", "pull clients to the server's weights", ("federated",)),
        Entry("scaffold", "neurocl.federated.scaffold:Scaffold", "control variates for plain SGD", ("federated",)),
        Entry("fisheravg", "neurocl.federated.fisheravg:FisherAvg", "average by Fisher information", ("federated",)),
        Entry("regmean", "neurocl.federated.fed_regmean:FedRegMean", "match layers' responses", ("federated",)),
        Entry("ties", "neurocl.federated.fed_ties:FedTies", "trim changes, elect signs, average", ("federated",)),
        Entry("fedsum", "neurocl.federated.fedsum:FedSum", "add up the clients' changes", ("federated",)),
        Entry("tangent", "neurocl.federated.tangent:Tangent", "average first-order displacements", ("federated",)),
        Entry("ewc", "neurocl.federated.ewc:Ewc", "hold weights that earlier tasks depend on", ("federated",)),
        Entry("lwf", "neurocl.federated.lwf:Lwf", "keep the last task's scores of old classes", ("federated",)),
        Entry("derpp", "neurocl.federated.derpp:Derpp", "rehearse samples that clients keep", ("federated",)),
        Entry("target", "neurocl.federated.target:Target", "rehearse samples made by the server", ("federated",)),
        Entry("local", "neurocl.federated.local:Local", "every client alone: a lower bound", ("federated",)),
        Entry("joint", "neurocl.federated.joint:Joint", "all samples in one place: an upper bound", ("federated",)),
        Entry("tangent-ridge", "neurocl.federated.tangent_ridge:TangentRidge", "ridge on gradients", ("federated",)),
        Entry("median", "neurocl.federated.robust:Median", "median of every weight", ("federated",)),
        Entry("trimmed-mean", "neurocl.federated.robust:TrimmedMean", "mean without the extremes", ("federated",)),
        Entry("krum", "neurocl.federated.robust:Krum", "the reply nearest to its neighbours", ("federated",)),
    ],
    word="method",
)

PROBLEMS = Registry(
    "federated problems",
    [
        Entry("digits", "neurocl.federated.digits:digits", "scikit-learn's digits, embedded", ("federated",)),
        *(
            Entry(name, "neurocl.federated.pictures:pictures", f"{told}, behind a frozen encoder", ("federated",))
            for name, told in (
                ("cifar10", "CIFAR-10, 300 pictures a class"),
                ("eurosat", "EuroSAT, 320 satellite pictures a class"),
                ("tiny-imagenet-100", "a hundred classes of Tiny-ImageNet, 100 pictures a class"),
            )
        ),
    ],
    word="data set",
)


def problem_for(config: FederatedConfig, source: Source | None = None) -> Problem:
    """The problem of a configuration.

    Args:
        config: of the run.
        source: in the place of the one that the configuration names.

    Raises:
        UserError: no such data set, method or device, data that are not there, or tasks or a partition that do not fit.
    """
    from neurocl.devices import resolve_device
    from neurocl.federated.problem import Problem

    method: type[FederatedMethod] = FEDERATED.load(config.method)
    config = method.arranged(config).model_copy(update={"device": str(resolve_device(config.device))})
    return Problem(config, source or _source(config))


def _source(config: FederatedConfig) -> Source:
    from neurocl.federated.problem import Source

    if ":" not in config.dataset:
        found: Source = PROBLEMS.load(config.dataset)(config)
        return found
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a file beside the user, as Python itself would find it
    with told_in_one_line(config.dataset):
        made = Entry(config.dataset, config.dataset, "", source="your own").load()(config)
    if not isinstance(made, Source):
        raise UserError(f"{config.dataset} must return a neurocl.federated.Source, not {type(made).__name__}")

    def build() -> Classifier:
        with told_in_one_line(config.dataset):
            return made.build()

    return replace(made, build=build)


@contextmanager
def told_in_one_line(name: str) -> Iterator[None]:
    """An exception of a user's own code as one line that says where it was raised; ``--debug`` shows all of it.

    Raises:
        UserError: for any exception but our own.
    """
    try:
        yield
    except NeuroclError:
        raise
    except Exception as error:
        # The last frame in a file of the user's; what it called into is of less use.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if not installed(frame.filename)]
        where = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
        said = " ".join(str(error).split())
        raise UserError(f"{name} raised {type(error).__name__}{where}: {said} (--debug shows the traceback)") from error


def installed(file: str) -> bool:
    """Whether a file belongs to neurocl, to Python or to an installed package."""
    ours = Path(__file__).parents[1]
    return (
        file.startswith("<")
        or "site-packages" in Path(file).parts
        or Path(file).is_relative_to(ours)
        or Path(file).is_relative_to(Path(os.__file__).parent)
    )


def method_for(problem: Problem) -> FederatedMethod:
    """The method of a problem's configuration, with its options.

    Raises:
        UserError: no such method, an unknown or wrong option, or one that has no privacy or secure sums.
    """
    from neurocl.config import validate

    config = problem.config
    kind: type[FederatedMethod] = FEDERATED.load(config.method)
    options = validate(kind.Config, config.options, source=f"options of {config.method}")
    method = kind(problem, options)
    if config.secure_sum is not None:
        if config.privacy is not None:
            raise UserError("privacy and secure_sum cannot be combined: no server could bound what clients change")
        from neurocl.federated.secure_sum import SecureSum

        return SecureSum(method, config.secure_sum)
    if config.privacy is not None:
        from neurocl.federated.privacy import PrivateMethod

        return PrivateMethod(method, config.privacy)
    return method
