"""Jobs that must be refused, each with what the API server and what the command line say. Data for two tests."""

# ruff: noqa: E501 - a table: one case, one line

import copy
from dataclasses import dataclass, field
from typing import Any

ABSENT = object()

SMALLEST: dict[str, Any] = {
    "apiVersion": "qlora.dev/v1alpha1",
    "kind": "QLoRAJob",
    "metadata": {"name": "support-bot", "namespace": "default"},
    "spec": {
        "model": {"uri": "pvc://models/base"},
        "dataset": {"train": [{"uri": "pvc://data/train.jsonl"}]},
        "output": {"uri": "pvc://models/tuned"},
    },
}

A_SOURCE = {"uri": "pvc://data/eval.jsonl"}


def edited(edits: dict[str, Any]) -> dict[str, Any]:
    """The smallest job with `edits` applied: dotted path to new value, or to ABSENT."""
    job = copy.deepcopy(SMALLEST)
    for path, value in edits.items():
        *parents, last = path.split(".")
        node: Any = job
        for step in parents:
            node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
        if value is ABSENT:
            del node[last]
        else:
            node[last] = value
    return job


@dataclass(frozen=True)
class Bad:
    """A job made bad by `edits`: where it is wrong, and what the server and the command line say there.

    "unknown field" is strict decoding, `must be of type`, `should`, `Unsupported value` and the like are the schema; a
    sentence that both say is a rule in CEL.
    """

    name: str
    edits: dict[str, Any] = field(hash=False)
    where: str
    server: str
    command_line: str = ""

    def said_by_command_line(self) -> str:
        return self.command_line or self.server


# fmt: off
BAD = [
    Bad("no model", {"spec.model": ABSENT}, "spec.model", "Required value", "required, and not there"),
    Bad("no model address", {"spec.model": {}}, "spec.model.uri", "Required value", "required, and not there"),
    Bad("no data", {"spec.dataset.train": []}, "spec.dataset.train", "should have at least 1 items", "must have at least 1 items"),
    Bad("data as text", {"spec.dataset.train": "pvc://data/train.jsonl"}, "spec.dataset.train", "must be of type array", "must be a list"),
    Bad("no output", {"spec.output": ABSENT}, "spec.output", "Required value", "required, and not there"),
    Bad("address of an unknown scheme", {"spec.model.uri": "ftp://host/model"}, "spec.model.uri", "should match '^((hf|s3|oci)", "must be hf://owner/name"),
    Bad("address without a path", {"spec.model.uri": "pvc://models"}, "spec.model.uri", "should match '^((hf|s3|oci)", "must be hf://owner/name"),
    Bad("address that climbs", {"spec.output.uri": "pvc://models/../secrets"}, "spec.output.uri", "should match '^((hf|s3|oci)", "must be hf://owner/name"),
    Bad("address with an empty part", {"spec.output.uri": "pvc://models//tuned"}, "spec.output.uri", "should match '^((hf|s3|oci)", "must be hf://owner/name"),
    Bad("address with a space", {"spec.dataset.train.0.uri": "pvc://data/my file.jsonl"}, "spec.dataset.train[0].uri", "should match '^((hf|s3|oci)", "must be hf://owner/name"),
    Bad("claim that no claim can be called", {"spec.model.uri": "pvc://My:claim/base"}, "spec.model.uri", "should match '^((hf|s3|oci)", "must be hf://owner/name"),
    Bad("address too long", {"spec.model.uri": "pvc://models/" + "x" * 1024}, "spec.model.uri", "Too long: may not be more than 1024 bytes", "must have at most 1024 characters"),
    Bad("Secret for a model on a claim", {"spec.model.credentialsSecretRef": {"name": "s3"}}, "spec.model", "a claim needs no credentialsSecretRef: remove it, or name a store in uri"),
    Bad("Secret for data on a claim", {"spec.dataset.train.0.credentialsSecretRef": {"name": "s3"}}, "spec.dataset.train[0]", "a claim needs no credentialsSecretRef: remove it, or name a store in uri"),
    Bad("Secret for an output on a claim", {"spec.output.credentialsSecretRef": {"name": "s3"}}, "spec.output", "a claim needs no credentialsSecretRef: remove it, or name a store in uri"),
    Bad("revision of a model on a claim", {"spec.model.revision": "main"}, "spec.model", "only hf:// and oci:// have revisions: remove revision, or name such a place in uri"),
    Bad("revision of data in a bucket", {"spec.dataset.train.0.uri": "s3://data/a.jsonl", "spec.dataset.train.0.revision": "v1"}, "spec.dataset.train[0]", "only hf:// and oci:// have revisions: remove revision, or name such a place in uri"),
    Bad("unknown field", {"spec.lora.ranc": 8}, "spec.lora.ranc", "unknown field", "no such field; check the spelling and the indentation"),
    Bad("unknown field at the top", {"spec.learningRate": 0.0001}, "spec.learningRate", "unknown field", "no such field; check the spelling and the indentation"),
    Bad("field of another place", {"spec.rank": 8}, "spec.rank", "unknown field", "no such field; check the spelling and the indentation"),
    Bad("field in snake case", {"spec.training.learning_rate": 0.0001}, "spec.training.learning_rate", "unknown field", "no such field; check the spelling and the indentation"),
    Bad("unknown data format", {"spec.dataset.train.0.format": "parquet"}, "spec.dataset.train[0].format", 'Unsupported value: "parquet"', "must be one of"),
    Bad("weight 0", {"spec.dataset.train.0.weight": 0}, "spec.dataset.train[0].weight", "should be greater than 0", "must be greater than 0"),
    Bad("eval and evalFraction", {"spec.dataset.eval": A_SOURCE, "spec.dataset.evalFraction": 0.1}, "spec.dataset", "eval and evalFraction exclude each other: set one of them or none"),
    Bad("all data held out", {"spec.dataset.evalFraction": 1}, "spec.dataset.evalFraction", "should be less than 1", "must be less than 1"),
    Bad("maxLength of a few tokens", {"spec.dataset.maxLength": 4}, "spec.dataset.maxLength", "should be greater than or equal to 16", "must be greater than or equal to 16"),
    Bad("unknown loss", {"spec.dataset.loss": "user"}, "spec.dataset.loss", 'Unsupported value: "user"', "must be one of"),
    Bad("packing as text", {"spec.dataset.packing": "yes"}, "spec.dataset.packing", "must be of type boolean", "must be a valid boolean"),
    Bad("unknown method", {"spec.method": "dpo"}, "spec.method", 'Unsupported value: "dpo"', "must be one of"),
    Bad("auto in a number", {"spec.training.microBatchSize": "auto"}, "spec.training.microBatchSize", "must be of type integer", "must be a valid integer"),
    Bad("unknown 4-bit type", {"spec.quantization.type": "int4"}, "spec.quantization.type", 'Unsupported value: "int4"', "must be one of"),
    Bad("unknown compute type", {"spec.quantization.computeDtype": "fp16"}, "spec.quantization.computeDtype", 'Unsupported value: "fp16"', "must be one of"),
    Bad("rank 0", {"spec.lora.rank": 0}, "spec.lora.rank", "should be greater than or equal to 1", "must be greater than or equal to 1"),
    Bad("rank as text", {"spec.lora.rank": "16"}, "spec.lora.rank", "must be of type integer", "must be a valid integer"),
    Bad("rank with a fraction", {"spec.lora.rank": 16.5}, "spec.lora.rank", "must be of type int64", "must be a valid integer"),
    Bad("dropout 1", {"spec.lora.dropout": 1}, "spec.lora.dropout", "should be less than 1", "must be less than 1"),
    Bad("a target module twice", {"spec.lora.targetModules": ["q_proj", "q_proj"]}, "spec.lora.targetModules", 'Duplicate value: "q_proj"', "q_proj: listed twice"),
    Bad("no target module", {"spec.lora.targetModules": []}, "spec.lora.targetModules", "should have at least 1 items", "must have at least 1 items"),
    Bad("LoftQ without quantisation", {"spec.method": "lora", "spec.lora.init": "loftq"}, "spec", "lora.init loftq makes good the rounding of a quantised base: use it with method qlora"),
    Bad("LoftQ on another base", {"spec.lora.init": "loftq", "spec.output.mergeBase": "original"}, "spec", "lora.init loftq puts what quantisation takes away into the adapter: with output.mergeBase original it would be there twice"),
    Bad("PiSSA", {"spec.lora.init": "pissa"}, "spec.lora.init", 'Unsupported value: "pissa"', "must be one of 'default', 'gaussian' or 'loftq' (found 'pissa')"),
    Bad("epochs and maxSteps", {"spec.training.epochs": 1, "spec.training.maxSteps": 10}, "spec.training", "epochs and maxSteps exclude each other: set one of them or none"),
    Bad("no epochs", {"spec.training.epochs": 0}, "spec.training.epochs", "should be greater than 0", "must be greater than 0"),
    Bad("learning rate 0", {"spec.training.learningRate": 0}, "spec.training.learningRate", "should be greater than 0", "must be greater than 0"),
    Bad("learning rate of 2", {"spec.training.learningRate": 2}, "spec.training.learningRate", "should be less than or equal to 1", "must be less than or equal to 1"),
    Bad("learning rate as quoted text", {"spec.training.learningRate": "0.1"}, "spec.training.learningRate", "must be of type number", "must be a valid number"),
    Bad("learning rate rises at the end", {"spec.training.minLearningRate": 0.001}, "spec.training", "minLearningRate must not exceed learningRate"),
    Bad("unknown schedule", {"spec.training.schedule": "polynomial"}, "spec.training.schedule", 'Unsupported value: "polynomial"', "must be one of"),
    Bad("all warm-up", {"spec.training.warmupFraction": 1}, "spec.training.warmupFraction", "should be less than 1", "must be less than 1"),
    Bad("batch does not divide", {"spec.training.effectiveBatchSize": 32, "spec.training.microBatchSize": 5}, "spec.training", "effectiveBatchSize must be a multiple of microBatchSize"),
    Bad("unknown optimizer", {"spec.training.optimizer": "sgd"}, "spec.training.optimizer", 'Unsupported value: "sgd"', "must be one of"),
    Bad("negative seed", {"spec.training.seed": -1}, "spec.training.seed", "should be greater than or equal to 0", "must be greater than or equal to 0"),
    Bad("no metrics", {"spec.evaluation.metrics": []}, "spec.evaluation.metrics", "should have at least 1 items", "must have at least 1 items"),
    Bad("unknown metric", {"spec.evaluation.metrics": ["bleu"]}, "spec.evaluation.metrics[0]", 'Unsupported value: "bleu"', "must be one of"),
    Bad("gate without a bound", {"spec.evaluation": {"golden": A_SOURCE, "gates": [{"metric": "exactMatch"}]}}, "spec.evaluation.gates[0]", "set exactly one of min, max, maxDropFromBase"),
    Bad("gate with two bounds", {"spec.evaluation": {"golden": A_SOURCE, "gates": [{"metric": "exactMatch", "min": 0, "max": 1}]}}, "spec.evaluation.gates[0]", "set exactly one of min, max, maxDropFromBase"),
    Bad("gate without a golden set", {"spec.evaluation.gates": [{"metric": "exactMatch", "min": 0.5}]}, "spec", "a gate on a score needs evaluation.golden"),
    Bad("gate on a canary that is not there", {"spec.evaluation.gates": [{"metric": "canary.exactMatch", "min": 0.5}]}, "spec.evaluation", "a gate on canary. needs evaluation.canary"),
    Bad("gate on a judge that is not there", {"spec.evaluation": {"golden": A_SOURCE, "gates": [{"metric": "judge", "min": 3}]}}, "spec.evaluation", "a gate on judge needs evaluation.judge"),
    Bad("gate on a loss of nothing", {"spec.evaluation.gates": [{"metric": "evalLoss", "max": 2}]}, "spec", "a gate on evalLoss needs dataset.eval or dataset.evalFraction"),
    Bad("format without a schema", {"spec.evaluation": {"golden": A_SOURCE, "metrics": ["jsonSchema"]}}, "spec.evaluation", "the metric jsonSchema needs evaluation.answerSchema"),
    Bad("gate on a format without a schema", {"spec.evaluation": {"golden": A_SOURCE, "gates": [{"metric": "jsonSchema", "min": 1}]}}, "spec.evaluation", "the metric jsonSchema needs evaluation.answerSchema"),
    Bad("judge with nothing to judge", {"spec.evaluation.judge": {"endpoint": "http://judge/v1", "model": "m"}}, "spec.evaluation", "a judge needs evaluation.golden: it scores the answers to that"),
    Bad("best by answers to nothing", {"spec.training.bestMetric": "rougeL"}, "spec", "training.bestMetric: all but evalLoss need evaluation.golden"),
    Bad("stops before it begins", {"spec.training.earlyStoppingEpochs": -1}, "spec.training.earlyStoppingEpochs", "should be greater than or equal to 0", "must be greater than or equal to 0"),
    Bad("judge without an address", {"spec.evaluation.judge": {"endpoint": "judge.svc", "model": "m"}}, "spec.evaluation.judge.endpoint", "should match '^https?://[^\\s/]", "must be https://host/path"),
    Bad("unknown accelerator", {"spec.hardware.accelerator": "tpu"}, "spec.hardware.accelerator", 'Unsupported value: "tpu"', "must be one of"),
    Bad("more GPUs than allowed", {"spec.hardware.gpus": 16}, "spec.hardware", "gpus must not exceed maxGPUs"),
    Bad("GPUs do not divide over nodes", {"spec.hardware.gpus": 8, "spec.hardware.nodes": 3}, "spec.hardware", "gpus must be a multiple of nodes"),
    Bad("GPUs on the CPU", {"spec.hardware.accelerator": "cpu", "spec.hardware.gpus": 1}, "spec.hardware", "with accelerator cpu, leave out gpus and gpuProducts"),
    Bad("products on the CPU", {"spec.hardware.accelerator": "cpu", "spec.hardware.gpuProducts": ["L40S"]}, "spec.hardware", "with accelerator cpu, leave out gpus and gpuProducts"),
    Bad("headroom of everything", {"spec.hardware.headroomPercent": 100}, "spec.hardware.headroomPercent", "should be less than or equal to 90", "must be less than or equal to 90"),
    Bad("product that is no label value", {"spec.hardware.gpuProducts": ["NVIDIA H100"]}, "spec.hardware.gpuProducts[0]", "should match '^([A-Za-z0-9]([-", "must be the value of a label"),
    Bad("label of the operator's", {"spec.podTemplate.labels": {"qlora.dev/job": "other"}}, "spec.podTemplate", "labels under qlora.dev/ belong to the operator"),
    Bad("annotation of the operator's", {"spec.podTemplate.annotations": {"qlora.dev/order": "x"}}, "spec.podTemplate", "annotations under qlora.dev/ belong to the operator"),
    Bad("label that is no text", {"spec.podTemplate.labels": {"team": 7}}, "spec.podTemplate.labels.team", "must be of type string", "must be text; put it in quotes"),
    Bad("toleration without key", {"spec.podTemplate.tolerations": [{"value": "x"}]}, "spec.podTemplate.tolerations[0]", "a toleration without a key needs operator Exists"),
    Bad("toleration with a useless value", {"spec.podTemplate.tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]}, "spec.podTemplate.tolerations[0]", "a toleration with operator Exists has no value"),
    Bad("image with a space", {"spec.podTemplate.image": "registry/trainer latest"}, "spec.podTemplate.image", "should match '^\\S+$'", "must be text without spaces"),
    Bad("too many tolerations", {"spec.podTemplate.tolerations": [{"key": "a"}] * 33}, "spec.podTemplate.tolerations", "Too many: 33: must have at most 32 items", "must have at most 32 items"),
    Bad("queue without a name", {"spec.queue": {}}, "spec.queue.name", "Required value", "required, and not there"),
    Bad("claim and class", {"spec.storage.claimName": "work", "spec.storage.className": "fast"}, "spec.storage", "claimName and className exclude each other: set one of them or none"),
    Bad("size of an existing claim", {"spec.storage.claimName": "work", "spec.storage.size": "10Gi"}, "spec.storage", "claimName names an existing volume: leave out size"),
    Bad("size that is no quantity", {"spec.storage.size": "10 GB"}, "spec.storage.size", "should match '^[1-9][0-9]{0,14", "must be a quantity such as 200Gi"),
    Bad("size as a number", {"spec.storage.size": 100}, "spec.storage.size", "must be of type string", "must be text; put it in quotes"),
    Bad("claim that is no name", {"spec.storage.claimName": "Work_Volume"}, "spec.storage.claimName", "should match '^[a-z0-9]([-.a-z", "must be the name of a Kubernetes object"),
    Bad("unknown retention", {"spec.storage.retain": "Forever"}, "spec.storage.retain", 'Unsupported value: "Forever"', "must be one of"),
    Bad("duration without a unit", {"spec.checkpoint.every": "15"}, "spec.checkpoint.every", "should match '^([1-9][0-9]{0,5", "must be a duration such as 15m, 1h30m or 7d"),
    Bad("duration as a number", {"spec.checkpoint.every": 15}, "spec.checkpoint.every", "must be of type string", "must be text; put it in quotes"),
    Bad("duration of nothing", {"spec.checkpoint.every": "0m"}, "spec.checkpoint.every", "should match '^([1-9][0-9]{0,5", "must be a duration such as 15m, 1h30m or 7d"),
    Bad("no checkpoint kept", {"spec.checkpoint.keep": 0}, "spec.checkpoint.keep", "should be greater than or equal to 1", "must be greater than or equal to 1"),
    Bad("unknown artifact", {"spec.output.formats": ["onnx"]}, "spec.output.formats[0]", 'Unsupported value: "onnx"', "must be one of"),
    Bad("an artifact twice", {"spec.output.formats": ["adapter", "adapter"]}, "spec.output.formats", 'Duplicate value: "adapter"', "adapter: listed twice"),
    Bad("no artifact", {"spec.output.formats": []}, "spec.output.formats", "should have at least 1 items", "must have at least 1 items"),
    Bad("restarts without end", {"spec.retry.maxRestarts": 1000}, "spec.retry.maxRestarts", "should be less than or equal to 100", "must be less than or equal to 100"),
    Bad("unknown answer to out-of-memory", {"spec.retry.onOutOfMemory": "ignore"}, "spec.retry.onOutOfMemory", 'Unsupported value: "ignore"', "must be one of"),
    Bad("budget of nothing", {"spec.budget.maxGPUHours": 0}, "spec.budget.maxGPUHours", "should be greater than 0", "must be greater than 0"),
    Bad("time to live below 0", {"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished", "should be greater than or equal to 0", "must be greater than or equal to 0"),
    Bad("suspend as a number", {"spec.suspend": 1}, "spec.suspend", "must be of type boolean", "must be a valid boolean"),
    Bad("name with a dot", {"metadata.name": "support.bot"}, "metadata.name", "must be a DNS label that begins with a letter", "must be a DNS label"),
    Bad("name that begins with a digit", {"metadata.name": "8b-bot"}, "metadata.name", "must be a DNS label that begins with a letter", "must be a DNS label"),
    Bad("name too long", {"metadata.name": "a" * 41}, "metadata.name", "Too long: may not be more than 40 bytes", "must have at most 40 characters"),
]
# fmt: on
