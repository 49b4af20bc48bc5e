"""Merging fine-tuned models without retraining: in memory, streamed from files, and as closed forms on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neurocl.lazy import lazy_attributes

if TYPE_CHECKING:
    from neurocl.merging.adamerging import ada_merging
    from neurocl.merging.adapter_files import merge_adapter_folders
    from neurocl.merging.adapters import merge_adapters
    from neurocl.merging.catalog import MERGES
    from neurocl.merging.collector import collect
    from neurocl.merging.com import chain_of_merges
    from neurocl.merging.evaluation import Evaluator
    from neurocl.merging.files import merge_files, plan_merge
    from neurocl.merging.lora import LoraLayer
    from neurocl.merging.lorm import RunningTaskMerge, merge_a, merge_b
    from neurocl.merging.masks import CompressedExperts, compress
    from neurocl.merging.memory import merge
    from neurocl.merging.method import merge_method
    from neurocl.merging.parameters import ParameterRules
    from neurocl.merging.pool import TaskVectorPool, task_vector
    from neurocl.merging.recipe import Recipe, read_recipe
    from neurocl.merging.regmean_plus import regmean_pp
    from neurocl.merging.statistics import Statistics
    from neurocl.merging.suite import Suite, suite_config
    from neurocl.merging.training import train_suite

_HOMES = {
    "MERGES": "catalog",
    "CompressedExperts": "masks",
    "Evaluator": "evaluation",
    "LoraLayer": "lora",
    "ParameterRules": "parameters",
    "Recipe": "recipe",
    "RunningTaskMerge": "lorm",
    "Statistics": "statistics",
    "Suite": "suite",
    "TaskVectorPool": "pool",
    "ada_merging": "adamerging",
    "chain_of_merges": "com",
    "collect": "collector",
    "compress": "masks",
    "merge": "memory",
    "merge_a": "lorm",
    "merge_adapter_folders": "adapter_files",
    "merge_adapters": "adapters",
    "merge_b": "lorm",
    "merge_files": "files",
    "merge_method": "method",
    "plan_merge": "files",
    "read_recipe": "recipe",
    "regmean_pp": "regmean_plus",
    "suite_config": "suite",
    "task_vector": "pool",
    "train_suite": "training",
}

__all__ = [
    "MERGES",
    "CompressedExperts",
    "Evaluator",
    "LoraLayer",
    "ParameterRules",
    "Recipe",
    "RunningTaskMerge",
    "Statistics",
    "Suite",
    "TaskVectorPool",
    "ada_merging",
    "chain_of_merges",
    "collect",
    "compress",
    "merge",
    "merge_a",
    "merge_adapter_folders",
    "merge_adapters",
    "merge_b",
    "merge_files",
    "merge_method",
    "plan_merge",
    "read_recipe",
    "regmean_pp",
    "suite_config",
    "task_vector",
    "train_suite",
]

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
