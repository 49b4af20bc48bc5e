"""The registry of merges; a merge is imported when it is used.

``areas`` says what a merge works on: ``weights`` (state dicts and files, tensor by tensor), ``adapters`` (LoRA
factors), ``networks`` (runnable modules and unlabelled data).
"""

from neurocl.registry import Entry, Registry

WEIGHTS, ADAPTERS, NETWORKS = ("weights",), ("adapters",), ("networks",)


def _weights(name: str, target: str, summary: str) -> Entry:
    return Entry(name, f"neurocl.merging.{target}", summary, WEIGHTS)


def _adapters(name: str, function: str, summary: str, module: str = "adapters") -> Entry:
    return Entry(name, f"neurocl.merging.{module}:{function}", summary, ADAPTERS)


def _networks(name: str, target: str, summary: str) -> Entry:
    return Entry(name, f"neurocl.merging.{target}", summary, NETWORKS)


MERGES = Registry(
    "merges",
    [
        _weights("average", "average:average", "weighted mean of the models (model soup)"),
        _weights("task-arithmetic", "arithmetic:task_arithmetic", "base plus the task vectors; negate to unlearn"),
        _weights("ties", "ties:ties", "trim small changes, elect signs, average what agrees"),
        _weights("dare", "dare:dare", "drop random changes, scale up the rest, add"),
        _weights("dare-ties", "dare:dare_ties", "DARE, then TIES on the result"),
        _weights("breadcrumbs", "breadcrumbs:breadcrumbs", "drop the largest and the smallest changes, add"),
        _weights("magnitude-prune", "breadcrumbs:magnitude_prune", "keep the largest changes, add"),
        _weights("slerp", "slerp:slerp", "along the arc between two models"),
        _weights("model-stock", "model_stock:model_stock", "between base and mean, as far as the models agree"),
        _weights("consensus", "masks:consensus", "sum of task vectors where several tasks need it (TALL masks)"),
        _weights("emr", "masks:emr", "elected signs, largest magnitudes; masks per task apart"),
        _weights("fisher", "fisher:fisher_merging", "mean weighted by Fisher information"),
        _weights("regmean", "regmean:regmean", "least squares on the inputs of every layer"),
        _weights("iso-c", "iso:iso_c", "sum of task matrices with a flat spectrum"),
        _weights("iso-cts", "iso:iso_cts", "flat spectrum, common and task-specific directions"),
        _weights("tsv-m", "tsv:tsv_merge", "leading singular vectors of every task, decorrelated"),
        _weights("wudi", "wudi:wudi", "least interference with every task vector, without data"),
        _adapters("lora-svd", "lora_svd", "best adapter of a given rank for the sum of updates"),
        _adapters("lora-cat", "lora_cat", "exact sum of updates, ranks add up"),
        _adapters("lora-linear", "lora_linear", "sums of the factors, with cross terms (PEFT's linear)"),
        _adapters("lora-ties", "lora_ties", "TIES on the factors (PEFT's ties)"),
        _adapters("lora-dare", "lora_dare", "DARE on the factors (PEFT's dare)"),
        _adapters("lora-magnitude", "lora_magnitude", "pruned factors (PEFT's magnitude_prune)"),
        _adapters("core-space", "core_space_merge", "TSV-M, Iso or WUDI on small cores that stand for the updates"),
        _adapters("knots", "knots", "TIES or the like in the shared singular space of the updates", "knots"),
        _networks("regmean-pp", "regmean_plus:regmean_pp", "RegMean with inputs from the merged blocks before"),
        _networks("com", "com:chain_of_merges", "least squares layer by layer behind the merged prefix"),
        _networks("ada-merging", "adamerging:ada_merging", "coefficients learned on unlabelled test data"),
    ],
)
